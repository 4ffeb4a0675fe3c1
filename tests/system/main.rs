//! The tests that need root, and what tests/install installs. All are ignored: tests/run runs them one by one, since the
//! machines that they boot want this one for themselves.

#[path = "../common/mod.rs"]
mod common;

mod by_hand;
mod documents;
mod drop_ins;
mod floods;
mod haproxy;
mod never_dead;
mod node;
mod played_nodes;
mod pools;
mod port_stays;
mod reload;
mod shutdown;
mod strangers;
mod surroundings;
mod system_calls;
mod waiting;
