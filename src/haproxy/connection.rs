//! HAProxy's connection: fd 3 (systemd, `Accept=yes`), fd 0 (xinetd, `StandardInput=socket`), one from a listening socket
//! (`Accept=no`), or an operator's terminal. In comes an agent-send line, out goes a reply. Knows nothing of Patroni.

use crate::journal;
use listenfd::ListenFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_acceptconn;
use rustix::net::{self, RecvFlags, SendFlags};
use sd_notify::NotifyState;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// The longest agent-send line, without its newline.
pub const LINE_LIMIT: usize = 256;
/// How long after the start the agent waits for HAProxy's line. HAProxy sends it at once, and the kernel sends a lost packet
/// again after some 200 ms. A stranger who sends nothing must not keep a place for longer.
pub const LINE_TIMEOUT: Duration = Duration::from_millis(300);

/// How many times the agent tries to send the reply.
const SEND_TRIES: usize = 16;
/// How many KiB of unread bytes the agent reads before it closes the connection.
const UNREAD_KIB: usize = 16;

/// Where a question comes from and the reply goes.
#[derive(Debug)]
pub enum Connection {
    /// HAProxy's connection.
    Socket(TcpStream),
    /// Stdin and stdout of a check by hand: a terminal, a pipe or a file.
    Standard,
}

/// Why there is no question to Patroni.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoQuestion {
    /// The peer sent nothing and closed.
    Closed,
    /// There was no whole line in time; with a reason that names the usual mistake.
    Late(String),
    /// The line is not valid, or cannot be read; with the reason.
    Invalid(String),
    /// The line is `hold`, which asks nothing of Patroni.
    OnlyHold,
}

/// How this process was started.
#[derive(Debug)]
pub enum Activation {
    /// For one connection.
    Connected(Connection),
    /// With listening sockets.
    Listeners(Vec<TcpListener>),
    /// For a connection that was reset before the process started.
    Reset,
}

impl Connection {
    /// Finds the connection or the listening sockets with which this process was started. Fails if systemd has passed
    /// something else and fd 0 is no TCP socket.
    pub fn inherited() -> Result<Activation, String> {
        let mut passed = ListenFd::from_env();
        let mut no_socket = Ok(Activation::Connected(Connection::Standard));
        let mut others = Vec::new();
        for number in 1..passed.len() {
            others.extend(passed.take_tcp_listener(number).ok().flatten());
        }
        if passed.len() > 0 {
            let mut take = || passed.take_custom(0, libc::AF_INET, libc::SOCK_STREAM, "TCP socket");
            // twice, since a system call may fail once
            match take().or_else(|_| take()) {
                Ok(stream) => {
                    return Ok(stream.map_or(Activation::Reset, |stream| activate(stream, others)));
                }
                Err(error) => no_socket = Err(format!("LISTEN_FDS is set, but {error}")),
            }
        }
        let stdin = io::stdin().as_fd().try_clone_to_owned().map(TcpStream::from);
        match stdin {
            Ok(stream) if stream.local_addr().is_ok() => Ok(activate(stream, others)),
            // stdin is no socket, or one of another family
            _ => no_socket,
        }
    }

    /// Whether an operator or a script asks, and not HAProxy.
    pub fn is_by_hand(&self) -> bool {
        matches!(self, Connection::Standard)
    }

    /// Sends the reply in one write, since HAProxy 2.6 may complete a split line with bytes of its other clients. HAProxy
    /// usually resets the connection after the line, so later errors do not matter.
    pub fn send(&self, line: &str) {
        let Connection::Socket(stream) = self else { return print(line) };
        // The agent does not wait for the peer. A send that fails for lack of memory may succeed a moment later, and after
        // silence HAProxy keeps the last reply.
        let once = || net::send(stream, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let _ = (0..SEND_TRIES).any(|_| once().is_ok());
        let _ = stream.shutdown(Shutdown::Write);
        // closing with unread bytes would reset the connection, and HAProxy might lose the line
        let mut rest = [0; 1024];
        for _ in 0..UNREAD_KIB {
            match net::recv(stream, &mut rest, RecvFlags::DONTWAIT) {
                Ok((1.., _)) | Err(Errno::INTR) => {}
                _ => break,
            }
        }
    }

    /// HAProxy's address and port. A dual-stack socket shows IPv4 as `::ffff:10.0.0.1`.
    pub fn peer(&self) -> Option<String> {
        let Connection::Socket(stream) = self else { return None };
        let canonical = |peer: SocketAddr| SocketAddr::new(peer.ip().to_canonical(), peer.port());
        Some(stream.peer_addr().map_or(String::new(), |peer| canonical(peer).to_string()))
    }

    /// The address of this machine on which HAProxy asked. A link-local IPv6 address keeps its interface.
    pub fn agent_address(&self) -> Option<SocketAddr> {
        let Connection::Socket(stream) = self else { return None };
        let local = stream.local_addr().ok()?;
        Some(match local.ip().to_canonical() {
            IpAddr::V4(ip) => (ip, local.port()).into(),
            IpAddr::V6(_) => local,
        })
    }

    /// The source of HAProxy; see [`source_of`].
    pub fn source(&self) -> Option<IpAddr> {
        let Connection::Socket(stream) = self else { return None };
        Some(source_of(stream.peer_addr().ok()?.ip(), stream.local_addr().ok()?.ip()))
    }

    /// Tells the operator of a check by hand something that is not for the journal.
    pub fn tell_operator(&self, text: &str) {
        if let Connection::Standard = self {
            journal::tell_operator(text);
        }
    }

    /// Reads the line that HAProxy sends by `agent-send`, and returns it without its newline. The line must come within
    /// [`LINE_TIMEOUT`] of the start, by hand within `timeout`.
    pub fn read_line(
        &mut self,
        started: Instant,
        timeout: Duration,
    ) -> Result<Vec<u8>, NoQuestion> {
        match self {
            Connection::Socket(stream) => read_line(stream, started, timeout.min(LINE_TIMEOUT)),
            Connection::Standard => read_line(&mut io::stdin().lock(), started, timeout),
        }
    }
}

/// The source of a peer. This machine is one source if it asks from a loopback address or from the address that it asks, and
/// so is an IPv6 network of 64 bits.
pub fn source_of(peer: IpAddr, local: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        ip if ip.is_loopback() || ip == local.to_canonical() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        ip => ip,
    }
}

