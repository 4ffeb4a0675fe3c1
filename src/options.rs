//! The command line: the only way of configuring. Knows the options and nothing of what is done
//! with them.

use crate::ask::Patroni;
use crate::check::{Check, Else, Question};
use crate::tls::Tls;
use lexopt::{Arg, Parser, ValueExt};
use std::ffi::OsString;
use std::fmt::Write;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;
use std::time::Duration;
use ureq::http::Uri;
use ureq::http::uri::Authority;

/// This program's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");

const OPTIONS: &[(&str, &str)] = &[
    ("--url URL", "Patroni's REST API, http or https (default http://127.0.0.1:8008)"),
    ("--timeout DURATION", "one deadline for everything, 10ms to 10s (default 1500ms)"),
    ("--else maint|drain|down", "what a healthy node gets that is not CHECK (default maint)"),
    (
        "--unreachable down|hold",
        "what is said if Patroni gives no usable answer; hold changes\nnothing in HAProxy (default down)",
    ),
    ("--agent-send", "HAProxy sends the check: one line 'CHECK [maint|drain|down]'"),
    ("--cacert FILE", "the CA of Patroni's certificate, PEM"),
    ("--cert FILE", "client certificate, PEM"),
    ("--key FILE", "its private key, PEM (default: in the file of --cert)"),
    ("-k, --insecure", "do not verify Patroni's certificate"),
    ("--connect-to HOST[:PORT]", "connect there, but verify and name the host of --url"),
    ("-h, --help", "print this and exit"),
    ("-V, --version", "print the version and exit"),
];

/// What to do with an unusable answer (`--unreachable`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unreachable {
    /// Out of the pool, shown as DOWN.
    #[default]
    Down,
    /// HAProxy leaves everything as it is; the health check of the server line decides alone.
    Hold,
}

impl FromStr for Unreachable {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "down" => Ok(Unreachable::Down),
            "hold" => Ok(Unreachable::Hold),
            _ => Err(format!("'{word}' is none of down, hold")),
        }
    }
}

/// A valid command line.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where Patroni is.
    pub patroni: Patroni,
    /// From the start of the process to the reply.
    pub timeout: Duration,
    /// What a healthy node gets that is not what was asked for.
    pub otherwise: Else,
    /// What is said if Patroni gives no usable answer.
    pub unreachable: Unreachable,
    /// The question; none with `--agent-send`: HAProxy sends it.
    pub question: Option<Question>,
}

/// Why there is nothing to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `--help` or `--version`: this text was asked for.
    Print(String),
    /// The command line is wrong: this is why.
    Usage(String),
}

impl From<lexopt::Error> for Stop {
    fn from(error: lexopt::Error) -> Stop {
        Stop::Usage(format!("{error}; see {NAME} --help"))
    }
}

