//! The grace period against the leader lock: a model of every order of events, with at most two faults, in steps of half a
//! second, with the real `decide` and the real record.
//!
//! The model has one node that is primary at first, the leader lock in the DCS, and HAProxies that share the memory. Another
//! node may be promoted at any time once the lock is free, as long as the cluster is not paused. A search has no bound on
//! depth: ages are clipped where nothing depends on them any more, and the search ends when there are no new states.
//!
//! **What is covered:** a server that is UP because the last reply was `Keep`. Patroni's loop makes an exchange with the DCS
//! within `retry_timeout`, and renews its lock by it or demotes. Then no such server is left at the moment when another node
//! may be promoted. This is more than the promise, which allows one `agent-inter` and one `--timeout` after that moment. Nor
//! is a server left that drains while Patroni stops PostgreSQL, within `drain_outlives`, even if that stop never ends and
//! Patroni does not renew the lock that it claims.
//!
//! **What is not:** a server that is UP because Patroni itself says 200. Patroni's claim counts from the answer to a renewal
//! and may outlive the lock by `retry_timeout`. A lock that was given up or deleted may be another node's at once, and no
//! grace period protects against that. There the model only shows that nothing is bridged once a check has got a bad answer,
//! unless Patroni was restarted since the last good one. At most two faults happen on one path. The model has no step of a
//! clock, no old answer that arrives late, no standby's health check, and no monitoring that refreshes `dcs_last_seen`.

use patroni_agent_check::decide::decide;
use patroni_agent_check::decide::grace::{Case, Policy};
use patroni_agent_check::haproxy::question::Question;
use patroni_agent_check::haproxy::reply::{AdminState, Otherwise, Verdict};
use patroni_agent_check::patroni::answer::{Answer, Cause, NoAnswer};
use patroni_agent_check::patroni::ask::Outcome;
use patroni_agent_check::run::memory::Record;
use stateright::{Checker, HasDiscoveries, Model, Path, Property};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// One step of time.
const TICK: Duration = Duration::from_millis(500);
/// Each state has this time. What a state remembers grows older instead.
const NOW: Duration = Duration::from_secs(1000);
/// A grace period that began then is over, but a HAProxy may not have got that answer yet.
const LONG_AGO: Duration = Duration::from_secs(980);
/// Patroni's clock. Both of its times are whole seconds, and an age is rounded down, which is the worst case.
const DATE: u32 = 1_000_000;
/// HAProxy's `agent-inter` and the agent's `--timeout`. These and all times below are in ticks.
const INTER: u8 = 1;
const TIMEOUT: u8 = 3;
/// From this age on, `dcs_last_seen` allows no grace period.
const OLD: u8 = 32;
/// How long a primary that Patroni stops drains.
const DRAIN: Duration = Duration::from_secs(10);
/// Longer than any drain outlives the lock.
const MOST: u8 = 8;

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A bad answer leaves the memory as it was.
    Memory,
    /// A primary that says 503 is bridged as if the cluster were paused.
    Lock,
    /// Nothing is broken, but the bound of a drain applies to READY.
    Measured,
}

