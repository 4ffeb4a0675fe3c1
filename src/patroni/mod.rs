//! The local Patroni: where its REST API is, the one question to it, and what it says. Knows nothing of what that
//! means for HAProxy.

mod hosts;
pub(crate) mod http;
pub mod tls;

use crate::before_stop::Patience;
use crate::check::Check;
use crate::memory::now;
use crate::sockets::{self, NotFound, Sockets};
use http::{Failure, Response};
use rustls::ClientConfig;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tls::Tls;
use ureq::http::Uri;
use ureq::http::uri::Authority;

/// A host and a port.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "{open}{}{close}:{}", self.host, self.port)
    }
}

impl Endpoint {
    /// From `--connect-to`: HOST or HOST:PORT.
    fn parse(target: &str, default: u16) -> Result<Endpoint, String> {
        if target.parse::<IpAddr>().is_ok() {
            return Ok(Endpoint { host: target.to_owned(), port: default });
        }
        let wrong = || format!("--connect-to {target}: write HOST or HOST:PORT");
        let authority: Authority = target.parse().map_err(|_| wrong())?;
        let host = bare(&authority).filter(|_| !target.contains('@')).ok_or_else(wrong)?;
        Ok(Endpoint { host, port: port(&authority, default).ok_or_else(wrong)? })
    }
}

/// The REST API of the local Patroni.
#[derive(Clone, Debug)]
pub struct Patroni {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub url: Uri,
    /// Where the connection goes: the URL's host and port, or those of `--connect-to`.
    pub connect_to: Endpoint,
    /// Present if the URL is https.
    pub tls: Option<Tls>,
    /// No URL was given: the agent looks where Patroni listens on this machine.
    pub discover: bool,
    /// `--patroni-user`: whose sockets are believed then.
    pub user: Option<String>,
    sockets: Arc<OnceLock<Sockets>>,
}

/// What to look at if nobody listens.
const CURE: &str = " (see restapi.listen and --url)";
/// Without `--url`. Patroni's own configuration generator and Debian's package have its REST API on the node's address
/// alone, where the agent finds it by [`Prepared::ask`].
const LOCAL: &str = "http://127.0.0.1:8008";

/// What Patroni said: top-level keys only, the body is the same with 200 and with 503.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status, 200 or 503.
    pub status: u16,
    /// PostgreSQL's state as Patroni sees it.
    pub state: String,
    /// The node's role as Patroni sees it.
    pub role: String,
    /// `streaming`, `in archive recovery` or nothing.
    pub replication_state: Option<String>,
    /// A replica does not report its `replication_state` because Patroni is older than 3.0.4.
    pub before_replication_state: bool,
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
    /// What the decision depends on.
    pub cause: Cause,
    /// Who failed and how, and the cure if there is one.
    pub reason: String,
}

/// What kept Patroni from answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nobody listens: Patroni is not there, or not there yet.
    Refused,
    /// This machine kept the agent from asking, which says nothing of Patroni.
    NotAsked,
    /// Anything else: a Patroni that is silent, an answer that is none, a certificate that cannot be read.
    Failed,
}

impl Cause {
    /// What an error of the operating system means. This machine's own may be over in the next moment: no port, descriptor or
    /// memory is left.
    pub fn of(error: &io::Error) -> Cause {
        use libc::{EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM};
        match error.raw_os_error() {
            Some(EADDRNOTAVAIL | EMFILE | ENFILE | ENOBUFS | ENOMEM) => Cause::NotAsked,
            _ if error.kind() == ErrorKind::ConnectionRefused => Cause::Refused,
            _ => Cause::Failed,
        }
    }
}

impl From<String> for NoAnswer {
    fn from(reason: String) -> NoAnswer {
        NoAnswer { cause: Cause::Failed, reason }
    }
}

