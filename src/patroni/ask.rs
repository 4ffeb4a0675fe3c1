//! The one question to Patroni: a GET of a health check, at the first address where Patroni listens. In go a check and a
//! deadline, out comes what was heard and when. Knows nothing of what an answer means.

use super::answer::{self, Answer, Cause, NoAnswer, seconds};
use super::check::Check;
use super::hosts;
use super::http::{self, Failure, Response};
use super::location::{Endpoint, Patroni};
use super::ports::NotFound;
use super::tls::Tls;
use crate::clock::now;
use crate::run::before_stop::Patience;
use rustls::ClientConfig;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to look at if nobody listens.
const CURE: &str = " (see restapi.listen and --url)";

impl Patroni {
    /// Reads the certificates and the host's addresses. Without `--url` the first question finds Patroni on localhost or at
    /// the `agent_address`, and by hand wherever it listens.
    pub fn prepare(&self, agent_address: Option<SocketAddr>) -> Prepared<'_> {
        self.sockets();
        Prepared { patroni: self, agent_address, files: self.read_files() }
    }

    fn read_files(&self) -> Result<Files, NoAnswer> {
        let Endpoint { host, port } = &self.connect_to;
        let blame = |no_answer| blame(&self.connect_to, no_answer);
        let tls = self.tls.as_ref().map(Tls::config).transpose().map_err(blame)?;
        let ips = match self.discover {
            true => Vec::new(),
            false => hosts::addresses(host).map_err(|error| blame(error.into()))?,
        };
        Ok((ips.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect(), tls))
    }
}

/// The error with the Patroni that it came from.
pub fn blame(patroni: &Endpoint, NoAnswer { cause, reason }: NoAnswer) -> NoAnswer {
    NoAnswer { cause, reason: format!("Patroni {patroni}: {reason}") }
}

/// A Patroni that can be asked without reading another file.
pub struct Prepared<'a> {
    patroni: &'a Patroni,
    /// The address of this machine on which HAProxy asked.
    agent_address: Option<SocketAddr>,
    files: Result<Files, NoAnswer>,
}

/// The addresses of the URL's host, and the certificates.
type Files = (Vec<SocketAddr>, Option<Arc<ClientConfig>>);

/// What came of one question.
#[derive(Clone, Debug)]
pub struct Heard {
    /// The Patroni that was asked, or all that may be asked if none answered.
    pub from: Vec<Endpoint>,
    /// The answer, or why there is none.
    pub answer: Result<Answer, NoAnswer>,
    /// When the question was sent, by [`now`]. The verdict counts from here, so that it does not depend on `--timeout`.
    pub asked: Duration,
    /// When the answer came, or the waiting ended.
    pub answered: Duration,
}

