//! The straight pipe: connection, question, ask, decide, say.

#![deny(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use patroni_agent_check::ask::{Answer, NoAnswer, Patroni};
use patroni_agent_check::check::{Check, Question};
use patroni_agent_check::connection::{Connection, Peer};
use patroni_agent_check::decide::{self, Reply, Times, Verdict};
use patroni_agent_check::memory::{self, Memory, News};
use patroni_agent_check::options::{IDLE, Options, Stop};
use patroni_agent_check::sandbox::Again;
use patroni_agent_check::share::{Missed, Shared};
use patroni_agent_check::{ask, hold, sandbox, say, serve, syslog, user};
use std::net::{IpAddr, TcpListener};
use std::panic;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let started = Instant::now();
    // A panic's own message goes to fd 2, which under xinetd is HAProxy. It goes into the reply instead.
    panic::set_hook(Box::new(|_| {}));
    let peer = Connection::inherited();
    // whatever is wrong with the rest of the command line
    if std::env::args_os().any(|argument| argument == "--syslog") {
        syslog::open();
    }
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

/// Questions to Patroni at once and the least time between two: its REST API has five workers, a queue of five, and
/// shares one core with its main loop. Each question takes a millisecond of that.
const AT_ONCE: usize = 4;
const APART: Duration = Duration::from_millis(2);

/// When Patroni was asked, and what came of it.
type Asked = (Times, Result<Answer, NoAnswer>);

/// A process for one check, which locks itself in.
fn one(options: &Options, mut connection: Connection, started: Instant) -> ExitCode {
    let deadline = started + options.timeout;
    let prepare = |connection: &Connection, memory: &Memory| {
        let found = ask::find(&options.patroni);
        // without_sandbox: only tests/bench/check builds it so, to tell the sandbox's cost from the rest
        if !cfg!(without_sandbox) {
            let port = options.patroni.connect_to.1;
            if let Err(missing) = sandbox::enter(port, memory.descriptor(), syslog::descriptor()) {
                say::remark(connection, &missing);
            }
        }
        move |connection: &Connection, check: &Check| {
            let asked =
                timed(|| ask::ask(found.as_ref().map_err(NoAnswer::clone)?, check, deadline));
            if let (Connection::Standard, Ok(found), Ok(_)) = (connection, &found, &asked.1) {
                if let Some(text) = too_long(options, ask::lock_outlives(found, deadline)) {
                    say::remark(connection, &text);
                }
            }
            asked
        }
    };
    let answered = answer(options, &mut connection, started, prepare);
    say::say(connection, &answered.reply, answered.news)
}

/// A process for many, which locks itself in as far as it does not need the same again for the next.
fn many(options: &Result<Options, Stop>, listeners: &[TcpListener]) -> ExitCode {
    let idle = options.as_ref().map_or(IDLE, |options| options.idle);
    let shared = Shared::new(AT_ONCE, APART);
    let again = options.as_ref().map(again).unwrap_or_default();
    let lock_in = || {
        if let Err(missing) = sandbox::enter_listening(&again) {
            say::warn(&missing);
        }
    };
    let served = serve::serve(listeners, idle, lock_in, |mut connection, place| match options {
        Ok(options) => {
            let started = Instant::now();
            let deadline = started + options.timeout;
            let prepare = |_: &Connection, _: &Memory| {
                |_: &Connection, check: &Check| {
                    place.heard();
                    together(&shared, &options.patroni, check, deadline)
                }
            };
            let answered = answer(options, &mut connection, started, prepare);
            say::say(connection, &answered.reply, answered.news);
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

/// What each check of a listening process needs.
fn again(options: &Options) -> Again {
    let (host, port) = &options.patroni.connect_to;
    let name = !host.eq_ignore_ascii_case("localhost") && host.parse::<IpAddr>().is_err();
    let tls = options.patroni.tls.iter().flat_map(|tls| [&tls.cacert, &tls.cert, &tls.key]);
    let mut read: Vec<_> = tls.flatten().cloned().collect();
    read.push(options.hold_file.clone());
    read.extend(name.then(|| "/etc/hosts".into()));
    let (memory, log) = (Some(options.memory_file.clone()), syslog::descriptor());
    Again { port: Some(*port), read, memory, log }
}

/// Asks, and looks at the clock before and after.
fn timed(ask: impl FnOnce() -> Result<Answer, NoAnswer>) -> Asked {
    let (asked, since) = (memory::now(), Instant::now());
    let answer = ask();
    (Times { asked, answered: asked + since.elapsed() }, answer)
}

/// Asks for all who want to know the same, and only then reads the certificates.
fn together(
    shared: &Shared<String, Asked>,
    patroni: &Patroni,
    check: &Check,
    deadline: Instant,
) -> Asked {
    let came = memory::now();
    let ask = || {
        let found = ask::find(patroni);
        timed(|| ask::ask(&found?, check, deadline))
    };
    shared.ask(check.path().to_owned(), deadline, ask).unwrap_or_else(|missed| {
        let why = match missed {
            Missed::Unasked => "no answer before the deadline (--timeout): others wait for it, too",
            Missed::Unanswered => "no answer before the deadline (--timeout)",
            Missed::Broken => "not asked, for a bug in patroni-agent-check",
        };
        let times = Times { asked: came, answered: memory::now() };
        (times, Err(NoAnswer::unusable(patroni.blame(why))))
    })
}

/// The end of the pipe.
struct Answered {
    reply: Reply,
    news: Option<News>,
}

impl From<Reply> for Answered {
    /// A reply that nothing is remembered of, and that is news if it is bad.
    fn from(reply: Reply) -> Answered {
        let news = (reply.verdict != Verdict::Unasked).then_some(News::Began);
        Answered { reply, news }
    }
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

/// One check, down the pipe. `prepare` comes before the first byte is read, and returns the step that asks.
fn answer<Ask: FnOnce(&Connection, &Check) -> Asked>(
    options: &Options,
    connection: &mut Connection,
    started: Instant,
    prepare: impl FnOnce(&Connection, &Memory) -> Ask,
) -> Answered {
    decide::whatever_happens(options.policy.unreachable, || {
        let human = connection.is_human();
        let memory = Memory::open(&options.memory_file, human);
        let (hold, unseen) = match hold::read(&options.hold_file) {
            Ok(hold) => (hold, None),
            Err(error) => (None, Some(error)),
        };
        if let Some(hold) = &hold {
            say::remark(connection, &format!("a hold is on: {}, {}", hold.word, hold.reason));
        }
        let ask = prepare(connection, &memory);
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
                let news = memory.recall(&options.patroni.connect_to, None).news_of_no_check();
                return Answered { reply: decide::not_understood(&error), news };
            }
        };
        let (times, answer) = ask(connection, &question.check);
        let recalled = memory.recall(&options.patroni.connect_to, Some(&question.check));
        if let Some(error) = recalled.error() {
            say::remark(connection, &format!("there is no grace: {error}"));
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
        // before it is said, for whoever asks in the next moment
        recalled.leave(&record);
        Answered { reply, news }
    })
}
