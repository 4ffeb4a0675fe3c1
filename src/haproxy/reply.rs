//! What HAProxy is told of a node. In goes a verdict with a reason, out comes a line. Knows nothing of Patroni and sockets.

use std::fmt;
use std::str::FromStr;

/// HAProxy keeps about 108 characters of a reply's text (`HCHK_DESC_LEN` in its source).
const REASON_LIMIT: usize = 100;

/// HAProxy's two administrative states for a node that leaves the pool and is not broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdminState {
    /// HAProxy sends no new sessions and keeps the open ones.
    #[default]
    Drain,
    /// HAProxy sends no new sessions and does not check the server.
    Maint,
}

impl FromStr for AdminState {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "drain" => Ok(AdminState::Drain),
            "maint" => Ok(AdminState::Maint),
            _ => Err("write drain or maint".to_owned()),
        }
    }
}

impl fmt::Display for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AdminState::Drain => "drain",
            AdminState::Maint => "maint",
        })
    }
}

impl From<AdminState> for Otherwise {
    fn from(state: AdminState) -> Otherwise {
        match state {
            AdminState::Drain => Otherwise::Drain,
            AdminState::Maint => Otherwise::Maint,
        }
    }
}

/// The state of a healthy node that does not match the check (`--else`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Otherwise {
    /// Out of the pool, and shown as MAINT: expected.
    #[default]
    Maint,
    /// Out of the pool, but open sessions stay.
    Drain,
    /// Out of the pool, and shown as DOWN, as by HAProxy's HTTP check.
    Down,
}

impl FromStr for Otherwise {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "down" => Ok(Otherwise::Down),
            _ => AdminState::from_str(word)
                .map(Otherwise::from)
                .map_err(|_| "write maint, drain or down".to_owned()),
        }
    }
}

/// What HAProxy shall do with this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The node matches the check: into the pool.
    Ready,
    /// The node does not match, or Patroni is at work, or an operator holds the node: out of the pool, as expected.
    Out(Otherwise),
    /// The node is broken.
    Fail,
    /// PostgreSQL was stopped and Patroni is not about to start it.
    Stopped,
    /// Patroni gave no usable answer.
    Down,
    /// There is trouble, and HAProxy shall leave the server as it is.
    Keep,
}

/// A verdict and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The verdict.
    pub verdict: Verdict,
    /// The health check; empty if there was none.
    pub check: String,
    /// Why, for an operator. The text may contain anything that Patroni sent.
    pub reason: String,
}

/// Formats the agent's reply line (HAProxy's configuration manual, `agent-check`).
///
/// The line has a health word and an administrative word, since each undoes only its own kind. `ready` alone never brings
/// back a server that the agent has called down. A server in MAINT does not show `down` alone. The word of `Keep` is
/// unknown to HAProxy, which shows and ignores it.
pub fn format_line(reply: &Reply) -> String {
    let reason = to_printable(&reply.reason, REASON_LIMIT);
    match (words(reply.verdict), reply.verdict) {
        // HAProxy splits words at commas, too
        (word, Verdict::Keep) => format!("{word}:_{}\n", reason.replace([' ', ','], "_")),
        (words, _) => format!("{words} # {reason}\n"),
    }
}

/// HAProxy's words for a verdict, without a reason.
pub fn words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ready => "up ready",
        Verdict::Out(Otherwise::Maint) => "up maint",
        Verdict::Out(Otherwise::Drain) => "up drain",
        Verdict::Out(Otherwise::Down) | Verdict::Down => "down ready",
        Verdict::Fail => "fail ready",
        Verdict::Stopped => "stopped ready",
        Verdict::Keep => "!unreachable",
    }
}

/// Replaces everything but printable ASCII: no text from outside is passed on as it came.
pub fn to_printable(text: &str, limit: usize) -> String {
    text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).take(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(verdict: Verdict, reason: &str) -> String {
        format_line(&Reply { verdict, check: "primary".to_owned(), reason: reason.to_owned() })
    }

    #[test]
    fn a_line_has_two_words_and_the_reason() {
        let lines = [
            (Verdict::Ready, "up ready # why\n"),
            (Verdict::Out(Otherwise::Maint), "up maint # why\n"),
            (Verdict::Out(Otherwise::Drain), "up drain # why\n"),
            (Verdict::Out(Otherwise::Down), "down ready # why\n"),
            (Verdict::Fail, "fail ready # why\n"),
            (Verdict::Stopped, "stopped ready # why\n"),
            (Verdict::Down, "down ready # why\n"),
            (Verdict::Keep, "!unreachable:_why\n"),
        ];
        for (verdict, line) in lines {
            assert_eq!(said(verdict, "why"), line);
        }
    }

    #[test]
    fn no_reason_can_break_the_line_or_add_a_word() {
        let evil = format!("a\nup ready\r\0\t\u{1b}[31m # é, down{}", "x".repeat(500));
        let line = said(Verdict::Fail, &evil);
        assert_eq!(line.len(), "fail ready # ".len() + REASON_LIMIT + 1);
        assert!(line.starts_with("fail ready # a?up ready????[31m # ?, down"));
        let word = said(Verdict::Keep, &evil);
        assert_eq!(word.find([' ', ',', '\t', '\n']), Some(word.len() - 1));
    }
}
