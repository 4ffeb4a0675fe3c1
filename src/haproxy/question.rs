//! HAProxy's question: one of Patroni's health checks, and the state of a healthy node that does not match it. In goes the
//! agent-send line, out comes a question or why there is none. Knows nothing of what an answer means.

use crate::haproxy::connection::{Connection, NoQuestion};
use crate::haproxy::reply::Otherwise;
use crate::patroni::check::Check;
use std::time::{Duration, Instant};

/// A question of HAProxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The health check.
    pub check: Check,
    /// The state of a healthy node that does not match.
    pub otherwise: Otherwise,
}

impl Question {
    /// Takes the health check of the command line, or else reads the question that HAProxy sends.
    pub fn read(
        fixed: Option<Check>,
        otherwise: Otherwise,
        connection: &mut Connection,
        started: Instant,
        timeout: Duration,
    ) -> Result<Question, NoQuestion> {
        if let Some(check) = fixed {
            return Ok(Question { check, otherwise });
        }
        let line = connection.read_line(started, timeout)?;
        if line.trim_ascii() == HOLD.as_bytes() {
            return Err(NoQuestion::OnlyHold);
        }
        Question::from_agent_send(&line, otherwise).map_err(NoQuestion::Invalid)
    }

    /// Parses the line that HAProxy sends by `agent-send`: `CHECK [maint|drain|down]`. `otherwise` is the default.
    pub fn from_agent_send(line: &[u8], otherwise: Otherwise) -> Result<Question, String> {
        let line = String::from_utf8_lossy(line);
        let mut words = line.split_ascii_whitespace();
        let question = (|| {
            let check = words.next().ok_or("empty")?.parse()?;
            let parse = |word: &str| word.parse().map_err(|error| format!("'{word}': {error}"));
            let otherwise = words.next().map_or(Ok(otherwise), parse)?;
            match words.next() {
                Some(word) => Err(format!("unexpected word '{word}'")),
                None => Ok(Question { check, otherwise }),
            }
        })();
        question.map_err(|error: String| format!("agent-send line: {error}"))
    }
}

/// The agent-send line that asks only whether an operator holds the node.
pub const HOLD: &str = "hold";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_send_line_is_a_check_and_perhaps_a_state() {
        let ask = |line: &str| Question::from_agent_send(line.as_bytes(), Otherwise::Drain);
        let question = ask("replica?lag=16MB down").expect("a question");
        assert_eq!(question.check.path(), "/replica?lag=16MB");
        assert_eq!(question.otherwise, Otherwise::Down);
        assert_eq!(ask(" primary\t").expect("a question").otherwise, Otherwise::Drain);
        assert!(ask("primary up").is_err());
        assert!(ask("primary maint maint").is_err());
        assert!(ask("").is_err());
        assert!(Question::from_agent_send(b"\xff\x00", Otherwise::Maint).is_err());
    }
}
