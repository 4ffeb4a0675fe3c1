//! What Patroni's answer means for HAProxy: the decision table, then the grace period, then an operator's hold. In goes a
//! case, out come the reply and the record for the next check. Knows nothing of HTTP, files and the clock.

pub mod bounds;
pub mod grace;
pub mod table;

use crate::haproxy::connection::NoQuestion;
use crate::haproxy::question::HOLD;
use crate::haproxy::reply::{Otherwise, Reply, Verdict};
use crate::run::{hold::Hold, memory::Record};
use grace::{Case, Policy};

/// Decides the reply to HAProxy and the record for the next check.
pub fn decide(case: Case, policy: Policy, hold: Option<&Hold>) -> (Reply, Record) {
    let mut reply = table::look_up(case.question, policy, &case.outcome.answer);
    let (in_the_pool, record) = grace::bridge(case, policy, &mut reply);
    if let Some(hold) = hold.filter(|_| in_the_pool) {
        reply.verdict = Verdict::Out(hold.state.into());
        reply.reason = format!("hold: {}", hold.reason);
    }
    (reply, record)
}

/// Decides the reply to a line that is no question to Patroni. A late line is trouble between HAProxy and the agent, and
/// changes nothing on a node that is `within_grace`.
pub fn reply_to(why: &NoQuestion, hold: Result<Option<Hold>, String>, within_grace: bool) -> Reply {
    let (verdict, check, reason) = match (why, hold) {
        // drain for both kinds of hold: in MAINT, HAProxy's own check of the reserve would pause
        (NoQuestion::OnlyHold, Ok(Some(hold))) => {
            (Verdict::Out(Otherwise::Drain), HOLD, format!("hold: {}", hold.reason))
        }
        (NoQuestion::OnlyHold, Ok(None)) => (Verdict::Ready, HOLD, "no hold".to_owned()),
        (NoQuestion::OnlyHold, Err(error)) => (Verdict::Ready, HOLD, error),
        (NoQuestion::Closed, _) => {
            (Verdict::Fail, "", "closed without an agent-send line".to_owned())
        }
        (NoQuestion::Late(why), _) if within_grace => (Verdict::Keep, "", why.clone()),
        (NoQuestion::Late(why) | NoQuestion::Invalid(why), _) => (Verdict::Fail, "", why.clone()),
    };
    Reply { verdict, check: check.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::table::look_up;
    use super::*;
    use crate::haproxy::question::Question;
    use crate::haproxy::reply::AdminState;
    use crate::patroni::answer::{self, Answer, Cause, NoAnswer};
    use crate::patroni::ask::Outcome;
    use std::time::Duration;

    fn question(check: &str) -> Question {
        Question { check: check.parse().expect("a check"), otherwise: Otherwise::Drain }
    }

    fn answer(status: u16, role: &str, state: &str) -> Answer {
        let body = format!(r#"{{"state": "{state}", "role": "{role}"}}"#);
        answer::read(status, body.as_bytes()).expect("an answer")
    }

    fn verdict(check: &str, status: u16, role: &str, state: &str) -> Verdict {
        let answer =
            Answer { dcs_last_seen: Some(DATE), date: DATE, ..answer(status, role, state) };
        look_up(&question(check), POLICY, &Ok(answer)).verdict
    }

    /// Patroni's clock, when it has just read the DCS.
    const DATE: u32 = 1_000_000;
    const POLICY: Policy =
        Policy { keep: false, grace: Duration::from_secs(4), stopping: AdminState::Drain };

    /// Checks of one node, each with the record of the one before.
    struct Node {
        question: Question,
        policy: Policy,
        hold: Option<Hold>,
        stop_noted: bool,
        left: Record,
        /// When the machine was started, by Patroni's clock.
        clock: u32,
    }

    impl Node {
        fn new(check: &str) -> Node {
            Node {
                question: question(check),
                policy: POLICY,
                hold: None,
                stop_noted: false,
                left: Record::default(),
                clock: DATE,
            }
        }

        fn hears(&mut self, asked: f64, answer: Result<Answer, NoAnswer>) -> Reply {
            self.hears_late(asked, asked, answer)
        }

        /// Hears a slow answer.
        fn hears_late(
            &mut self,
            asked: f64,
            answered: f64,
            answer: Result<Answer, NoAnswer>,
        ) -> Reply {
            let outcome = Outcome {
                from: vec![],
                answer: answer.map(|answer| self.date_answer(answered, answer)),
                asked: Duration::from_secs_f64(asked),
                answered: Duration::from_secs_f64(answered),
            };
            let case = Case {
                question: &self.question,
                outcome: &outcome,
                last: &self.left,
                stop_noted: self.stop_noted,
            };
            let (reply, left) = decide(case, self.policy, self.hold.as_ref());
            self.left = left;
            reply
        }

        /// Dates an answer. Patroni has just read the DCS, unless the answer says otherwise.
        fn date_answer(&self, answered: f64, answer: Answer) -> Answer {
            let date = self.clock + answered as u32;
            Answer { date, dcs_last_seen: answer.dcs_last_seen.or(Some(date - 1)), ..answer }
        }

        /// Whether trouble at that second is bridged.
        fn bridges(&self, asked: f64) -> bool {
            let hold = self.hold.clone();
            let mut node =
                Node { question: self.question.clone(), left: self.left.clone(), hold, ..*self };
            let reply = node.hears(asked, SILENT());
            assert_eq!(reply.reason.starts_with("held "), reply.verdict == Verdict::Keep);
            reply.verdict == Verdict::Keep
        }
    }

    const PRIMARY: fn() -> Answer = || answer(200, "primary", "running");
    const STANDBY: fn() -> Answer = || answer(503, "replica", "running");
    const UNLOCKED: fn() -> Answer = || answer(503, "primary", "running");
    const SILENT: fn() -> Result<Answer, NoAnswer> =
        || Err(NoAnswer { cause: Cause::Failed, reason: "no answer".to_owned() });
    const REFUSED: fn() -> Result<Answer, NoAnswer> =
        || Err(NoAnswer { cause: Cause::Refused, reason: "connection refused".to_owned() });

    #[test]
    fn the_reason_tells_an_old_patroni_from_a_replica_that_does_not_stream() {
        for (old, said) in [(false, ""), (true, " (not reported before Patroni 3.0.4)")] {
            let mut node = Node::new("replica?replication_state=streaming");
            let replica = answer(200, "replica", "running");
            let reply = node.hears(10.0, Ok(Answer { predates_replication_state: old, ..replica }));
            assert_eq!(reply.verdict, Verdict::Out(Otherwise::Drain));
            let reason = "replica, running, replication_state is not streaming";
            assert_eq!(reply.reason, format!("{reason}{said}"));
        }
    }

    #[test]
    fn a_hold_takes_out_a_ready_node_and_nothing_else() {
        for state in [AdminState::Maint, AdminState::Drain] {
            let hold = Some(Hold { state, reason: "why".to_owned() });
            let mut node = Node { hold: hold.clone(), ..Node::new("primary") };
            let expected = (Verdict::Out(state.into()), "hold: why".to_owned());
            let said = |reply: Reply| (reply.verdict, reply.reason);
            assert_eq!(said(node.hears(10.0, Ok(PRIMARY()))), expected);
            // also in the grace period, since the node was ready, and not afterwards
            assert_eq!(said(node.hears(11.0, REFUSED())), expected);
            assert_eq!(node.hears(15.0, REFUSED()).verdict, Verdict::Down);
            for other in [
                STANDBY(),
                UNLOCKED(),
                answer(200, "primary", "stopping"),
                answer(503, "primary", "stopped"),
            ] {
                let mut free = Node { left: node.left.clone(), ..Node::new("primary") };
                assert_eq!(node.hears(20.0, Ok(other.clone())), free.hears(20.0, Ok(other)));
            }
            let mut standby = Node { hold, ..Node::new("primary") };
            standby.hears(10.0, Ok(STANDBY()));
            assert_eq!(standby.hears(11.0, REFUSED()).verdict, Verdict::Keep);
        }
    }

    #[test]
    fn trouble_soon_after_a_good_answer_changes_nothing() {
        for (check, good) in
            [("primary", PRIMARY()), ("primary", STANDBY()), ("replica", UNLOCKED())]
        {
            let mut node = Node::new(check);
            assert_eq!(node.hears(9.0, SILENT()).verdict, Verdict::Down, "nothing good yet");
            node.hears(10.0, Ok(good));
            let reply = node.hears(11.2, REFUSED());
            assert_eq!(reply.verdict, Verdict::Keep);
            assert_eq!(reply.reason, "held 1.2 of 4 s: connection refused");
            let reply = node.hears(13.9, SILENT());
            assert_eq!(reply.reason, "held 3.9 of 4 s: no answer");
            // trouble renews no grace
            let reply = node.hears(14.0, SILENT());
            assert_eq!((reply.verdict, reply.reason.as_str()), (Verdict::Down, "no answer"));
        }
    }

    #[test]
    fn without_grace_nothing_is_bridged() {
        let policy = Policy { grace: Duration::ZERO, ..POLICY };
        let mut node = Node { policy, ..Node::new("primary") };
        node.hears(10.0, Ok(PRIMARY()));
        assert_eq!(node.hears(10.0, SILENT()).verdict, Verdict::Down);
        assert_eq!(node.hears(10.1, Ok(UNLOCKED())).verdict, Verdict::Fail);
    }

    #[test]
    fn the_verdict_does_not_depend_on_the_timeout() {
        let mut node = Node::new("primary");
        node.hears(10.0, Ok(PRIMARY()));
        for timeout in [0.01, 1.5, 2.5, 10.0] {
            let left = node.left.clone();
            assert_eq!(node.hears_late(13.5, 13.5 + timeout, SILENT()).verdict, Verdict::Keep);
            node.left = left;
        }
        // a slow answer counts from its question
        let mut node = Node::new("primary");
        node.hears_late(10.0, 11.5, Ok(PRIMARY()));
        assert!(node.bridges(13.9) && !node.bridges(14.1));
    }

    /// Each of these answers ends the grace period at once, and the last answer counts.
    #[test]
    fn any_other_answer_ends_the_grace_period() {
        for (check, other) in [
            ("primary", UNLOCKED()),
            ("leader", UNLOCKED()),
            ("primary", answer(503, "primary", "unknown")),
            ("read-only", answer(200, "primary", "unknown")),
            ("primary", answer(200, "primary", "stopping")),
            ("primary", answer(503, "demoted", "stopped")),
            ("primary", answer(200, "primary", "crashed")),
            ("primary", answer(200, "primary", "starting")),
            ("primary", answer(200, "primary", "start failed")),
            ("replica", answer(503, "replica", "crashed")),
            ("primary", answer(200, "primary", "nonsense")),
        ] {
            let mut node = Node::new(check);
            let good = || match check {
                "replica" => Ok(answer(200, "replica", "running")),
                _ => Ok(PRIMARY()),
            };
            node.hears(10.0, good());
            assert!(node.bridges(10.4));
            let expected =
                look_up(&node.question, POLICY, &Ok(node.date_answer(10.5, other.clone())));
            assert_eq!(node.hears(10.5, Ok(other)), expected);
            assert!(!node.bridges(10.6), "{check}");
            // and what was asked before and answered afterwards does not bring it back
            node.hears_late(10.4, 10.7, good());
            assert!(!node.bridges(10.8), "{check}");
            node.hears(10.9, good());
            assert!(node.bridges(11.0), "{check}");
        }
    }

    /// One check's READY is on its way while another check is told that the lock is lost.
    #[test]
    fn a_ready_that_was_overtaken_is_not_sent() {
        for other in [UNLOCKED(), answer(503, "replica", "running")] {
            let mut node = Node::new("primary");
            node.hears(10.0, Ok(PRIMARY()));
            node.hears(10.3, Ok(other));
            let reply = node.hears_late(10.2, 11.4, Ok(PRIMARY()));
            assert_eq!(reply.verdict, Verdict::Out(Otherwise::Drain));
            // a READY that was asked for at the same time is sent
            assert_eq!(node.hears_late(10.3, 11.5, Ok(PRIMARY())).verdict, Verdict::Ready);
        }
        // both were in flight together
        let mut node = Node::new("primary");
        node.hears_late(10.3, 10.4, Ok(PRIMARY()));
        assert_eq!(node.hears_late(10.2, 10.5, Ok(PRIMARY())).verdict, Verdict::Ready);
    }

    /// When Patroni restarts outside a pause, it stops PostgreSQL first.
    #[test]
    fn a_standby_whose_patroni_is_restarted_is_not_down() {
        for (check, good) in
            [("primary", STANDBY()), ("replica", answer(200, "replica", "running"))]
        {
            let was_ready = good.status == 200;
            let mut node = Node::new(check);
            node.hears(10.0, Ok(good));
            for (time, state) in [(10.5, "stopping"), (10.6, "unknown"), (10.7, "stopped")] {
                let reply = node.hears(time, Ok(answer(503, "replica", state)));
                assert_eq!(reply.verdict, Verdict::Out(Otherwise::Maint));
            }
            // the node stays out of the pool, also for a HAProxy that was not told that it has left
            let expected = if was_ready { Verdict::Out(Otherwise::Drain) } else { Verdict::Keep };
            assert_eq!(node.hears(11.0, REFUSED()).verdict, expected);
            assert_eq!(node.hears(13.9, REFUSED()).verdict, expected);
            // the grace has not begun anew
            let stopped = || Ok(answer(503, "replica", "stopped"));
            assert_eq!(node.hears(14.0, REFUSED()).verdict, Verdict::Down);
            assert_eq!(node.hears(14.0, stopped()).verdict, Verdict::Stopped);
            // a standby that stays stopped is broken after the grace period
            let mut node = Node::new(check);
            node.hears(10.0, Ok(answer(503, "replica", "running")));
            assert_eq!(node.hears(13.9, stopped()).verdict, Verdict::Out(Otherwise::Maint));
            assert_eq!(node.hears(14.0, stopped()).verdict, Verdict::Stopped);
            // a stopped primary is broken at once
            let mut node = Node::new("primary");
            node.hears(10.0, Ok(PRIMARY()));
            let reply = node.hears(10.5, Ok(answer(503, "primary", "stopped")));
            assert_eq!(reply.verdict, Verdict::Stopped);
        }
    }

    #[test]
    fn an_unknown_state_of_the_lock_holder_is_trouble() {
        let mut node = Node::new("primary");
        node.hears(10.0, Ok(PRIMARY()));
        let unknown = || Ok(answer(200, "primary", "unknown"));
        assert_eq!(node.hears(11.0, unknown()).verdict, Verdict::Keep);
        assert_eq!(node.hears(14.0, unknown()).verdict, Verdict::Fail);
    }

    #[test]
    fn a_missing_lock_is_bridged_only_if_the_primary_may_still_hold_it() {
        // Patroni restarted
        let mut node = Node::new("primary");
        node.hears(10.0, Ok(PRIMARY()));
        node.hears(10.5, REFUSED());
        let reply = node.hears(11.0, Ok(UNLOCKED()));
        assert_eq!(reply.verdict, Verdict::Keep);
        assert!(reply.reason.ends_with("does not know its lock yet"), "{reply:?}");
        assert_eq!(node.hears(14.0, Ok(UNLOCKED())).verdict, Verdict::Fail);
        // a good answer since
        let mut node = Node::new("primary");
        node.hears(10.0, Ok(PRIMARY()));
        node.hears(10.5, REFUSED());
        node.hears(11.0, Ok(PRIMARY()));
        assert_eq!(node.hears(11.5, Ok(UNLOCKED())).verdict, Verdict::Fail);
        // silence is no refusal
        let mut node = Node::new("primary");
        node.hears(10.0, Ok(PRIMARY()));
        node.hears(10.5, SILENT());
        assert_eq!(node.hears(11.0, Ok(UNLOCKED())).verdict, Verdict::Fail);
        // paused: now and at the last good answer
        for (before, now, expected) in [
            (true, true, Verdict::Keep),
            (true, false, Verdict::Fail),
            (false, true, Verdict::Fail),
        ] {
            let mut node = Node::new("primary");
            node.hears(10.0, Ok(Answer { pause: before, ..PRIMARY() }));
            let reply = node.hears(11.0, Ok(Answer { pause: now, ..UNLOCKED() }));
            assert_eq!(reply.verdict, expected);
        }
        // Patroni's clock was set
        for (step, expected) in
            [(300, Verdict::Keep), (5, Verdict::Fail), (1, Verdict::Fail), (-300, Verdict::Fail)]
        {
            let mut node = Node::new("primary");
            node.hears(10.0, Ok(PRIMARY()));
            node.clock = node.clock.saturating_add_signed(step);
            assert_eq!(node.hears(11.0, Ok(UNLOCKED())).verdict, expected, "{step}");
        }
        // Patroni's clock was not set: a bad answer leaves its date, and before the first there is none
        for first in [UNLOCKED(), PRIMARY()] {
            let mut node = Node::new("primary");
            for (time, answer) in [(10.0, first), (20.0, UNLOCKED()), (40.0, UNLOCKED())] {
                node.hears(time, Ok(answer));
                assert_eq!(node.left.at, Duration::from_secs_f64(time));
            }
        }
    }

    #[test]
    fn the_age_of_dcs_last_seen_bounds_the_grace_period() {
        let seen = |ago: i64| {
            let mut node = Node::new("primary");
            let seen = u32::try_from(i64::from(node.clock) + 100 - ago).expect("a time");
            node.hears(100.0, Ok(Answer { dcs_last_seen: Some(seen), ..PRIMARY() }));
            node
        };
        assert!(seen(0).bridges(103.9) && seen(11).bridges(103.9));
        assert!(seen(13).bridges(101.9) && !seen(13).bridges(102.0));
        assert!(!seen(15).bridges(100.0) && !seen(1000).bridges(100.0));
        // whole seconds may be off by one; what is further in the future says nothing
        assert!(seen(-1).bridges(103.9) && !seen(-2).bridges(100.0));
        let mut failsafe = Node::new("primary");
        failsafe.hears(100.0, Ok(Answer { cluster_unlocked: true, ..PRIMARY() }));
        assert!(!failsafe.bridges(100.1));
    }

    #[test]
    fn a_node_that_has_left_the_pool_stays_out() {
        let mut node = Node::new("primary");
        node.hears(10.0, Ok(PRIMARY()));
        node.hears(10.5, Ok(STANDBY()));
        // another HAProxy may not have been told
        let reply = node.hears(11.0, SILENT());
        assert_eq!(reply.verdict, Verdict::Out(Otherwise::Drain));
        assert_eq!(reply.reason, "held 0.5 of 4 s: no answer");
        node.hears(69.5, Ok(STANDBY()));
        assert_eq!(node.hears(69.9, SILENT()).verdict, Verdict::Out(Otherwise::Drain));
        assert_eq!(node.hears(70.0, SILENT()).verdict, Verdict::Keep);
        // a HAProxy that was not told READY does no harm
        node.hears(72.0, Ok(PRIMARY()));
        assert_eq!(node.hears(72.5, SILENT()).verdict, Verdict::Keep);
    }

    /// The standby's question may be older than that of the last ready answer.
    #[test]
    fn a_late_answer_of_a_standby_counts() {
        let mut node = Node::new("primary");
        node.hears(10.1, Ok(PRIMARY()));
        node.hears_late(10.0, 10.5, Ok(STANDBY()));
        assert_eq!(node.hears(11.0, SILENT()).verdict, Verdict::Out(Otherwise::Drain));
    }

    #[test]
    fn trouble_begins_lasts_and_ends() {
        let mut node = Node::new("primary");
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        node.hears(10.0, Ok(PRIMARY()));
        assert_eq!(node.left.trouble, None);
        node.hears(11.0, SILENT());
        node.hears(20.0, SILENT());
        node.hears(21.0, Ok(UNLOCKED()));
        assert_eq!(node.left.trouble, seconds(11));
        for well in [PRIMARY(), STANDBY(), answer(503, "replica", "starting")] {
            node.hears(30.0, Ok(answer(503, "primary", "stopped")));
            assert_eq!(node.left.trouble, seconds(if well == PRIMARY() { 11 } else { 30 }));
            node.hears(31.0, Ok(well));
            assert_eq!(node.left.trouble, None);
        }
    }

    const UNASKED: fn() -> Result<Answer, NoAnswer> =
        || Err(NoAnswer { cause: Cause::NotAsked, reason: String::new() });

    #[test]
    fn a_hold_counts_where_the_agent_could_not_ask() {
        let hold = || Some(Hold { state: AdminState::Maint, reason: "by hand".to_owned() });
        for (last, expected) in [(PRIMARY(), MAINT), (STANDBY(), Verdict::Keep)] {
            let mut node = Node::new("primary");
            node.hears(10.0, Ok(last));
            node.hold = hold();
            assert_eq!(node.hears(20.0, UNASKED()).verdict, expected);
        }
    }

    const STOPPING: fn() -> Answer = || answer(200, "primary", "stopping");
    const DRAIN: Verdict = Verdict::Out(Otherwise::Drain);
    const MAINT: Verdict = Verdict::Out(Otherwise::Maint);

    #[test]
    fn a_primary_that_patroni_stops_drains_for_ten_seconds() {
        for (check, state) in [("primary", "stopping"), ("leader", "restarting")] {
            let stopping = || Ok(answer(200, "primary", state));
            let mut node = Node::new(check);
            node.hears(10.0, Ok(PRIMARY()));
            assert_eq!(node.hears(10.5, stopping()).verdict, DRAIN);
            // the first such answer counts, however often checks ask
            for time in [10.6, 14.0, 20.4] {
                assert_eq!(node.hears(time, stopping()).verdict, DRAIN, "{time}");
            }
            assert_eq!(node.hears(20.5, stopping()).verdict, MAINT);
            assert_eq!(node.hears(90.0, stopping()).verdict, MAINT);
            // a stop starts no grace
            assert_eq!(node.hears(20.6, SILENT()).verdict, Verdict::Down);
            // the next stop drains anew
            node.hears(100.0, Ok(PRIMARY()));
            assert_eq!(node.hears(101.0, stopping()).verdict, DRAIN);
            // silence does not extend the ten seconds
            assert_eq!(node.hears(105.0, SILENT()).verdict, Verdict::Down);
            assert_eq!(node.hears(110.9, stopping()).verdict, DRAIN);
            assert_eq!(node.hears(111.0, stopping()).verdict, MAINT);
            // a stop after a finished one drains anew
            node.hears(112.0, Ok(answer(503, "demoted", "stopped")));
            assert_eq!(node.hears(113.0, stopping()).verdict, DRAIN);
        }
    }

    #[test]
    fn a_primary_drains_only_while_it_has_the_lock_and_sees_the_dcs() {
        let node = Node::new("primary");
        let seen = |ago: u32| Some(node.clock + 10 - ago);
        for (answer, expected) in [
            (Answer { dcs_last_seen: seen(14), ..STOPPING() }, DRAIN),
            (Answer { dcs_last_seen: seen(15), ..STOPPING() }, MAINT),
            (Answer { cluster_unlocked: true, ..STOPPING() }, MAINT),
            (Answer { status: 503, ..STOPPING() }, MAINT),
            (Answer { role: "demoted".to_owned(), ..STOPPING() }, MAINT),
            (Answer { role: "standby_leader".to_owned(), ..STOPPING() }, MAINT),
        ] {
            let mut node = Node::new("primary");
            assert_eq!(node.hears(10.0, Ok(answer)).verdict, expected);
        }
        // Patroni before 2.1.2 does not say when it last saw the DCS
        assert_eq!(look_up(&node.question, POLICY, &Ok(STOPPING())).verdict, MAINT);
        // a check that needs no lock gets no draining primary
        assert_eq!(Node::new("read-only").hears(10.0, Ok(STOPPING())).verdict, MAINT);
        let policy = Policy { stopping: AdminState::Maint, ..POLICY };
        let mut node = Node { policy, ..Node::new("primary") };
        assert_eq!(node.hears(10.0, Ok(STOPPING())).verdict, MAINT);
    }

    /// When its service is stopped, Patroni closes its REST API before it stops PostgreSQL.
    #[test]
    fn a_note_turns_bridged_trouble_into_a_drain() {
        for check in ["primary", "replica"] {
            let role = if check == "primary" { "primary" } else { "replica" };
            let good = || Ok(answer(200, role, "running"));
            let mut node = Node { stop_noted: true, ..Node::new(check) };
            // an answer counts more than a forgotten note
            assert_eq!(node.hears(10.0, good()).verdict, Verdict::Ready);
            let reply = node.hears(10.5, REFUSED());
            assert_eq!(reply.verdict, DRAIN);
            assert_eq!(reply.reason, "PostgreSQL is about to stop: connection refused");
            assert_eq!(node.hears(13.9, REFUSED()).verdict, DRAIN);
            // the grace is over, and the note is not
            let reply = node.hears(14.0, REFUSED());
            assert_eq!(reply.verdict, MAINT);
            assert_eq!(reply.reason, "PostgreSQL is about to stop: connection refused");
            node.stop_noted = false;
            assert_eq!(node.hears(14.5, REFUSED()).verdict, Verdict::Down);
            let policy = Policy { stopping: AdminState::Maint, ..POLICY };
            let mut node = Node { policy, stop_noted: true, ..Node::new(check) };
            node.hears(10.0, good());
            assert_eq!(node.hears(10.5, REFUSED()).verdict, Verdict::Keep);
        }
        // a node that was not in the pool does not drain
        let mut node = Node { stop_noted: true, ..Node::new("primary") };
        node.hears(10.0, Ok(STANDBY()));
        assert_eq!(node.hears(10.5, REFUSED()).verdict, Verdict::Keep);
        // afterwards, a note counts only if Patroni was asked in vain
        assert_eq!(node.hears(20.0, UNASKED()).verdict, Verdict::Keep);
        assert_eq!(node.hears(20.0, Ok(answer(503, "primary", "crashed"))).verdict, Verdict::Fail);
    }

    const ROLES: [&str; 7] =
        ["primary", "master", "replica", "standby_leader", "demoted", "uninitialized", "promoted"];

    /// Each state that Patroni's source knows but `running`, with each role, check and status.
    #[test]
    fn no_state_but_running_is_ready() {
        let maint = Verdict::Out(Otherwise::Maint);
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
                    for status in [200, 503] {
                        let lock = matches!(check, "primary" | "leader") && status == 200;
                        let expected = match (state, role) {
                            ("stopped", "demoted" | "uninitialized") | ("unknown", "replica") => {
                                maint
                            }
                            ("stopping" | "restarting", "primary" | "master") if lock => {
                                Verdict::Out(Otherwise::Drain)
                            }
                            _ => expected,
                        };
                        let verdict = verdict(check, status, role, state);
                        assert_eq!(verdict, expected, "{check} {status} {role} {state}");
                    }
                }
            }
        }
    }

    /// A running node is READY with 200 and a role that fits. Only a check that needs the lock fails without it.
    #[test]
    fn a_running_node_is_ready_by_status_and_role() {
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
                let ready = if fits { Verdict::Ready } else { Verdict::Out(Otherwise::Drain) };
                assert_eq!(verdict(check, 200, role, "running"), ready, "{check} {role}");
                let lost = matches!(check, "primary" | "read-write" | "master" | "leader")
                    && matches!(role, "primary" | "master");
                let out = if lost { Verdict::Fail } else { Verdict::Out(Otherwise::Drain) };
                assert_eq!(verdict(check, 503, role, "running"), out, "{check} {role}");
            }
        }
    }
}