#[derive(Clone, Copy, Debug)]
struct Cluster {
    ttl: u8,
    loop_wait: u8,
    retry_timeout: u8,
    grace: u8,
    haproxies: usize,
    /// Whether Patroni's loop may hang alone, and a frozen Patroni may go on.
    stalls: bool,
    /// Whether a loop first reads the cluster, which may take another `retry_timeout`.
    reads: bool,
    /// Whether the cluster may be paused.
    pauses: bool,
    /// Whether the lock may be given up or deleted.
    gives_up: bool,
    /// The DCS acts and answers after multiples of this time, or when `retry_timeout` is over.
    grain: u8,
    /// How many faults happen at most. The end of a fault does not count.
    faults: u8,
    /// How long sessions in a drain may outlive the promotion of another node after the lock has run out.
    drain_outlives: u8,
    broken: Broken,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Node {
    Primary,
    Dead,
    /// PostgreSQL runs as primary, and Patroni has not run its loop yet.
    Restarted,
    /// PostgreSQL runs as primary, and Patroni knows that it has lost its lock.
    Deposed,
    Stopping,
    Replica,
}

/// What Patroni asks of the DCS, and for how long it has waited.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Asks {
    Nothing,
    Read(u8),
    Renew(u8),
    /// The DCS has renewed the lock, and the answer is on its way.
    Renewed(u8),
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct HaProxy {
    /// The time until the next check.
    wait: u8,
    /// For how long a check has waited for a silent Patroni.
    asking: Option<u8>,
    up: bool,
    /// The server is UP because the last reply was `Keep`.
    kept: bool,
    /// That reply came after Patroni had given a bad answer to some check.
    against: bool,
    /// The server is no longer UP, but keeps its sessions.
    drains: bool,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct State {
    /// How long the lock will last.
    lock: u8,
    /// The lock did not run out: it was given up or deleted.
    given_up: bool,
    /// Another node was promoted.
    promoted: bool,
    /// How long ago that was.
    promoted_for: u8,
    pause: bool,
    node: Node,
    /// How long Patroni goes on saying that it has the lock.
    claim: u8,
    /// The age of `dcs_last_seen`.
    seen: u8,
    failsafe: bool,
    knows_pause: bool,
    next_loop: u8,
    asks: Asks,
    /// The REST API does not answer.
    silent: bool,
    /// The loop does not run.
    stuck: bool,
    haproxies: Vec<HaProxy>,
    record: Record,
    /// A check got a bad answer, and no check has replied READY since.
    told: bool,
    /// How many more faults may happen.
    faults: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Tick,
    /// HAProxy asks; the reply comes at once unless Patroni is silent.
    Ask(usize),
    Reply(usize),
    Process,
    Answer,
    Fail,
    FailsafeMode,
    Stops,
    /// Patroni stops its primary, with the lock that it has or still claims, and does not renew it meanwhile.
    StopsWithTheLock,
    Demoted,
    Promote,
    GiveUp,
    Pause,
    Silent,
    Speaks,
    Stuck,
    GoesOn,
    Freeze,
    Kill,
    Restart,
}

impl Cluster {
    fn due(&self, state: &State) -> bool {
        let haproxy = |h: &HaProxy| h.asking.map_or(h.wait == 0, |asking| asking == TIMEOUT);
        let exchange = match state.asks {
            Asks::Nothing => false,
            Asks::Read(waited) | Asks::Renew(waited) | Asks::Renewed(waited) => {
                waited >= self.retry_timeout
            }
        };
        state.haproxies.iter().any(haproxy) || state.runs() && exchange
    }

    /// Whether the DCS may act or answer now.
    fn acts_now(&self, waited: u8) -> bool {
        waited <= self.retry_timeout && waited % self.grain == 0 || waited == self.retry_timeout
    }

    /// A check is over: the real decision with the real record.
    fn reply(&self, state: &mut State, number: usize) {
        let waited = state.haproxies[number].asking.unwrap_or(0);
        let question = Question::from_agent_send(b"primary", Otherwise::Maint).expect("a question");
        let policy = Policy {
            keep: false,
            grace: TICK * u32::from(self.grace),
            stopping: AdminState::Drain,
        };
        let mut last = state.record.clone();
        let answer = match state.answer() {
            Ok(answer) if self.broken == Broken::Lock && answer.status == 503 => {
                last.pause = true;
                Ok(Answer { pause: true, ..answer })
            }
            Ok(_) if waited == TIMEOUT || state.silent => {
                Err(NoAnswer { cause: Cause::Failed, reason: String::new() })
            }
            answer => answer,
        };
        // after a restart, nobody can tell whether the first loop has run, until an answer says that Patroni has the lock
        let restarted = state.node == Node::Restarted || state.record.refused;
        let claimed = restarted || state.knows_pause;
        state.told |= answer.as_ref().is_ok_and(|a| a.status != 200) && !claimed;
        let bad = answer.as_ref().is_ok_and(|answer| answer.status != 200);
        let asked = NOW - TICK * u32::from(waited);
        let outcome = Outcome { from: Vec::new(), answer, asked, answered: NOW };
        let case = Case { question: &question, outcome: &outcome, last: &last, stop_noted: false };
        let (reply, record) = decide(case, policy, None);
        if !(bad && self.broken == Broken::Memory) {
            state.record = record;
        }
        state.told &= reply.verdict != Verdict::Ready;
        let haproxy = &mut state.haproxies[number];
        (haproxy.wait, haproxy.asking) = (INTER, None);
        haproxy.drains = match reply.verdict {
            Verdict::Out(Otherwise::Drain) => haproxy.up || haproxy.drains,
            Verdict::Keep => haproxy.drains,
            _ => false,
        };
        haproxy.up = match reply.verdict {
            Verdict::Ready => true,
            Verdict::Keep => haproxy.up,
            _ => false,
        };
        haproxy.kept = haproxy.up && reply.verdict == Verdict::Keep;
        haproxy.against = haproxy.kept && state.told;
        self.forget(&mut state.record);
    }

    /// Makes states equal if no later decision depends on their difference.
    fn forget(&self, record: &mut Record) {
        record.trouble = None; // only for the journal
        let lease = record.lease.min(TICK * u32::from(self.grace));
        let age = NOW - record.at;
        let was_ready = record.ready == Some(record.at);
        // a check that still waits may have asked in time
        if age >= lease + TICK * u32::from(TIMEOUT + 1) {
            (record.at, record.lease) = (LONG_AGO, Duration::ZERO);
            (record.refused, record.pause) = (false, false);
        }
        record.ready = record.ready.map(|_| if was_ready { record.at } else { LONG_AGO - TICK });
        record.stopping = record.stopping.map(|since| since.max(NOW - DRAIN));
    }

    fn tick(&self, state: &mut State) {
        let less = |time: &mut u8| *time = time.saturating_sub(1);
        less(&mut state.lock);
        less(&mut state.claim);
        less(&mut state.next_loop);
        state.seen = OLD.min(state.seen + 1);
        state.promoted_for = MOST.min(state.promoted_for + u8::from(state.promoted));
        if let Asks::Read(waited) | Asks::Renew(waited) | Asks::Renewed(waited) = &mut state.asks {
            *waited = (self.retry_timeout + 1).min(*waited + 1);
        }
        for haproxy in &mut state.haproxies {
            match &mut haproxy.asking {
                Some(waited) => *waited += 1,
                None => less(&mut haproxy.wait),
            }
        }
        state.record.at -= TICK;
        state.record.ready = state.record.ready.map(|ready| ready - TICK);
        state.record.stopping = state.record.stopping.map(|since| since - TICK);
        self.forget(&mut state.record);
    }

    /// Searches all states, or until it has found these.
    fn search(self, until: HasDiscoveries) -> impl Checker<Cluster> {
        let begin = Instant::now();
        let checker = self.checker().threads(2).finish_when(until).spawn_bfs().join();
        let (states, seconds) = (checker.unique_state_count(), begin.elapsed().as_secs_f32());
        println!("{self:?}: {states} states, {seconds:.1} s");
        for (name, path) in checker.discoveries() {
            println!("    {name}: {}", format_path(&path));
        }
        checker
    }
}

/// The actions of a path, with the time in seconds at which they happen.
fn format_path(path: &Path<State, Action>) -> String {
    let mut ticks = 0;
    let mut words = Vec::new();
    for action in path.clone().into_actions() {
        match action {
            Action::Tick => ticks += 1,
            Action::Ask(_) => {}
            action => words.push(format!("{:.1} {action:?}", f64::from(ticks) / 2.0)),
        }
    }
    words.join(", ")
}

impl State {
    fn runs(&self) -> bool {
        !self.stuck && matches!(self.node, Node::Primary | Node::Restarted)
    }

    fn answer(&self) -> Result<Answer, NoAnswer> {
        let (status, state, role) = match self.node {
            Node::Dead => {
                return Err(NoAnswer { cause: Cause::Refused, reason: String::new() });
            }
            Node::Primary if self.claim > 0 => (200, "running", "primary"),
            Node::Primary | Node::Restarted | Node::Deposed => (503, "running", "primary"),
            Node::Stopping if self.claim > 0 => (200, "stopping", "primary"),
            Node::Stopping => (503, "stopping", "primary"),
            Node::Replica => (503, "running", "replica"),
        };
        Ok(Answer {
            status,
            state: state.to_owned(),
            role: role.to_owned(),
            replication_state: None,
            predates_replication_state: false,
            timeline: None,
            noloadbalance: false,
            pause: self.knows_pause,
            cluster_unlocked: self.failsafe,
            dcs_last_seen: Some(DATE - u32::from(self.seen / 2)),
            date: DATE,
        })
    }

    /// Whether another node was promoted longer ago than this, or just now for 0, because the lock ran out.
    fn outlives(&self, limit: u8) -> bool {
        self.promoted && !self.given_up && (self.promoted_for > limit || limit == 0)
    }

    /// The DCS did not answer, or another node has the lock.
    fn depose(&mut self) {
        (self.node, self.claim, self.asks) = (Node::Deposed, 0, Asks::Nothing);
    }
}

impl Model for Cluster {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let record = Record { at: LONG_AGO, ..Record::default() };
        let haproxy = |wait| HaProxy {
            wait,
            asking: None,
            up: false,
            kept: false,
            against: false,
            drains: false,
        };
        vec![State {
            lock: self.ttl,
            given_up: false,
            promoted: false,
            promoted_for: 0,
            pause: false,
            node: Node::Primary,
            claim: self.ttl,
            seen: 0,
            failsafe: false,
            knows_pause: false,
            next_loop: self.loop_wait,
            asks: Asks::Nothing,
            silent: false,
            stuck: false,
            haproxies: (0..self.haproxies).map(|_| haproxy(0)).collect(),
            record,
            told: false,
            faults: self.faults,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let over = matches!(state.node, Node::Deposed | Node::Stopping | Node::Replica)
            || state.promoted && state.claim == 0;
        if over && state.haproxies.iter().all(|haproxy| !haproxy.up && !haproxy.drains) {
            return; // no session can reach the node any more
        }
        if !self.due(state) {
            actions.push(Action::Tick);
        }
        for (number, haproxy) in state.haproxies.iter().enumerate() {
            match haproxy.asking {
                None if haproxy.wait == 0 => actions.push(Action::Ask(number)),
                Some(waited) if waited == TIMEOUT || !state.silent => {
                    actions.push(Action::Reply(number));
                }
                _ => {}
            }
        }
        match state.asks {
            Asks::Nothing => {}
            _ if state.promoted && state.runs() => actions.push(Action::Fail),
            Asks::Renew(waited) if self.acts_now(waited) && !state.promoted => {
                actions.push(Action::Process)
            }
            Asks::Read(waited) | Asks::Renewed(waited) if state.runs() && self.acts_now(waited) => {
                actions.push(Action::Answer);
            }
            _ => {}
        }
        let waited_enough = matches!(state.asks, Asks::Read(waited) | Asks::Renew(waited)
            | Asks::Renewed(waited) if waited >= self.retry_timeout);
        if state.runs() && waited_enough && !state.promoted {
            actions.extend([Action::Fail, Action::FailsafeMode]);
        }
        // Two checks are not asked in the same millisecond with READY for one and a standby's answer for the other.
        let asked = |h: &HaProxy| NOW - TICK * u32::from(h.asking.unwrap_or(0));
        let same = state.haproxies.iter().any(|h| state.record.ready == Some(asked(h)));
        match state.node {
            Node::Primary if state.claim > 0 => actions.push(Action::StopsWithTheLock),
            Node::Deposed => actions.push(Action::Stops),
            Node::Stopping if !same => actions.push(Action::Demoted),
            _ => {}
        }
        if !state.promoted {
            if state.lock == 0 && !state.pause {
                actions.push(Action::Promote);
            }
            if state.lock > 0 && self.gives_up {
                actions.push(Action::GiveUp);
            }
            if self.pauses {
                actions.push(Action::Pause);
            }
        }
        let frozen = state.silent && state.stuck;
        if state.node != Node::Dead {
            match state.silent {
                false => actions.push(Action::Silent),
                true if !frozen || self.stalls => actions.push(Action::Speaks),
                true => {}
            }
            match state.stuck {
                true if self.stalls => actions.push(Action::GoesOn),
                false if self.stalls => actions.push(Action::Stuck),
                false => actions.push(Action::Freeze),
                true => {}
            }
        }
        match state.node {
            Node::Primary | Node::Restarted => actions.push(Action::Kill),
            Node::Dead => actions.push(Action::Restart),
            _ => {}
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => self.tick(&mut state),
            Action::Ask(number) => {
                if state.silent && state.node != Node::Dead {
                    state.haproxies[number].asking = Some(0);
                } else {
                    self.reply(&mut state, number);
                }
            }
            Action::Reply(number) => self.reply(&mut state, number),
            Action::Process => {
                let Asks::Renew(waited) = state.asks else { return None };
                state.asks = Asks::Renewed(waited);
                (state.lock, state.given_up) = (self.ttl, false);
            }
            Action::Answer => {
                (state.seen, state.failsafe, state.knows_pause) = (0, false, state.pause);
                if let Asks::Read(_) = state.asks {
                    (state.asks, state.failsafe) = (Asks::Renew(0), state.lock == 0);
                } else {
                    (state.node, state.claim, state.asks) =
                        (Node::Primary, self.ttl, Asks::Nothing);
                }
            }
            // in a pause the primary runs on, and its claim runs out
            Action::Fail if state.knows_pause && state.node == Node::Primary => {
                state.asks = Asks::Nothing;
            }
            Action::Fail => state.depose(),
            Action::FailsafeMode if state.node == Node::Primary => {
                (state.claim, state.failsafe, state.asks) = (self.ttl, true, Asks::Nothing);
            }
            Action::FailsafeMode => return None,
            Action::Stops => state.node = Node::Stopping,
            Action::StopsWithTheLock => (state.node, state.asks) = (Node::Stopping, Asks::Nothing),
            Action::Demoted => (state.node, state.claim) = (Node::Replica, 0),
            Action::Promote => state.promoted = true,
            Action::GiveUp => (state.lock, state.given_up) = (0, true),
            Action::Pause => state.pause = !state.pause,
            Action::Silent => state.silent = true,
            Action::Speaks => state.silent = false,
            Action::Stuck => state.stuck = true,
            Action::GoesOn => state.stuck = false,
            Action::Freeze => (state.silent, state.stuck) = (true, true),
            Action::Kill => {
                state.node = Node::Dead;
                (state.claim, state.seen, state.next_loop, state.asks) = (0, OLD, 0, Asks::Nothing);
                (state.silent, state.stuck, state.failsafe) = (false, false, false);
                state.knows_pause = false;
            }
            Action::Restart => state.node = Node::Restarted,
        }
        if state.runs() && state.asks == Asks::Nothing && state.next_loop == 0 {
            state.next_loop = self.loop_wait;
            state.asks = if self.reads { Asks::Read(0) } else { Asks::Renew(0) };
        }
        if matches!(
            action,
            Action::FailsafeMode
                | Action::GiveUp
                | Action::Pause
                | Action::StopsWithTheLock
                | Action::Silent
                | Action::Stuck
                | Action::Freeze
                | Action::Kill
        ) {
            state.faults = state.faults.checked_sub(1)?;
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(KEEP, |_, state: &State| {
                let kept = state.haproxies.iter().any(|haproxy| haproxy.kept);
                !kept || !state.promoted || state.given_up
            }),
            Property::always(DRAINS, |cluster: &Cluster, state: &State| {
                let drains = state.haproxies.iter().any(|haproxy| haproxy.drains);
                !(drains && state.outlives(cluster.drain_outlives))
            }),
            Property::always(READY, |cluster: &Cluster, state: &State| {
                let ready = state.haproxies.iter().any(|haproxy| haproxy.up && !haproxy.kept);
                !(cluster.broken == Broken::Measured
                    && ready
                    && state.outlives(cluster.drain_outlives))
            }),
            Property::always(NOT_BRIDGED, |_, state: &State| {
                !state.haproxies.iter().any(|haproxy| haproxy.against)
            }),
            Property::sometimes("a healthy holder of the lock is READY", |_, state: &State| {
                state.haproxies.iter().all(|haproxy| haproxy.up && !haproxy.kept)
            }),
            Property::sometimes("HAProxy has not seen the trouble", |_, state: &State| {
                let well = state.node == Node::Primary && state.claim > 0 && !state.silent;
                well && state.haproxies.iter().all(|haproxy| haproxy.kept)
            }),
        ]
    }
}

const fn cluster(ttl: u8, loop_wait: u8, retry_timeout: u8, grace: u8) -> Cluster {
    Cluster {
        ttl: 2 * ttl,
        loop_wait: 2 * loop_wait,
        retry_timeout: 2 * retry_timeout,
        grace,
        haproxies: 1,
        stalls: false,
        reads: false,
        pauses: false,
        gives_up: false,
        grain: retry_timeout,
        faults: 2,
        drain_outlives: 0,
        broken: Broken::Nothing,
    }
}

const SETTINGS: [Cluster; 4] = [
    cluster(30, 10, 10, 6),
    cluster(20, 1, 3, 6),
    // 15 s after Patroni has read the DCS the lock may have run out, and the last check takes some time
    Cluster { drain_outlives: INTER + TIMEOUT, ..cluster(20, 10, 5, 3) },
    cluster(20, 14, 3, 0),
];

const KEEP: &str = "a Keep does not outlive the lock";
const DRAINS: &str = "a drain does not outlive the lock for too long";
const READY: &str = "READY does not outlive the lock for longer than a drain";
const NOT_BRIDGED: &str = "nothing is bridged after a bad answer";

fn assert_found(cluster: Cluster, property: &'static str) {
    let until = HasDiscoveries::AllOf(BTreeSet::from([property]));
    assert!(cluster.search(until).discoveries().contains_key(property), "{property}");
}

#[test]
fn the_grace_ends_before_the_lock() {
    for cluster in SETTINGS {
        let checker = Cluster { pauses: true, ..cluster }.search(HasDiscoveries::All);
        checker.assert_no_discovery(KEEP);
        checker.assert_no_discovery(NOT_BRIDGED);
        checker.assert_no_discovery(DRAINS);
        checker.assert_any_discovery("a healthy holder of the lock is READY");
        if cluster.grace > 0 {
            checker.assert_any_discovery("HAProxy has not seen the trouble");
        }
    }
}

#[test]
fn two_haproxies_share_the_memory() {
    Cluster { gives_up: true, haproxies: 2, ..SETTINGS[1] }
        .search(HasDiscoveries::All)
        .assert_properties();
}

#[test]
fn a_stall_is_covered_with_the_default_setting() {
    Cluster { stalls: true, ..SETTINGS[0] }.search(HasDiscoveries::All).assert_properties();
}

#[test]
fn a_grace_that_is_too_long_is_found() {
    assert_found(Cluster { grace: 8, ..SETTINGS[2] }, KEEP);
    assert_found(Cluster { grace: 8, ..SETTINGS[3] }, KEEP);
    // an exchange longer than loop_wait is followed by the next loop at once
    assert_found(Cluster { grace: 25, ..SETTINGS[1] }, KEEP);
}

#[test]
fn a_bad_answer_that_is_forgotten_is_found() {
    let broken = Broken::Memory;
    assert_found(Cluster { broken, gives_up: true, haproxies: 2, ..SETTINGS[1] }, NOT_BRIDGED);
}

#[test]
fn a_lost_lock_that_is_bridged_is_found() {
    assert_found(Cluster { broken: Broken::Lock, ..SETTINGS[1] }, NOT_BRIDGED);
}

#[test]
fn a_drain_that_is_longer_than_the_lock_is_found_and_ready_is_longer() {
    assert_found(Cluster { drain_outlives: 0, ..SETTINGS[2] }, DRAINS);
    assert_found(Cluster { broken: Broken::Measured, ..SETTINGS[2] }, READY);
}

/// What is not covered, as docs/grace.md says: a slow read before a slow renewal, and a stall with a `ttl` of 20 s.
#[test]
fn known_limits_of_the_rule() {
    let slow = Cluster { reads: true, ..SETTINGS[0] };
    assert_found(slow, KEEP);
    assert_found(slow, DRAINS);
    assert_found(Cluster { stalls: true, ..SETTINGS[2] }, KEEP);
}
