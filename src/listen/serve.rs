//! The listener's loop: it accepts connections, starts a thread for each, and ends when none has come for a while or
//! systemd stops it. In go listening sockets, out come connections, each with a place. Knows nothing of Patroni.

use crate::haproxy::connection::{self, Connection};
use crate::journal::{self, syslog};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGTERM, SIGXFSZ};
use std::env;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The most checks at the same time, in all and for each source. While Patroni hangs, each pool of a HAProxy takes a place
/// for `--timeout`. `TasksMax=` and `LimitNOFILE=` of the unit allow these numbers.
const AT_ONCE: usize = 512;
const AT_ONCE_PER_SOURCE: usize = 128;
/// Longer than any `--timeout`: a check that takes so long hangs, and systemd's watchdog ends the listener.
const HANGS_AFTER: Duration = Duration::from_secs(15);
/// The least time between two status messages to systemd: each costs PID 1 as much as this process.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// Answers each connection by `answer`, which returns the words for HAProxy. Ends after `idle` without a check, on SIGTERM,
/// or when the system log is gone. Running checks are finished, and later connections wait for the listener that systemd
/// starts next. `confine` is called with the socket to systemd before the first connection.
pub fn serve(
    listeners: &[TcpListener],
    idle: Duration,
    confine: impl FnOnce(Option<RawFd>),
    answer: impl Fn(Connection, &Place) -> &'static str + Sync,
) -> io::Result<()> {
    let (stop, stopper) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGTERM, stopper)?;
    // if stderr is a file that is longer than the sandbox allows, the listener loses log lines and not checks
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    // each check takes four descriptors: its connection twice, the memory file and the note of the hook
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    // a connection may be gone before the listener accepts it
    for listener in listeners {
        listener.set_nonblocking(true)?;
    }
    let watchdog = sd_notify::watchdog_enabled();
    let tick = watchdog.map_or(STATUS_EVERY, |limit| STATUS_EVERY.min(limit / 3));
    let wait = Timespec::try_from(tick).map_err(io::Error::other)?;
    let checks = Checks::default();
    let systemd = connect_to_systemd();
    // if PID 1 is busy, the next tick repeats the status
    let notify = |state: NotifyState| {
        let text = state.to_string();
        systemd.as_ref().map(|systemd| systemd.send(text.as_bytes()))
    };
    confine(systemd.as_ref().map(UnixDatagram::as_raw_fd));
    notify(NotifyState::Ready);
    if let Some(systemd) = &systemd {
        systemd.set_nonblocking(true)?;
    }
    thread::scope(|scope| {
        let mut last_check = Instant::now();
        let mut told = last_check;
        loop {
            let mut ready = vec![PollFd::new(&stop, PollFlags::IN)];
            ready.extend(listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
            match poll(&mut ready, Some(&wait)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !ready[0].revents().is_empty() || syslog::is_gone() {
                break;
            }
            for (listener, ready) in listeners.iter().zip(&ready[1..]) {
                if ready.revents().is_empty() {
                    continue;
                }
                if let Some((stream, place)) = accept(listener, &checks) {
                    let answer = &answer;
                    // if no thread can be started, the connection is closed as if there were no place
                    let run = move || place.run(stream, answer);
                    let _ = thread::Builder::new().spawn_scoped(scope, run);
                }
            }
            if !checks.lock().running.is_empty() {
                last_check = Instant::now();
            } else if last_check.elapsed() >= idle {
                break;
            }
            if told.elapsed() >= tick {
                told = Instant::now();
                let mut state = checks.lock();
                notify(NotifyState::Status(&state.status_text()));
                if state.running.iter().all(|check| check.since.elapsed() < HANGS_AFTER) {
                    notify(NotifyState::Watchdog);
                }
                if let Some(news) = state.take_news() {
                    drop(state);
                    journal::log(journal::WARNING, &news);
                }
            }
        }
        notify(NotifyState::Stopping);
        Ok(())
    })
}

fn accept<'a>(listener: &TcpListener, checks: &'a Checks) -> Option<(TcpStream, Place<'a>)> {
    let accepted = listener.accept().and_then(|(stream, peer)| {
        let source = connection::source_of(peer.ip(), stream.local_addr()?.ip());
        let place = checks.take_place(source, &stream)?;
        Ok(place.map(|place| (stream, place)))
    });
    accepted.unwrap_or_else(|error| {
        // there may be no descriptor until a check ends
        if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) {
            thread::sleep(Duration::from_millis(10));
        }
        None
    })
}

