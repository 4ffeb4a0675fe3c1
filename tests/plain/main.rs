//! The tests that need nothing but tar, xz, script(1) and unshare(1). What is ignored here needs a tool that tests/install
//! installs, or is a process that another test starts.

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod before_stop;
mod connection;
mod grace;
mod headers;
mod hold;
mod hostile;
mod manual;
mod model;
mod pools;
mod properties;
mod sandbox;
mod serve;
mod share;
mod tls;
