//! The straight pipe: connection, question, ask, decide, say.

#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use patroni_agent_check::check::Question;
use patroni_agent_check::connection::{Connection, Peer};
use patroni_agent_check::decide::{self, Reply};
use patroni_agent_check::options::{Options, Stop};
use patroni_agent_check::{ask, sandbox, say};
use std::panic;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    // A panic's own message goes to fd 2, which under xinetd is HAProxy. It goes into the reply instead.
    panic::set_hook(Box::new(|_| {}));
    let mut connection = match Connection::inherited() {
        Ok(Peer::Here(connection)) => connection,
        Ok(Peer::Gone) => return ExitCode::SUCCESS,
        Err(error) => return say::misused(&error),
    };
    let options = panic::catch_unwind(|| Options::parse(std::env::args_os().skip(1)));
    match options.unwrap_or_else(|_| Err(Stop::Usage("bug in reading the command line".to_owned())))
    {
        Ok(options) => {
            let answer = || answer(&options, &mut connection, started);
            let reply = decide::whatever_happens(options.unreachable, answer);
            say::say(connection, &reply)
        }
        Err(stop) => say::stop(connection, &stop),
    }
}

fn answer(options: &Options, connection: &mut Connection, started: Instant) -> Reply {
    let deadline = started + options.timeout;
    // Files and names come first: once the process is locked in, there are none.
    let patroni = match ask::find(&options.patroni, deadline) {
        Ok(patroni) => patroni,
        Err(error) => {
            return decide::unreachable(options.question.as_ref(), options.unreachable, &error);
        }
    };
    // without_sandbox: only tests/bench/check builds it so, to tell the sandbox's cost from the rest
    if !cfg!(without_sandbox) {
        if let Err(missing) = sandbox::enter(options.patroni.connect_to.1) {
            say::remark(connection, &missing);
        }
    }
    let question = match &options.question {
        Some(question) => Ok(question.clone()),
        None => match connection.read_line(deadline) {
            Ok(Some(line)) => Question::from_agent_send(&line, options.otherwise),
            Ok(None) => return decide::nobody_asked(),
            Err(error) => Err(error),
        },
    };
    match question {
        Ok(question) => {
            let answer = ask::ask(&patroni, &question.check, deadline);
            decide::decide(&question, options.unreachable, &answer)
        }
        Err(error) => decide::not_understood(&error),
    }
}
