//! The command line, which is the only configuration. In go the arguments, out come options. The table is hand-written,
//! since a crate such as clap slows down each start. Knows nothing of files.

use crate::decide::grace::Policy;
use crate::haproxy::reply::Otherwise;
use crate::patroni::check::{self, Check};
use crate::patroni::location::Patroni;
use crate::patroni::tls::Tls;
use crate::run::Paths;
use crate::{NAME, VERSION};
use lexopt::{Arg, Parser, ValueExt};
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::mem::take;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// One option, as `--help`, the manual, the completions and docs/reference.md show it, and what it sets.
#[derive(Clone, Copy, Debug)]
pub struct OptionRow {
    /// Its short form, if it has one.
    pub short: Option<char>,
    /// Its name, without the dashes.
    pub long: &'static str,
    /// What it takes: `a|b` is a choice, `FILE` a file; empty if it takes nothing.
    pub value: &'static str,
    /// Its default value; empty if there is none.
    pub default: &'static str,
    /// What it means.
    pub meaning: &'static str,
    set: Set,
}

/// What an option does.
#[derive(Clone, Copy, Debug)]
enum Set {
    Flag(fn(&mut Options)),
    Value(SetValue),
    Print(fn() -> String),
}

type SetValue = fn(&mut Options, &OsStr) -> Result<(), String>;
type Text = &'static str;

const fn takes(long: Text, value: Text, default: Text, set: SetValue, meaning: Text) -> OptionRow {
    OptionRow { short: None, long, value, default, meaning, set: Set::Value(set) }
}

const fn flag(short: Option<char>, long: Text, set: Set, meaning: Text) -> OptionRow {
    OptionRow { short, long, value: "", default: "", meaning, set }
}

pub(crate) const IN_THE_POOL: u8 = 0;
pub(crate) const OUT_OF_THE_POOL: u8 = 1;
pub(crate) const IN_TROUBLE: u8 = 2;
/// As in sysexits(3).
pub(crate) const USAGE: u8 = 64;
/// The exit statuses of a check by hand.
pub const EXIT_STATUSES: [(u8, Text); 4] = [
    (IN_THE_POOL, "in the pool"),
    (OUT_OF_THE_POOL, "not in the pool, as expected: another role, a hold, or Patroni is at work"),
    (IN_TROUBLE, "broken or unreachable, or trouble that changes nothing in HAProxy"),
    (USAGE, "wrong options or settings; the message says how to fix them"),
];

