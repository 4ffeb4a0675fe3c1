//! A listener: one process with listening sockets (`Accept=no`) and a thread for each check. Knows nothing of what an
//! answer means.

pub mod questions;
pub mod serve;
pub mod share;
