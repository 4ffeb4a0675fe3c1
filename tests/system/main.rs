//! The tests that need root, and what tests/install installs. All are ignored: tests/run runs them one by one, since the
//! machines that they boot want this one for themselves.

#[path = "../common/mod.rs"]
mod common;

mod haproxy;
mod reload;
mod site;
mod system_calls;
mod units;
mod waiting;
