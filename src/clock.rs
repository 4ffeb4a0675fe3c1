//! The clock of the records and of the note. Knows nothing of Patroni and HAProxy.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// The time since boot (CLOCK_BOOTTIME), which goes on while the machine sleeps, and which nobody can set.
pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}
