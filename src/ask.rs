//! One GET of a health check on Patroni's REST API: the status and the JSON, or who failed and how.
//! Knows nothing of what the answer means for HAProxy.

use crate::check::Check;
use crate::hosts;
use crate::tls::{self, Tcp, Tls};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::tls::TlsConfig;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Connector, NextTimeout, RustlsConnector, TcpConnector};
use ureq::{Agent, Error};

/// An answer has 500 to 800 bytes, and about 150 more for each replica.
const BODY_LIMIT: u64 = 64 * 1024;
/// Patroni's header has 150 bytes. ureq clears a buffer of this size at each check.
const HEADER_LIMIT: usize = 4 * 1024;

/// The REST API of the local Patroni.
#[derive(Clone, Debug)]
pub struct Patroni {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub url: Uri,
    /// Where the connection goes: the URL's host and port, or those of `--connect-to`.
    pub connect_to: (String, u16),
    /// Present if the URL is https.
    pub tls: Option<Tls>,
}

/// What Patroni said: top-level keys only, the body is the same with 200 and with 503.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status, 200 or 503.
    pub status: u16,
    /// PostgreSQL's state as Patroni sees it.
    pub state: String,
    /// The node's role as Patroni sees it.
    pub role: String,
    /// `streaming`, `in archive recovery` or nothing (since Patroni 3.0.4).
    pub replication_state: Option<String>,
    /// PostgreSQL's timeline, present while PostgreSQL answers Patroni.
    pub timeline: Option<u64>,
    /// Patroni's tag that takes a standby out of load balancing.
    pub noloadbalance: bool,
    /// The cluster is paused.
    pub pause: bool,
    /// Patroni sees no leader lock in the DCS: failsafe mode, a pause, or the lock has just run out.
    pub cluster_unlocked: bool,
    /// When Patroni last read the cluster from the DCS, in seconds since 1970 (since Patroni 2.1.2).
    pub dcs_last_seen: Option<u32>,
    /// When Patroni answered, by its own clock, in seconds since 1970.
    pub date: u32,
}

/// Why there is no usable answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoAnswer {
    /// Nobody listens: Patroni is not there, or not there yet.
    pub refused: bool,
    /// Who failed and how, and the cure if there is one.
    pub reason: String,
}

impl NoAnswer {
    /// Somebody is there, or nobody knows.
    pub fn unusable(reason: String) -> NoAnswer {
        NoAnswer { refused: false, reason }
    }
}

/// A Patroni for which no file needs to be read any more.
pub struct Found<'a> {
    patroni: &'a Patroni,
    addresses: Vec<SocketAddr>,
    tls: Option<TlsConfig>,
}

/// Reads the certificates, and the host's addresses if it is a name.
///
/// # Errors
///
/// As those of [`ask`].
pub fn find(patroni: &Patroni) -> Result<Found<'_>, NoAnswer> {
    let (host, port) = &patroni.connect_to;
    let found = || {
        let tls = patroni.tls.as_ref().map(Tls::config).transpose()?;
        let addresses = hosts::addresses(host)?;
        let addresses = addresses.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect();
        Ok(Found { patroni, addresses, tls })
    };
    found().map_err(|error: String| NoAnswer::unusable(patroni.blame(&error)))
}

/// Asks Patroni once.
///
/// # Errors
///
/// The text says who failed and, where there is one, the cure: nobody there, no answer before the
/// deadline, no HTTP, a status other than 200 and 503, a body that is no status of Patroni's.
pub fn ask(found: &Found, check: &Check, deadline: Instant) -> Result<Answer, NoAnswer> {
    let (status, date, body) = get(found, check.path(), deadline)?;
    let blame = |error: String| NoAnswer::unusable(found.patroni.blame(&error));
    let mut answer = answer(status, &body).map_err(blame)?;
    answer.date = date.unwrap_or(answer.date);
    Ok(answer)
}

