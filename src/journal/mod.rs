//! Log lines, which go to the system log, or else to stderr as sd-daemon(3) describes, and never to a peer. Knows nothing of
//! Patroni.

pub mod news;
pub mod syslog;

use crate::NAME;
use crate::haproxy::reply::to_printable;
use rustix::net::{AddressFamily, getpeername};
use std::io::{self, Write};
use std::time::Duration;

/// The priority of syslog(3) if a socket is closed.
pub const ERROR: u8 = 3;
/// The priority if an operator may have to act.
pub const WARNING: u8 = 4;
/// The priority if trouble is over.
pub const NOTICE: u8 = 5;
/// Trouble that lasts is logged again after this time.
pub const REPEAT: Duration = Duration::from_secs(60);
/// The longest line in characters. A reply's reason is cut sooner.
const LINE_LIMIT: usize = 1000;

/// Writes one line to the journal.
pub fn log(priority: u8, text: &str) {
    if !syslog::send(priority, NAME, &to_printable(text, LINE_LIMIT)) {
        write_to_stderr(&format!("<{priority}>{text}"));
    }
}

/// Writes one line for whoever started this program.
pub fn tell_operator(text: &str) {
    if !syslog::send(WARNING, NAME, &to_printable(text, LINE_LIMIT)) {
        write_to_stderr(&format!("{NAME}: {text}"));
    }
}

/// Writes one line, unless stderr is the connection: xinetd makes fd 2 the connection as well.
fn write_to_stderr(text: &str) {
    let stderr = io::stderr();
    let family = getpeername(&stderr).ok().flatten().map(|peer| peer.address_family());
    if !matches!(family, Some(AddressFamily::INET | AddressFamily::INET6)) {
        let line = format!("{}\n", to_printable(text, LINE_LIMIT));
        let _ = stderr.lock().write_all(line.as_bytes());
    }
}
