//! The command line: the only way of configuring. Knows the options and nothing of what is done
//! with them.

use crate::check::{Check, Question};
use crate::decide::{Policy, Unreachable};
use crate::patroni::Patroni;
use crate::patroni::tls::Tls;
use crate::reply::Otherwise;
use lexopt::{Arg, Parser, ValueExt};
use std::ffi::OsString;
use std::fmt::Write;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// This program's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");

/// One option, as `--help`, the manual, the completions and the README have it.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    /// Its letter, if it has one.
    pub short: Option<char>,
    /// Its name, without the dashes.
    pub long: &'static str,
    /// What it takes: `a|b` is a choice, `FILE` a file; empty if it takes nothing.
    pub value: &'static str,
    /// What holds without it; empty if that says nothing.
    pub default: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

const fn takes(
    long: &'static str,
    value: &'static str,
    default: &'static str,
    meaning: &'static str,
) -> Described {
    Described { short: None, long, value, default, meaning }
}

const fn flag(short: Option<char>, long: &'static str, meaning: &'static str) -> Described {
    Described { short, long, value: "", default: "", meaning }
}

/// All options. What is said of them anywhere is made from this (`tests/manual.rs`).
pub const OPTIONS: &[Described] = &[
    takes(
        "url",
        "URL",
        URL,
        "Patroni's REST API, http or https; a host name must be in /etc/hosts, unless there is --connect-to",
    ),
    takes("timeout", "DURATION", "1500ms", "one deadline for everything, 10ms to 10s"),
    takes("else", "maint|drain|down", "maint", "what a healthy node gets that is not CHECK"),
    takes(
        "unreachable",
        "down|keep",
        "down",
        "what is said if Patroni gives no usable answer; keep changes nothing in HAProxy",
    ),
    flag(
        None,
        "agent-send",
        "HAProxy sends the check: one line CHECK [maint|drain|down], at most 256 bytes",
    ),
    takes(
        "hold-file",
        "FILE",
        HOLD_FILE,
        "if there is this file, its first word drain or maint is what a ready node gets, and the rest says why",
    ),
    takes(
        "grace",
        "DURATION",
        "3s",
        "how long after a good answer trouble changes nothing in HAProxy, at most 15s; 0 for never",
    ),
    takes(
        "memory-file",
        "FILE",
        MEMORY_FILE,
        "what one check leaves to the next, for --grace and the journal",
    ),
    takes(
        "idle",
        "DURATION",
        "10s",
        "with a listening socket: how long to stay after the last check, 1s to 1h",
    ),
    takes(
        "user",
        "NAME",
        "",
        "if root starts it: become this user of /etc/passwd before anything else",
    ),
    flag(
        None,
        "syslog",
        "what goes to the journal goes by /dev/log, not by stderr, and nothing waits",
    ),
    takes("cacert", "FILE", "", "the CA of Patroni's certificate, PEM; public CAs are not used"),
    takes("cert", "FILE", "", "client certificate, PEM"),
    takes(
        "key",
        "FILE",
        "",
        "its private key, PEM; without it the key is looked for in the file of --cert",
    ),
    flag(Some('k'), "insecure", "do not verify Patroni's certificate"),
    takes("connect-to", "HOST[:PORT]", "", "connect there, but verify and name the host of --url"),
    flag(Some('h'), "help", "print this and exit"),
    flag(Some('V'), "version", "print the version and exit"),
];

const URL: &str = "http://127.0.0.1:8008";
const HOLD_FILE: &str = "/run/patroni-agent-check/hold";
const MEMORY_FILE: &str = "/run/patroni-agent-check/memory";
const GRACE: Duration = Duration::from_secs(3);
const TIMEOUT: Duration = Duration::from_millis(1500);
/// How long a process with a listening socket stays after the last check (`--idle`).
pub const IDLE: Duration = Duration::from_secs(10);

