//! What a check by hand tells the operator besides the reply: how the answer came about, and in what HAProxy's checks would
//! differ. In go options and the outcome, out come lines on stderr. Knows nothing of HTTP.

use super::sockets::explain_access_lists;
use crate::NAME;
use crate::decide::bounds;
use crate::journal::tell_operator;
use crate::options::Options;
use crate::patroni::ask::{Outcome, Prepared};
use crate::patroni::check::Check;
use crate::patroni::location::Patroni;
use crate::run::memory::Record;
use rustix::net::{AddressFamily, getsockname};
use rustix::process::geteuid;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

/// Tells the operator which user this check has become, why it could not become the user of the units, and that this is a
/// check by hand where HAProxy's connection may have been meant.
pub fn explain_start(options: &Options, error: Option<&str>) {
    if let Some(error) = error.filter(|_| options.other.is_none() && !options.explain) {
        tell_operator(&format!("the units would answer fail to HAProxy: --user {NAME}: {error}"));
    }
    if options.explain {
        let why = error.map_or(String::new(), |error| format!("; not here: {error}"));
        tell_operator(&format!("user: uid {}; the units run each check as {NAME}{why}", geteuid()));
    }
    explain_access_lists(Path::new("/")).iter().for_each(|text| tell_operator(text));
    // socat with EXEC: or SYSTEM:, and ncat, give the agent a Unix socket as stdin
    if getsockname(io::stdin()).is_ok_and(|own| own.address_family() == AddressFamily::UNIX) {
        tell_operator(
            "standard input is a Unix socket and not HAProxy's connection, so this is a check by hand; with socat, add nofork after EXEC:...",
        );
    }
}

/// Warns if HAProxy has to ask at one address, and if the grace period is too long. With `--explain`, also says what the
/// check asked and what Patroni answered.
pub fn explain_answer(
    options: &Options,
    prepared: &Prepared,
    check: &Check,
    outcome: &Outcome,
    deadline: Instant,
) {
    if options.explain {
        let from = match &outcome.from[..] {
            [patroni] => format!("Patroni {patroni}"),
            _ => prepared.describe_candidates(),
        };
        tell_operator(&format!("asked: {from} for {}", check.path()));
    }
    let Ok(answer) = &outcome.answer else { return };
    if options.explain {
        let node =
            prepared.node_name(deadline).map_or(String::new(), |node| format!(" of node {node}"));
        let replication = answer.replication_state.as_deref().unwrap_or("none");
        let timeline = answer.timeline.map_or("none".to_owned(), |timeline| timeline.to_string());
        tell_operator(&format!(
            "answer{node}: status {}, state '{}', role '{}', replication_state {replication}, timeline {timeline}",
            answer.status, answer.state, answer.role
        ));
    }
    explain_only_address(&options.patroni, outcome).iter().for_each(|text| tell_operator(text));
    let lock = prepared.lock_settings(deadline).and_then(bounds::shortest_lock_time);
    let warning = bounds::warn_too_long(options.policy.grace, options.timeout, lock);
    warning.iter().for_each(|text| tell_operator(text));
}

/// Says which of HAProxy's checks get this answer, if Patroni listens on one address only and that is not localhost.
fn explain_only_address(patroni: &Patroni, outcome: &Outcome) -> Option<String> {
    let [from] = &outcome.from[..] else { return None };
    let local = from.host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    (patroni.discover && !local).then(|| {
        format!(
            "Patroni listens on {} only: HAProxy gets this answer if it asks the agent at that address, and is told down if not (see --url)",
            from.host
        )
    })
}

/// Says when this check last had an answer, which shows whether HAProxy asks.
pub fn explain_memory(last: &Record, asked: Duration) -> String {
    if last.at.is_zero() {
        return "memory: no answer to this check is remembered".to_owned();
    }
    let ago = |time| asked.saturating_sub(time).as_secs_f32();
    let trouble = last.trouble.map(|since| format!("; trouble for {:.1} s", ago(since)));
    let (ago, trouble) = (ago(last.at), trouble.unwrap_or_default());
    format!("memory: the last answer to this check came {ago:.1} s ago{trouble}")
}
