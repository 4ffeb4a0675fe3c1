//! What is different if a human starts the agent: the settings of the units hold, so that the answer is the one that
//! HAProxy gets, and `--explain` says how it came about. Knows the settings file and the units' port; decides nothing.

use crate::NAME;
use crate::check::Check;
use crate::connection::complain;
use crate::file;
use crate::memory::Record;
use crate::options::{FOR_A_TERMINAL, Options, Stop};
use crate::patroni::{Heard, Patroni, Prepared};
use crate::question::{Question, Source};
use crate::{sockets, user};
use rustix::net::{AddressFamily, getsockname};
use rustix::process::geteuid;
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The settings of the units, as their `EnvironmentFile=` lines have them: the last one counts.
const SETTINGS: [&str; 2] =
    ["/etc/default/patroni-agent-check", "/etc/sysconfig/patroni-agent-check"];
/// The longest settings file in bytes.
const LIMIT: u64 = 64 * 1024;
/// The port of the units.
const PORT: u16 = 5555;
/// What an administrator adds to the sockets, that of both pairs and that of one.
const SOCKETS: [&str; 3] = [
    "etc/systemd/system/patroni-agent-.socket.d",
    "etc/systemd/system/patroni-agent-check.socket.d",
    "etc/systemd/system/patroni-agent-check-listen.socket.d",
];
/// What an administrator adds to the services.
const DROP_INS: [&str; 2] = [
    "/etc/systemd/system/patroni-agent-check@.service.d",
    "/etc/systemd/system/patroni-agent-check-listen.service.d",
];

/// Reads the command line as [`settled`] does, and becomes the user of the units.
///
/// # Errors
///
/// See [`settled`].
pub fn parse(arguments: Vec<OsString>) -> Result<Options, Stop> {
    // while it may still be root, who is told more
    let options = settled(arguments)?;
    if options.reopen.is_some() {
        // no check, and only root may do that
        return Ok(options);
    }
    // HAProxy's checks see no more than this user does, whatever else is asked
    let unlike = options.user.is_none().then(|| user::become_user(NAME).err()).flatten();
    if let Some(error) = unlike.as_ref().filter(|_| options.own.is_none() && !options.explain) {
        complain(&format!("the units would answer fail to HAProxy: --user {NAME}: {error}"));
    }
    let why = unlike.map_or(String::new(), |error| format!("; not here: {error}"));
    let uid = geteuid().as_raw();
    explain(&options, &format!("user: uid {uid}; the units run each check as {NAME}{why}"));
    // of EXEC: and SYSTEM: of socat, and of ncat
    if getsockname(io::stdin()).is_ok_and(|own| own.address_family() == AddressFamily::UNIX) {
        complain(
            "standard input is a Unix socket and not HAProxy's connection, so this is a check by hand; with socat, add nofork after EXEC:...",
        );
    }
    Ok(options)
}

/// Reads the command line as [`Options::parse`]. Where it has no option of its own but `--explain`, the settings of the
/// units hold, so that the answer is the one that HAProxy gets, or those of `--settings`; a CHECK takes the place of theirs.
///
/// # Errors
///
/// See [`Stop`]; with the file's name, if the settings are wrong.
pub fn settled(arguments: Vec<OsString>) -> Result<Options, Stop> {
    let given = Options::parse(arguments)?;
    if let (Some(own), Some(_)) = (given.own, &given.settings) {
        return Err(Stop::Usage(format!(
            "--{own} does not go with --settings, whose file has the options"
        )));
    }
    if given.explain {
        machine().iter().for_each(|text| complain(text));
    }
    if given.own.is_some() { Ok(given) } else { with_settings(&given) }
}

fn explain(options: &Options, text: &str) {
    if options.explain {
        complain(text);
    }
}

/// With the settings that are tried or, if there are any, of the units.
fn with_settings(given: &Options) -> Result<Options, Stop> {
    let settings = match &given.settings {
        Some(file) => Some(tried(file).map_err(Stop::Usage)?),
        None => installed(),
    };
    let Some((file, settings)) = settings else { return Ok(given.clone()) };
    explain(given, &format!("settings: {file}: {settings}"));
    let wrong = |stop| {
        let stop = match stop {
            Stop::Usage(error) => Stop::Usage(format!("{file}: {error}")),
            Stop::Print(_) => Stop::Usage(format!("{file}: {FOR_A_TERMINAL}")),
        };
        if given.settings.is_some() { stop } else { stop.with_cure() }
    };
    let theirs =
        Options::of_units(words_of(&settings).into_iter().map(OsString::from)).map_err(wrong)?;
    let asked = match (theirs.asked, given.asked.clone()) {
        (Source::CommandLine(theirs), _) if !given.named => Source::CommandLine(theirs),
        (
            Source::CommandLine(Question { otherwise, .. }) | Source::AgentSend(otherwise),
            Source::CommandLine(mine),
        ) => Source::CommandLine(Question { otherwise, ..mine }),
        (_, mine) => mine,
    };
    Ok(Options { asked, explain: given.explain, own: None, ..theirs })
}

