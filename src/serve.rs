//! Many checks a second: a listening socket (`Accept=no`), a thread for each check, and an end as soon as
//! nobody asks any more. Knows nothing of what a check is.

use crate::connection::Connection;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use sd_notify::NotifyState;
use signal_hook::consts::SIGTERM;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Checks at once, in all and for each address that asks; one above is closed without an answer, as
/// systemd does it. While Patroni hangs, each pool of a HAProxy takes a place for `--timeout`, and the pools
/// above the limit would keep what they heard last. `TasksMax=` and `LimitNOFILE=` of the unit fit these.
const AT_ONCE: usize = 512;
const AT_ONCE_PER_SOURCE: usize = 256;
/// Above the longest `--timeout`: a check that takes longer hangs, and systemd's watchdog shall see it.
const LONGEST: Duration = Duration::from_secs(15);
/// How often systemd is told the status, at most: it costs PID 1 as much as it costs here.
const STATUS: Duration = Duration::from_secs(1);

/// Answers each connection by `check`, which returns the words that it said, until there was none for
/// `idle` or SIGTERM came. Checks that run then are finished; connections that come later wait for the
/// process that systemd starts next.
///
/// # Errors
///
/// The socket or the signal cannot be waited for.
pub fn serve(
    listeners: &[TcpListener],
    idle: Duration,
    check: impl Fn(Connection) -> &'static str + Sync,
) -> io::Result<()> {
    let (stop, stopper) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGTERM, stopper)?;
    // a connection may be gone again before it is accepted
    for listener in listeners {
        listener.set_nonblocking(true)?;
    }
    let watchdog = sd_notify::watchdog_enabled();
    let tick = watchdog.map_or(STATUS, |limit| STATUS.min(limit / 3));
    let wait = Timespec::try_from(tick).map_err(io::Error::other)?;
    let checks = Checks::default();
    notify(NotifyState::Ready);
    thread::scope(|scope| {
        let mut asked = Instant::now();
        let mut told = asked;
        loop {
            let mut ready = vec![PollFd::new(&stop, PollFlags::IN)];
            ready.extend(listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
            match poll(&mut ready, Some(&wait)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !ready[0].revents().is_empty() {
                break;
            }
            for (listener, ready) in listeners.iter().zip(&ready[1..]) {
                if ready.revents().is_empty() {
                    continue;
                }
                if let Some((stream, slot)) = accept(listener, &checks) {
                    let check = &check;
                    // without a thread for it the connection is closed, as one above the limit
                    let _ =
                        thread::Builder::new().spawn_scoped(scope, move || slot.run(stream, check));
                }
            }
            if !checks.lock().running.is_empty() {
                asked = Instant::now();
            } else if asked.elapsed() >= idle {
                break;
            }
            if told.elapsed() >= tick {
                told = Instant::now();
                notify(NotifyState::Status(&checks.status()));
                if checks.lock().running.iter().all(|(_, since)| since.elapsed() < LONGEST) {
                    notify(NotifyState::Watchdog);
                }
            }
        }
        notify(NotifyState::Stopping);
        Ok(())
    })
}

fn accept<'a>(listener: &TcpListener, checks: &'a Checks) -> Option<(TcpStream, Slot<'a>)> {
    match listener.accept() {
        Ok((stream, peer)) => Some((stream, checks.slot(peer.ip())?)),
        Err(error) => {
            // No descriptor is left: one comes back when a check ends.
            if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) {
                thread::sleep(Duration::from_millis(10));
            }
            None
        }
    }
}

fn notify(state: NotifyState) {
    let _ = sd_notify::notify(&[state]);
}

/// The checks that are being answered, and what became of the others.
#[derive(Default)]
struct Checks(Mutex<State>);

#[derive(Default)]
struct State {
    running: Vec<(IpAddr, Instant)>,
    served: u64,
    refused: u64,
    last: &'static str,
}

/// A place among those that are answered at once.
struct Slot<'a> {
    checks: &'a Checks,
    entry: (IpAddr, Instant),
}

impl Checks {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, source: IpAddr) -> Option<Slot<'_>> {
        let state = &mut *self.lock();
        let same = state.running.iter().filter(|(other, _)| *other == source).count();
        if state.running.len() >= AT_ONCE || same >= AT_ONCE_PER_SOURCE {
            state.refused += 1;
            return None;
        }
        let entry = (source, Instant::now());
        state.running.push(entry);
        Some(Slot { checks: self, entry })
    }

    fn status(&self) -> String {
        let state = self.lock();
        let last = if state.last.is_empty() { "nothing yet" } else { state.last };
        let (served, refused, running) = (state.served, state.refused, state.running.len());
        format!("{served} checks served, {refused} refused, {running} running, last said: {last}")
    }
}

impl Slot<'_> {
    fn run(self, stream: TcpStream, check: &(impl Fn(Connection) -> &'static str + Sync)) {
        // A bug in one check must not end the others.
        let said = panic::catch_unwind(AssertUnwindSafe(|| check(Connection::Socket(stream))));
        let mut state = self.checks.lock();
        state.served += 1;
        state.last = said.unwrap_or("nothing, for a bug");
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let running = &mut self.checks.lock().running;
        if let Some(place) = running.iter().position(|entry| *entry == self.entry) {
            running.swap_remove(place);
        }
    }
}
