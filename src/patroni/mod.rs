//! The local Patroni: its health checks, its address, the question to it and its answer. Knows nothing of HAProxy.

pub mod answer;
pub mod ask;
pub mod check;
pub(crate) mod hosts;
pub mod http;
pub mod location;
pub mod ports;
pub mod tls;
