//! What is different if a human starts the agent: the settings of the units hold, so that the answer is the one that
//! HAProxy gets, and `--explain` says how it came about. Knows the settings file and the units' port; decides nothing.

use crate::NAME;
use crate::check::Check;
use crate::connection::complain;
use crate::decide::Times;
use crate::file;
use crate::memory::Record;
use crate::options::{FOR_A_TERMINAL, Options, Stop};
use crate::patroni::{Answer, NoAnswer, Prepared};
use crate::question::{Asked, Question};
use crate::{sockets, user};
use rustix::process::geteuid;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

/// The settings of the units, as their `EnvironmentFile=` lines have them: the last one counts.
const SETTINGS: [&str; 2] =
    ["/etc/default/patroni-agent-check", "/etc/sysconfig/patroni-agent-check"];
/// The longest settings file in bytes.
const LIMIT: u64 = 64 * 1024;
/// The port of the units.
const PORT: u16 = 5555;
/// What an administrator adds to the services.
const DROP_INS: [&str; 2] = [
    "/etc/systemd/system/patroni-agent-check@.service.d",
    "/etc/systemd/system/patroni-agent-check-listen.service.d",
];

/// Reads the command line as [`Options::parse`]. Where it has no option of its own but `--explain`, the settings and the
/// user of the units hold, so that the answer is the one that HAProxy gets; a CHECK takes the place of theirs.
///
/// # Errors
///
/// See [`Stop`]; with the file's name, if the settings are wrong.
pub fn parse(arguments: Vec<OsString>) -> Result<Options, Stop> {
    let words = arguments.iter().filter(|argument| *argument != "--explain");
    let own = words.clone().any(|argument| argument.as_bytes().starts_with(b"-"));
    let check = words.count() > 0;
    let given = Options::parse(arguments)?;
    let explain = |text: &str| {
        if given.explain {
            complain(text);
        }
    };
    // while it may still be root, who is told more
    if given.explain {
        machine().iter().for_each(|text| complain(text));
    }
    let options = if own { given.clone() } else { with_settings(&given, check, explain)? };
    let unlike = match (own, &options.user) {
        (false, None) => user::become_user(NAME).err(),
        _ => None,
    };
    let why = unlike.map_or(String::new(), |error| format!("; not here: {error}"));
    explain(&format!("user: uid {}; the units run each check as {NAME}{why}", geteuid().as_raw()));
    Ok(options)
}

/// With the settings of the units, if there are any.
fn with_settings(given: &Options, check: bool, explain: impl Fn(&str)) -> Result<Options, Stop> {
    let Some((file, settings)) = settings() else { return Ok(given.clone()) };
    explain(&format!("settings: {file}: {settings}"));
    let wrong = |stop| match stop {
        Stop::Usage(error) => Stop::Usage(format!("{file}: {error}")),
        Stop::Print(_) => Stop::Usage(format!("{file}: {FOR_A_TERMINAL}")),
    };
    let theirs =
        Options::parse(words_of(&settings).into_iter().map(OsString::from)).map_err(wrong)?;
    let asked = match (theirs.asked, given.asked.clone()) {
        (Asked::Fixed(theirs), _) if !check => Asked::Fixed(theirs),
        (
            Asked::Fixed(Question { otherwise, .. }) | Asked::AgentSend(otherwise),
            Asked::Fixed(mine),
        ) => Asked::Fixed(Question { otherwise, ..mine }),
        (_, mine) => mine,
    };
    Ok(Options { asked, explain: given.explain, ..theirs })
}

/// The settings file that counts and its `OPTIONS=`. What is wrong with one is said.
fn settings() -> Option<(&'static str, String)> {
    let read = |file| match read(Path::new(file)) {
        Ok(value) => Some((file, value?)),
        Err(error) => {
            complain(&format!("settings: {file}: {error}"));
            None
        }
    };
    SETTINGS.into_iter().filter_map(read).next_back()
}

/// The value of `OPTIONS=` in a settings file, as systemd.exec(5) reads it (`EnvironmentFile=`); none without such a file.
///
/// # Errors
///
/// The file cannot be read, or it has settings and `OPTIONS=` is none of them, so that the units do not see them.
fn read(path: &Path) -> Result<Option<String>, String> {
    let text = match file::read(path, LIMIT) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{error}, so the defaults hold here")),
    };
    match (value(&text), lines(&text).next()) {
        (None, Some(line)) => Err(format!(
            "'{line}' is not OPTIONS=..., so the units ignore it and ask for primary, whatever HAProxy sends"
        )),
        (value, _) => Ok(value),
    }
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
}

