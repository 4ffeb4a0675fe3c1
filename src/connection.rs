//! How this process was started: with HAProxy's connection as fd 3 (systemd, `Accept=yes`) or as
//! fd 0 (xinetd, inetd, `StandardInput=socket`), with a listening socket in their place (`Accept=no`,
//! `wait = yes`), or by a human. Knows nothing of Patroni and of what the bytes mean.

use listenfd::ListenFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_acceptconn;
use sd_notify::NotifyState;
use std::io::{self, ErrorKind, IsTerminal, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// The longest agent-send line, without its newline.
pub const LINE_LIMIT: usize = 256;
/// How long after the start HAProxy's agent-send line may come. HAProxy sends it as soon as it is connected, and a
/// packet that is lost is sent again after some 200 ms; a stranger who says nothing must not keep a place for longer.
pub const LINE_DUE: Duration = Duration::from_millis(300);

/// Where the question comes from and the reply goes.
#[derive(Debug)]
pub enum Connection {
    /// HAProxy's connection.
    Socket(TcpStream),
    /// A terminal, a pipe, a file: stdin and stdout.
    Standard,
}

/// Who is there to be answered.
#[derive(Debug)]
pub enum Peer {
    /// One who asked.
    Here(Connection),
    /// All who ask from now on, on one socket or several.
    Listeners(Vec<TcpListener>),
    /// The connection was reset before this process got it.
    Gone,
}

impl Connection {
    /// Finds the connection that this process was started with.
    ///
    /// # Errors
    ///
    /// What was handed over is no TCP socket, or cannot be used.
    pub fn inherited() -> Result<Peer, String> {
        let mut passed = ListenFd::from_env();
        let mut no_socket = Ok(Peer::Here(Connection::Standard));
        let mut others = Vec::new();
        for number in 1..passed.len() {
            others.extend(passed.take_tcp_listener(number).ok().flatten());
        }
        if passed.len() > 0 {
            let mut take = || passed.take_custom(0, libc::AF_INET, libc::SOCK_STREAM, "TCP socket");
            // again, in case that looking at it has failed and not what it is
            match take().or_else(|_| take()) {
                Ok(stream) => {
                    return stream.map_or(Ok(Peer::Gone), |stream| connected(stream, others));
                }
                Err(error) => no_socket = Err(format!("LISTEN_FDS is set, but {error}")),
            }
        }
        let stdin = io::stdin().as_fd().try_clone_to_owned().map(TcpStream::from);
        match stdin {
            Ok(stream) if stream.local_addr().is_ok() => connected(stream, others),
            // no socket, or one of another family
            _ => no_socket,
        }
    }

    /// Whether somebody looks at a terminal, and HAProxy hears nothing of it.
    pub fn is_human(&self) -> bool {
        matches!(self, Connection::Standard) && io::stdin().is_terminal()
    }

    /// Reads the line that HAProxy sends by `agent-send`, in however many pieces it comes.
    /// Returned without its newline; none if the peer closed without a word.
    ///
    /// # Errors
    ///
    /// There is no whole line within [`LINE_DUE`] of the start (by hand: `timeout`), and never later than that
    /// `timeout`; or it is longer than [`LINE_LIMIT`] bytes.
    pub fn read_line(
        &mut self,
        started: Instant,
        timeout: Duration,
    ) -> Result<Option<Vec<u8>>, String> {
        match self {
            Connection::Socket(stream) => read_line(stream, started, timeout.min(LINE_DUE)),
            Connection::Standard => read_line(&mut io::stdin().lock(), started, timeout),
        }
    }
}

fn connected(stream: TcpStream, mut others: Vec<TcpListener>) -> Result<Peer, String> {
    match stream.peer_addr() {
        Ok(_) => {
            // Nothing but a look at the environment unless a drop-in makes the unit Type=notify, for
            // which a process that ends without this has failed.
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            Ok(Peer::Here(Connection::Socket(stream)))
        }
        // A listening socket and a connection that was reset both have no peer. Any other error says nothing of the
        // connection: whoever is there is answered.
        Err(error) if error.kind() == ErrorKind::NotConnected => match socket_acceptconn(&stream) {
            Ok(true) => {
                others.push(TcpListener::from(OwnedFd::from(stream)));
                Ok(Peer::Listeners(others))
            }
            _ => Ok(Peer::Gone),
        },
        Err(_) => Ok(Peer::Here(Connection::Socket(stream))),
    }
}

fn read_line(
    stream: &mut (impl Read + AsFd),
    started: Instant,
    due: Duration,
) -> Result<Option<Vec<u8>>, String> {
    let no_line = |until: &str| {
        format!(
            r#"no agent-send line {until}: end it with a newline, as in agent-send "primary\n""#
        )
    };
    let late = || no_line(&format!("within {} ms", due.as_millis()));
    let mut buffer = [0; LINE_LIMIT + 1];
    let mut length = 0;
    loop {
        let left = due.saturating_sub(started.elapsed());
        let left = left.try_into().map_err(|_| late())?;
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(late()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(format!("cannot wait for the agent-send line: {error}")),
        }
        match stream.read(&mut buffer[length..]) {
            Ok(0) if length == 0 => return Ok(None),
            Ok(0) => return Err(no_line("before the end")),
            Ok(count) => {
                let end = length + count;
                if let Some(newline) = buffer[length..end].iter().position(|byte| *byte == b'\n') {
                    return Ok(Some(buffer[..length + newline].to_vec()));
                }
                length = end;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("cannot read the agent-send line: {error}")),
        }
        if length > LINE_LIMIT {
            return Err(format!("agent-send line is longer than {LINE_LIMIT} bytes"));
        }
    }
}
