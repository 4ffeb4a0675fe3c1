//! What `patroni-pools` does on the machine that HAProxy runs on: it reads haproxy.cfg, says which mistakes are in it, and
//! looks whether HAProxy does what was meant. The agent knows nothing of it.

/// The command line.
pub mod options;

/// A line of haproxy.cfg, as HAProxy splits it.
pub mod words;

/// The conditions of `.if`.
pub mod conditions;

/// The files that HAProxy reads, and their sections.
pub mod configuration;

/// The files that haproxy.service names.
pub mod service;

/// The pools, their servers, and what is asked of each.
pub mod pool;

/// The mistakes that are known, and the harm of each.
pub mod rules;

/// HAProxy itself: its program, and its admin socket.
pub mod haproxy;

/// What HAProxy reports of its servers.
pub mod reported;

/// What HAProxy does with the pools at this moment.
pub mod status;

/// The states of the servers, for a reload.
pub mod states;
