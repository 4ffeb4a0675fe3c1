//! The grace period: trouble soon after a good answer changes nothing in HAProxy, since the leader lock outlives that answer
//! ([`super::bounds`]). In go a case and the table's reply, out come the reply and the next record. Knows nothing of files
//! and the clock.

use crate::haproxy::question::Question;
use crate::haproxy::reply::{AdminState, Otherwise, Reply, Verdict};
use crate::patroni::answer::{Answer, Cause};
use crate::patroni::ask::Outcome;
use crate::run::memory::Record;
use std::time::Duration;

/// Trouble is bridged for no longer than this after Patroni last saw the DCS, since Patroni's main loop may hang while its
/// REST API still claims the lock. With Patroni's defaults (`ttl` 30, `loop_wait` 10) the lock lives 20 s after that.
const DCS_LIMIT: Duration = Duration::from_secs(15);
/// How long a primary drains during a stop. Patroni itself limits no stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// After this time every HAProxy has been told that a node is no longer ready, unless its `agent-inter` is longer.
const EVERY_HAPROXY_KNOWS: Duration = Duration::from_secs(60);
/// Only a longer step of Patroni's clock, in seconds, excuses a missing lock. `Date:` has whole seconds.
const CLOCK_STEP: u64 = 5;

/// How trouble is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Whether HAProxy keeps the node's state if Patroni gives no usable answer (`--unreachable keep`).
    pub keep: bool,
    /// How long after a good answer trouble is bridged (`--grace`); zero for never.
    pub grace: Duration,
    /// The state of a primary that Patroni stops on purpose (`--stopping`).
    pub stopping: AdminState,
}

impl Policy {
    /// The verdict if Patroni gives no usable answer.
    pub fn without_answer(self) -> Verdict {
        if self.keep { Verdict::Keep } else { Verdict::Down }
    }
}

/// What one check has found out.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// What HAProxy asked.
    pub question: &'a Question,
    /// What Patroni answered, and when.
    pub outcome: &'a Outcome,
    /// The record that the last check of this question left.
    pub last: &'a Record,
    /// The before-stop hook has noted that PostgreSQL is about to stop.
    pub stop_noted: bool,
}

/// Whether the last answer was ready.
pub fn was_ready(record: &Record) -> bool {
    record.ready == Some(record.at)
}

/// When the grace period of the last answer ends.
pub fn grace_end(record: &Record, grace: Duration) -> Duration {
    record.at + grace.min(record.lease)
}

/// Whether the grace period of the last answer has not ended yet.
pub fn is_within_grace(record: &Record, now: Duration, grace: Duration) -> bool {
    now < grace_end(record, grace)
}

/// Changes the reply where trouble is bridged. Returns whether the node is in the pool, and the record for the next check.
/// While the hook's note is valid, trouble drains the node within the grace period, and shows it as MAINT afterwards.
pub fn bridge(case: Case, policy: Policy, reply: &mut Reply) -> (bool, Record) {
    let Case { question, outcome, last, stop_noted } = case;
    let (asked, answered) = (outcome.asked, outcome.answered);
    let cause = outcome.answer.as_ref().err().map(|no_answer| no_answer.cause);
    let mut record = last.clone();
    let ready = reply.verdict == Verdict::Ready;
    let was_ready = was_ready(last);
    let mut in_the_pool = ready;
    match classify(case) {
        Meaning::Good(answer) => {
            // READY is out of date if another check has been told something else since this check asked
            let overtaken = ready && asked < last.at && !was_ready;
            if overtaken {
                (reply.verdict, in_the_pool) = (Verdict::Out(question.otherwise), false);
            }
            record.trouble = last.trouble.filter(|_| overtaken);
            // READY counts from its question, which may be older than the last bad answer; any other answer counts from its
            // arrival
            let at = if ready { asked } else { answered };
            if at >= last.at {
                (record.at, record.lease) = (at, lease_after(answer));
                record.ready = if ready { Some(asked) } else { last.ready };
                record.stopping = None;
                (record.date, record.pause, record.refused) = (answer.date, answer.pause, false);
            }
        }
        Meaning::Trouble(excuse) => {
            record.trouble = last.trouble.or(Some(answered));
            record.refused |= cause == Some(Cause::Refused);
            let passed = asked.saturating_sub(last.at);
            let grace = policy.grace.min(last.lease);
            if passed < grace {
                let (passed, grace) = (passed.as_secs_f32(), grace.as_secs_f32());
                let why = excuse.unwrap_or(&reply.reason).to_owned();
                reply.reason = format!("held {passed:.1} of {grace} s: {why}");
                in_the_pool = was_ready;
                let is_recent =
                    |ready: &Duration| asked.saturating_sub(*ready) < EVERY_HAPROXY_KNOWS;
                reply.verdict = match last.ready.filter(is_recent) {
                    // the node has left the pool, and a HAProxy that was not told so must not keep the node
                    Some(_) if !was_ready => Verdict::Out(question.otherwise),
                    Some(_) if stop_noted && policy.stopping == AdminState::Drain => {
                        reply.reason = format!("PostgreSQL is about to stop: {why}");
                        Verdict::Out(Otherwise::Drain)
                    }
                    _ => Verdict::Keep,
                };
            } else if cause == Some(Cause::NotAsked) {
                // HAProxy leaves the server as it is, so an operator's hold counts
                in_the_pool = was_ready;
            } else if stop_noted && cause.is_some() {
                reply.reason = format!("PostgreSQL is about to stop: {}", reply.reason);
                reply.verdict = Verdict::Out(Otherwise::Maint);
            }
        }
        Meaning::Other(answer) => {
            let end = grace_end(last, policy.grace);
            // before its own restart, Patroni stops the standby, which has left the pool and is not broken
            let standby = answer.role == "replica";
            if standby && reply.verdict == Verdict::Stopped && asked < end {
                reply.verdict = Verdict::Out(Otherwise::Maint);
            }
            let broken = matches!(reply.verdict, Verdict::Fail | Verdict::Stopped);
            record.trouble = last.trouble.or(Some(answered)).filter(|_| broken);
            record.stopping =
                is_stopping_with_lock(question, answer).then(|| last.stopping.unwrap_or(answered));
            let too_long = |since| answered.saturating_sub(since) >= DRAIN_LIMIT;
            if record.stopping.is_some_and(too_long) {
                reply.verdict = Verdict::Out(Otherwise::Maint);
            }
            let standby = standby && !broken;
            if answered >= last.at {
                (record.at, record.date) = (answered, answer.date);
                record.lease = if standby { end.saturating_sub(answered) } else { Duration::ZERO };
            }
        }
    }
    (in_the_pool, record)
}

