//! The straight pipe: connection, question, ask, decide, say.

#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use patroni_agent_check::check::Question;
use patroni_agent_check::connection::{Connection, Peer};
use patroni_agent_check::decide::{self, Reply};
use patroni_agent_check::options::Options;
use patroni_agent_check::{ask, sandbox, say};
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    let mut connection = match Connection::inherited() {
        Ok(Peer::Here(connection)) => connection,
        Ok(Peer::Gone) => return ExitCode::SUCCESS,
        Err(error) => return say::misused(&error),
    };
    match Options::parse(std::env::args_os().skip(1)) {
        Ok(options) => {
            let reply =
                decide::whatever_happens(&options, || answer(&options, &mut connection, started));
            say::say(connection, &reply)
        }
        Err(stop) => say::stop(connection, &stop),
    }
}

fn answer(options: &Options, connection: &mut Connection, started: Instant) -> Reply {
    let deadline = started + options.timeout;
    // Files and names come first: once the process is locked in, there are none.
    let patroni = ask::find(&options.patroni, deadline);
    if let Err(missing) = sandbox::enter(options.patroni.connect_to.1) {
        say::remark(connection, &missing);
    }
    let question = match &options.question {
        Some(question) => Ok(question.clone()),
        None => connection
            .read_line(deadline)
            .and_then(|line| Question::from_agent_send(&line, options.otherwise)),
    };
    match question {
        Ok(question) => {
            let answer = patroni.and_then(|patroni| ask::ask(patroni, &question.check, deadline));
            decide::decide(&question, options.unreachable, &answer)
        }
        Err(error) => decide::not_understood(&error),
    }
}
