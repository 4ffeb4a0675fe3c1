//! A zero-resident HAProxy agent for Patroni.
//!
//! One HAProxy agent check starts one process, which goes once down this pipe and exits: open, confine, read the question,
//! ask, conclude. With a listening socket each check is a thread instead. The library exists so
//! that tests can call the steps.

// fd 1 and 2 may be HAProxy: only `connection` writes there, and never by a macro that may panic.
#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

/// This program's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");

/// The pipe: one agent check, and many.
pub mod agent;

/// The kinds of process, and how each asks Patroni.
pub mod process;

/// The questions of a listener to Patroni.
pub mod questions;

/// The command line.
pub mod options;

/// What is different if a human starts it.
pub mod by_hand;

/// The user that this process becomes, if root started it.
pub mod user;

/// How this process was started; the question comes and the reply goes through it.
pub mod connection;

/// Patroni's health checks.
pub mod check;

/// What HAProxy asks.
pub mod question;

/// The operator's hand: a file that takes this node out of every pool.
pub mod hold;

/// The note that Patroni is about to stop PostgreSQL.
pub mod before_stop;

/// What the last checks left for the next.
pub mod memory;

/// What this process can no longer do once it talks to somebody.
pub mod sandbox;

/// The local Patroni and the one question to it.
pub mod patroni;

/// What Patroni's answer means for HAProxy.
pub mod decide;

/// HAProxy's words and the reply line.
pub mod reply;

/// Many checks a second by one process, for as long as somebody asks.
pub mod serve;

/// One question to Patroni for all who ask the same at once.
pub mod share;

/// The system log.
pub mod syslog;

/// Where somebody listens on this machine.
pub mod sockets;

/// A port that systemd has closed.
pub mod reopen;

/// A small plain file, read whole.
pub mod file;

/// Another program, for the machine that HAProxy runs on.
pub mod pools;