/// All options. The help, the manual, the completions and docs/reference.md are made from this table (`tests/plain/manual.rs`).
#[rustfmt::skip] // rustfmt would give each argument a line of its own
pub const OPTIONS: &[OptionRow] = &[
    takes("url", "URL", "", |o, v| set_text(&mut o.url, v),
        "Patroni's REST API, http or https; a host name must be in /etc/hosts unless --connect-to \
         is given (default http://127.0.0.1:8008 or, if Patroni does not listen there, the same port of the \
         address on which HAProxy asked)"),
    takes("patroni-user", "USER", "", |o, v| set_text(&mut o.patroni_user, v),
        "without --url and --connect-to: Patroni's user, a name in /etc/passwd or a number; the agent asks only \
         this user's socket or root's (default the owner of /run/postgresql, or else postgres)"),
    takes("timeout", "DURATION", "1500ms",
        |o, v| set_within(&mut o.timeout, v, 10..=10_000, "10ms to 10s, such as 1500ms or 2s"),
        "time limit for the whole check, 10ms to 10s"),
    takes("else", "maint|drain|down", "maint", |o, v| set_word(&mut o.otherwise, v),
        "state to report for a healthy node that does not match CHECK"),
    takes("unreachable", "down|keep", "down", |o, v| set(&mut o.policy.keep, parse_unreachable(v)),
        "state to report if Patroni gives no usable answer; keep leaves HAProxy's state as it is"),
    takes("stopping", "drain|maint", "drain", |o, v| set_word(&mut o.policy.stopping, v),
        "state to report, for at most 10 s, for a primary that Patroni stops or restarts while it \
         holds the leader lock"),
    flag(None, "agent-send", Set::Flag(|o| o.agent_send = true),
        "read the check from HAProxy: one line CHECK [maint|drain|down], at most 256 bytes, or \
         hold: up drain while an operator's hold is active, otherwise up ready, without asking Patroni"),
    takes("hold-file", "FILE", "/run/patroni-agent-check/hold",
        |o, v| set_path(&mut o.files.hold, v),
        "if this file exists, a node that is ready reports its first word, drain or maint, and the \
         rest as the reason"),
    takes("before-stop-file", "FILE", "/run/patroni-agent-check/before-stop",
        |o, v| set_path(&mut o.files.before_stop, v),
        "where the hook for Patroni's before_stop notes that PostgreSQL is about to stop"),
    takes("grace", "DURATION", "3s", |o, v| set_grace(&mut o.policy.grace, v),
        "how long after a good answer a failure leaves HAProxy's state as it is, at most 15s; 0 \
         turns this off"),
    takes("memory-file", "FILE", "/run/patroni-agent-check/memory",
        |o, v| set_path(&mut o.files.memory, v),
        "where a check leaves its result for the next one, for --grace and the journal"),
    takes("idle", "DURATION", "10s",
        |o, v| set_within(&mut o.idle, v, 1_000..=3_600_000, "1s to 1h, such as 10s or 5min"),
        "with a listening socket: exit after this time without a check, 1s to 1h"),
    takes("user", "NAME", "", |o, v| set_text(&mut o.user, v),
        "if started by root: become this user, as /etc/passwd has it, before anything else"),
    // `main` opens the system log, before it reads the command line
    flag(None, "syslog", Set::Flag(|_| {}),
        "log to /dev/log instead of stderr, and never wait for it"),
    takes("cacert", "FILE", "", |o, v| set_path(&mut o.tls.cacert, v),
        "the CA that signed Patroni's certificate, or that certificate itself, PEM; public CAs are \
         not trusted"),
    takes("cert", "FILE", "", |o, v| set_path(&mut o.tls.cert, v), "client certificate, PEM"),
    takes("key", "FILE", "", |o, v| set_path(&mut o.tls.key, v),
        "private key of --cert, PEM; by default it is read from the file of --cert"),
    flag(Some('k'), "insecure", Set::Flag(|o| o.tls.insecure = true),
        "do not verify Patroni's certificate"),
    takes("connect-to", "HOST[:PORT]", "", |o, v| set_text(&mut o.connect_to, v),
        "connect to this address, but verify and send the host name of --url"),
    takes("settings", "FILE", "", |o, v| set_path(&mut o.settings, v),
        "by hand: try the settings in this file before they count, in place of those of the units; \
         with no other option but --explain"),
    flag(None, "explain", Set::Flag(|o| o.explain = true),
        "by hand: also print what was asked, what came back, and what looks wrong, on stderr"),
    takes("reopen", "UNIT", "", |o, v| set_text(&mut o.reopen, v),
        "no check: start this socket unit again, which systemd has given up \
         (patroni-agent-check-reopen@.service)"),
    flag(Some('h'), "help", Set::Print(help), "print this help and exit"),
    flag(Some('V'), "version", Set::Print(|| format!("{NAME} {VERSION}\n")), "print the version and exit"),
];

/// The options of a valid command line.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The local Patroni.
    pub patroni: Patroni,
    url: Option<String>,
    connect_to: Option<String>,
    patroni_user: Option<String>,
    tls: Tls,
    /// The time limit from the start of the process to the reply.
    pub timeout: Duration,
    /// How trouble is answered.
    pub policy: Policy,
    /// The files in /run.
    pub files: Paths,
    /// How long a listener waits for another check before it exits.
    pub idle: Duration,
    /// The user that the agent becomes if root starts it.
    pub user: Option<String>,
    /// The health check, if one was given.
    pub check: Option<Check>,
    /// Whether HAProxy sends the health check.
    pub agent_send: bool,
    /// The state of a healthy node that does not match, unless HAProxy's line names one.
    pub otherwise: Otherwise,
    /// The last option on the command line other than `--settings` and `--explain`.
    pub other: Option<&'static str>,
    /// By hand: the file whose settings are tried.
    pub settings: Option<PathBuf>,
    /// By hand: explain the reply.
    pub explain: bool,
    /// The socket unit to start again, instead of a check.
    pub reopen: Option<String>,
}

/// The reply to HAProxy if the settings contain `--help` or `--version`.
pub const FOR_A_TERMINAL: &str = "--help and --version are for a terminal";

