//! Finds out how the program was started, reads the command line, and lets the agent answer.

#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use patroni_agent_check::NAME;
use patroni_agent_check::by_hand::{explain, settings};
use patroni_agent_check::haproxy::connection::{Activation::*, Connection};
use patroni_agent_check::journal::syslog;
use patroni_agent_check::options::{Options, Stop};
use patroni_agent_check::sandbox::user;
use patroni_agent_check::{agent, reopen};
use std::panic;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    // a panic's message goes into the reply and not to fd 2, which is HAProxy's connection under xinetd
    panic::set_hook(Box::new(|_| {}));
    let activation = Connection::inherited();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    // first, so that mistakes in the command line are logged to the system log, too
    if arguments.iter().any(|argument| argument == "--syslog") {
        syslog::open();
    }
    let by_hand = matches!(activation, Ok(Connected(Connection::Standard)));
    let parse = || match by_hand {
        true => settings::read_command_line(arguments),
        false => Options::parse_for_units(arguments).map_err(Stop::with_hint),
    };
    let bug = "bug in reading the command line";
    let options = panic::catch_unwind(parse).unwrap_or_else(|_| Err(Stop::Usage(bug.to_owned())));
    let options = options.and_then(|options| become_user(options, by_hand));
    match (activation, options) {
        (Err(error), _) => agent::report_usage_error(&error),
        (Ok(Reset), _) => ExitCode::SUCCESS,
        (Ok(Connected(connection)), Err(stop)) => agent::answer_without_check(&connection, &stop),
        (_, Ok(Options { reopen: Some(socket), .. })) => reopen::reopen(&socket),
        (Ok(Connected(connection)), Ok(options)) => {
            agent::answer_one(&options, connection, started)
        }
        (Ok(Listeners(listeners)), options) => agent::answer_all(&options, &listeners),
    }
}

/// Changes the user before anything is opened and before a byte from the peer is read. A check by hand becomes the user of
/// the units, so that it sees no more than HAProxy's checks.
fn become_user(options: Options, by_hand: bool) -> Result<Options, Stop> {
    // --reopen is no check, and only root may start a unit
    let by_hand = by_hand && options.reopen.is_none();
    let given = options.user.as_deref();
    let changed = given.or(by_hand.then_some(NAME)).map_or(Ok(()), user::become_user);
    if let (Some(name), Err(error)) = (given, &changed) {
        return Err(Stop::Usage(format!("--user {name}: {error}")));
    }
    if by_hand {
        explain::explain_start(&options, changed.err().as_deref());
    }
    Ok(options)
}