/// A valid command line.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where Patroni is.
    pub patroni: Patroni,
    /// From the start of the process to the reply.
    pub timeout: Duration,
    /// What a healthy node gets that is not what was asked for.
    pub otherwise: Otherwise,
    /// How trouble is answered.
    pub policy: Policy,
    /// The operator's hold.
    pub hold_file: PathBuf,
    /// What one check leaves to the next.
    pub memory_file: PathBuf,
    /// With a listening socket: how long to stay after the last check.
    pub idle: Duration,
    /// Whom to become if root starts it.
    pub user: Option<String>,
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
        let mut url = URL.to_owned();
        let mut timeout = TIMEOUT;
        let mut hold_file = PathBuf::from(HOLD_FILE);
        let mut memory_file = PathBuf::from(MEMORY_FILE);
        let mut grace = GRACE;
        let mut idle = IDLE;
        let mut user = None;
        let mut otherwise = Otherwise::default();
        let mut unreachable = Unreachable::default();
        let mut agent_send = false;
        let mut tls = Tls::default();
        let mut connect_to = None;
        let mut check: Option<Check> = None;
        let mut parser = Parser::from_args(arguments);
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("url") => url = parser.value()?.string()?,
                Arg::Long("timeout") => timeout = parser.value()?.parse_with(timeout_value)?,
                Arg::Long("else") => otherwise = parser.value()?.parse()?,
                Arg::Long("unreachable") => unreachable = parser.value()?.parse()?,
                Arg::Long("agent-send") => agent_send = true,
                Arg::Long("hold-file") => hold_file = parser.value()?.into(),
                Arg::Long("grace") => grace = parser.value()?.parse_with(grace_value)?,
                Arg::Long("memory-file") => memory_file = parser.value()?.into(),
                Arg::Long("idle") => idle = parser.value()?.parse_with(idle_value)?,
                Arg::Long("user") => user = Some(parser.value()?.string()?),
                // done before the command line is read
                Arg::Long("syslog") => {}
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
            patroni: Patroni::new(&url, connect_to.as_deref(), tls).map_err(Stop::Usage)?,
            timeout,
            otherwise,
            policy: Policy { unreachable, grace },
            hold_file,
            memory_file,
            idle,
            user,
            question,
        })
    }
}

impl Described {
    /// The option with its value, such as `-k, --insecure` or `--url URL`.
    pub fn usage(&self) -> String {
        let short = self.short.map(|short| format!("-{short}, ")).unwrap_or_default();
        let space = if self.value.is_empty() { "" } else { " " };
        format!("{short}--{}{space}{}", self.long, self.value)
    }
}

/// What `--help` prints.
pub fn help() -> String {
    let mut text = format!(
        "HAProxy agent for Patroni: answers one agent check and exits.\n\n\
         Usage: {NAME} [OPTIONS] [CHECK]\n\n\
         CHECK is one of Patroni's health checks, with its query: primary (default),\n\
         replica?lag=16MB, read-only, sync, standby-leader ...\n\n"
    );
    for option in OPTIONS {
        let mut meaning = option.meaning.to_owned();
        if !option.default.is_empty() {
            let _ = write!(meaning, " (default {})", option.default);
        }
        let (mut column, mut length) = (format!("  {:26}", option.usage()), 0);
        for word in meaning.split(' ') {
            if length + word.len() > 50 {
                let _ = writeln!(text, "{}", column.trim_end());
                (column, length) = (" ".repeat(28), 0);
            }
            length += word.len() + 1;
            column += &format!("{word} ");
        }
        let _ = writeln!(text, "{}", column.trim_end());
    }
    text += "\nExit status on a terminal: 0 in the pool, 1 healthy but not CHECK, 2 broken or\n\
             unreachable, 64 usage. Behind a socket 0 whenever an answer was written.\n\
             See patroni-agent-check(8).\n";
    text
}

fn timeout_value(text: &str) -> Result<Duration, String> {
    duration(text, 10..=10_000)
        .ok_or("--timeout takes 10ms to 10s, such as 1500ms or 2s".to_owned())
}

fn grace_value(text: &str) -> Result<Duration, String> {
    let grace = if text == "0" { Some(Duration::ZERO) } else { duration(text, 0..=15_000) };
    grace.ok_or("--grace takes 0 to 15s, such as 3s or 2500ms".to_owned())
}

fn idle_value(text: &str) -> Result<Duration, String> {
    duration(text, 1_000..=3_600_000).ok_or("--idle takes 1s to 1h, such as 10s or 5min".to_owned())
}

/// A whole number with its unit; none if it is not one or not within these milliseconds.
fn duration(text: &str, milliseconds: RangeInclusive<u64>) -> Option<Duration> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    // Only digits: parse() would take a sign.
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let duration = number.parse::<u64>().ok().filter(|_| digits)?.checked_mul(unit)?;
    milliseconds.contains(&duration).then(|| Duration::from_millis(duration))
}
