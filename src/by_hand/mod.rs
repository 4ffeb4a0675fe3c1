//! What is different if a person starts the agent: which settings hold, which user asks, and what is said beside the answer.
//! Knows nothing of what an answer means.

pub mod explain;
pub mod settings;
pub mod sockets;

use crate::NAME;
use crate::journal::tell_operator;
use crate::options::Options;
use rustix::net::{AddressFamily, getsockname};
use rustix::process::Uid;
use std::io;

/// Tells a person as which user this process asks, and why that is `unlike` the units, and that it is a check by hand where
/// this may not have been meant.
pub fn explain_start(options: &Options, uid: Uid, unlike: Option<&String>) {
    if let Some(error) = unlike.filter(|_| options.own.is_none() && !options.explain) {
        tell_operator(&format!("the units would answer fail to HAProxy: --user {NAME}: {error}"));
    }
    if options.explain {
        let why = unlike.map_or(String::new(), |error| format!("; not here: {error}"));
        tell_operator(&format!("user: uid {uid}; the units run each check as {NAME}{why}"));
    }
    // of EXEC: and SYSTEM: of socat, and of ncat
    if getsockname(io::stdin()).is_ok_and(|own| own.address_family() == AddressFamily::UNIX) {
        tell_operator(
            "standard input is a Unix socket and not HAProxy's connection, so this is a check by hand; with socat, add nofork after EXEC:...",
        );
    }
}
