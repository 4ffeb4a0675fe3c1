//! What Patroni's answer means for HAProxy: the only place where meaning lives, and a pure one.
//! Knows nothing of sockets, HTTP and the words of an agent reply.

use crate::ask::Answer;
use crate::check::{Else, Question};
use crate::options::{Options, Unreachable};
use std::panic::{self, AssertUnwindSafe};

/// What HAProxy shall do with this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is what was asked for: into the pool.
    Ready,
    /// It is healthy or in transition, and not what was asked for: out of the pool, as expected.
    Out(Else),
    /// It is broken.
    Fail,
    /// PostgreSQL was stopped and Patroni is not about to start it.
    Stopped,
    /// Patroni gave no usable answer.
    Down,
    /// Patroni gave no usable answer, and HAProxy shall leave everything as it is.
    Hold,
}

/// A verdict and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The verdict.
    pub verdict: Verdict,
    /// The health check that was asked; empty where there was none.
    pub check: String,
    /// Why, in an operator's words. May hold anything that Patroni sent.
    pub reason: String,
}

/// The decision table of the README, first row that matches.
///
/// READY needs all three: status 200, state running, a role that fits. The role word alone stays
/// `primary` after the lock is lost, and `/primary` is 200 on a primary that is stopping, starting or
/// crashed (patroni#2756) and on a replica that is not promoted yet (patroni#2972).
pub fn decide(
    question: &Question,
    unreachable: Unreachable,
    answer: &Result<Answer, String>,
) -> Reply {
    let check = &question.check;
    let (verdict, reason) = match answer {
        Err(error) => (no_answer(unreachable), error.clone()),
        Ok(answer) => match (answer.state.as_str(), answer.role.as_str()) {
            ("running", role) if answer.status == 200 && serves(question, answer) => {
                let timeline = answer.timeline.map(|n| format!(", timeline {n}"));
                let state = answer.replication_state.as_deref().unwrap_or("running");
                let reason = format!("{role}, {state}{}", timeline.unwrap_or_default());
                (Verdict::Ready, reason)
            }
            ("running", "primary" | "master")
                if answer.status == 503 && check.asks_for_the_lock() =>
            {
                (Verdict::Fail, format!("{} without the leader lock", answer.role))
            }
            ("running", _) => (Verdict::Out(question.otherwise), not_asked_for(question, answer)),
            ("stopped", role) if !matches!(role, "demoted" | "uninitialized") => {
                (Verdict::Stopped, format!("{role}, PostgreSQL is stopped"))
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
            ) => (Verdict::Out(Else::Maint), format!("{}, {}", answer.role, answer.state)),
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
            (state, role) => (Verdict::Fail, format!("{role}, '{state}' is no state of Patroni's")),
        },
    };
    Reply { verdict, check: check.to_string(), reason }
}

/// Whether the body shows what the check is there to find.
fn serves(question: &Question, answer: &Answer) -> bool {
    let streams = match question.check.replication_state() {
        Some(wanted) if answer.role == "replica" => {
            answer.replication_state.as_deref() == Some(wanted)
        }
        _ => true,
    };
    question.check.fits(&answer.role) && streams
}

/// Why a healthy node is not in the pool.
fn not_asked_for(question: &Question, answer: &Answer) -> String {
    let check = &question.check;
    let mut reason =
        format!("{}, {}", answer.role, answer.replication_state.as_deref().unwrap_or("running"));
    if check.fits(&answer.role) {
        match check.replication_state() {
            Some(wanted) if answer.status == 200 => {
                reason += &format!(", replication_state is not {wanted}");
            }
            _ if answer.noloadbalance => reason += ", noloadbalance",
            _ => reason += &format!(", 503 for {}", check.path()),
        }
    } else if answer.status == 200 && answer.role == "replica" && check.asks_for_the_lock() {
        reason += ", not promoted yet";
    }
    reason
}

fn no_answer(unreachable: Unreachable) -> Verdict {
    match unreachable {
        Unreachable::Down => Verdict::Down,
        Unreachable::Hold => Verdict::Hold,
    }
}

/// HAProxy's question could not be understood, so Patroni was not asked.
pub fn not_understood(error: &str) -> Reply {
    Reply { verdict: Verdict::Fail, check: String::new(), reason: error.to_owned() }
}

/// Even a bug is answered: silence would leave HAProxy with what it heard last, which may be READY.
pub fn whatever_happens(options: &Options, answer: impl FnOnce() -> Reply) -> Reply {
    // A panic's own message goes to fd 2, which under xinetd is HAProxy. It goes into the reply instead.
    panic::set_hook(Box::new(|_| {}));
    panic::catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Reply {
            verdict: no_answer(options.unreachable),
            check: String::new(),
            reason: format!(
                "bug in patroni-agent-check, please report it: {}",
                text.unwrap_or("?")
            ),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_answered() {
        let bug = |arguments: &[&str], panic: fn() -> Reply| {
            let options = Options::parse(arguments.iter().map(Into::into)).expect("options");
            let reply = whatever_happens(&options, panic);
            (reply.verdict, reply.reason)
        };
        let text = "bug in patroni-agent-check, please report it: ";
        let (verdict, reason) = bug(&[], || panic!("at {}", 3));
        assert_eq!((verdict, reason), (Verdict::Down, format!("{text}at 3")));
        let (verdict, reason) = bug(&["--unreachable", "hold"], || panic!("here"));
        assert_eq!((verdict, reason), (Verdict::Hold, format!("{text}here")));
    }
}
