//! Where the local Patroni is. In go options and the agent's address, out come Patroni's addresses. Knows nothing of
//! HAProxy and what an answer means.

use super::hosts;
use super::ports::{self, Sockets};
use super::tls::Tls;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use ureq::http::Uri;
use ureq::http::uri::Authority;

/// A host and a port.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
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
    /// Parses the value of `--connect-to`: HOST or HOST:PORT.
    fn parse(target: &str, default: u16) -> Result<Endpoint, String> {
        if target.parse::<IpAddr>().is_ok() {
            return Ok(Endpoint { host: target.to_owned(), port: default });
        }
        let wrong = || format!("--connect-to {target}: write HOST or HOST:PORT");
        let authority: Authority = target.parse().map_err(|_| wrong())?;
        let host = host_of(&authority).filter(|_| !target.contains('@')).ok_or_else(wrong)?;
        Ok(Endpoint { host, port: port_of(&authority, default).ok_or_else(wrong)? })
    }
}

/// The REST API of the local Patroni.
#[derive(Clone, Debug, Default)]
pub struct Patroni {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub url: Uri,
    /// The host and the port to connect to: those of the URL or of `--connect-to`.
    pub connect_to: Endpoint,
    /// The TLS options, if the URL is https.
    pub tls: Option<Tls>,
    /// Whether the agent looks where Patroni listens on this machine, since neither --url nor --connect-to was given.
    pub discover: bool,
    /// The user of `--patroni-user`: the agent asks only a socket of this user or of root.
    pub user: Option<String>,
    sockets: Arc<OnceLock<Sockets>>,
}

/// The default of `--url`. A REST API that listens on the node's address alone, as Debian's package sets it up, is found,
/// too.
const LOCAL: &str = "http://127.0.0.1:8008";

impl Patroni {
    /// Parses `--url` and `--connect-to`, and checks that the TLS options go with them.
    pub fn new(url: Option<&str>, connect_to: Option<&str>, tls: Tls) -> Result<Patroni, String> {
        let discover = url.is_none() && connect_to.is_none();
        let url = url.unwrap_or(LOCAL);
        let wrong = || format!("--url {url}: write http://HOST:PORT or https://HOST:PORT");
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let https = uri.scheme_str() == Some("https");
        let http = uri.scheme_str() == Some("http");
        let plain = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let host = host_of(authority).ok_or_else(wrong)?;
        if !(http || https) || !plain || authority.as_str().contains('@') {
            return Err(wrong());
        }
        if !https && tls != Tls::default() {
            return Err(format!(
                "--cacert, --cert, --key, --insecure go with https; --url is {url}"
            ));
        }
        if https && tls.cacert.is_none() && !tls.insecure {
            let error = "https needs --cacert FILE, the CA of Patroni's certificate, or --insecure";
            return Err(error.to_owned());
        }
        if tls.key.is_some() && tls.cert.is_none() {
            return Err("--key goes with --cert".to_owned());
        }
        let port = port_of(authority, if https { 443 } else { 80 }).ok_or_else(wrong)?;
        let connect_to = match connect_to {
            Some(target) => Endpoint::parse(target, port)?,
            None => Endpoint { host, port },
        };
        let tls = https.then_some(tls);
        Ok(Patroni { connect_to, tls, url: uri, discover, user: None, sockets: Arc::default() })
    }

    /// Patroni's address, unless it is localhost. The reason names it, since settings are easily copied to another node.
    pub fn remote_endpoint(&self) -> Option<&Endpoint> {
        let host = &self.connect_to.host;
        let local =
            host.parse().map_or(host == "localhost", |address: IpAddr| address.is_loopback());
        (!local).then_some(&self.connect_to)
    }

    /// Opens, once and before the process is confined, the files that tell who listens; none if --url or --connect-to was
    /// given.
    pub fn open_sockets(&self) -> Option<&Sockets> {
        let open = || Sockets::open(self.user.as_deref());
        self.discover.then(|| self.sockets.get_or_init(open))
    }

    /// The addresses that may be Patroni's without `--url`: the two of localhost, and the one on which HAProxy asked the
    /// agent. Another loopback address is no candidate, since any user of this machine can listen there.
    pub fn candidates(&self, agent_address: Option<SocketAddr>) -> Vec<SocketAddr> {
        let localhost: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let mut candidates = localhost.map(|ip| SocketAddr::new(ip, 0)).to_vec();
        candidates.extend(unless_loopback(agent_address));
        candidates.iter_mut().for_each(|address| address.set_port(self.connect_to.port));
        candidates
    }

    /// The endpoints that a check may ask. Their records in the memory file count if none of them answers.
    pub fn candidate_endpoints(&self, agent_address: Option<SocketAddr>) -> Vec<Endpoint> {
        if !self.discover {
            return vec![self.connect_to.clone()];
        }
        self.candidates(agent_address).iter().map(|address| self.endpoint(address.ip())).collect()
    }

    /// The endpoints that any of HAProxy's checks may ask, whichever address of this machine HAProxy uses.
    pub fn all_endpoints(&self) -> Vec<Endpoint> {
        let own = if self.discover { ports::own_addresses() } else { Vec::new() };
        let own = own.into_iter().map(|ip| self.endpoint(ip));
        self.candidate_endpoints(None).into_iter().chain(own).collect()
    }

    /// This Patroni, found at this address.
    pub fn endpoint(&self, ip: IpAddr) -> Endpoint {
        Endpoint { host: ip.to_string(), port: self.connect_to.port }
    }

    /// The files that [`Patroni::prepare`](super::ask) reads.
    pub fn files_to_read(&self) -> Vec<PathBuf> {
        let name = hosts::parse_address(&self.connect_to.host).is_none();
        let tls = self.tls.iter().flat_map(|tls| [&tls.cacert, &tls.cert, &tls.key]);
        let hosts = name.then(|| hosts::HOSTS.into());
        tls.flatten().cloned().chain(hosts).collect()
    }
}

/// The address on which HAProxy asked the agent, unless it is a loopback address.
pub fn unless_loopback(agent_address: Option<SocketAddr>) -> Option<SocketAddr> {
    agent_address.filter(|address| !address.ip().is_loopback())
}

/// The port of a URL, or the default if there is none; none if it is not valid.
fn port_of(authority: &Authority, default: u16) -> Option<u16> {
    if authority.as_str() == authority.host() { Some(default) } else { authority.port_u16() }
}

/// The host of a URL without the brackets of an IPv6 address; none if it is not valid.
fn host_of(authority: &Authority) -> Option<String> {
    let host = authority.host();
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|inner| inner.parse::<Ipv6Addr>().is_ok())?,
        None => host,
    };
    (!host.is_empty()).then(|| host.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_name_needs_etc_hosts() {
        let [cacert, cert, key] = ["ca", "cert", "key"].map(|name| Some(PathBuf::from(name)));
        let tls = Tls { cacert, cert, key, insecure: false };
        let files =
            |url, tls| Patroni::new(Some(url), None, tls).expect("a Patroni").files_to_read();
        let found = files("https://10.0.0.1:8008", tls.clone());
        assert_eq!(found, ["ca", "cert", "key"].map(PathBuf::from));
        let found = files("https://pg1:8008", tls);
        assert_eq!(found, ["ca", "cert", "key", "/etc/hosts"].map(PathBuf::from));
    }
}