impl Patroni {
    /// From `--url`, `--connect-to` and the TLS options.
    ///
    /// # Errors
    ///
    /// One of them cannot be, or they do not go together.
    pub fn new(url: Option<&str>, connect_to: Option<&str>, tls: Tls) -> Result<Patroni, String> {
        let discover = url.is_none() && connect_to.is_none();
        let url = url.unwrap_or(LOCAL);
        let wrong = || format!("--url {url}: write http://HOST:PORT or https://HOST:PORT");
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let https = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(wrong()),
        };
        let plain = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let host = bare(authority).ok_or_else(wrong)?;
        if !plain || authority.as_str().contains('@') {
            return Err(wrong());
        }
        if !https && tls != Tls::default() {
            return Err(format!(
                "--cacert, --cert, --key, --insecure go with https; --url is {url}"
            ));
        }
        if https && tls.cacert.is_none() && !tls.insecure {
            return Err(
                "https needs --cacert FILE, the CA of Patroni's certificate, or --insecure"
                    .to_owned(),
            );
        }
        if tls.key.is_some() && tls.cert.is_none() {
            return Err("--key goes with --cert".to_owned());
        }
        let port = port(authority, if https { 443 } else { 80 }).ok_or_else(wrong)?;
        let connect_to = match connect_to {
            Some(target) => Endpoint::parse(target, port)?,
            None => Endpoint { host, port },
        };
        let tls = https.then_some(tls);
        Ok(Patroni { connect_to, tls, url: uri, discover, user: None, sockets: Arc::default() })
    }

    /// Where the connection goes, if that may be another machine: settings that were meant for one node are soon on all.
    pub fn named(&self) -> Option<&Endpoint> {
        let host = &self.connect_to.host;
        let local =
            host.parse().map_or(host == "localhost", |address: IpAddr| address.is_loopback());
        (!local).then_some(&self.connect_to)
    }

    /// What tells who listens, opened once, before the sandbox is entered; none if the URL was given.
    pub fn sockets(&self) -> Option<&Sockets> {
        let open = || Sockets::open(self.user.as_deref());
        self.discover.then(|| self.sockets.get_or_init(open))
    }

    /// Where Patroni is looked for without `--url`: on localhost, and at the address on which HAProxy `asked` the agent. An
    /// address of localhost does not count because HAProxy asked there: any user of this machine can listen on one of them.
    fn candidates(&self, asked: Option<SocketAddr>) -> impl Iterator<Item = SocketAddr> {
        let port = self.connect_to.port;
        let localhost = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let localhost = localhost.map(|ip: IpAddr| SocketAddr::new(ip, port));
        localhost.into_iter().chain(beside_localhost(asked).map(|mut asked| {
            asked.set_port(port);
            asked
        }))
    }

    /// Whose records in the memory are those of a check that could not ask: the Patronis that it would have asked.
    fn candidate_endpoints(&self, asked: Option<SocketAddr>) -> Vec<Endpoint> {
        match self.discover {
            true => self.candidates(asked).map(|address| self.endpoint(address.ip())).collect(),
            false => vec![self.connect_to.clone()],
        }
    }

    /// All whose records those of HAProxy's checks may be, wherever on this machine HAProxy asks.
    pub fn all_endpoints(&self) -> Vec<Endpoint> {
        let own = if self.discover { sockets::addresses() } else { Vec::new() };
        let own = own.into_iter().map(|ip| self.endpoint(ip));
        self.candidate_endpoints(None).into_iter().chain(own).collect()
    }

    fn endpoint(&self, ip: IpAddr) -> Endpoint {
        Endpoint { host: ip.to_string(), port: self.connect_to.port }
    }

    /// Reads the certificates, and the host's addresses if it is a name. Without `--url` Patroni is looked for when it is
    /// asked: on localhost, or at the address on which HAProxy `asked`; by hand, wherever it listens.
    pub fn prepare(&self, asked: Option<SocketAddr>) -> Prepared<'_> {
        self.sockets();
        Prepared { patroni: self, asked, files: self.read_files() }
    }

    fn read_files(&self) -> Result<Files, NoAnswer> {
        let Endpoint { host, port } = &self.connect_to;
        let blame = |no_answer| blame(&self.connect_to, no_answer);
        let tls = self.tls.as_ref().map(Tls::config).transpose().map_err(blame)?;
        let addresses = match self.discover {
            true => Vec::new(),
            false => hosts::addresses(host).map_err(|error| blame(error.into()))?,
        };
        let addresses = addresses.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect();
        Ok(Files { addresses, tls })
    }

    /// What a check has that could not ask, though it was asked on this address.
    pub fn unheard(
        &self,
        asked: Option<SocketAddr>,
        since: Duration,
        no_answer: NoAnswer,
    ) -> Heard {
        let from = self.candidate_endpoints(asked);
        Heard { from, answer: Err(no_answer), asked: since, answered: now() }
    }

    /// The files that [`Patroni::prepare`] reads.
    pub fn files(&self) -> Vec<PathBuf> {
        let name = hosts::written(&self.connect_to.host).is_none();
        let tls = self.tls.iter().flat_map(|tls| [&tls.cacert, &tls.cert, &tls.key]);
        let hosts = name.then(|| hosts::HOSTS.into());
        tls.flatten().cloned().chain(hosts).collect()
    }
}

