//! The question to Patroni: a GET of a health check. Checks by hand and the hook also get settings. In go a check and a
//! deadline, out comes an answer with its times. Knows nothing of what an answer means.

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
use serde_json::{Map, Value};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The hint if nobody listens.
const HINT: &str = " (see restapi.listen and --url)";

impl Patroni {
    /// Reads the certificates and the host's addresses. Without `--url`, the question goes to a Patroni on localhost or on
    /// the `agent_address`, and by hand (without an `agent_address`) to any address on which Patroni listens.
    pub fn prepare(&self, agent_address: Option<SocketAddr>) -> Prepared<'_> {
        self.open_sockets();
        Prepared { patroni: self, agent_address, files: self.read_files() }
    }

    fn read_files(&self) -> Result<Files, NoAnswer> {
        let Endpoint { host, port } = &self.connect_to;
        let name_patroni = |no_answer| name_patroni(&self.connect_to, no_answer);
        let tls = self.tls.as_ref().map(Tls::build_config).transpose().map_err(name_patroni)?;
        let ips = match self.discover {
            true => Vec::new(),
            false => hosts::look_up(host).map_err(|error| name_patroni(error.into()))?,
        };
        Ok((ips.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect(), tls))
    }
}

/// Adds the address of Patroni to an error.
pub fn name_patroni(patroni: &Endpoint, NoAnswer { cause, reason }: NoAnswer) -> NoAnswer {
    NoAnswer { cause, reason: format!("Patroni {patroni}: {reason}") }
}

/// A Patroni that a confined process can ask, since its files are read or open.
pub struct Prepared<'a> {
    patroni: &'a Patroni,
    /// The address of this machine on which HAProxy asked.
    agent_address: Option<SocketAddr>,
    files: Result<Files, NoAnswer>,
}

/// The addresses of the URL's host, and the certificates.
type Files = (Vec<SocketAddr>, Option<Arc<ClientConfig>>);

/// The outcome of one question.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The address that was asked, or all addresses that may be Patroni's if none answered.
    pub from: Vec<Endpoint>,
    /// The answer, or why there is none.
    pub answer: Result<Answer, NoAnswer>,
    /// When the question was sent, by [`now`]. The grace period is measured here, so that `--timeout` does not matter.
    pub asked: Duration,
    /// When the answer came, or when the check gave up.
    pub answered: Duration,
}

