//! HAProxy: its connection, its question, and the reply to it. Knows nothing of what an answer means.

pub mod connection;
pub mod question;
pub mod reply;