/// An address on which HAProxy asked, if it is none of localhost.
pub fn beside_localhost(asked: Option<SocketAddr>) -> Option<SocketAddr> {
    asked.filter(|asked| !asked.ip().is_loopback())
}

/// Says whose error it is.
pub fn blame(patroni: &Endpoint, NoAnswer { cause, reason }: NoAnswer) -> NoAnswer {
    NoAnswer { cause, reason: format!("Patroni {patroni}: {reason}") }
}

/// The port that is written, or the default if none is; none if it is not one.
fn port(authority: &Authority, default: u16) -> Option<u16> {
    if authority.as_str() == authority.host() { Some(default) } else { authority.port_u16() }
}

/// The host without the brackets of an IPv6 address; none if it is none.
fn bare(authority: &Authority) -> Option<String> {
    let host = authority.host();
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|inner| inner.parse::<Ipv6Addr>().is_ok())?,
        None => host,
    };
    (!host.is_empty()).then(|| host.to_owned())
}

/// A Patroni for which no file needs to be read any more.
pub struct Prepared<'a> {
    patroni: &'a Patroni,
    /// The address of this machine on which HAProxy asked.
    asked: Option<SocketAddr>,
    files: Result<Files, NoAnswer>,
}

/// What was read from files.
struct Files {
    /// Those of the URL's host.
    addresses: Vec<SocketAddr>,
    tls: Option<Arc<ClientConfig>>,
}

/// What came of one question.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Who was asked, or those who would have been.
    pub from: Vec<Endpoint>,
    /// What was said.
    pub answer: Result<Answer, NoAnswer>,
    /// Before the question was sent, by [`now`]. Counted from here, the verdict does not depend on `--timeout`.
    pub asked: Duration,
    /// When there was an answer or an end to waiting.
    pub answered: Duration,
}