/// The settings file that counts and its `OPTIONS=`. What is wrong with one is said.
fn installed() -> Option<(String, String)> {
    let read = |file: &str| {
        let value = match file::read(Path::new(file), LIMIT) {
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => Err(format!("{error}, so the defaults hold here")),
            Ok(bytes) => value(&bytes),
        };
        match value {
            Ok(value) => Some((file.to_owned(), value?)),
            Err(error) => {
                complain(&format!("settings: {file}: {error}"));
                None
            }
        }
    };
    SETTINGS.into_iter().filter_map(read).next_back()
}

/// The file of `--settings` and its `OPTIONS=`.
///
/// # Errors
///
/// It cannot be read, or see [`value`]: what is tried must be what will count.
fn tried(file: &Path) -> Result<(String, String), String> {
    let name = file.display().to_string();
    let bytes = file::read(file, LIMIT).map_err(|error| error.to_string());
    let value =
        bytes.and_then(|bytes| value(&bytes)).map_err(|error| format!("{name}: {error}"))?;
    if value.is_none() {
        complain(&format!(
            "settings: {name}: none in it, so the defaults hold: the units ask for primary, whatever HAProxy sends"
        ));
    }
    Ok((name, value.unwrap_or_default()))
}

/// The value of `OPTIONS=` in a settings file, as systemd.exec(5) reads it (`EnvironmentFile=`); none in a file without
/// settings.
///
/// # Errors
///
/// It has settings and `OPTIONS=` is none of them, or they are not UTF-8, so that the units do not see them.
fn value(bytes: &[u8]) -> Result<Option<String>, String> {
    let text = String::from_utf8_lossy(bytes);
    let assigned = assignments(&text, systemd_version);
    if assigned
        .iter()
        .any(|(name, value)| [name, value].iter().any(|text| text.contains('\u{fffd}')))
    {
        return Err("a setting is not UTF-8, so the units ignore the whole file".to_owned());
    }
    let first = lines(&text).next();
    match (assigned.into_iter().rfind(|(name, _)| name == "OPTIONS"), first) {
        (None, Some(line)) => Err(format!(
            "'{line}' is not OPTIONS=..., so the units ignore it and ask for primary, whatever HAProxy sends"
        )),
        (value, _) => Ok(value.map(|(_, value)| value)),
    }
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
}

/// This machine's systemd; the newest, if nobody knows.
fn systemd_version() -> u32 {
    let output = Command::new("systemctl").arg("--version").stdin(Stdio::null()).output();
    let said =
        output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    said.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(u32::MAX)
}

/// Where systemd is in a settings file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    Name,
    /// Before a value, or after something in quotes.
    BeforeValue,
    Value,
    /// In quotes of this kind.
    Quotes(char),
    Comment,
}

/// The assignments of a settings file, as systemd reads it: a backslash continues a line, even of a comment before version
/// 254; white space around a name and a value does not count; what is in quotes does.
fn assignments(text: &str, version: impl Fn() -> u32) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let (mut name, mut value) = (String::new(), String::new());
    // how much of the value is kept at its end, though it is white space
    let mut kept = 0;
    let mut at = At::Start;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let ends = matches!(c, '\n' | '\r');
        match at {
            At::Start if matches!(c, '#' | ';') => at = At::Comment,
            At::Start if matches!(c, ' ' | '\t' | '\n' | '\r') => {}
            At::Start => (at, name) = (At::Name, c.to_string()),
            At::Name if ends => at = At::Start,
            At::Name if c == '=' => (at, value, kept) = (At::BeforeValue, String::new(), 0),
            At::Name => name.push(c),
            At::BeforeValue | At::Value if ends => {
                at = At::Start;
                found.push(assignment(&name, &value, kept));
            }
            At::BeforeValue if matches!(c, '"' | '\'') => at = At::Quotes(c),
            At::BeforeValue if matches!(c, ' ' | '\t') => {}
            At::BeforeValue | At::Value if c == '\\' => {
                at = At::Value;
                value.extend(chars.next().filter(|next| !matches!(next, '\n' | '\r')));
                kept = value.len();
            }
            At::BeforeValue | At::Value => {
                at = At::Value;
                value.push(c);
            }
            At::Quotes(quote) if c == quote => (at, kept) = (At::BeforeValue, value.len()),
            At::Quotes('"') if c == '\\' => match chars.next() {
                Some('\n') | None => {}
                Some(next) if matches!(next, '"' | '\\' | '`' | '$') => value.push(next),
                Some(next) => value.extend([c, next]),
            },
            At::Quotes(_) => value.push(c),
            At::Comment if ends => at = At::Start,
            At::Comment if c == '\\' => {
                if let Some('\n' | '\r') = chars.next() {
                    if version() >= 254 {
                        at = At::Start;
                    }
                }
            }
            At::Comment => {}
        }
    }
    match at {
        At::Quotes(_) => found.push(assignment(&name, &value, value.len())),
        At::BeforeValue | At::Value => found.push(assignment(&name, &value, kept)),
        _ => {}
    }
    found
}

