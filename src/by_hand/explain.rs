//! What a check by hand says beside its answer: how the answer came about, and what HAProxy would not get. In goes what was
//! heard, out come lines. Knows nothing of files.

use crate::NAME;
use crate::decide::bounds;
use crate::journal::tell_operator;
use crate::options::Options;
use crate::patroni::ask::{Heard, Prepared};
use crate::patroni::check::Check;
use crate::patroni::location::Patroni;
use crate::run::memory::Record;
use rustix::net::{AddressFamily, getsockname};
use rustix::process::Uid;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Tells a person which user this process is, why it is `unlike` the units, and that this is a check by hand where the
/// person may have wanted another one.
pub fn explain_start(options: &Options, uid: Uid, unlike: Option<&String>) {
    if let Some(error) = unlike.filter(|_| options.own.is_none() && !options.explain) {
        tell_operator(&format!("the units would answer fail to HAProxy: --user {NAME}: {error}"));
    }
    if options.explain {
        let why = unlike.map_or(String::new(), |error| format!("; not here: {error}"));
        tell_operator(&format!("user: uid {uid}; the units run each check as {NAME}{why}"));
    }
    // of EXEC: and SYSTEM: of socat, and of ncat
    if getsockname(io::stdin()).is_ok_and(|own| own.address_family() == AddressFamily::UNIX) {
        tell_operator(
            "standard input is a Unix socket and not HAProxy's connection, so this is a check by hand; with socat, add nofork after EXEC:...",
        );
    }
}

/// What a person is told of an answer: always what HAProxy would not get, and a grace period that is too long; with
/// `--explain` also where Patroni was asked for what, and what it answered.
pub fn explain_answer(
    options: &Options,
    prepared: &Prepared,
    check: &Check,
    heard: &Heard,
    deadline: Instant,
) -> Vec<String> {
    let mut lines = Vec::new();
    if options.explain {
        let from = match &heard.from[..] {
            [patroni] => format!("Patroni {patroni}"),
            _ => prepared.tried(),
        };
        lines.push(format!("asked: {from} for {}", check.path()));
    }
    let Ok(answer) = &heard.answer else { return lines };
    if options.explain {
        let node = prepared.node(deadline).map_or(String::new(), |node| format!(" of node {node}"));
        let replication = answer.replication_state.as_deref().unwrap_or("none");
        let timeline = answer.timeline.map_or("none".to_owned(), |timeline| timeline.to_string());
        lines.push(format!(
            "answer{node}: status {}, state '{}', role '{}', replication_state {replication}, timeline {timeline}",
            answer.status, answer.state, answer.role
        ));
    }
    lines.extend(found_beside_localhost(&options.patroni, heard));
    let lock = prepared.lock_settings(deadline).and_then(bounds::lock_outlives);
    lines.extend(bounds::explain_too_long(options.policy.grace, options.timeout, lock));
    lines
}

/// Which checks of HAProxy get this answer, if Patroni listens at one address only.
fn found_beside_localhost(patroni: &Patroni, heard: &Heard) -> Option<String> {
    let [from] = &heard.from[..] else { return None };
    let local = from.host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    (patroni.discover && !local).then(|| {
        format!(
            "Patroni listens on {} only: HAProxy gets this answer if it asks the agent at that address, and is told down if not (see --url)",
            from.host
        )
    })
}

/// When this check last had an answer, which shows whether HAProxy asks.
pub fn explain_memory(last: &Record, asked: Duration) -> String {
    if last.at.is_zero() {
        return "memory: no answer to this check is remembered".to_owned();
    }
    let ago = |time| asked.saturating_sub(time).as_secs_f32();
    let trouble = last.trouble.map(|since| format!("; trouble for {:.1} s", ago(since)));
    format!(
        "memory: the last answer to this check came {:.1} s ago{}",
        ago(last.at),
        trouble.unwrap_or_default()
    )
}