impl Prepared<'_> {
    /// Why Patroni cannot be asked.
    pub fn failure(&self) -> Option<&NoAnswer> {
        self.files.as_ref().err()
    }

    /// Asks Patroni once.
    pub fn ask(&self, check: &Check, patience: &Patience) -> Outcome {
        let (asked, since) = (now(), Instant::now());
        let (ip, response) = self.get(check.path(), patience);
        let from = match ip {
            Some(ip) if self.patroni.discover => vec![self.patroni.endpoint(ip)],
            _ => self.patroni.candidate_endpoints(self.agent_address),
        };
        let answer = response.and_then(|response| {
            let mut answer = answer::read(response.status, &response.body)?;
            answer.date = response.date.map_or(answer.date, seconds);
            Ok(answer)
        });
        let name = |error| if ip.is_some() { name_patroni(&from[0], error) } else { error };
        let answer = answer.map_err(name);
        Outcome { from, answer, asked, answered: asked + since.elapsed() }
    }

    /// Sends one GET to the first address that accepts a connection. Returns that address, too, and an error then does not
    /// name it.
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
                // one address at a time: ureq would divide the time among them
                Err(Failure::NotConnected(error)) => {
                    causes.push(Cause::of(&error));
                    first_error.get_or_insert_with(|| http::explain_error(url, error.into()));
                }
                Err(Failure::NoAnswer(error)) => return (Some(address.ip()), Err(error.into())),
                Ok(response) => return (Some(address.ip()), Ok(response)),
            }
        }
        let cause = Cause::of_all(&causes);
        let error = first_error.unwrap_or_else(|| "its name has no address".to_owned());
        (None, Err(NoAnswer { cause, reason: format!("{}: {error}", self.describe_candidates()) }))
    }

    /// Finds the addresses on which Patroni may be asked. Returns the certificates as well.
    fn find_addresses(&self, deadline: Instant) -> Result<Files, NoAnswer> {
        let files = self.files.clone()?;
        let Some(sockets) = self.patroni.open_sockets() else { return Ok(files) };
        let port = self.patroni.connect_to.port;
        let candidates = self.patroni.candidates(self.agent_address);
        let found = sockets.find_patroni(port, &candidates, self.agent_address.is_none(), deadline);
        let refused = |reason| NoAnswer { cause: Cause::Refused, reason };
        let not_asked = |reason| NoAnswer { cause: Cause::NotAsked, reason };
        Err(match found {
            Ok(addresses) => return Ok((addresses, None)),
            Err(NotFound::Nobody) => {
                refused(format!("{}: connection refused{HINT}", self.describe_candidates()))
            }
            Err(NotFound::Stranger(address, uid)) => refused(format!(
                "Patroni {address}: not asked, uid {uid} listens there \
                 (see --patroni-user and --url)"
            )),
            Err(NotFound::Hidden) => not_asked(format!(
                "Patroni: PrivateUsers= hides which of two has port {port} (see --url)"
            )),
            Err(NotFound::Unreadable(error)) => not_asked(format!(
                "Patroni: cannot see who listens on port {port}: {error} (see --url)"
            )),
        })
    }

    /// Names the addresses on which the agent looks for Patroni.
    pub fn describe_candidates(&self) -> String {
        let other = self.patroni.candidate_endpoints(self.agent_address);
        let other = other.get(2).map(|other| format!(" and {other}"));
        format!("Patroni {}{}", self.patroni.connect_to, other.unwrap_or_default())
    }

    /// Gets the keys of another path of Patroni. Only for checks by hand and the hook: HAProxy's checks ask once.
    fn get_json(&self, path: &str, deadline: Instant) -> Option<Map<String, Value>> {
        let answered = self.get(path, &Patience::until(deadline)).1.ok()?;
        serde_json::from_slice(&answered.body).ok()
    }

    /// Asks for the name of Patroni's node, which 3.3.11 tells and 3.0.4 does not.
    pub fn node_name(&self, deadline: Instant) -> Option<String> {
        let keys = self.get_json("/patroni", deadline)?;
        Some(keys.get("patroni")?.get("name")?.as_str()?.to_owned())
    }

    /// Asks for the leader lock's times in Patroni's dynamic configuration.
    pub fn lock_settings(&self, deadline: Instant) -> Option<LockSettings> {
        let keys = self.get_json("/config", deadline)?;
        // a setting that is not there has Patroni's own default
        let seconds = |key, default| keys.get(key).map_or(Some(default), Value::as_u64);
        Some(LockSettings {
            ttl: seconds("ttl", 30)?,
            loop_wait: seconds("loop_wait", 10)?,
            retry_timeout: seconds("retry_timeout", 10)?,
        })
    }
}

/// The settings on which the leader lock's life depends, in seconds.
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
    fn without_a_url_patroni_may_be_where_haproxy_asked() {
        let asked = |address: &str| Some(address.parse().expect("an address"));
        let anywhere = patroni(None);
        for (from, describe_candidates) in [
            (asked("10.0.0.1:5555"), "Patroni 127.0.0.1:8008 and 10.0.0.1:8008"),
            (asked("[fd00::1]:5555"), "Patroni 127.0.0.1:8008 and [fd00::1]:8008"),
            (asked("127.0.0.1:5555"), "Patroni 127.0.0.1:8008"),
            // any user of this machine can listen on such an address
            (asked("127.0.0.9:5555"), "Patroni 127.0.0.1:8008"),
            (asked("[::1]:5555"), "Patroni 127.0.0.1:8008"),
        ] {
            assert_eq!(anywhere.prepare(from).describe_candidates(), describe_candidates);
        }
        let there = patroni(Some("http://10.0.0.2:8008"));
        assert_eq!(
            there.prepare(asked("10.0.0.1:5555")).describe_candidates(),
            "Patroni 10.0.0.2:8008"
        );
    }
}