/// Connects to the socket of sd_notify(3), whose name is a path, or an abstract name after an `@`.
fn connect_to_systemd() -> Option<UnixDatagram> {
    let name = env::var_os("NOTIFY_SOCKET")?;
    let socket = UnixDatagram::unbound().ok()?;
    match name.as_bytes().strip_prefix(b"@") {
        Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name).ok()?).ok()?,
        None => socket.connect(name).ok()?,
    }
    Some(socket)
}

/// The checks that run, and the counts of the others.
#[derive(Default)]
struct Checks(Mutex<State>);

#[derive(Default)]
struct State {
    /// In the order in which they came.
    running: Vec<Running>,
    /// The number of the next check.
    next: u64,
    served: u64,
    unanswered: Unanswered,
    /// What the journal was told, and when.
    told: Option<(Unanswered, Instant)>,
    last: &'static str,
}

/// How many connections were closed without a reply: those without a place, and silent ones that lost theirs to a newcomer.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Unanswered {
    refused: u64,
    silent: u64,
}

struct Running {
    number: u64,
    source: IpAddr,
    since: Instant,
    /// The connection, until its peer has sent a question.
    silent: Option<TcpStream>,
}

/// A place among the checks that run at the same time.
pub struct Place<'a> {
    checks: &'a Checks,
    number: u64,
}

impl Checks {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for a newcomer, if need be from the oldest silent connection: HAProxy sends its line at once.
    fn take_place(&self, source: IpAddr, stream: &TcpStream) -> io::Result<Option<Place<'_>>> {
        let silent = Some(stream.try_clone()?);
        let state = &mut *self.lock();
        let same = state.running.iter().filter(|other| other.source == source).count();
        let crowd = same >= AT_ONCE_PER_SOURCE;
        if crowd || state.running.len() >= AT_ONCE {
            let may_leave =
                |other: &Running| other.silent.is_some() && (!crowd || other.source == source);
            let Some(leaves) = state.running.iter().position(may_leave) else {
                state.unanswered.refused += 1;
                return Ok(None);
            };
            // this ends the thread of that connection
            if let Some(stream) = state.running.remove(leaves).silent {
                let _ = stream.shutdown(Shutdown::Both);
            }
            state.unanswered.silent += 1;
        }
        let (number, since) = (state.next, Instant::now());
        state.next += 1;
        state.running.push(Running { number, source, since, silent });
        Ok(Some(Place { checks: self, number }))
    }
}

impl State {
    fn status_text(&self) -> String {
        let last = if self.last.is_empty() { "nothing yet" } else { self.last };
        let Unanswered { refused, silent } = self.unanswered;
        let (served, running) = (self.served, self.running.len());
        format!(
            "{served} checks served, {refused} refused, {silent} silent ones closed, {running} running, last said: {last}"
        )
    }

    /// Returns the line about connections that the journal was not told of yet, and remembers it.
    fn take_news(&mut self) -> Option<String> {
        let (known, when) = self.told.unzip();
        let (known, now) = (known.unwrap_or_default(), self.unanswered);
        if now == known || when.is_some_and(|when| when.elapsed() < journal::REPEAT) {
            return None;
        }
        self.told = Some((now, Instant::now()));
        let (refused, silent) = (now.refused - known.refused, now.silent - known.silent);
        Some(format!(
            "all places were taken ({AT_ONCE}, {AT_ONCE_PER_SOURCE} for each source): closed {silent} connections that sent nothing, refused {refused} more; access-list.conf limits who may ask"
        ))
    }
}

impl Place<'_> {
    /// Keeps the place from newcomers, since the peer has sent its question.
    pub fn keep(&self) {
        let running = &mut self.checks.lock().running;
        if let Some(own) = running.iter_mut().find(|check| check.number == self.number) {
            own.silent = None;
        }
    }

    fn run(self, stream: TcpStream, answer: &(impl Fn(Connection, &Place) -> &'static str + Sync)) {
        // a bug in one check must not end the others
        let said =
            panic::catch_unwind(AssertUnwindSafe(|| answer(Connection::Socket(stream), &self)));
        let mut state = self.checks.lock();
        if state.running.iter().any(|check| check.number == self.number) {
            state.served += 1;
            state.last = said.unwrap_or("nothing, for a bug");
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.checks.lock().running.retain(|check| check.number != self.number);
    }
}
