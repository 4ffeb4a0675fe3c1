//! The tests that need nothing but tar, xz, script(1) and unshare(1). Ignored tests need a tool that tests/install installs,
//! or are processes that other tests start.

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
