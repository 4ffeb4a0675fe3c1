//! The modules of `patroni-pools`, which runs on HAProxy's machine. It reads haproxy.cfg, reports the mistakes in it,
//! and looks whether HAProxy does what the configuration means. The agent uses nothing of it.

/// The command line.
pub mod options;

/// Splits a line of haproxy.cfg as HAProxy does.
pub mod words;

/// The conditions of `.if`.
pub mod conditions;

/// The files that HAProxy reads, as sections of lines.
pub mod configuration;

/// The files that haproxy.service names.
pub mod service;

/// The pools, their servers, and the checks of each server.
pub mod pool;

/// The known mistakes, and the harm that each does.
pub mod rules;

/// Runs HAProxy, and asks its admin socket.
pub mod haproxy;

/// What HAProxy reports of its servers.
pub mod reported;

/// Compares HAProxy's states with the configuration.
pub mod status;

/// Saves the servers' states for a reload.
pub mod states;
