//! A check by hand: which settings count, and what it says besides the reply. Knows nothing of HAProxy.

pub mod explain;
pub mod settings;
pub mod sockets;
