//! Patroni's health checks. In goes a name with a query, out come a path and roles. Knows nothing of HAProxy, sockets and
//! HTTP.

use std::str::FromStr;

/// The nodes that a health check looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wants {
    Primary,
    Leader,
    StandbyLeader,
    Replica,
    ReadOnly,
    Any,
}

/// Patroni's health checks (Patroni manual, "REST API"). Patroni answers 503 to a name that it does not know, so the agent
/// sends no other name. The number of a name is its place in the memory file and must never change.
const CHECKS: &[(&str, Wants, usize)] = &[
    ("primary", Wants::Primary, 0),
    ("read-write", Wants::Primary, 1),
    ("master", Wants::Primary, 2),
    ("leader", Wants::Leader, 3),
    ("standby-leader", Wants::StandbyLeader, 4),
    ("standby_leader", Wants::StandbyLeader, 5),
    ("replica", Wants::Replica, 6),
    ("read-only", Wants::ReadOnly, 7),
    ("sync", Wants::Replica, 8),
    ("synchronous", Wants::Replica, 9),
    ("async", Wants::Replica, 10),
    ("asynchronous", Wants::Replica, 11),
    ("quorum", Wants::Replica, 12),
    ("read-only-sync", Wants::ReadOnly, 13),
    ("read-only-quorum", Wants::ReadOnly, 14),
    ("health", Wants::Any, 15),
    ("read-only-synchronous", Wants::ReadOnly, 16),
];

/// The numbers of the names rise and are less than this.
pub const NUMBERS: usize = 23;

const _: () = {
    let mut row = CHECKS.len() - 1;
    assert!(CHECKS[row].2 < NUMBERS);
    while row > 0 {
        row -= 1;
        assert!(CHECKS[row].2 < CHECKS[row + 1].2);
    }
};

/// The names of all health checks.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, ..)| *name)
}

/// One of Patroni's health checks with its query, such as `replica?lag=16MB`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    text: String,
    path: String,
    wants: Wants,
    replication_state: Option<String>,
}

impl Check {
    /// The path of the question to Patroni, such as `/replica?lag=16MB`. It lacks `replication_state`, which the agent
    /// judges itself: Patroni ignores it up to 4.1.5, and Patroni's next release always answers 503 to it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether a node of this role matches. Patroni 4 says `primary` where older ones say `master`.
    pub fn matches_role(&self, role: &str) -> bool {
        match self.wants {
            Wants::Primary => matches!(role, "primary" | "master"),
            Wants::Leader => matches!(role, "primary" | "master" | "standby_leader"),
            Wants::StandbyLeader => role == "standby_leader",
            Wants::Replica => role == "replica",
            Wants::ReadOnly => {
                matches!(role, "primary" | "master" | "standby_leader" | "replica")
            }
            Wants::Any => true,
        }
    }

    /// Whether only the holder of the leader lock passes this check, so that a primary that fails it has lost the lock.
    pub fn needs_lock(&self) -> bool {
        matches!(self.wants, Wants::Primary | Wants::Leader)
    }

    /// The check as it was written, without a leading `/`.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The number of the check's name, if the check has no query.
    pub fn plain_number(&self) -> Option<usize> {
        let row = CHECKS.iter().find(|(name, ..)| *name == self.text);
        row.map(|(.., number)| *number)
    }

    /// The `replication_state` that a replica must report, if the query names one.
    pub fn replication_state(&self) -> Option<&str> {
        self.replication_state.as_deref()
    }
}

impl Default for Check {
    fn default() -> Check {
        let (text, path) = ("primary".to_owned(), "/primary".to_owned());
        Check { text, path, wants: Wants::Primary, replication_state: None }
    }
}

impl FromStr for Check {
    type Err = String;

    /// Parses `[/]NAME[?lag=SIZE&replication_state=WORD&tag_NAME=VALUE]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.strip_prefix('/').unwrap_or(text);
        let (name, query) = text.split_once('?').unzip();
        let name = name.unwrap_or(text);
        let Some((name, wants, _)) = CHECKS.iter().find(|(known, ..)| *known == name) else {
            return Err(format!(
                "unknown health check '{name}'; try primary, replica, read-only (all: --help)"
            ));
        };
        let (mut sent, mut lag, mut state) = (Vec::new(), None, None);
        for parameter in query.into_iter().flat_map(|query| query.split('&')) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let twice = match (key, key.strip_prefix("tag_")) {
                ("lag", _) => lag.replace(check_size(value)?).is_some(),
                ("replication_state", _) => state.replace(check_word(key, value)?).is_some(),
                (_, Some(tag)) => {
                    check_word("tag_", tag).and(check_word(key, value))?;
                    false
                }
                (_, None) => {
                    return Err(format!(
                        "unknown parameter '{parameter}'; a health check takes lag=SIZE, \
                         replication_state=WORD, tag_NAME=VALUE"
                    ));
                }
            };
            if twice {
                return Err(format!("{key} is given twice"));
            }
            if key != "replication_state" {
                sent.push(parameter);
            }
        }
        let mark = if sent.is_empty() { "" } else { "?" };
        let path = format!("/{name}{mark}{}", sent.join("&"));
        Ok(Check { text: text.to_owned(), path, wants: *wants, replication_state: state })
    }
}

