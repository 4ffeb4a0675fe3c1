//! The straight pipe: connection, question, ask, decide, say.

#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use patroni_agent_check::check::Question;
use patroni_agent_check::connection::{Connection, Peer};
use patroni_agent_check::decide::{self, Reply, Times, Verdict};
use patroni_agent_check::memory::{self, Memory, News, Recalled, Record};
use patroni_agent_check::options::{IDLE, Options, Stop};
use patroni_agent_check::{ask, hold, sandbox, say, serve, user};
use std::net::TcpListener;
use std::panic;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let started = Instant::now();
    // A panic's own message goes to fd 2, which under xinetd is HAProxy. It goes into the reply instead.
    panic::set_hook(Box::new(|_| {}));
    let peer = Connection::inherited();
    let options = panic::catch_unwind(|| Options::parse(std::env::args_os().skip(1)));
    let bug = || Err(Stop::Usage("bug in reading the command line".to_owned()));
    let options = options.unwrap_or_else(|_| bug()).and_then(as_user);
    match (peer, options) {
        (Err(error), _) => say::misused(&error),
        (Ok(Peer::Gone), _) => ExitCode::SUCCESS,
        (Ok(Peer::Here(connection)), Err(stop)) => say::stop(connection, &stop),
        (Ok(Peer::Here(connection)), Ok(options)) => one(&options, connection, started),
        (Ok(Peer::Listeners(listeners)), options) => many(&options, &listeners),
    }
}

/// Before anything is opened, and before a byte of the peer is read.
fn as_user(options: Options) -> Result<Options, Stop> {
    let name = options.user.as_deref();
    let become_user = |name| {
        user::become_user(name).map_err(|error| Stop::Usage(format!("--user {name}: {error}")))
    };
    name.map_or(Ok(()), become_user)?;
    Ok(options)
}

/// A process for one check, which locks itself in.
fn one(options: &Options, mut connection: Connection, started: Instant) -> ExitCode {
    // without_sandbox: only tests/bench/check builds it so, to tell the sandbox's cost from the rest
    let lock_in = |memory: &Memory| match cfg!(without_sandbox) {
        true => Ok(()),
        false => sandbox::enter(options.patroni.connect_to.1, memory.descriptor()),
    };
    let answered = answer(options, &mut connection, started, lock_in);
    say(connection, &answered)
}

/// A process for many, which its unit locks in: files are needed again for the next.
fn many(options: &Result<Options, Stop>, listeners: &[TcpListener]) -> ExitCode {
    let idle = options.as_ref().map_or(IDLE, |options| options.idle);
    let served = serve::serve(listeners, idle, |mut connection| match options {
        Ok(options) => {
            let answered = answer(options, &mut connection, Instant::now(), |_| Ok(()));
            say(connection, &answered);
            say::words(answered.reply.verdict)
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

/// The end of the pipe.
struct Answered {
    reply: Reply,
    news: Option<News>,
    left: Option<(Recalled, Record)>,
}

impl From<Reply> for Answered {
    /// A reply that nothing is remembered of, and that is news if it is bad.
    fn from(reply: Reply) -> Answered {
        let news = (reply.verdict != Verdict::Unasked).then_some(News::Began);
        Answered { reply, news, left: None }
    }
}

/// What has been said is remembered, for whoever asks in the next moment.
fn say(connection: Connection, answered: &Answered) -> ExitCode {
    if let Some((recalled, record)) = &answered.left {
        recalled.leave(record);
    }
    say::say(connection, &answered.reply, answered.news)
}

/// Says that the grace could outlive the leader lock, if it could: with HAProxy's interval of units/haproxy.cfg.
fn too_long(options: &Options, lock: Option<Duration>) -> Option<String> {
    let (grace, timeout) = (options.policy.grace, options.timeout);
    let needed = grace + 2 * timeout + Duration::from_millis(500);
    let lock = lock.filter(|lock| *lock < needed && !grace.is_zero())?;
    let seconds = |time: Duration| time.as_secs_f32();
    Some(format!(
        "--grace {} s is too long for this cluster: its leader lock may end {} s after a good answer (ttl less retry_timeout, less the larger of loop_wait and retry_timeout), and --grace, two --timeout and HAProxy's agent-inter together must be less",
        seconds(grace),
        seconds(lock)
    ))
}

/// One check, down the pipe. `lock_in` comes when files are no longer needed.
fn answer(
    options: &Options,
    connection: &mut Connection,
    started: Instant,
    lock_in: impl FnOnce(&Memory) -> Result<(), String>,
) -> Answered {
    decide::whatever_happens(options.policy.unreachable, || {
        let deadline = started + options.timeout;
        let human = connection.is_human();
        let memory = Memory::open(&options.memory_file, human);
        let (hold, unseen) = match hold::read(&options.hold_file) {
            Ok(hold) => (hold, None),
            Err(error) => (None, Some(error)),
        };
        if let Some(hold) = &hold {
            say::remark(connection, &format!("a hold is on: {}, {}", hold.word, hold.reason));
        }
        let found = ask::find(&options.patroni);
        if let Err(missing) = lock_in(&memory) {
            say::remark(connection, &missing);
        }
        let question = match &options.question {
            Some(question) => Ok(question.clone()),
            None => match connection.read_line(started, options.timeout) {
                Ok(Some(line)) => Question::from_agent_send(&line, options.otherwise),
                Ok(None) => return decide::nobody_asked().into(),
                Err(error) => Err(error),
            },
        };
        let question = match question {
            Ok(question) => question,
            Err(error) => {
                let recalled = memory.recall(&options.patroni.connect_to, None, memory::now());
                let news = recalled.news_of_no_check();
                return Answered {
                    reply: decide::not_understood(&error),
                    news: news.as_ref().map(|(news, _)| *news),
                    left: news.map(|(_, record)| (recalled, record)),
                };
            }
        };
        let (asked, since) = (memory::now(), Instant::now());
        let answer = match &found {
            Ok(found) => ask::ask(found, &question.check, deadline),
            Err(no_answer) => Err(no_answer.clone()),
        };
        let times = Times { asked, answered: asked + since.elapsed() };
        let recalled =
            memory.recall(&options.patroni.connect_to, Some(&question.check), times.answered);
        if let Some(error) = recalled.error() {
            say::remark(connection, &format!("there is no grace: {error}"));
        }
        if let (Connection::Standard, Ok(found), Ok(_)) = (&*connection, &found, &answer) {
            if let Some(text) = too_long(options, ask::lock_outlives(found, deadline)) {
                say::remark(connection, &text);
            }
        }
        let last = recalled.last();
        if human && recalled.error().is_none() && last.lease.is_zero() {
            let file = options.memory_file.display();
            let text = format!("there is no grace: no good answer to this check is in {file}");
            say::remark(connection, &text);
        }
        let (mut reply, mut record) =
            decide::decide(&question, options.policy, &answer, hold, &last, times);
        // seen by hand as well: it is part of the reason
        if let Some(unseen) = unseen {
            reply.reason = format!("{}; {unseen}", reply.reason);
        }
        // by hand nothing is said to the journal, and it must not be remembered that it was
        let by_hand = matches!(connection, Connection::Standard);
        let news = if by_hand { None } else { recalled.news(&mut record) };
        Answered { reply, news, left: Some((recalled, record)) }
    })
}
