//! A zero-resident HAProxy agent for Patroni.
//!
//! One HAProxy agent check starts one process, which goes once down this pipe and exits:
//! connection, question, ask, decide, say. With a listening socket each check is a thread instead. The library exists so that tests can call the steps.

// fd 1 and 2 may be HAProxy: only `say` writes there, and never by a macro that may panic.
#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

/// What HAProxy is told: the agent reply line, written once.
pub mod say;

/// How this process was started, and so where the question comes from and the reply goes.
pub mod connection;

/// Many checks a second by one process, for as long as somebody asks.
pub mod serve;

/// The system log.
pub mod syslog;

/// One question to Patroni for all who ask the same at once.
pub mod share;

/// The command line.
pub mod options;

/// The question: which of Patroni's health checks is asked.
pub mod check;

/// A small plain file, read whole.
pub mod file;

/// The user that this process becomes, if root started it.
pub mod user;

/// The operator's hand: a file that takes this node out of every pool.
pub mod hold;

/// What the last checks left for the next.
pub mod memory;

/// The addresses of a host, without any name service.
pub mod hosts;

/// One GET on Patroni's REST API.
pub mod ask;

/// What https to Patroni needs: certificates from files, and errors in words.
pub mod tls;

/// What this process can no longer do once it talks to somebody.
pub mod sandbox;

/// What Patroni's answer means for HAProxy.
pub mod decide;
