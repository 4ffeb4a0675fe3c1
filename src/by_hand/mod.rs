//! What is different if a person starts the agent: which settings hold, and what is said beside the answer. Knows nothing of
//! HAProxy.

pub mod explain;
pub mod settings;
pub mod sockets;
