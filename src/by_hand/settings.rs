//! The settings of a check by hand: those of the units, or those that `--settings` tries. In go the arguments, out come
//! options. Hand-written, since the file must be read exactly as systemd reads it. Knows nothing of Patroni and HAProxy.

use super::sockets::explain_sockets;
use crate::file;
use crate::journal::tell_operator;
use crate::options::{FOR_A_TERMINAL, Options, Stop};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

/// The files of the units' `EnvironmentFile=`. The last one counts.
const SETTINGS: [&str; 2] =
    ["/etc/default/patroni-agent-check", "/etc/sysconfig/patroni-agent-check"];
/// The longest settings file in bytes.
const SIZE_LIMIT: u64 = 64 * 1024;
/// Reads the command line. If it has no option but `--explain`, the settings of the units or of `--settings` hold, so that
/// the answer is the one that HAProxy gets. A CHECK takes the place of theirs.
///
/// # Errors
///
/// See [`Stop`]; with the file's name, if the settings are wrong.
pub fn settle(arguments: Vec<OsString>) -> Result<Options, Stop> {
    let given = Options::parse(arguments)?;
    if let (Some(own), Some(_)) = (given.own, &given.settings) {
        return Err(Stop::Usage(format!(
            "--{own} does not go with --settings, whose file has the options"
        )));
    }
    if given.explain {
        explain_sockets().iter().for_each(|text| tell_operator(text));
    }
    if given.own.is_some() { Ok(given) } else { with_settings(&given) }
}

/// The options of the settings that are tried, or else of the units.
fn with_settings(given: &Options) -> Result<Options, Stop> {
    let settings = match &given.settings {
        Some(file) => Some(tried(file).map_err(Stop::Usage)?),
        None => installed(),
    };
    let Some((file, settings)) = settings else { return Ok(given.clone()) };
    if given.explain {
        tell_operator(&format!("settings: {file}: {settings}"));
    }
    let wrong = |stop| {
        let stop = match stop {
            Stop::Usage(error) => Stop::Usage(format!("{file}: {error}")),
            Stop::Print(_) => Stop::Usage(format!("{file}: {FOR_A_TERMINAL}")),
        };
        if given.settings.is_some() { stop } else { stop.with_cure() }
    };
    let theirs = Options::of_units(words_of(&settings).into_iter().map(OsString::from));
    let mut theirs = theirs.map_err(wrong)?;
    theirs.check = given.check.clone().or(theirs.check);
    (theirs.agent_send, theirs.explain, theirs.own) = (false, given.explain, None);
    Ok(theirs)
}

/// The units' settings file that counts, and its `OPTIONS=`. Says what is wrong with one.
fn installed() -> Option<(String, String)> {
    let read = |file: &str| {
        let value = match file::read(Path::new(file), SIZE_LIMIT) {
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => Err(format!("{error}, so the defaults hold here")),
            Ok(bytes) => value(&bytes),
        };
        match value {
            Ok(value) => Some((file.to_owned(), value?)),
            Err(error) => {
                tell_operator(&format!("settings: {file}: {error}"));
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
/// It cannot be read, or see [`value`].
fn tried(file: &Path) -> Result<(String, String), String> {
    let name = file.display().to_string();
    let bytes = file::read(file, SIZE_LIMIT).map_err(|error| error.to_string());
    let value =
        bytes.and_then(|bytes| value(&bytes)).map_err(|error| format!("{name}: {error}"))?;
    if value.is_none() {
        tell_operator(&format!(
            "settings: {name}: none in it, so the defaults hold: the units ask for primary, whatever HAProxy sends"
        ));
    }
    Ok((name, value.unwrap_or_default()))
}

/// The value of `OPTIONS=`, as systemd.exec(5) reads it (`EnvironmentFile=`); none in a file without settings.
///
/// # Errors
///
/// It has settings but no `OPTIONS=`, or they are not UTF-8, so that the units ignore them.
fn value(bytes: &[u8]) -> Result<Option<String>, String> {
    let text = String::from_utf8_lossy(bytes);
    let assigned = assignments(&text, systemd_version);
    if assigned
        .iter()
        .any(|(name, value)| [name, value].iter().any(|text| text.contains('\u{fffd}')))
    {
        return Err("a setting is not UTF-8, so the units ignore the whole file".to_owned());
    }
    let is_setting = |line: &&str| !line.is_empty() && !line.starts_with(['#', ';']);
    let first = text.lines().map(str::trim).find(is_setting);
    match (assigned.into_iter().rfind(|(name, _)| name == "OPTIONS"), first) {
        (None, Some(line)) => Err(format!(
            "'{line}' is not OPTIONS=..., so the units ignore it and ask for primary, whatever HAProxy sends"
        )),
        (value, _) => Ok(value.map(|(_, value)| value)),
    }
}

/// The version of this machine's systemd, or the newest if that is unknown.
fn systemd_version() -> u32 {
    let output = Command::new("systemctl").arg("--version").stdin(Stdio::null()).output();
    let said =
        output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    said.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(u32::MAX)
}

/// Where systemd's reader is in a settings file.
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

/// The assignments of a settings file. A backslash continues a line, and before version 254 a comment as well. White space
/// around names and values does not count, unless it is in quotes.
fn assignments(text: &str, version: impl Fn() -> u32) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let (mut name, mut value) = (String::new(), String::new());
    // this much of the value is kept, even if it ends with white space
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

/// Splits `$OPTIONS` into arguments as systemd.service(5) does: at white space that is not in quotes or behind a backslash.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, version: u32) -> Option<String> {
        let mut found = assignments(text, || version).into_iter();
        found.rfind(|(name, _)| name == "OPTIONS").map(|(_, value)| value)
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
