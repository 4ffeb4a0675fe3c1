//! One GET by ureq. In go a URL and an address, out comes a response. Its transport is hand-written, since ureq's takes no
//! verifier, delays acknowledgements by 40 ms, and cannot end early. Knows nothing of what an answer means.

use super::{answer::Cause, tls};
use crate::run::before_stop::Patience;
use crate::{NAME, VERSION};
use rustix::net::sockopt::set_tcp_quickack;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::ErrorKind::{self, Interrupted, WouldBlock};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};
use ureq::{Agent, Error};

/// The longest body in bytes. An answer has 500 to 800, and about 150 more for each replica.
const BODY_LIMIT: u64 = 64 * 1024;
/// The longest header in bytes. Patroni's has 150, and ureq clears a buffer of this size at each check.
const HEADER_LIMIT: usize = 4 * 1024;

/// The reason if Patroni is silent.
pub const NO_ANSWER: &str = "no answer before the deadline (--timeout)";

/// Patroni's response to one GET.
pub struct Response {
    /// 200 or 503.
    pub status: u16,
    /// The `Date:` by Patroni's clock.
    pub date: Option<SystemTime>,
    /// The body.
    pub body: Vec<u8>,
}

/// Why there is no response from one address.
pub enum Failure {
    /// There was no connection, so another address may be asked.
    NotConnected(io::Error),
    /// There was a connection, but no answer.
    NoAnswer(String),
}

impl From<String> for Failure {
    fn from(error: String) -> Failure {
        Failure::NoAnswer(error)
    }
}

/// Sends one GET to one address. The response must be HTTP with status 200 or 503 and come before the deadline.
pub fn get(
    url: &Uri,
    tls: Option<&Arc<ClientConfig>>,
    address: SocketAddr,
    path: &str,
    patience: &Patience,
) -> Result<Response, Failure> {
    let explain = |error| explain_error(url, error);
    let left = patience.deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(NO_ANSWER.to_owned().into());
    }
    let mut parts = url.clone().into_parts();
    parts.path_and_query = path.parse().ok();
    let uri = Uri::from_parts(parts).map_err(|error| error.to_string())?;
    let connect = Connect { tls: tls.cloned(), patience: patience.clone() };
    let request = build_agent(connect, address, left).get(uri).header("Connection", "close");
    let mut response = request.call().map_err(|error| match error {
        Error::Io(error) if is_not_connected(&error) => Failure::NotConnected(error),
        error => Failure::NoAnswer(explain(error)),
    })?;
    let status = response.status().as_u16();
    let date = response.headers().get("Date").and_then(|date| date.to_str().ok());
    let date = date.and_then(|date| httpdate::parse_http_date(date).ok());
    // the agent reads to the end in any case, since Patroni logs a traceback for a connection that is reset
    let body = response.body_mut().with_config().limit(BODY_LIMIT).read_to_vec();
    if !matches!(status, 200 | 503) {
        return Err(format!("HTTP status {status} instead of 200 or 503").into());
    }
    Ok(Response { status, date, body: body.map_err(explain)? })
}

/// Whether this error means that there was no connection.
fn is_not_connected(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::PermissionDenied
    ) || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
        || Cause::of(error) != Cause::Failed
}

fn build_agent(connect: Connect, address: SocketAddr, left: Duration) -> Agent {
    let config = Agent::config_builder()
        .timeout_global(Some(left))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .max_idle_connections(0)
        .no_delay(false) // the request is one write
        .user_agent(format!("{NAME}/{VERSION}"))
        .accept("")
        .accept_encoding("")
        .input_buffer_size(HEADER_LIMIT)
        .output_buffer_size(1024)
        // ureq mistakes a full buffer for the end of the connection
        .max_response_header_size(HEADER_LIMIT - 1);
    Agent::with_parts(config.build(), connect, FixedAddress(address))
}

/// A resolver with one address. ureq's own starts a thread as soon as there is a deadline.
#[derive(Debug)]
pub struct FixedAddress(pub SocketAddr);

impl Resolver for FixedAddress {
    fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let mut addresses = self.empty();
        addresses.push(self.0);
        Ok(addresses)
    }
}

/// Explains an error to an operator, with a hint where there is one.
pub fn explain_error(url: &Uri, error: Error) -> String {
    match error {
        Error::Timeout(_) => NO_ANSWER.to_owned(),
        Error::BodyExceedsLimit(limit) => format!("answer is larger than {limit} bytes"),
        Error::LargeResponseHeader(_, limit) => {
            format!("answer's header is larger than {limit} bytes")
        }
        Error::Io(error) => match error.kind() {
            ErrorKind::InvalidData => tls::explain_error(&error, url.host().unwrap_or_default())
                .unwrap_or_else(|| error.to_string()),
            ErrorKind::ConnectionRefused => "connection refused".to_owned(),
            ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof => {
                let https = url.scheme_str() == Some("https");
                let hint = if https { "--cert and --key?" } else { "https?" };
                format!("closed the connection early: is it stopping, or does it require {hint}")
            }
            ErrorKind::HostUnreachable => "host unreachable".to_owned(),
            ErrorKind::NetworkUnreachable => "network unreachable".to_owned(),
            ErrorKind::PermissionDenied => "a rule of this machine forbids the connection".into(),
            _ => error.to_string(),
        },
        Error::Protocol(error) => format!("answer is not HTTP: {error}"),
        error => error.to_string(),
    }
}

