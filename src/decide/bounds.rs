//! The longest grace period: trouble may be bridged only while no other node can have the leader lock. In go Patroni's
//! settings, out comes a bound. Knows nothing of files and HTTP.

use crate::patroni::ask::LockSettings;
use std::time::Duration;

/// HAProxy's `agent-inter` for a write pool, in units/examples/haproxy.cfg.
const AGENT_INTER: Duration = Duration::from_millis(500);

/// The shortest time for which the leader lock outlives a good answer: `ttl` less `retry_timeout`, less the larger of
/// `loop_wait` and `retry_timeout`. A loop that has waited longer than `loop_wait` is followed by the next one at once.
pub fn shortest_lock_time(lock: LockSettings) -> Option<Duration> {
    let LockSettings { ttl, loop_wait, retry_timeout } = lock;
    let taken = loop_wait.max(retry_timeout).checked_add(retry_timeout)?;
    Some(Duration::from_secs(ttl.saturating_sub(taken)))
}

/// Warns if the grace period could outlive the leader lock.
pub fn warn_too_long(grace: Duration, timeout: Duration, lock: Option<Duration>) -> Option<String> {
    let needed = grace + 2 * timeout + AGENT_INTER;
    let lock = lock.filter(|lock| *lock < needed && !grace.is_zero())?;
    let (grace, lock) = (grace.as_secs_f32(), lock.as_secs_f32());
    Some(format!(
        "--grace {grace} s is too long for this cluster: its leader lock may end {lock} s after a good answer (ttl less retry_timeout, less the larger of loop_wait and retry_timeout), and --grace plus twice --timeout plus HAProxy's agent-inter must not exceed that"
    ))
}