fn value(text: &str) -> Option<String> {
    let value = lines(text).filter_map(|line| line.strip_prefix("OPTIONS=")).last()?.trim();
    let quoted = value.strip_prefix(['"', '\'']).zip(value.chars().next());
    let unquoted = quoted.and_then(|(rest, quote)| rest.split(quote).next());
    Some(unquoted.unwrap_or(value).to_owned())
}

/// As systemd.service(5) splits `$OPTIONS` into arguments: at white space, with quotes around what has some.
fn words_of(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in text.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if matches!(c, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// `--explain`, of this machine: whether HAProxy could ask, and what holds for its checks alone.
fn machine() -> Vec<String> {
    let port = if !sockets::is_listening(PORT) {
        Some(format!(
            "nobody listens on port {PORT} of this machine; if HAProxy asks there: systemctl enable --now {NAME}.socket"
        ))
    } else if sockets::is_foreign(PORT) {
        Some(format!(
            "not systemd, but xinetd or another program listens on port {PORT} of this machine: see ss -ltnp sport = :{PORT}"
        ))
    } else {
        None
    };
    let files = DROP_INS.into_iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
    let mut files: Vec<_> = files.flatten().map(|file| file.path().display().to_string()).collect();
    files.retain(|file| file.ends_with(".conf"));
    files.sort();
    let drop_ins = (!files.is_empty()).then(|| {
        format!(
            "drop-ins, which hold for HAProxy's checks and not for this one: {}",
            files.join(", ")
        )
    });
    port.into_iter().chain(drop_ins).collect()
}

/// `--explain`, of Patroni: where it was asked for what, whose Patroni it is, and what it said.
pub fn asked(
    prepared: Option<&Prepared>,
    check: &Check,
    answer: &Result<Answer, NoAnswer>,
    deadline: Instant,
) -> Vec<String> {
    let tried =
        prepared.map(|prepared| format!("asked: {} for {}", prepared.tried(), check.path()));
    let answer = answer.as_ref().ok().map(|answer| {
        let node = prepared.and_then(|prepared| prepared.node(deadline));
        let node = node.map_or(String::new(), |node| format!(" of node {node}"));
        let replication = answer.replication_state.as_deref().unwrap_or("none");
        let timeline = answer.timeline.map_or("none".to_owned(), |timeline| timeline.to_string());
        format!(
            "answer{node}: status {}, state '{}', role '{}', replication_state {replication}, timeline {timeline}",
            answer.status, answer.state, answer.role
        )
    });
    tried.into_iter().chain(answer).collect()
}

/// `--explain`, of what was left for this check: when it had an answer last, which shows whether HAProxy asks.
pub fn memory(last: &Record, times: Times) -> String {
    if last.at.is_zero() {
        return "memory: no answer to this check is remembered".to_owned();
    }
    let ago = |time| times.asked.saturating_sub(time).as_secs_f32();
    let trouble = last.trouble.map(|since| format!("; trouble for {:.1} s", ago(since)));
    format!(
        "memory: the last answer to this check came {:.1} s ago{}",
        ago(last.at),
        trouble.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_are_read_as_systemd_reads_them() {
        let cases = [
            ("OPTIONS=\"--agent-send\"\n", Some("--agent-send")),
            ("# x\nOPTIONS=--agent-send --grace 2s \n", Some("--agent-send --grace 2s")),
            ("OPTIONS='--key \"a b\"'", Some("--key \"a b\"")),
            ("OPTIONS=a\n OPTIONS=b\n", Some("b")),
            ("OPTIONS=", Some("")),
            ("#OPTIONS=a\n;OPTIONS=b\n", None),
            ("OPTION=a", None),
            ("export OPTIONS=a", None),
            ("", None),
        ];
        for (text, wanted) in cases {
            assert_eq!(value(text).as_deref(), wanted, "{text}");
        }
        assert_eq!(words_of(" --key  \"a b\"c '' d\t"), ["--key", "a bc", "", "d"]);
        assert_eq!(words_of(""), [""; 0]);
    }
}
