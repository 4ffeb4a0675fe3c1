//! HAProxy's words: what it is told of a node. In goes a verdict with its reason, out comes the reply line. Knows nothing of
//! Patroni and sockets.

use std::fmt;
use std::str::FromStr;

/// HAProxy keeps about 108 characters of the text (`HCHK_DESC_LEN` in its source).
const REASON_LIMIT: usize = 100;

/// The state of a healthy node that does not match the check (`--else`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Otherwise {
    /// Out of the pool, and shown as MAINT: expected.
    #[default]
    Maint,
    /// No new sessions, old ones stay.
    Drain,
    /// Shown as DOWN, as by HAProxy's HTTP check.
    Down,
}

impl FromStr for Otherwise {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "maint" => Ok(Otherwise::Maint),
            "drain" => Ok(Otherwise::Drain),
            "down" => Ok(Otherwise::Down),
            _ => Err("write maint, drain or down".to_owned()),
        }
    }
}

impl fmt::Display for Otherwise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Otherwise::Maint => "maint",
            Otherwise::Drain => "drain",
            Otherwise::Down => "down",
        })
    }
}

/// What HAProxy shall do with this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// It matches the check: into the pool.
    Ready,
    /// It is healthy or in transition, and does not match: out of the pool, as expected.
    Out(Otherwise),
    /// It is broken.
    Fail,
    /// PostgreSQL was stopped and Patroni is not about to start it.
    Stopped,
    /// Patroni gave no usable answer.
    #[default]
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
    /// Why, in words for an operator. It may hold anything that Patroni sent.
    pub reason: String,
}

/// The agent reply line (HAProxy's configuration manual, `agent-check`).
///
/// Always a health word and an administrative word, since each undoes only its own kind: `ready` alone never brings back a
/// server that an agent has called down. `down` alone is not seen on a server in MAINT. HAProxy shows and ignores a word
/// that it does not know.
pub fn line(reply: &Reply) -> String {
    let reason = printable(&reply.reason, REASON_LIMIT);
    match (words(reply.verdict), reply.verdict) {
        // HAProxy splits words at commas, too
        (word, Verdict::Keep) => format!("{word}:_{}\n", reason.replace([' ', ','], "_")),
        (words, _) => format!("{words} # {reason}\n"),
    }
}

/// The words of the reply, without the reason.
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

/// Printable ASCII only: nothing from outside is passed on as it came.
pub fn printable(text: &str, limit: usize) -> String {
    text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).take(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(verdict: Verdict, reason: &str) -> String {
        line(&Reply { verdict, check: "primary".to_owned(), reason: reason.to_owned() })
    }

    #[test]
    fn both_words_and_the_reason() {
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
