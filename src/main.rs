//! The straight pipe: connection, question, ask, decide, say.

#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use patroni_agent_check::check::Question;
use patroni_agent_check::connection::{Connection, Peer};
use patroni_agent_check::decide::{self, Reply, Verdict};
use patroni_agent_check::options::{IDLE, Options, Stop};
use patroni_agent_check::{ask, hold, sandbox, say, serve};
use std::net::TcpListener;
use std::panic;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    // A panic's own message goes to fd 2, which under xinetd is HAProxy. It goes into the reply instead.
    panic::set_hook(Box::new(|_| {}));
    let peer = Connection::inherited();
    let options = panic::catch_unwind(|| Options::parse(std::env::args_os().skip(1)));
    let bug = || Err(Stop::Usage("bug in reading the command line".to_owned()));
    match (peer, options.unwrap_or_else(|_| bug())) {
        (Err(error), _) => say::misused(&error),
        (Ok(Peer::Gone), _) => ExitCode::SUCCESS,
        (Ok(Peer::Here(connection)), Err(stop)) => say::stop(connection, &stop),
        (Ok(Peer::Here(connection)), Ok(options)) => one(&options, connection, started),
        (Ok(Peer::Listeners(listeners)), options) => many(&options, &listeners),
    }
}

/// A process for one check, which locks itself in.
fn one(options: &Options, mut connection: Connection, started: Instant) -> ExitCode {
    // without_sandbox: only tests/bench/check builds it so, to tell the sandbox's cost from the rest
    let lock_in = || match cfg!(without_sandbox) {
        true => Ok(()),
        false => sandbox::enter(options.patroni.connect_to.1),
    };
    let reply = answer(options, &mut connection, started, lock_in);
    say::say(connection, &reply)
}

/// A process for many, which its unit locks in: files and names are needed again for the next.
fn many(options: &Result<Options, Stop>, listeners: &[TcpListener]) -> ExitCode {
    let idle = options.as_ref().map_or(IDLE, |options| options.idle);
    let served = serve::serve(listeners, idle, |mut connection| match options {
        Ok(options) => {
            let reply = answer(options, &mut connection, Instant::now(), || Ok(()));
            say::say(connection, &reply);
            say::words(reply.verdict)
        }
        Err(stop) => {
            say::stop(connection, stop);
            say::words(Verdict::Fail)
        }
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => say::misused(&format!("cannot serve: {error}")),
    }
}

/// One check, down the pipe. `lock_in` comes when files and names are no longer needed.
fn answer(
    options: &Options,
    connection: &mut Connection,
    started: Instant,
    lock_in: impl FnOnce() -> Result<(), String>,
) -> Reply {
    decide::whatever_happens(options.unreachable, || {
        let deadline = started + options.timeout;
        let hold = hold::read(&options.hold_file);
        if let Some(hold) = &hold {
            say::remark(connection, &format!("a hold is on: {}, {}", hold.word, hold.reason));
        }
        let patroni = match ask::find(&options.patroni, deadline) {
            Ok(patroni) => patroni,
            Err(error) => {
                return decide::unreachable(options.question.as_ref(), options.unreachable, &error);
            }
        };
        if let Err(missing) = lock_in() {
            say::remark(connection, &missing);
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
                decide::held(hold, decide::decide(&question, options.unreachable, &answer))
            }
            Err(error) => decide::not_understood(&error),
        }
    })
}
