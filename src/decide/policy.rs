//! What a decision depends on: what the operator has set, and what one check has found out. Knows nothing of what is decided.

use crate::haproxy::question::Question;
use crate::haproxy::reply::{Otherwise, Verdict};
use crate::patroni::ask::Heard;
use crate::run::memory::Record;
use std::time::Duration;

/// How trouble is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What is said if Patroni gives no usable answer (`--unreachable`): down, or keep.
    pub unreachable: Verdict,
    /// How long after a good answer trouble is bridged (`--grace`); zero for never.
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
