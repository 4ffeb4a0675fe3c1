//! The settings of a check by hand: those of the units, or those that `--settings` tries. In go the arguments, out come
//! options. Hand-written, since the check must read the file exactly as systemd does. Knows nothing of Patroni and HAProxy.

use super::sockets::explain_sockets;
use crate::file;
use crate::journal::tell_operator;
use crate::options::{FOR_A_TERMINAL, Options, Stop};
use crate::reopen;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::Path;

/// The files of the units' `EnvironmentFile=`. The last one counts.
const SETTINGS: [&str; 2] =
    ["/etc/default/patroni-agent-check", "/etc/sysconfig/patroni-agent-check"];
/// The longest settings file in bytes.
const SIZE_LIMIT: u64 = 64 * 1024;

/// Reads the command line. Without an option other than `--explain`, the settings of the units or of `--settings` count, so
/// that the reply is the one that HAProxy gets. A CHECK on the command line replaces the one in the settings.
pub fn read_command_line(arguments: Vec<OsString>) -> Result<Options, Stop> {
    let given = Options::parse(arguments)?;
    if let (Some(other), Some(_)) = (given.other, &given.settings) {
        return Err(Stop::Usage(format!(
            "--{other} does not go with --settings, whose file has the options"
        )));
    }
    if given.explain {
        explain_sockets().iter().for_each(|text| tell_operator(text));
    }
    if given.other.is_some() { Ok(given) } else { apply_settings(&given) }
}

/// Reads the options from the file of `--settings`, or else from the settings of the units.
fn apply_settings(given: &Options) -> Result<Options, Stop> {
    let settings = match &given.settings {
        Some(file) => Some(read_given(file).map_err(Stop::Usage)?),
        None => read_installed(),
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
        if given.settings.is_some() { stop } else { stop.with_hint() }
    };
    let theirs = Options::parse_for_units(split_words(&settings).into_iter().map(OsString::from));
    let mut theirs = theirs.map_err(wrong)?;
    theirs.check = given.check.clone().or(theirs.check);
    (theirs.agent_send, theirs.explain, theirs.other) = (false, given.explain, None);
    Ok(theirs)
}

/// Reads the settings file that counts for the units. Returns its name and its `OPTIONS=`, and reports unreadable files.
fn read_installed() -> Option<(String, String)> {
    let read = |file: &str| {
        let value = match file::read(Path::new(file), SIZE_LIMIT) {
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => Err(format!("{error}, so the defaults hold here")),
            Ok(bytes) => read_value(&bytes),
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

/// Reads the file of `--settings`. Returns its name and its `OPTIONS=`.
fn read_given(file: &Path) -> Result<(String, String), String> {
    let name = file.display().to_string();
    let bytes = file::read(file, SIZE_LIMIT).map_err(|error| format!("{name}: {error}"))?;
    let value = read_value(&bytes).map_err(|error| format!("{name}: {error}"))?;
    if value.is_none() {
        tell_operator(&format!(
            "settings: {name}: none in it, so the defaults hold: the units ask for primary, whatever HAProxy sends"
        ));
    }
    Ok((name, value.unwrap_or_default()))
}

/// Reads the value of `OPTIONS=` as systemd.exec(5) does (`EnvironmentFile=`); none in a file without settings. Fails if the
/// file has settings but no `OPTIONS=`, or if a setting is not UTF-8, so that the units ignore them.
fn read_value(bytes: &[u8]) -> Result<Option<String>, String> {
    let text = String::from_utf8_lossy(bytes);
    let assigned = read_assignments(&text, systemd_version);
    let is_replaced = |text: &String| text.contains('\u{fffd}');
    if assigned.iter().any(|(name, value)| is_replaced(name) || is_replaced(value)) {
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

/// The version of this machine's systemd, or the largest number if systemctl does not say.
fn systemd_version() -> u32 {
    let said = reopen::systemctl(&["--version"]);
    said.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(u32::MAX)
}

/// Where the reader is in a settings file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Position {
    Start,
    Name,
    /// Before a value, or after a part in quotes.
    BeforeValue,
    Value,
    /// In quotes of this kind.
    Quotes(char),
    Comment,
}

/// Reads the assignments of a settings file. A backslash continues a line, and before version 254 a comment as well. White
/// space around names and values does not count, unless it is in quotes.
fn read_assignments(text: &str, version: impl Fn() -> u32) -> Vec<(String, String)> {
    use Position::*;
    let mut found = Vec::new();
    let (mut name, mut value) = (String::new(), String::new());
    // this many bytes of the value are not trimmed
    let mut kept = 0;
    let mut at = Start;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let ends = matches!(c, '\n' | '\r');
        match at {
            Start if matches!(c, '#' | ';') => at = Comment,
            Start if matches!(c, ' ' | '\t' | '\n' | '\r') => {}
            Start => (at, name) = (Name, c.to_string()),
            Name if ends => at = Start,
            Name if c == '=' => (at, value, kept) = (BeforeValue, String::new(), 0),
            Name => name.push(c),
            BeforeValue | Value if ends => {
                at = Start;
                found.push(trim_assignment(&name, &value, kept));
            }
            BeforeValue if matches!(c, '"' | '\'') => at = Quotes(c),
            BeforeValue if matches!(c, ' ' | '\t') => {}
            BeforeValue | Value if c == '\\' => {
                at = Value;
                value.extend(chars.next().filter(|next| !matches!(next, '\n' | '\r')));
                kept = value.len();
            }
            BeforeValue | Value => {
                at = Value;
                value.push(c);
            }
            Quotes(quote) if c == quote => (at, kept) = (BeforeValue, value.len()),
            Quotes('"') if c == '\\' => match chars.next() {
                Some('\n') | None => {}
                Some(next) if matches!(next, '"' | '\\' | '`' | '$') => value.push(next),
                Some(next) => value.extend([c, next]),
            },
            Quotes(_) => value.push(c),
            Comment if ends => at = Start,
            Comment if c == '\\' => {
                if matches!(chars.next(), Some('\n' | '\r')) && version() >= 254 {
                    at = Start;
                }
            }
            Comment => {}
        }
    }
    match at {
        Quotes(_) => found.push(trim_assignment(&name, &value, value.len())),
        BeforeValue | Value => found.push(trim_assignment(&name, &value, kept)),
        _ => {}
    }
    found
}

fn trim_assignment(name: &str, value: &str, kept: usize) -> (String, String) {
    let (kept, rest) = value.split_at(kept);
    (name.trim_end().to_owned(), format!("{kept}{}", rest.trim_end()))
}

/// Splits `$OPTIONS` into arguments as systemd.service(5) does: at white space that is not in quotes or behind a backslash.
fn split_words(text: &str) -> Vec<String> {
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
        let mut found = read_assignments(text, || version).into_iter();
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
        assert_eq!(read_assignments(continued, || 253).len(), 1);
        assert_eq!(read_assignments(continued, || 254).len(), 2);
        assert_eq!(split_words(r#"a\ b "c\"d" '\'' \"#), ["a b", "c\"d", "'", ""]);
        assert_eq!(split_words(" --key  \"a b\"c '' d\t"), ["--key", "a bc", "", "d"]);
        assert_eq!(split_words(""), [""; 0]);
    }
}
