//! The tests that need root, and what tests/install installs. All are ignored: tests/run runs them one by one, since the
//! machines that they boot want this one for themselves.

#[path = "../common/mod.rs"]
mod common;

mod haproxy;
mod pools;
mod port_stays;
mod reload;
mod shutdown;
mod site;
mod strangers;
mod system_calls;
mod units;
mod waiting;