/// Allows only a size that every version of Patroni can read, since Patroni takes a size that it cannot read for "no
/// limit".
fn check_size(value: &str) -> Result<(), String> {
    let digits = value.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = value.split_at(digits);
    // a leading 0 means octal to Patroni
    let plain = number == "0" || (!number.is_empty() && !number.starts_with('0'));
    if plain && number.len() <= 15 && matches!(unit, "" | "B" | "kB" | "MB" | "GB" | "TB") {
        return Ok(());
    }
    Err(format!(
        "lag={value} is not a size; write a whole number with B, kB, MB, GB or TB, such as lag=16MB"
    ))
}

/// Allows only characters without a meaning in a query, since it is sent as it is.
fn check_word(key: &str, value: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:/@,".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return Ok(value.to_owned());
    }
    Err(format!("{key}={value}: letters, digits and -._~:/@, are allowed, and at least one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> String {
        text.parse::<Check>().expect(text).path().to_owned()
    }

    fn error(text: &str) -> String {
        text.parse::<Check>().expect_err(text)
    }

    #[test]
    fn a_check_without_a_query_has_the_number_of_its_name() {
        let number = |text: &str| text.parse::<Check>().expect(text).plain_number();
        let numbers: Vec<_> = names().map(number).collect();
        assert_eq!(numbers, (0..CHECKS.len()).map(Some).collect::<Vec<_>>());
        assert_eq!(number("primary?lag=16MB"), None);
    }

    #[test]
    fn every_name_is_sent_as_it_is_written() {
        for (name, ..) in CHECKS {
            assert_eq!(path(name), format!("/{name}"));
            assert_eq!(path(&format!("/{name}")), format!("/{name}"));
        }
    }

    #[test]
    fn a_query_is_checked_and_sent() {
        assert_eq!(path("replica?lag=16MB"), "/replica?lag=16MB");
        assert_eq!(
            path("/read-only?lag=0&tag_zone=a-1&tag_clone=true"),
            "/read-only?lag=0&tag_zone=a-1&tag_clone=true"
        );
    }

    #[test]
    fn replication_state_is_not_sent() {
        let check: Check = "replica?replication_state=streaming&lag=1GB".parse().expect("a check");
        assert_eq!(check.path(), "/replica?lag=1GB");
        assert_eq!(check.replication_state(), Some("streaming"));
        assert_eq!(check.text(), "replica?replication_state=streaming&lag=1GB");
        assert_eq!(path("replica?replication_state=streaming"), "/replica");
    }

    #[test]
    fn the_error_for_an_unknown_name_says_where_the_names_are() {
        for name in ["", "/", "Primary", "primary ", "//primary", "cluster", "../primary"] {
            let error = error(name);
            assert!(error.ends_with("try primary, replica, read-only (all: --help)"), "{error}");
        }
    }

    #[test]
    fn a_lag_that_patroni_would_ignore_is_refused() {
        for size in [
            "",
            "16mb",
            "16M",
            "1.5GB",
            "010",
            "-1",
            "+1",
            "1e3",
            "MB",
            "16 MB",
            "9999999999999999",
        ] {
            let error = error(&format!("replica?lag={size}"));
            assert!(error.contains("lag=16MB"), "{error}");
        }
    }

    #[test]
    fn no_other_parameter_and_no_other_character_is_sent() {
        for query in [
            "",
            "lag",
            "x=y",
            "tag_=a",
            "tag_a=",
            "tag_a=b c",
            "tag_a=%20",
            "tag_a=b#c",
            "lag=1&lag=2",
            "&",
            "replication_state=",
            "replication_state=a b",
            "tag_a=b\r\nHost: x",
            "tag_é=1",
            "replication_state=a&replication_state=b",
        ] {
            error(&format!("replica?{query}"));
        }
    }
}