impl Prepared<'_> {
    /// Why Patroni cannot be asked.
    pub fn failure(&self) -> Option<&NoAnswer> {
        self.files.as_ref().err()
    }

    /// Asks Patroni once. If there is no answer, the text says who failed and, where there is one, the cure: nobody there, a
    /// stranger in its place, no answer before the deadline, no HTTP, a status other than 200 and 503, a body that is no
    /// status of Patroni's.
    pub fn ask(&self, check: &Check, patience: &Patience) -> Heard {
        let (asked, since) = (now(), Instant::now());
        let (from, response) = self.get(check.path(), patience);
        let from = match from {
            Some(ip) if self.patroni.discover => vec![self.patroni.endpoint(ip)],
            _ => self.patroni.candidate_endpoints(self.asked),
        };
        let answer = response.and_then(|response| {
            let answer = answer(response.status, &response.body);
            let mut answer = answer.map_err(|error| blame(&from[0], error.into()))?;
            answer.date = response.date.map_or(answer.date, seconds);
            Ok(answer)
        });
        Heard { from, answer, asked, answered: asked + since.elapsed() }
    }

    /// One GET, and who answered it or failed to. The first address that can be connected is asked.
    fn get(&self, path: &str, patience: &Patience) -> (Option<IpAddr>, Result<Response, NoAnswer>) {
        match self.addresses(patience.deadline) {
            Ok((addresses, tls)) => self.get_from(&addresses, tls, path, patience),
            Err(no_answer) => (None, Err(no_answer)),
        }
    }

    fn get_from(
        &self,
        addresses: &[SocketAddr],
        tls: Option<&Arc<ClientConfig>>,
        path: &str,
        patience: &Patience,
    ) -> (Option<IpAddr>, Result<Response, NoAnswer>) {
        let url = &self.patroni.url;
        let (mut refused, mut not_asked) = (false, true);
        let mut first_error = None;
        for address in addresses {
            match http::get(url, tls, *address, path, patience) {
                // The first error is told. ureq itself would share the time between the addresses.
                Err(Failure::NotConnected(error)) => {
                    refused |= Cause::of(&error) == Cause::Refused;
                    not_asked &= Cause::of(&error) == Cause::NotAsked;
                    first_error.get_or_insert_with(|| http::in_words(url, error.into()));
                }
                Err(Failure::NoAnswer(error)) => {
                    let patroni = match self.patroni.discover {
                        true => &self.patroni.endpoint(address.ip()),
                        false => &self.patroni.connect_to,
                    };
                    return (Some(address.ip()), Err(blame(patroni, error.into())));
                }
                Ok(response) => return (Some(address.ip()), Ok(response)),
            }
        }
        let cause = match first_error {
            Some(_) if not_asked => Cause::NotAsked,
            _ if refused => Cause::Refused,
            _ => Cause::Failed,
        };
        let error = first_error.unwrap_or_else(|| "its name has no address".to_owned());
        (None, Err(NoAnswer { cause, reason: format!("{}: {error}", self.tried()) }))
    }

    /// Where Patroni may be asked, and with which certificates.
    fn addresses(
        &self,
        deadline: Instant,
    ) -> Result<(Vec<SocketAddr>, Option<&Arc<ClientConfig>>), NoAnswer> {
        let Prepared { patroni, asked, files } = self;
        let Files { addresses, tls } = files.as_ref().map_err(NoAnswer::clone)?;
        let Some(sockets) = patroni.sockets() else { return Ok((addresses.clone(), tls.as_ref())) };
        let port = patroni.connect_to.port;
        let candidates: Vec<_> = patroni.candidates(*asked).collect();
        let (cause, reason) = match sockets.find(port, &candidates, asked.is_none(), deadline) {
            Ok(addresses) => return Ok((addresses, None)),
            Err(NotFound::Nobody) => {
                (Cause::Refused, format!("{}: connection refused{CURE}", self.tried()))
            }
            Err(NotFound::Stranger(address, uid)) => (
                Cause::Refused,
                format!(
                    "Patroni {address}: not asked, uid {uid} listens there (see --patroni-user and --url)"
                ),
            ),
            Err(NotFound::Hidden) => (
                Cause::NotAsked,
                format!("Patroni: PrivateUsers= hides which of two has port {port} (see --url)"),
            ),
            Err(NotFound::Untold(error)) => (
                Cause::NotAsked,
                format!("Patroni: cannot see who listens on port {port}: {error} (see --url)"),
            ),
        };
        Err(NoAnswer { cause, reason })
    }

    /// Where Patroni is looked for, in this order, in words.
    pub fn tried(&self) -> String {
        let other = self.patroni.candidate_endpoints(self.asked);
        let other = other.get(2).map(|other| format!(" and {other}"));
        format!("Patroni {}{}", self.patroni.connect_to, other.unwrap_or_default())
    }

    /// What Patroni says at another path. Not for HAProxy's checks, which ask once.
    fn keys(&self, path: &str, deadline: Instant) -> Option<BTreeMap<String, Box<RawValue>>> {
        let answered = self.get(path, &Patience::until(deadline)).1.ok()?;
        serde_json::from_slice(&answered.body).ok()
    }

    /// The name that Patroni's node gives itself: 3.3.11 tells it, 3.0.4 does not. By hand, as [`Prepared::lock_outlives`].
    pub fn node(&self, deadline: Instant) -> Option<String> {
        let keys = self.keys("/patroni", deadline)?;
        let patroni: BTreeMap<String, &RawValue> =
            serde_json::from_str(keys.get("patroni")?.get()).ok()?;
        serde_json::from_str(patroni.get("name")?.get()).ok()
    }

    /// How long the leader lock outlives any good answer at the least, from Patroni's dynamic configuration: `ttl` less
    /// `retry_timeout` and the larger of `loop_wait` and `retry_timeout`, since a loop that waited that long for the DCS is
    /// followed by the next one at once. None if Patroni does not tell it. Not for HAProxy's checks, which ask once.
    pub fn lock_outlives(&self, deadline: Instant) -> Option<Duration> {
        let keys = self.keys("/config", deadline)?;
        // what is not set has Patroni's own default
        let seconds = |key, default| {
            keys.get(key).map_or(Some(default), |value| value.get().parse::<u64>().ok())
        };
        let retry_timeout = seconds("retry_timeout", 10)?;
        let taken = seconds("loop_wait", 10)?.max(retry_timeout).checked_add(retry_timeout)?;
        Some(Duration::from_secs(seconds("ttl", 30)?.saturating_sub(taken)))
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
    let (state, role) = (required("state")?, required("role")?);
    let replication_state = string("replication_state");
    let asked_in_vain = role == "replica" && replication_state.is_none();
    Ok(Answer {
        status,
        state,
        before_replication_state: asked_in_vain
            && version(&keys).is_some_and(|version| version < [3, 0, 4]),
        role,
        replication_state,
        timeline: keys.get("timeline").and_then(|timeline| timeline.get().parse().ok()),
        noloadbalance,
        pause: is_true("pause"),
        cluster_unlocked: is_true("cluster_unlocked"),
        dcs_last_seen: keys.get("dcs_last_seen").and_then(|seen| seen.get().parse().ok()),
        date: seconds(SystemTime::now()),
    })
}

