//! The decision table of README.md. In goes an answer, out comes a verdict. Knows nothing of files and the clock.

use super::grace::{Policy, is_stopping_with_lock};
use crate::haproxy::question::Question;
use crate::haproxy::reply::{Otherwise, Reply, Verdict};
use crate::patroni::answer::{Answer, Cause, NoAnswer};

/// Finds the first row that matches.
///
/// READY needs all three: status 200, state running, a role that matches. The role stays `primary` after the lock is lost.
/// `/primary` is 200 on a stopping, starting or crashed primary (patroni#2756) and on a replica before its promotion
/// (patroni#2972).
pub fn look_up(question: &Question, policy: Policy, answer: &Result<Answer, NoAnswer>) -> Reply {
    let check = &question.check;
    let (verdict, reason) = match answer {
        // this machine kept the check from asking, so HAProxy's own check decides
        Err(error) if error.cause == Cause::NotAsked => (Verdict::Keep, error.reason.clone()),
        Err(error) => (policy.without_answer(), error.reason.clone()),
        Ok(answer) => match (answer.state.as_str(), answer.role.as_str()) {
            ("running", role) if answer.status == 200 && matches_check(question, answer) => {
                let timeline = answer.timeline.map(|n| format!(", timeline {n}"));
                let state = answer.replication_state.as_deref().unwrap_or("running");
                let reason = format!("{role}, {state}{}", timeline.unwrap_or_default());
                (Verdict::Ready, reason)
            }
            ("running", "primary" | "master")
                if answer.status == 503 && check.needs_lock() =>
            {
                (Verdict::Fail, format!("{} without the leader lock", answer.role))
            }
            ("running", _) => (Verdict::Out(question.otherwise), explain_mismatch(question, answer)),
            ("stopped", role) if !matches!(role, "demoted" | "uninitialized") => {
                (Verdict::Stopped, format!("{role}, PostgreSQL is stopped"))
            }
            ("stopping" | "restarting", _) if is_stopping_with_lock(question, answer) => {
                let reason = format!("{}, {}", answer.role, answer.state);
                (Verdict::Out(policy.stopping.into()), reason)
            }
            ("unknown", "replica")
            | (
                "stopped"
                | "stopping"
                | "starting"
                | "restarting"
                | "creating replica"
                | "initializing new cluster"
                // Patroni before 3.0.4
                | "initalizing new cluster"
                | "running custom bootstrap script"
                | "starting after custom bootstrap",
                _,
            ) => (Verdict::Out(Otherwise::Maint), format!("{}, {}", answer.role, answer.state)),
            (
                "crashed"
                | "start failed"
                | "restart failed"
                | "stop failed"
                | "initdb failed"
                | "custom bootstrap failed",
                _,
            ) => (Verdict::Fail, format!("{}, {}", answer.role, answer.state)),
            ("unknown", role) => {
                (Verdict::Fail, format!("{role}, state unknown: PostgreSQL does not answer Patroni"))
            }
            (state, role) => (Verdict::Fail, format!("{role}, unknown state '{state}'")),
        },
    };
    Reply { verdict, check: check.text().to_owned(), reason }
}

/// Whether a running node matches the check.
fn matches_check(question: &Question, answer: &Answer) -> bool {
    let wanted = question.check.replication_state().filter(|_| answer.role == "replica");
    question.check.matches_role(&answer.role)
        && wanted.is_none_or(|wanted| answer.replication_state.as_deref() == Some(wanted))
}

/// Why a healthy node is not in the pool.
fn explain_mismatch(question: &Question, answer: &Answer) -> String {
    let check = &question.check;
    let mut reason =
        format!("{}, {}", answer.role, answer.replication_state.as_deref().unwrap_or("running"));
    if check.matches_role(&answer.role) {
        match check.replication_state() {
            Some(wanted) if answer.status == 200 => {
                reason += &format!(", replication_state is not {wanted}");
                if answer.predates_replication_state {
                    reason += " (not reported before Patroni 3.0.4)";
                }
            }
            _ if answer.noloadbalance => reason += ", noloadbalance",
            _ => reason += &format!(", 503 for {}", check.path()),
        }
    } else if answer.status == 200 && answer.role == "replica" && check.needs_lock() {
        reason += ", not promoted yet";
    }
    reason
}
