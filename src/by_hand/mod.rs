//! A check by hand: whose settings count, and what it tells besides the reply. Knows nothing of HAProxy.

pub mod explain;
pub mod settings;
pub mod sockets;