/// The release of Patroni, as far as it is numbers.
fn version(keys: &BTreeMap<String, &RawValue>) -> Option<[u32; 3]> {
    let patroni: BTreeMap<String, &RawValue> =
        serde_json::from_str(keys.get("patroni")?.get()).ok()?;
    let text: String = serde_json::from_str(patroni.get("version")?.get()).ok()?;
    let mut numbers = text.split('.').map(|number| number.parse().unwrap_or(0));
    Some([(); 3].map(|()| numbers.next().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patroni(url: Option<&str>, tls: Tls) -> Patroni {
        Patroni::new(url, None, tls).expect("a Patroni")
    }

    #[test]
    fn without_a_url_it_may_be_where_haproxy_asked() {
        let asked = |address: &str| Some(address.parse().expect("an address"));
        let anywhere = patroni(None, Tls::default());
        for (from, tried) in [
            (asked("10.0.0.1:5555"), "Patroni 127.0.0.1:8008 and 10.0.0.1:8008"),
            (asked("[fd00::1]:5555"), "Patroni 127.0.0.1:8008 and [fd00::1]:8008"),
            (asked("127.0.0.1:5555"), "Patroni 127.0.0.1:8008"),
            // everybody has such addresses
            (asked("127.0.0.9:5555"), "Patroni 127.0.0.1:8008"),
            (asked("[::1]:5555"), "Patroni 127.0.0.1:8008"),
        ] {
            assert_eq!(anywhere.prepare(from).tried(), tried);
        }
        let there = patroni(Some("http://10.0.0.2:8008"), Tls::default());
        assert_eq!(there.prepare(asked("10.0.0.1:5555")).tried(), "Patroni 10.0.0.2:8008");
    }

    #[test]
    fn the_files_that_are_read_again() {
        let [cacert, cert, key] = ["ca", "cert", "key"].map(|name| Some(PathBuf::from(name)));
        let tls = Tls { cacert, cert, key, insecure: false };
        let files = patroni(Some("https://10.0.0.1:8008"), tls.clone()).files();
        assert_eq!(files, ["ca", "cert", "key"].map(PathBuf::from));
        let files = patroni(Some("https://pg1:8008"), tls).files();
        assert_eq!(files, ["ca", "cert", "key", "/etc/hosts"].map(PathBuf::from));
    }

    #[test]
    fn what_is_true_is_read_and_when() {
        let body = br#"{"state": "running", "role": "replica", "pause": true,
            "cluster_unlocked": false, "tags": {"noloadbalance": true}}"#;
        let answer = answer(200, body).expect("an answer");
        assert!(answer.pause && !answer.cluster_unlocked && answer.noloadbalance);
        assert!(answer.date > 1_700_000_000, "seconds since 1970");
    }

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
    fn only_a_release_that_says_its_number_is_known_to_be_old() {
        for (version, old) in [
            (r#""3.0.3""#, true),
            (r#""1.6.5""#, true),
            (r#""2.1""#, true),
            (r#""3.0.4""#, false),
            (r#""3.1.0rc1""#, false),
            (r#""10.0.0""#, false),
            ("3", false),
        ] {
            let body = format!(
                r#"{{"state": "running", "role": "replica", "patroni": {{"version": {version}}}}}"#
            );
            let answer = answer(200, body.as_bytes()).expect("an answer");
            assert_eq!(answer.before_replication_state, old, "{version}");
        }
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