impl Options {
    /// Reads the arguments, without the program's name.
    ///
    /// # Errors
    ///
    /// See [`Stop`].
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, Stop> {
        let mut url = "http://127.0.0.1:8008".to_owned();
        let mut timeout = Duration::from_millis(1500);
        let mut otherwise = Else::default();
        let mut unreachable = Unreachable::default();
        let mut agent_send = false;
        let mut tls = Tls::default();
        let mut connect_to = None;
        let mut check: Option<Check> = None;
        let mut parser = Parser::from_args(arguments);
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("url") => url = parser.value()?.string()?,
                Arg::Long("timeout") => timeout = parser.value()?.parse_with(duration)?,
                Arg::Long("else") => otherwise = parser.value()?.parse()?,
                Arg::Long("unreachable") => unreachable = parser.value()?.parse()?,
                Arg::Long("agent-send") => agent_send = true,
                Arg::Long("cacert") => tls.cacert = Some(parser.value()?.into()),
                Arg::Long("cert") => tls.cert = Some(parser.value()?.into()),
                Arg::Long("key") => tls.key = Some(parser.value()?.into()),
                Arg::Short('k') | Arg::Long("insecure") => tls.insecure = true,
                Arg::Long("connect-to") => connect_to = Some(parser.value()?.string()?),
                Arg::Short('h') | Arg::Long("help") => return Err(Stop::Print(help())),
                Arg::Short('V') | Arg::Long("version") => {
                    let version = env!("CARGO_PKG_VERSION");
                    return Err(Stop::Print(format!("{NAME} {version}\n")));
                }
                Arg::Value(value) if check.is_none() => {
                    check = Some(value.string()?.parse().map_err(Stop::Usage)?);
                }
                other => return Err(other.unexpected().into()),
            }
        }
        let question = match (check, agent_send) {
            (Some(_), true) => {
                let error = "with --agent-send HAProxy names the check, so give none here";
                return Err(Stop::Usage(error.to_owned()));
            }
            (None, true) => None,
            (check, false) => {
                let check = check.map_or_else(|| "primary".parse(), Ok).map_err(Stop::Usage)?;
                Some(Question { check, otherwise })
            }
        };
        Ok(Options {
            patroni: patroni(&url, connect_to.as_deref(), tls).map_err(Stop::Usage)?,
            timeout,
            otherwise,
            unreachable,
            question,
        })
    }
}

fn help() -> String {
    let mut text = format!(
        "HAProxy agent for Patroni: answers one agent check and exits.\n\n\
         Usage: {NAME} [OPTIONS] [CHECK]\n\n\
         CHECK is one of Patroni's health checks, with its query: primary (default),\n\
         replica?lag=16MB, read-only, sync, standby-leader ...\n\n"
    );
    for (option, meaning) in OPTIONS {
        for (number, meaning) in meaning.lines().enumerate() {
            let option = if number == 0 { option } else { "" };
            let _ = writeln!(text, "  {option:25} {meaning}");
        }
    }
    text += "\nExit status on a terminal: 0 in the pool, 1 healthy but not CHECK, 2 broken or\n\
             unreachable, 64 usage. Behind a socket 0 whenever an answer was written.\n";
    text
}

fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s').unwrap_or(""), 1000),
    };
    // Only digits: parse() would take a sign.
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let milliseconds = number.parse::<u64>().ok().filter(|_| digits);
    match milliseconds.and_then(|n| n.checked_mul(unit)) {
        Some(n @ 10..=10_000) => Ok(Duration::from_millis(n)),
        _ => Err("--timeout takes 10ms to 10s, such as 1500ms or 2s".to_owned()),
    }
}

fn patroni(url: &str, connect_to: Option<&str>, tls: Tls) -> Result<Patroni, String> {
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
        return Err(format!("--cacert, --cert, --key, --insecure go with https; --url is {url}"));
    }
    if https && tls.cacert.is_none() && !tls.insecure {
        return Err(
            "https needs --cacert FILE, the CA of Patroni's certificate, or --insecure".to_owned()
        );
    }
    if tls.key.is_some() && tls.cert.is_none() {
        return Err("--key goes with --cert".to_owned());
    }
    let port = port(authority, if https { 443 } else { 80 }).ok_or_else(wrong)?;
    let connect_to = match connect_to {
        Some(target) => host_and_port(target, port)?,
        None => (host, port),
    };
    Ok(Patroni { connect_to, tls: https.then_some(tls), url: uri })
}

fn host_and_port(target: &str, default: u16) -> Result<(String, u16), String> {
    if target.parse::<IpAddr>().is_ok() {
        return Ok((target.to_owned(), default));
    }
    let wrong = || format!("--connect-to {target}: write HOST or HOST:PORT");
    let authority: Authority = target.parse().map_err(|_| wrong())?;
    let host = bare(&authority).filter(|_| !target.contains('@')).ok_or_else(wrong)?;
    Ok((host, port(&authority, default).ok_or_else(wrong)?))
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