/// How long the leader lock outlives any good answer at the least, from Patroni's dynamic configuration: `ttl` less
/// `retry_timeout` and the larger of `loop_wait` and `retry_timeout`, since a loop that waited that long for the DCS is
/// followed by the next one at once. None if Patroni does not tell it. Not for HAProxy's checks, which ask once.
pub fn lock_outlives(found: &Found, deadline: Instant) -> Option<Duration> {
    let (_, _, body) = get(found, "/config", deadline).ok()?;
    let keys: BTreeMap<String, &RawValue> = serde_json::from_slice(&body).ok()?;
    // what is not set has Patroni's own default
    let seconds =
        |key, default| keys.get(key).map_or(Some(default), |value| value.get().parse::<u64>().ok());
    let retry_timeout = seconds("retry_timeout", 10)?;
    let taken = seconds("loop_wait", 10)?.max(retry_timeout).checked_add(retry_timeout)?;
    Some(Duration::from_secs(seconds("ttl", 30)?.saturating_sub(taken)))
}

/// Status, date and body.
type Response = (u16, Option<u32>, Vec<u8>);

fn get(found: &Found, path: &str, deadline: Instant) -> Result<Response, NoAnswer> {
    let mut nobody = NoAnswer::unusable("its name has no address".to_owned());
    for (number, address) in found.addresses.iter().enumerate() {
        match exchange(found, *address, path, deadline) {
            // Not even connected, so the next one may be asked; the first error is told. ureq itself
            // would share the time between them.
            Err(Failure::Nobody(error)) if number == 0 => nobody = error,
            Err(Failure::Nobody(_)) => {}
            Err(Failure::Answer(error)) => {
                return Err(NoAnswer::unusable(found.patroni.blame(&error)));
            }
            Ok(response) => return Ok(response),
        }
    }
    Err(NoAnswer { reason: found.patroni.blame(&nobody.reason), ..nobody })
}

/// Why there is no answer from one address.
enum Failure {
    /// There is nobody.
    Nobody(NoAnswer),
    /// There is somebody who did not give one.
    Answer(String),
}

impl From<String> for Failure {
    fn from(error: String) -> Failure {
        Failure::Answer(error)
    }
}

impl Patroni {
    /// Says whose error it is.
    pub fn blame(&self, error: &str) -> String {
        let (host, port) = &self.connect_to;
        let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
        format!("Patroni {open}{host}{close}:{port}: {error}")
    }
}

fn exchange(
    found: &Found,
    address: SocketAddr,
    path: &str,
    deadline: Instant,
) -> Result<Response, Failure> {
    let patroni = found.patroni;
    let in_words = |error| in_words(patroni, error);
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(in_words(Error::Timeout(ureq::Timeout::Global)).into());
    }
    let uri = Uri::builder()
        .scheme(patroni.url.scheme_str().unwrap_or("http"))
        .authority(patroni.url.authority().map_or("", |host| host.as_str()))
        .path_and_query(path)
        .build()
        .map_err(|error| error.to_string())?;
    let request = agent(found.tls.clone(), address, left).get(uri).header("Connection", "close");
    let mut response = request.call().map_err(|error| match &error {
        Error::Io(cause) if nobody(cause) => {
            let refused = cause.kind() == io::ErrorKind::ConnectionRefused;
            Failure::Nobody(NoAnswer { refused, reason: in_words(error) })
        }
        _ => Failure::Answer(in_words(error)),
    })?;
    let status = response.status().as_u16();
    let date = response.headers().get("Date").and_then(|date| date.to_str().ok());
    let date = date.and_then(|date| httpdate::parse_http_date(date).ok()).map(seconds);
    // Read to the end even if it is of no use: Patroni logs a traceback for a reset connection.
    let body = response.body_mut().with_config().limit(BODY_LIMIT).read_to_vec();
    if !matches!(status, 200 | 503) {
        return Err(format!("HTTP status {status} instead of 200 or 503").into());
    }
    Ok((status, date, body.map_err(in_words)?))
}

/// Whether there was no connection at all.
fn nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::AddrNotAvailable
    ) || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

fn agent(tls: Option<TlsConfig>, address: SocketAddr, left: Duration) -> Agent {
    let config = Agent::config_builder()
        .timeout_global(Some(left))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .max_idle_connections(0)
        .no_delay(false) // the request is one write
        .user_agent(concat!("patroni-agent-check/", env!("CARGO_PKG_VERSION")))
        .accept("")
        .accept_encoding("")
        .input_buffer_size(HEADER_LIMIT)
        .output_buffer_size(1024)
        // less than the buffer, or a full one is taken for the connection's end
        .max_response_header_size(HEADER_LIMIT - 1);
    match tls {
        None => Agent::with_parts(config.build(), TcpConnector::default(), To(address)),
        Some(tls) => {
            let connector = ().chain(Tcp).chain(RustlsConnector::default());
            Agent::with_parts(config.tls_config(tls).build(), connector, To(address))
        }
    }
}

