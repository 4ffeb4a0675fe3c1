//! The tests that need root, and what tests/install installs. All are ignored: tests/run runs them one at a time, because
//! other work on the host would disturb what they measure.

#[path = "../common/mod.rs"]
mod common;

mod by_hand;
mod documents;
mod drop_ins;
mod fake_nodes;
mod floods;
mod haproxy;
mod never_dead;
mod node;
mod pools;
mod port_stays;
mod reload;
mod shutdown;
mod strangers;
mod surroundings;
mod system_calls;
mod waiting;