fn activate(stream: TcpStream, mut others: Vec<TcpListener>) -> Activation {
    match stream.peer_addr() {
        Ok(_) => {
            // with Type=notify in a drop-in, systemd counts a process that ends without this as failed
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            Activation::Connected(Connection::Socket(stream))
        }
        // A listening socket and a connection that was reset both have no peer. After any other error the peer is answered.
        Err(error) if error.kind() == ErrorKind::NotConnected => match socket_acceptconn(&stream) {
            Ok(true) => {
                others.push(TcpListener::from(OwnedFd::from(stream)));
                Activation::Listeners(others)
            }
            _ => Activation::Reset,
        },
        Err(_) => Activation::Connected(Connection::Socket(stream)),
    }
}

fn read_line(
    stream: &mut (impl Read + AsFd),
    started: Instant,
    due: Duration,
) -> Result<Vec<u8>, NoQuestion> {
    let no_line = |until: &str| {
        let hint = r#"end it with a newline, as in agent-send "primary\n""#;
        NoQuestion::Late(format!("no agent-send line {until}: {hint}"))
    };
    let cannot = |what: &str, error: io::Error| {
        NoQuestion::Invalid(format!("cannot {what} the agent-send line: {error}"))
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
            Err(error) => return Err(cannot("wait for", error.into())),
        }
        match stream.read(&mut buffer[length..]) {
            Ok(0) if length == 0 => return Err(NoQuestion::Closed),
            Ok(0) => return Err(no_line("before the end")),
            Ok(count) => {
                let end = length + count;
                if let Some(newline) = buffer[length..end].iter().position(|byte| *byte == b'\n') {
                    return Ok(buffer[..length + newline].to_vec());
                }
                length = end;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(cannot("read", error)),
        }
        if length > LINE_LIMIT {
            let text = format!("agent-send line is longer than {LINE_LIMIT} bytes");
            return Err(NoQuestion::Invalid(text));
        }
    }
}

/// Prints text to stdout.
pub fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}

#[cfg(test)]
mod tests {
    use super::{Connection, source_of};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    #[test]
    fn a_connection_has_the_source_of_its_peer() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a listener");
        let _peer = TcpStream::connect(listener.local_addr().expect("an address")).expect("a peer");
        let connection = Connection::Socket(listener.accept().expect("a connection").0);
        assert_eq!(connection.source(), Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(Connection::Standard.source(), None);
    }

    #[test]
    fn this_machine_is_one_source_and_so_is_a_network() {
        let is = |peer: &str, local: &str| {
            let ip = |text: &str| text.parse().expect("an address");
            source_of(ip(peer), ip(local)).to_string()
        };
        for (peer, local, source) in [
            ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
            ("127.9.8.7", "127.0.0.9", "127.0.0.1"),
            ("::ffff:127.0.0.3", "::ffff:127.0.0.1", "127.0.0.1"),
            ("::1", "::1", "127.0.0.1"),
            ("10.0.0.11", "10.0.0.11", "127.0.0.1"),
            ("::ffff:10.0.0.1", "::ffff:10.0.0.11", "10.0.0.1"),
            ("10.0.0.1", "10.0.0.11", "10.0.0.1"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::1", "2001:db8:1:2::"),
            ("2001:db8:1:3::1", "2001:db8:1:2::1", "2001:db8:1:3::"),
        ] {
            assert_eq!(is(peer, local), source, "{peer} {local}");
        }
    }
}