/// For ureq, whose own resolver starts a thread as soon as there is a deadline.
#[derive(Debug)]
struct To(SocketAddr);

impl Resolver for To {
    fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let mut addresses = self.empty();
        addresses.push(self.0);
        Ok(addresses)
    }
}

fn in_words(patroni: &Patroni, error: Error) -> String {
    if let Some(text) = tls::in_words(&error, patroni.url.host().unwrap_or_default()) {
        return text;
    }
    match error {
        Error::Timeout(_) => "no answer before the deadline (--timeout)".to_owned(),
        Error::BodyExceedsLimit(limit) => format!("answer is larger than {limit} bytes"),
        Error::LargeResponseHeader(_, limit) => {
            format!("answer's header is larger than {limit} bytes")
        }
        Error::Io(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => {
                let cure = match patroni.tls {
                    Some(_) => "--cert and --key?",
                    None => "https?",
                };
                format!("closed the connection early; does it want {cure}")
            }
            io::ErrorKind::HostUnreachable => "host unreachable".to_owned(),
            io::ErrorKind::NetworkUnreachable => "network unreachable".to_owned(),
            _ => error.to_string(),
        },
        Error::Protocol(error) => format!("answer is not HTTP: {error}"),
        error => error.to_string(),
    }
}

fn seconds(time: SystemTime) -> u32 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
}

/// Reads the body's few keys that matter. A key of an unexpected type counts as absent, and the
/// rest of the body may be anything that is JSON. The date is that of this machine.
///
/// # Errors
///
/// The body is no JSON object, or has no `state` or no `role`.
pub fn answer(status: u16, body: &[u8]) -> Result<Answer, String> {
    let keys: BTreeMap<String, &RawValue> = serde_json::from_slice(body)
        .map_err(|error| format!("answer is not Patroni's JSON: {error}"))?;
    let string = |key: &str| serde_json::from_str::<String>(keys.get(key)?.get()).ok();
    let is_true = |key: &str| keys.get(key).is_some_and(|value| value.get() == "true");
    let required = |key: &str| string(key).ok_or(format!("answer has no '{key}'"));
    let tags = keys
        .get("tags")
        .and_then(|tags| serde_json::from_str::<BTreeMap<String, &RawValue>>(tags.get()).ok());
    let noloadbalance = tags
        .as_ref()
        .and_then(|tags| tags.get("noloadbalance"))
        .is_some_and(|value| value.get() == "true");
    Ok(Answer {
        status,
        state: required("state")?,
        role: required("role")?,
        replication_state: string("replication_state"),
        timeline: keys.get("timeline").and_then(|timeline| timeline.get().parse().ok()),
        noloadbalance,
        pause: is_true("pause"),
        cluster_unlocked: is_true("cluster_unlocked"),
        dcs_last_seen: keys.get("dcs_last_seen").and_then(|seen| seen.get().parse().ok()),
        date: seconds(SystemTime::now()),
    })
}

#[cfg(test)]
mod tests {
    use super::answer;

    #[test]
    fn only_top_level_keys_count() {
        let body =
            br#"{"replication": [{"state": "streaming", "role": "primary"}], "role": "replica"}"#;
        assert_eq!(answer(200, body), Err("answer has no 'state'".to_owned()));
    }

    #[test]
    fn a_surprise_where_nobody_looks_changes_nothing() {
        let body = br#"{"state": "running", "role": "primary", "timeline": "5", "tags": [1],
            "replication_state": {"a": null}, "xlog": 3, "server_version": {}, "patroni": []}"#;
        let answer = answer(200, body).expect("an answer");
        assert_eq!((answer.timeline, answer.noloadbalance), (None, false));
        assert_eq!(answer.replication_state, None);
    }

    #[test]
    fn a_surprise_where_it_matters_is_no_answer() {
        for body in [
            r#"{"state": ["running"], "role": "primary"}"#,
            r#"{"state": "running", "role": null}"#,
            r#"{"state": "running", "role": "primary"} x"#,
            r#"{"state": "running", "role": "primary""#,
            r#"["running", "primary"]"#,
            "",
        ] {
            assert!(answer(200, body.as_bytes()).is_err(), "{body}");
        }
    }
}
