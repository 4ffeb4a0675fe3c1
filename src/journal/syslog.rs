//! The system log. In goes a line, and the check never waits. If processes logged to stderr, systemd's own way, a slow
//! journald would delay each check. Hand-written, since no crate sends with `MSG_DONTWAIT`. Knows nothing of Patroni and
//! HAProxy.

use rustix::io::Errno;
use rustix::net::{self, SendFlags};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The socket of syslog(3).
const SOCKET: &str = "/dev/log";
const DAEMON: u8 = 3 << 3;

/// The socket, and the process ID, which the sandbox hides.
static LOG: OnceLock<(UnixDatagram, u32)> = OnceLock::new();

/// Whether the system log has closed its end of the socket.
static GONE: AtomicBool = AtomicBool::new(false);

/// Opens the system log. If there is none, lines go to stderr.
pub fn open() {
    let connect = |log: UnixDatagram| log.connect(SOCKET).map(|()| (log, process::id()));
    let _ = UnixDatagram::unbound().and_then(connect).map(|log| LOG.set(log));
}

/// The socket's descriptor, for the sandbox.
pub fn descriptor() -> Option<RawFd> {
    LOG.get().map(|(log, _)| log.as_raw_fd())
}

/// Sends one line with a priority of syslog(3). Returns whether the system log was opened.
pub fn send(priority: u8, name: &str, line: &str) -> bool {
    let Some((log, process)) = LOG.get() else { return false };
    let line = format!("<{}>{name}[{process}]: {line}", DAEMON | priority);
    let sent = net::send(log, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    if matches!(sent, Err(Errno::CONNREFUSED | Errno::NOTCONN)) {
        GONE.store(true, Ordering::Relaxed);
    }
    true
}

/// Whether the system log was restarted and a line was lost. The sandbox lets only the next process open the new socket.
pub fn is_gone() -> bool {
    GONE.load(Ordering::Relaxed)
}