/// What an answer means for the grace period.
enum Meaning<'a> {
    /// The node is healthy, in the pool or not, and the grace period begins.
    Good(&'a Answer),
    /// Trouble, which may be over with the next answer, and the reason that replaces the table's, if any.
    Trouble(Option<&'static str>),
    /// Patroni reports something else, which ends the grace period.
    Other(&'a Answer),
}

fn classify<'a>(Case { question, outcome, last, .. }: Case<'a>) -> Meaning<'a> {
    let Ok(answer) = &outcome.answer else { return Meaning::Trouble(None) };
    let lock = question.check.needs_lock();
    match (answer.status, answer.state.as_str(), answer.role.as_str()) {
        (503, "running", "primary" | "master") if lock => {
            match excuse_missing_lock(answer, last, outcome.answered) {
                Some(excuse) => Meaning::Trouble(Some(excuse)),
                None => Meaning::Other(answer),
            }
        }
        (_, "running", _) => Meaning::Good(answer),
        // Patroni holds the lock, and PostgreSQL did not answer Patroni this once
        (200, "unknown", role) if lock && role != "replica" => Meaning::Trouble(None),
        _ => Meaning::Other(answer),
    }
}

/// Why a primary answers 503 although it may still have the leader lock.
fn excuse_missing_lock(answer: &Answer, last: &Record, answered: Duration) -> Option<&'static str> {
    let by_patroni = u64::from(answer.date.saturating_sub(last.date));
    let by_agent = answered.saturating_sub(last.at).as_secs();
    if last.refused {
        Some("primary, Patroni has just started and does not know its lock yet")
    } else if answer.pause && last.pause {
        // in a pause nobody but an operator promotes another node
        Some("primary, paused, Patroni does not know its lock")
    } else if last.date > 0 && by_patroni > by_agent + CLOCK_STEP {
        // Patroni's claim ends by its own clock, and the lock by the clock of the DCS
        Some("primary, Patroni's clock was set forward")
    } else {
        None
    }
}

/// Whether Patroni stops or restarts a primary that holds the leader lock, so that open transactions may end. Patroni's
/// claim of the lock counts only if Patroni has read the DCS not long ago.
pub fn is_stopping_with_lock(question: &Question, answer: &Answer) -> bool {
    question.check.needs_lock()
        && answer.status == 200
        && matches!(answer.role.as_str(), "primary" | "master")
        && matches!(answer.state.as_str(), "stopping" | "restarting")
        && answer.dcs_last_seen.is_some()
        && !lease_after(answer).is_zero()
}

/// How long trouble may be bridged after this answer at most.
fn lease_after(answer: &Answer) -> Duration {
    let age = answer.dcs_last_seen.map(|seen| i64::from(answer.date) - i64::from(seen));
    match age {
        // Patroni is in failsafe mode, or the lock has just run out
        _ if answer.cluster_unlocked => Duration::ZERO,
        // Patroni before 2.1.2 does not say when it last saw the DCS
        None => DCS_LIMIT,
        // both times are whole seconds, so one second in the future is rounding, and more is wrong
        Some(age) if age < -1 => Duration::ZERO,
        Some(age) => DCS_LIMIT.saturating_sub(Duration::from_secs(age.max(0).unsigned_abs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_answer_counts_for_the_grace_period() {
        let (now, minute) = (Duration::from_secs(1000), Duration::from_secs(60));
        let record = Record { at: now - minute, lease: minute, ..Record::default() };
        assert_eq!((grace_end(&record, minute), grace_end(&record, 2 * minute)), (now, now));
        let just_before = now - Duration::from_nanos(1);
        assert!(
            !is_within_grace(&record, now, minute) && is_within_grace(&record, just_before, minute)
        );
    }
}