/// Why there is no check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `--help` or `--version`, with the text to print.
    Print(String),
    /// The command line is wrong, with the reason.
    Usage(String),
}

impl From<lexopt::Error> for Stop {
    fn from(error: lexopt::Error) -> Stop {
        Stop::Usage(format!("{error}; see --help"))
    }
}

impl Stop {
    /// Names --settings, which shows such a mistake before HAProxy meets it. The hint comes last, since HAProxy may cut the
    /// line.
    #[must_use]
    pub fn with_hint(self) -> Stop {
        self.map_usage(|error| format!("{error}; try a copy: --settings FILE"))
    }

    fn map_usage(self, change: impl FnOnce(String) -> String) -> Stop {
        match self {
            Stop::Usage(error) => Stop::Usage(change(error)),
            print @ Stop::Print(_) => print,
        }
    }
}

impl Options {
    /// Parses the arguments, without the program's name.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, Stop> {
        let arguments: Vec<_> = arguments.into_iter().collect();
        let hide = |error| hide_secrets(error, &arguments);
        Options::read(&arguments).map_err(|stop| stop.map_usage(hide))
    }

    /// Parses the arguments of HAProxy's checks. An option that is only for checks by hand is an error.
    pub fn parse_for_units(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, Stop> {
        let options = Options::parse(arguments)?;
        let error = match &options {
            _ if options.settings.is_some() => "--settings is for a check by hand",
            _ if options.reopen.is_some() => "--reopen is no check",
            _ => return Ok(options),
        };
        Err(Stop::Usage(format!("{error}, and not for the settings")))
    }

    fn read(arguments: &[OsString]) -> Result<Options, Stop> {
        let mut options = Options::defaults().map_err(Stop::Usage)?;
        let mut parser = Parser::from_args(arguments);
        while let Some(argument) = parser.next()? {
            if let (Arg::Value(value), None) = (&argument, &options.check) {
                options.check = Some(value.clone().string()?.parse().map_err(Stop::Usage)?);
                continue;
            }
            let option = OPTIONS.iter().find(|option| match &argument {
                Arg::Long(long) => *long == option.long,
                Arg::Short(short) => Some(*short) == option.short,
                Arg::Value(_) => false,
            });
            let Some(option) = option else { return Err(argument.unexpected().into()) };
            if !["settings", "explain"].contains(&option.long) {
                options.other = Some(option.long);
            }
            match option.set {
                Set::Flag(set) => set(&mut options),
                Set::Print(text) => return Err(Stop::Print(text())),
                Set::Value(set) => {
                    let value = parser.value()?;
                    set(&mut options, &value).map_err(|error| {
                        let value = value.to_string_lossy();
                        Stop::Usage(format!("--{} {value}: {error}", option.long))
                    })?;
                }
            }
        }
        options.resolve().map_err(Stop::Usage)
    }

    pub(crate) fn defaults() -> Result<Options, String> {
        let mut options = Options::default();
        for option in OPTIONS.iter().filter(|option| !option.default.is_empty()) {
            if let Set::Value(set) = option.set {
                set(&mut options, option.default.as_ref())?;
            }
        }
        Ok(options)
    }

    /// Refuses options that do not go together, and completes the others.
    fn resolve(mut self) -> Result<Options, String> {
        if self.agent_send && self.check.is_some() {
            return Err("with --agent-send HAProxy sends the check, so give none here".to_owned());
        }
        let (url, connect_to, tls) = (self.url.take(), self.connect_to.take(), take(&mut self.tls));
        self.patroni = Patroni::new(url.as_deref(), connect_to.as_deref(), tls)?;
        self.patroni.user = self.patroni_user.take();
        if self.patroni.user.is_some() && !self.patroni.discover {
            return Err("--patroni-user goes without --url and --connect-to".to_owned());
        }
        Ok(self)
    }

    /// The health check that HAProxy cannot change; none if HAProxy sends it.
    pub fn fixed_check(&self) -> Option<Check> {
        (!self.agent_send).then(|| self.check.clone().unwrap_or_default())
    }
}

