//! A zero-resident HAProxy agent for Patroni. Each agent check starts one process, which takes five steps and exits: open,
//! confine, read the question, ask, conclude. A listener runs each check in a thread instead. The library exists so that
//! tests and the other programs can call its parts.

// fd 1 and 2 may be HAProxy's connection: only `connection` and `journal` write there, and never by a macro that may panic.
#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

/// This program's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");
/// Its version, which names the commit unless it is a release: see `build.rs`.
pub const VERSION: &str = env!("VERSION");

pub mod agent;
pub mod by_hand;
pub mod clock;
pub mod conclude;
pub mod decide;
pub mod file;
pub mod haproxy;
pub mod journal;
pub mod listen;
pub mod options;
pub mod patroni;
pub mod pools;
pub mod process;
pub mod reopen;
pub mod run;
pub mod sandbox;
