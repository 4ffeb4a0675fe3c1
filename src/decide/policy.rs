//! What a decision depends on: what the operator has set, and what one check has found out. Knows nothing of what is decided.

use crate::haproxy::question::Question;
use crate::haproxy::reply::{Otherwise, Verdict};
use crate::patroni::ask::Heard;
use crate::run::memory::Record;
use std::str::FromStr;
use std::time::Duration;

/// What to do with an unusable answer (`--unreachable`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unreachable {
    /// Out of the pool, shown as DOWN.
    #[default]
    Down,
    /// HAProxy leaves everything as it is; its own check decides alone.
    Keep,
}

impl Unreachable {
    /// What HAProxy shall do then.
    pub fn verdict(self) -> Verdict {
        match self {
            Unreachable::Down => Verdict::Down,
            Unreachable::Keep => Verdict::Keep,
        }
    }
}

impl FromStr for Unreachable {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "down" => Ok(Unreachable::Down),
            "keep" => Ok(Unreachable::Keep),
            _ => Err("write down or keep".to_owned()),
        }
    }
}

/// How trouble is answered (`--unreachable`, `--grace`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What is said if Patroni gives no usable answer.
    pub unreachable: Unreachable,
    /// How long after a good answer trouble is bridged; zero for never.
    pub grace: Duration,
    /// What a node gets that Patroni stops on purpose (`--stopping`): drain, or maint.
    pub stopping: Otherwise,
}

/// What one check has found out.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// What HAProxy asked.
    pub question: &'a Question,
    /// What Patroni said, and when.
    pub heard: &'a Heard,
    /// What the last check of this question left.
    pub last: &'a Record,
    /// The before-stop hook has noted that PostgreSQL is about to stop.
    pub stop_noted: bool,
}