/// Hides names and passwords before an `@`, since every peer is told what is wrong with the command line.
fn hide_secrets(mut error: String, arguments: &[OsString]) -> String {
    for argument in arguments {
        let argument = argument.to_string_lossy();
        let Some((before, _)) = argument.rsplit_once('@') else { continue };
        let value = if before.starts_with('-') { before.split_once('=') } else { None };
        let value = value.map_or(before, |(_, value)| value);
        let secret = value.split_once("://").map_or(value, |(_, secret)| secret);
        // as it is written, and as it is quoted
        for secret in [secret, format!("{secret:?}").trim_matches('"')] {
            if !secret.is_empty() {
                error = error.replace(secret, "...");
            }
        }
    }
    error
}

fn set<T>(field: &mut T, value: Result<T, String>) -> Result<(), String> {
    *field = value?;
    Ok(())
}

fn set_path<T: From<PathBuf>>(field: &mut T, value: &OsStr) -> Result<(), String> {
    set(field, Ok(PathBuf::from(value).into()))
}

fn set_text(field: &mut Option<String>, value: &OsStr) -> Result<(), String> {
    set(field, text(value).map(|text| Some(text.to_owned())))
}

fn set_word<T: FromStr<Err = String>>(field: &mut T, value: &OsStr) -> Result<(), String> {
    set(field, text(value).and_then(str::parse))
}

fn text(value: &OsStr) -> Result<&str, String> {
    value.to_str().ok_or("not valid UTF-8".to_owned())
}

impl OptionRow {
    /// The option with its value, such as `-k, --insecure` or `--url URL`.
    pub fn usage(&self) -> String {
        let short = self.short.map(|short| format!("-{short}, ")).unwrap_or_default();
        let space = if self.value.is_empty() { "" } else { " " };
        format!("{short}--{}{space}{}", self.long, self.value)
    }
}

/// The text of `--help`.
pub fn help() -> String {
    let mut text = format!(
        "HAProxy agent for Patroni: answers one agent check and exits.\n\n\
         Usage: {NAME} [OPTIONS] [CHECK]\n\n\
         CHECK is one of Patroni's health checks, with its query, such as\n\
         replica?lag=16MB; primary is the default:\n"
    );
    wrap(&mut text, "  ", 70, check::names());
    text += "\n";
    for option in OPTIONS {
        let mut meaning = option.meaning.to_owned();
        if !option.default.is_empty() {
            let _ = write!(meaning, " (default {})", option.default);
        }
        wrap(&mut text, &format!("  {:26}", option.usage()), 50, meaning.split(' '));
    }
    text += "\nExit status by hand:\n";
    for (status, meaning) in EXIT_STATUSES {
        wrap(&mut text, &format!("  {status:<4}"), 70, meaning.split(' '));
    }
    text += "Behind a socket, it is 0 whenever an answer was written.\n\n\
             See patroni-agent-check(8).\n";
    text
}

/// Adds words in a column of this width, with `before` in front of its first line.
pub fn wrap<'a>(
    text: &mut String,
    before: &str,
    width: usize,
    words: impl Iterator<Item = &'a str>,
) {
    let (mut line, mut length) = (before.to_owned(), 0);
    for word in words {
        if length + word.len() > width {
            let _ = writeln!(text, "{}", line.trim_end());
            (line, length) = (" ".repeat(before.len()), 0);
        }
        length += word.len() + 1;
        line += &format!("{word} ");
    }
    let _ = writeln!(text, "{}", line.trim_end());
}

fn parse_unreachable(value: &OsStr) -> Result<bool, String> {
    match text(value)? {
        "down" => Ok(false),
        "keep" => Ok(true),
        _ => Err("write down or keep".to_owned()),
    }
}

fn set_grace(field: &mut Duration, value: &OsStr) -> Result<(), String> {
    if value == "0" {
        set(field, Ok(Duration::ZERO))
    } else {
        set_within(field, value, 0..=15_000, "0 to 15s, such as 3s or 2500ms")
    }
}

fn set_within(
    field: &mut Duration,
    value: &OsStr,
    limits: RangeInclusive<u64>,
    range: &str,
) -> Result<(), String> {
    set(field, parse_duration(value, limits).ok_or_else(|| format!("write {range}")))
}

/// Parses a whole number with its unit; none if it is not valid or not within these milliseconds.
pub fn parse_duration(value: &OsStr, milliseconds: RangeInclusive<u64>) -> Option<Duration> {
    let text = value.to_str()?;
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    // only digits, since parse() would accept a sign
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let duration = number.parse::<u64>().ok().filter(|_| digits)?.checked_mul(unit)?;
    milliseconds.contains(&duration).then(|| Duration::from_millis(duration))
}
