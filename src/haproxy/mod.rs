//! HAProxy's side: its connection, what it asks, and the line that it is told. Knows nothing of what an answer means.

pub mod connection;
pub mod question;
pub mod reply;
