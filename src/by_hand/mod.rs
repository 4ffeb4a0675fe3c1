//! What is different if a person starts the agent: which settings hold, which user asks, and what is said beside the answer.
//! Knows nothing of what an answer means.

pub mod explain;
pub mod settings;
pub mod sockets;

use crate::NAME;
use crate::journal::tell_operator;
use crate::options::{Options, Stop};
use crate::sandbox::user;
use rustix::net::{AddressFamily, getsockname};
use rustix::process::geteuid;
use std::ffi::OsString;
use std::io;

/// Reads the command line as [`settings::settled`] does, and becomes the user of the units.
///
/// # Errors
///
/// See [`settings::settled`].
pub fn parse(arguments: Vec<OsString>) -> Result<Options, Stop> {
    // while it may still be root, who is told more
    let options = settings::settled(arguments)?;
    if options.reopen.is_some() {
        // no check, and only root may do that
        return Ok(options);
    }
    // HAProxy's checks see no more than this user does, whatever else is asked
    let unlike = options.user.is_none().then(|| user::become_user(NAME).err()).flatten();
    if let Some(error) = unlike.as_ref().filter(|_| options.own.is_none() && !options.explain) {
        tell_operator(&format!("the units would answer fail to HAProxy: --user {NAME}: {error}"));
    }
    let why = unlike.map_or(String::new(), |error| format!("; not here: {error}"));
    let uid = geteuid().as_raw();
    if options.explain {
        tell_operator(&format!("user: uid {uid}; the units run each check as {NAME}{why}"));
    }
    // of EXEC: and SYSTEM: of socat, and of ncat
    if getsockname(io::stdin()).is_ok_and(|own| own.address_family() == AddressFamily::UNIX) {
        tell_operator(
            "standard input is a Unix socket and not HAProxy's connection, so this is a check by hand; with socat, add nofork after EXEC:...",
        );
    }
    Ok(options)
}