/// Makes the connection, with TLS if it is configured.
#[derive(Debug)]
struct Connect {
    tls: Option<Arc<ClientConfig>>,
    patience: Patience,
}

/// A connection made by [`Connect`].
#[derive(Debug)]
struct Connected {
    stream: Box<dyn Stream>,
    is_tls: bool,
    buffers: LazyBuffers,
}

trait Stream: Read + Write + std::fmt::Debug + Send + Sync {}
impl Stream for Tcp {}
impl Stream for StreamOwned<ClientConnection, Tcp> {}

/// A TCP connection that waits no longer than the check's patience lasts.
#[derive(Debug)]
struct Tcp {
    stream: TcpStream,
    patience: Patience,
    /// Whether to acknowledge at once. Patroni sends header and body as two TLS records, and waits between them (Nagle's
    /// algorithm).
    quick: bool,
}

impl Connector for Connect {
    type Out = Connected;

    fn connect(&self, to: &ConnectionDetails, _: Option<()>) -> Result<Option<Connected>, Error> {
        let connect = || -> io::Result<Box<dyn Stream>> {
            let patience = self.patience.clone();
            let stream = connect_tcp(to.addrs[0], &patience)?;
            let Some(tls) = &self.tls else {
                return Ok(Box::new(Tcp { stream, patience, quick: false }));
            };
            let host = to.uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            stream.set_nodelay(true)?;
            let mut tcp = Tcp { stream, patience, quick: true };
            let mut tls = ClientConnection::new(tls.clone(), name).map_err(io::Error::other)?;
            tls.complete_io(&mut tcp)?;
            Ok(Box::new(StreamOwned::new(tls, tcp)))
        };
        let stream = connect().map_err(|error| map_timeout(error, to.timeout))?;
        let buffers =
            LazyBuffers::new(to.config.input_buffer_size(), to.config.output_buffer_size());
        Ok(Some(Connected { stream, is_tls: self.tls.is_some(), buffers }))
    }
}

impl Transport for Connected {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let output = &self.buffers.output()[..amount];
        self.stream.write_all(output).map_err(|error| map_timeout(error, timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let input = self.buffers.input_append_buf();
        let amount = self.stream.read(input).map_err(|error| map_timeout(error, timeout))?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        false // there is no other request
    }

    fn is_tls(&self) -> bool {
        self.is_tls
    }
}

impl Read for Tcp {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.stream.set_read_timeout(Some(self.patience.remaining()?))?;
            if self.quick {
                // before each read, since the kernel delays again after each write
                set_tcp_quickack(&self.stream, true)?;
            }
            match self.stream.read(buffer) {
                // SIGTERM to a listener may interrupt a read, even with SA_RESTART
                Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
                read => return read,
            }
        }
    }
}

impl Write for Tcp {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // no loop: a request, or the part of a handshake, fits into the socket's buffer
        self.stream.set_write_timeout(Some(self.patience.remaining()?))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Connects. The first try lasts until the check has to look for the hook's note. Without a note, a second try has the rest
/// of the time.
fn connect_tcp(patroni: SocketAddr, patience: &Patience) -> io::Result<TcpStream> {
    match TcpStream::connect_timeout(&patroni, patience.remaining()?) {
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            patience.remaining()?;
            let left = patience.deadline.saturating_duration_since(Instant::now());
            TcpStream::connect_timeout(&patroni, left.max(Duration::from_millis(1)))
        }
        connected => connected,
    }
}

fn map_timeout(error: io::Error, timeout: NextTimeout) -> Error {
    match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Error::Timeout(timeout.reason),
        _ => Error::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_tells_whether_there_was_a_connection() {
        let url = Uri::from_static("http://127.0.0.1:8008");
        for (error, gone, words) in [
            (ErrorKind::ConnectionRefused.into(), true, "connection refused"),
            (io::Error::from_raw_os_error(libc::EHOSTUNREACH), true, "host unreachable"),
            (io::Error::from_raw_os_error(libc::ENETUNREACH), true, "network unreachable"),
            (io::Error::from_raw_os_error(libc::EADDRNOTAVAIL), true, ""),
            (io::Error::from_raw_os_error(libc::EAFNOSUPPORT), true, ""),
            (ErrorKind::ConnectionReset.into(), false, "closed the connection early"),
            (ErrorKind::UnexpectedEof.into(), false, "closed the connection early"),
            (io::Error::from_raw_os_error(libc::EMFILE), true, ""),
            (io::Error::from_raw_os_error(libc::EPERM), true, "a rule of this machine"),
            (io::Error::from_raw_os_error(libc::EACCES), true, "a rule of this machine"),
            (io::Error::from_raw_os_error(libc::EIO), false, ""),
        ] {
            assert_eq!(is_not_connected(&error), gone, "{error}");
            let text = explain_error(&url, Error::Io(error));
            assert!(text.starts_with(words), "{text}");
        }
    }
}