impl Prepared<'_> {
    /// Why Patroni cannot be asked.
    pub fn failure(&self) -> Option<&NoAnswer> {
        self.files.as_ref().err()
    }

    /// Asks Patroni once. If there is no answer, the reason says what failed, and the cure where there is one.
    pub fn ask(&self, check: &Check, patience: &Patience) -> Heard {
        let (asked, since) = (now(), Instant::now());
        let (from, response) = self.get(check.path(), patience);
        let from = match from {
            Some(ip) if self.patroni.discover => vec![self.patroni.endpoint(ip)],
            _ => self.patroni.candidate_endpoints(self.agent_address),
        };
        let answer = response.and_then(|response| {
            let answer = answer::read(response.status, &response.body);
            let mut answer = answer.map_err(|error| blame(&from[0], error.into()))?;
            answer.date = response.date.map_or(answer.date, seconds);
            Ok(answer)
        });
        Heard { from, answer, asked, answered: asked + since.elapsed() }
    }

    /// One GET of the first address that can be connected. Returns that address as well.
    fn get(&self, path: &str, patience: &Patience) -> (Option<IpAddr>, Result<Response, NoAnswer>) {
        let url = &self.patroni.url;
        let (addresses, tls) = match self.find_addresses(patience.deadline) {
            Ok(found) => found,
            Err(no_answer) => return (None, Err(no_answer)),
        };
        let mut causes = Vec::new();
        let mut first_error = None;
        for address in addresses {
            match http::get(url, tls.as_ref(), address, path, patience) {
                // the first error is told; ureq would share the time between the addresses
                Err(Failure::NotConnected(error)) => {
                    causes.push(Cause::of(&error));
                    first_error.get_or_insert_with(|| http::in_words(url, error.into()));
                }
                Err(Failure::NoAnswer(error)) => {
                    let found = self.patroni.endpoint(address.ip());
                    let patroni =
                        if self.patroni.discover { &found } else { &self.patroni.connect_to };
                    return (Some(address.ip()), Err(blame(patroni, error.into())));
                }
                Ok(response) => return (Some(address.ip()), Ok(response)),
            }
        }
        let cause = match &causes[..] {
            [first, rest @ ..] if rest.iter().all(|cause| cause == first) => *first,
            causes if causes.contains(&Cause::Refused) => Cause::Refused,
            _ => Cause::Failed,
        };
        let error = first_error.unwrap_or_else(|| "its name has no address".to_owned());
        (None, Err(NoAnswer { cause, reason: format!("{}: {error}", self.tried()) }))
    }

    /// Where Patroni may be asked, and with which certificates.
    fn find_addresses(&self, deadline: Instant) -> Result<Files, NoAnswer> {
        let files = self.files.clone()?;
        let Some(sockets) = self.patroni.sockets() else { return Ok(files) };
        let port = self.patroni.connect_to.port;
        let candidates = self.patroni.candidates(self.agent_address);
        let found = sockets.find(port, &candidates, self.agent_address.is_none(), deadline);
        let (cause, reason) = match found {
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

    /// Where Patroni is looked for, in words.
    pub fn tried(&self) -> String {
        let other = self.patroni.candidate_endpoints(self.agent_address);
        let other = other.get(2).map(|other| format!(" and {other}"));
        format!("Patroni {}{}", self.patroni.connect_to, other.unwrap_or_default())
    }

    /// The keys that Patroni returns for another path. Not for HAProxy's checks, which ask once.
    fn keys(&self, path: &str, deadline: Instant) -> Option<BTreeMap<String, Box<RawValue>>> {
        let answered = self.get(path, &Patience::until(deadline)).1.ok()?;
        serde_json::from_slice(&answered.body).ok()
    }

    /// The name of Patroni's node, which 3.3.11 tells and 3.0.4 does not. Not for HAProxy's checks, which ask once.
    pub fn node(&self, deadline: Instant) -> Option<String> {
        let keys = self.keys("/patroni", deadline)?;
        let patroni: BTreeMap<String, &RawValue> =
            serde_json::from_str(keys.get("patroni")?.get()).ok()?;
        serde_json::from_str(patroni.get("name")?.get()).ok()
    }

    /// The leader lock's times in Patroni's dynamic configuration. Not for HAProxy's checks, which ask once.
    pub fn lock_settings(&self, deadline: Instant) -> Option<LockSettings> {
        let keys = self.keys("/config", deadline)?;
        // what is not set has Patroni's own default
        let seconds = |key, default| {
            keys.get(key).map_or(Some(default), |value| value.get().parse::<u64>().ok())
        };
        Some(LockSettings {
            ttl: seconds("ttl", 30)?,
            loop_wait: seconds("loop_wait", 10)?,
            retry_timeout: seconds("retry_timeout", 10)?,
        })
    }
}

/// The times that Patroni keeps the leader lock by, in seconds.
pub struct LockSettings {
    pub(crate) ttl: u64,
    pub(crate) loop_wait: u64,
    pub(crate) retry_timeout: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patroni(url: Option<&str>) -> Patroni {
        Patroni::new(url, None, Tls::default()).expect("a Patroni")
    }

    #[test]
    fn without_a_url_it_may_be_where_haproxy_asked() {
        let asked = |address: &str| Some(address.parse().expect("an address"));
        let anywhere = patroni(None);
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
        let there = patroni(Some("http://10.0.0.2:8008"));
        assert_eq!(there.prepare(asked("10.0.0.1:5555")).tried(), "Patroni 10.0.0.2:8008");
    }
}
