//! What Patroni's answer means for HAProxy: the only place where meaning lives, and a pure one.
//! Knows nothing of sockets, HTTP and the words of an agent reply.

use crate::ask::Answer;
use crate::check::{Else, Question};
use crate::hold::Hold;
use crate::options::Unreachable;
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
    /// The peer left without a question: somebody who tries ports. As `Fail`, but no news.
    Unasked,
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

/// An operator's hold takes a node out that would be ready, and makes no other one better.
pub fn held(hold: Option<Hold>, reply: Reply) -> Reply {
    match hold {
        Some(hold) if reply.verdict == Verdict::Ready => {
            let reason = format!("hold: {}", hold.reason);
            Reply { verdict: Verdict::Out(hold.word), reason, ..reply }
        }
        _ => reply,
    }
}

/// HAProxy's question could not be understood, so Patroni was not asked.
pub fn not_understood(error: &str) -> Reply {
    Reply { verdict: Verdict::Fail, check: String::new(), reason: error.to_owned() }
}

/// Patroni could not even be looked for, so HAProxy's question does not matter.
pub fn unreachable(question: Option<&Question>, unreachable: Unreachable, error: &str) -> Reply {
    let check = question.map(|question| question.check.to_string()).unwrap_or_default();
    Reply { verdict: no_answer(unreachable), check, reason: error.to_owned() }
}

/// The peer closed without a question, so Patroni was not asked.
pub fn nobody_asked() -> Reply {
    let reason = "closed without an agent-send line".to_owned();
    Reply { verdict: Verdict::Unasked, check: String::new(), reason }
}

/// Even a bug is answered: silence would leave HAProxy with what it heard last, which may be READY.
pub fn whatever_happens(unreachable: Unreachable, answer: impl FnOnce() -> Reply) -> Reply {
    panic::catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Reply {
            verdict: no_answer(unreachable),
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
        let text = "bug in patroni-agent-check, please report it: ";
        let reply = whatever_happens(Unreachable::Down, || panic!("at {}", 3));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Down, format!("{text}at 3")));
        let reply = whatever_happens(Unreachable::Hold, || panic!("here"));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Hold, format!("{text}here")));
    }

    #[test]
    fn a_hold_takes_out_a_ready_node_and_nothing_else() {
        let hold = |word| Some(Hold { word, reason: "why".to_owned() });
        let before = |verdict| Reply {
            verdict,
            check: "primary".to_owned(),
            reason: "primary, running".to_owned(),
        };
        for word in [Else::Maint, Else::Drain] {
            let reply = held(hold(word), before(Verdict::Ready));
            assert_eq!((reply.verdict, reply.reason.as_str()), (Verdict::Out(word), "hold: why"));
            for verdict in [
                Verdict::Out(Else::Maint),
                Verdict::Out(Else::Drain),
                Verdict::Out(Else::Down),
                Verdict::Fail,
                Verdict::Unasked,
                Verdict::Stopped,
                Verdict::Down,
                Verdict::Hold,
            ] {
                assert_eq!(held(hold(word), before(verdict)), before(verdict));
            }
        }
        assert_eq!(held(None, before(Verdict::Ready)), before(Verdict::Ready));
    }

    fn verdict(check: &str, status: u16, role: &str, state: &str) -> Verdict {
        let check = check.parse().expect("a check");
        let question = Question { check, otherwise: Else::Drain };
        let answer = Answer {
            status,
            state: state.to_owned(),
            role: role.to_owned(),
            replication_state: None,
            timeline: None,
            noloadbalance: false,
        };
        decide(&question, Unreachable::Down, &Ok(answer)).verdict
    }

    const ROLES: [&str; 7] =
        ["primary", "master", "replica", "standby_leader", "demoted", "uninitialized", "promoted"];

    /// Each state that Patroni's source knows but `running`, with each role, check and status.
    #[test]
    fn no_state_but_running_is_ready() {
        let maint = Verdict::Out(Else::Maint);
        for (state, expected) in [
            ("stopping", maint),
            ("starting", maint),
            ("restarting", maint),
            ("creating replica", maint),
            ("initializing new cluster", maint),
            ("initalizing new cluster", maint),
            ("running custom bootstrap script", maint),
            ("starting after custom bootstrap", maint),
            ("stopped", Verdict::Stopped),
            ("crashed", Verdict::Fail),
            ("start failed", Verdict::Fail),
            ("restart failed", Verdict::Fail),
            ("stop failed", Verdict::Fail),
            ("initdb failed", Verdict::Fail),
            ("custom bootstrap failed", Verdict::Fail),
            ("unknown", Verdict::Fail),
            ("Running", Verdict::Fail),
            ("", Verdict::Fail),
        ] {
            for role in ROLES {
                for check in
                    ["primary", "leader", "standby-leader", "replica", "read-only", "health"]
                {
                    let expected = match (state, role) {
                        ("stopped", "demoted" | "uninitialized") | ("unknown", "replica") => maint,
                        _ => expected,
                    };
                    for status in [200, 503] {
                        let verdict = verdict(check, status, role, state);
                        assert_eq!(verdict, expected, "{check} {status} {role} {state}");
                    }
                }
            }
        }
    }

    /// Running, each role and check: READY wants 200 and a role that fits; the lock is only missed
    /// by those who ask for it.
    #[test]
    fn running() {
        let fits = [
            ("primary", "primary master"),
            ("read-write", "primary master"),
            ("master", "primary master"),
            ("leader", "primary master standby_leader"),
            ("standby-leader", "standby_leader"),
            ("standby_leader", "standby_leader"),
            ("replica", "replica"),
            ("sync", "replica"),
            ("synchronous", "replica"),
            ("async", "replica"),
            ("asynchronous", "replica"),
            ("quorum", "replica"),
            ("read-only", "primary master standby_leader replica"),
            ("read-only-sync", "primary master standby_leader replica"),
            ("read-only-quorum", "primary master standby_leader replica"),
            ("health", "primary master standby_leader replica demoted uninitialized promoted"),
        ];
        for (check, fitting) in fits {
            for role in ROLES {
                let fits = fitting.split(' ').any(|fitting| fitting == role);
                let ready = if fits { Verdict::Ready } else { Verdict::Out(Else::Drain) };
                assert_eq!(verdict(check, 200, role, "running"), ready, "{check} {role}");
                let lost = matches!(check, "primary" | "read-write" | "master" | "leader")
                    && matches!(role, "primary" | "master");
                let out = if lost { Verdict::Fail } else { Verdict::Out(Else::Drain) };
                assert_eq!(verdict(check, 503, role, "running"), out, "{check} {role}");
            }
        }
    }
}
