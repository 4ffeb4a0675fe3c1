//! Finds out how it was started, reads the command line, and lets the agent answer.

#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use patroni_agent_check::NAME;
use patroni_agent_check::by_hand::{explain, settings};
use patroni_agent_check::haproxy::connection::{Activation, Connection};
use patroni_agent_check::journal::syslog;
use patroni_agent_check::options::{Options, Stop};
use patroni_agent_check::sandbox::user;
use patroni_agent_check::{agent, reopen};
use rustix::process::geteuid;
use std::panic;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    // a panic's message would go to fd 2, which is HAProxy under xinetd, and goes into the reply instead
    panic::set_hook(Box::new(|_| {}));
    let activation = Connection::inherited();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    // even if the rest of the command line is wrong
    if arguments.iter().any(|argument| argument == "--syslog") {
        syslog::open();
    }
    let by_hand = matches!(activation, Ok(Activation::Here(Connection::Standard)));
    let parse = || match by_hand {
        true => settings::settle(arguments),
        false => Options::of_units(arguments).map_err(Stop::with_cure),
    };
    let bug = || Err(Stop::Usage("bug in reading the command line".to_owned()));
    let options = panic::catch_unwind(parse).unwrap_or_else(|_| bug());
    let options = options.and_then(|options| become_user(options, by_hand));
    match (activation, options) {
        (Err(error), _) => agent::report_usage_error(&error),
        (Ok(Activation::Gone), _) => ExitCode::SUCCESS,
        (Ok(Activation::Here(connection)), Err(stop)) => agent::refuse(&connection, &stop),
        (_, Ok(Options { reopen: Some(socket), .. })) => reopen::reopen(&socket),
        (Ok(Activation::Here(connection)), Ok(options)) => {
            agent::answer_one(&options, connection, started)
        }
        (Ok(Activation::Listeners(listeners)), options) => agent::answer_all(&options, &listeners),
    }
}

/// Changes the user before anything is opened and before a byte from the peer is read. A check by hand becomes the user of
/// the units, so that it sees no more than HAProxy's checks.
fn become_user(options: Options, by_hand: bool) -> Result<Options, Stop> {
    // --reopen is no check, and only root may do that
    let by_hand = by_hand && options.reopen.is_none();
    let own = options.user.as_deref();
    let before = by_hand.then(geteuid);
    let became = own.or(by_hand.then_some(NAME)).map_or(Ok(()), user::become_user);
    if let Some(before) = before {
        let uid = if own.is_some() { before } else { geteuid() };
        explain::explain_start(&options, uid, became.as_ref().err().filter(|_| own.is_none()));
    }
    match (own, became) {
        (Some(name), Err(error)) => Err(Stop::Usage(format!("--user {name}: {error}"))),
        _ => Ok(options),
    }
}
