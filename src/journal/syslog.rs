//! The system log. In goes a line, and nothing ever waits: systemd's own way, a stream of each process's stderr, keeps every
//! check waiting once journald lags. Hand-written, since no crate sends with `MSG_DONTWAIT`. Knows nothing of Patroni and
//! HAProxy.

use rustix::io::Errno;
use rustix::net::{self, SendFlags};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// syslog(3)
const SOCKET: &str = "/dev/log";
const DAEMON: u8 = 3 << 3;

/// With the number of this process, which the sandbox no longer tells.
static LOG: OnceLock<(UnixDatagram, u32)> = OnceLock::new();

/// Whether nobody reads any more what this process has opened.
static GONE: AtomicBool = AtomicBool::new(false);

/// Opens it for this process. Where there is none, what is said goes to stderr as before.
pub fn open() {
    if let Ok(log) = UnixDatagram::unbound() {
        if log.connect(SOCKET).is_ok() {
            let _ = LOG.set((log, process::id()));
        }
    }
}

/// The descriptor, for the sandbox.
pub fn descriptor() -> Option<RawFd> {
    LOG.get().map(|(log, _)| log.as_raw_fd())
}

/// Sends one line of a priority as in syslog(3), 4 for a warning; whether there was a system log to take it.
pub fn send(priority: u8, name: &str, line: &str) -> bool {
    let Some((log, process)) = LOG.get() else { return false };
    let line = format!("<{}>{name}[{process}]: {line}", DAEMON | priority);
    let sent = net::send(log, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    if matches!(sent, Err(Errno::CONNREFUSED | Errno::NOTCONN)) {
        GONE.store(true, Ordering::Relaxed);
    }
    true
}

/// Whether a line was lost because somebody has made the system log anew. The sandbox keeps this process from opening that
/// one; the next process does.
pub fn is_gone() -> bool {
    GONE.load(Ordering::Relaxed)
}
