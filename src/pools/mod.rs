//! The modules of `patroni-pools`, which runs on HAProxy's machine. It reads haproxy.cfg, reports the mistakes in it,
//! and looks whether HAProxy does what the configuration means. The agent uses nothing of it.

pub mod conditions;
pub mod configuration;
pub mod haproxy;
pub mod options;
pub mod pool;
pub mod reported;
pub mod rules;
pub mod service;
pub mod states;
pub mod status;
pub mod words;