fn assignment(name: &str, value: &str, kept: usize) -> (String, String) {
    let (kept, rest) = value.split_at(kept);
    (name.trim_end().to_owned(), format!("{kept}{}", rest.trim_end()))
}

/// As systemd.service(5) splits `$OPTIONS` into arguments: at white space, with quotes around what has some, and as it is
/// what follows a backslash.
fn words_of(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match quote {
            _ if c == '\\' => word.get_or_insert_default().extend(chars.next()),
            Some(open) if c == open => quote = None,
            None if matches!(c, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if matches!(c, ' ' | '\t' | '\n' | '\r') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The ports of the sockets: that of the units, as drop-ins change it. systemd reads them in the order of their names.
fn ports(root: &Path) -> Vec<u16> {
    let folders = SOCKETS.iter().filter_map(|folder| fs::read_dir(root.join(folder)).ok());
    let mut files: Vec<_> = folders.flatten().flatten().map(|file| file.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    files.sort_by(|one, other| one.file_name().cmp(&other.file_name()));
    let mut ports = vec![PORT];
    for text in files.iter().filter_map(|file| file::read(file, LIMIT).ok()) {
        let text = String::from_utf8_lossy(&text).into_owned();
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            if key.trim() != "ListenStream" {
                continue;
            }
            if value.trim().is_empty() {
                ports.clear();
            }
            ports.extend(value.trim().rsplit(':').next().and_then(|port| port.parse::<u16>().ok()));
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// `--explain`, of this machine: whether HAProxy could ask, and what holds for its checks alone.
fn machine() -> Vec<String> {
    let port = ports(Path::new("/")).into_iter().filter_map(|port| {
        if !sockets::is_listening(port) {
            Some(format!(
                "nobody listens on port {port} of this machine; if HAProxy asks there: systemctl enable --now {NAME}.socket"
            ))
        } else if sockets::is_foreign(port) {
            Some(format!(
                "not systemd, but xinetd or another program listens on port {port} of this machine: see ss -ltnp sport = :{port}"
            ))
        } else {
            None
        }
    });
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
    port.chain(drop_ins).collect()
}

/// What a person is told of an answer: with `--explain` where Patroni was asked for what, whose Patroni it is, and what it
/// said; always what HAProxy would not get, and a grace period that is too long.
pub fn explain_answer(
    options: &Options,
    prepared: &Prepared,
    check: &Check,
    heard: &Heard,
    deadline: Instant,
) -> Vec<String> {
    let mut lines = Vec::new();
    if options.explain {
        let from = match &heard.from[..] {
            [patroni] => format!("Patroni {patroni}"),
            _ => prepared.tried(),
        };
        lines.push(format!("asked: {from} for {}", check.path()));
    }
    let Ok(answer) = &heard.answer else { return lines };
    if options.explain {
        let node = prepared.node(deadline).map_or(String::new(), |node| format!(" of node {node}"));
        let replication = answer.replication_state.as_deref().unwrap_or("none");
        let timeline = answer.timeline.map_or("none".to_owned(), |timeline| timeline.to_string());
        lines.push(format!(
            "answer{node}: status {}, state '{}', role '{}', replication_state {replication}, timeline {timeline}",
            answer.status, answer.state, answer.role
        ));
    }
    lines.extend(found_beside_localhost(&options.patroni, heard));
    lines.extend(too_long(options, prepared.lock_outlives(deadline)));
    lines
}

/// Who gets this answer, if Patroni was found at an address on which HAProxy need not ask.
fn found_beside_localhost(patroni: &Patroni, heard: &Heard) -> Option<String> {
    let [from] = &heard.from[..] else { return None };
    let local = from.host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    (patroni.discover && !local).then(|| {
        format!(
            "Patroni listens on {} only: HAProxy gets this answer if it asks the agent at that address, and is told down if not (see --url)",
            from.host
        )
    })
}

/// Says that the grace could outlive the leader lock, if it could: with HAProxy's interval of units/examples/haproxy.cfg.
fn too_long(options: &Options, lock: Option<Duration>) -> Option<String> {
    let (grace, timeout) = (options.policy.grace, options.timeout);
    let needed = grace + 2 * timeout + Duration::from_millis(500);
    let lock = lock.filter(|lock| *lock < needed && !grace.is_zero())?;
    let seconds = |time: Duration| time.as_secs_f32();
    Some(format!(
        "--grace {} s is too long for this cluster: its leader lock may end {} s after a good answer (ttl less retry_timeout, less the larger of loop_wait and retry_timeout), and --grace plus twice --timeout plus HAProxy's agent-inter must not exceed that",
        seconds(grace),
        seconds(lock)
    ))
}

/// `--explain`, of what was left for this check: when it had an answer last, which shows whether HAProxy asks.
pub fn explain_memory(last: &Record, asked: Duration) -> String {
    if last.at.is_zero() {
        return "memory: no answer to this check is remembered".to_owned();
    }
    let ago = |time| asked.saturating_sub(time).as_secs_f32();
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

    fn value(text: &str, version: u32) -> Option<String> {
        let mut found = assignments(text, || version).into_iter();
        found.rfind(|(name, _)| name == "OPTIONS").map(|(_, value)| value)
    }

    #[test]
    fn the_ports_are_those_that_drop_ins_leave() {
        let root = tempfile::tempdir().expect("a folder");
        assert_eq!(ports(root.path()), [PORT]);
        for (folder, file, text, wanted) in [
            (SOCKETS[0], "port.conf", "[Socket]\nListenStream=5556\n", &[5555, 5556][..]),
            (
                SOCKETS[1],
                "fence.conf",
                "[Socket]\nIPAddressDeny=any\nListenStream=[::1]:5557",
                &[5555, 5556, 5557],
            ),
            (SOCKETS[2], "old", "[Socket]\nListenStream=1\n", &[5555, 5556, 5557]),
            (
                SOCKETS[0],
                "port.conf",
                "[Socket]\nListenStream =\nListenStream= 0.0.0.0:5558\n",
                &[5558],
            ),
            (SOCKETS[0], "fence.conf", "[Socket]\nListenStream=/run/x\n", &[5558]),
        ] {
            fs::create_dir_all(root.path().join(folder)).expect("a folder");
            fs::write(root.path().join(folder).join(file), text).expect("a file");
            assert_eq!(ports(root.path()), wanted, "{file}");
        }
    }

    #[test]
    fn the_settings_are_read_as_systemd_reads_them() {
        let cases = [
            ("OPTIONS=\"--agent-send\"\n", Some("--agent-send")),
            ("# x\nOPTIONS=--agent-send --grace 2s \n", Some("--agent-send --grace 2s")),
            ("OPTIONS='--key \"a b\"'", Some("--key \"a b\"")),
            ("OPTIONS=a\n OPTIONS=b\n", Some("b")),
            ("OPTIONS=", Some("")),
            ("OPTIONS = primary", Some("primary")),
            ("  OPTIONS\t=  a b \t\n", Some("a b")),
            ("OPTIONS=\"a\" 'b'\n", Some("ab")),
            ("OPTIONS=\"a\" b  \n", Some("ab")),
            ("OPTIONS=a \"b c\"", Some("a \"b c\"")),
            ("OPTIONS=a \\\n  b\\ \n", Some("a   b ")),
            ("OPTIONS=\"a\nb\\\nc\\n\\\"\"", Some("a\nbc\\n\"")),
            ("OPTIONS='a\\\nb'", Some("a\\\nb")),
            ("OPTIONS=a\rOPTIONS=b\r\n", Some("b")),
            ("OPTIONS=a#b # c", Some("a#b # c")),
            ("OPTIONS='open", Some("open")),
            ("OPTIONS", None),
            ("OPTIONS=a\nopt\n", Some("a")),
            ("#OPTIONS=a\n;OPTIONS=b\n", None),
            ("OPTION=a", None),
            ("export OPTIONS=a", None),
            ("", None),
        ];
        for (text, wanted) in cases {
            for version in [247, 262] {
                let value = value(text, version);
                assert_eq!(value.as_deref(), wanted, "{text}");
            }
        }
        let continued = "# a comment \\\nOPTIONS=a\nOPTIONS=b\n# and \\x\n";
        assert_eq!(assignments(continued, || 253).len(), 1);
        assert_eq!(assignments(continued, || 254).len(), 2);
        assert_eq!(words_of(r#"a\ b "c\"d" '\'' \"#), ["a b", "c\"d", "'", ""]);
        assert_eq!(words_of(" --key  \"a b\"c '' d\t"), ["--key", "a bc", "", "d"]);
        assert_eq!(words_of(""), [""; 0]);
    }
}
