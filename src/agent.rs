//! One agent check, from the connection to the reply, and many of them: the pipe. Knows all the steps and does none of
//! them itself.

use crate::before_stop::{Note, Patience};
use crate::check::Check;
use crate::connection::{self, Connection};
use crate::decide::{self, Policy, Times, Unreachable};
use crate::memory::{self, Memory, News};
use crate::options::{self, Options, Stop};
use crate::patroni::{Heard, NoAnswer};
use crate::question::{Asked, HOLD, NoQuestion, Question};
use crate::reply::{self, Otherwise, Reply, Verdict};
use crate::sandbox::{self, Again};
use crate::share::{Missed, Shared};
use crate::{NAME, by_hand, hold, serve, syslog};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::RawFd;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Questions to Patroni at once, of which one source has all but one, and the least time between two: its REST API has five
/// workers, a queue of five, and shares one core with its main loop. Each question takes a millisecond of that.
const AT_ONCE: usize = 5;
const APART: Duration = Duration::from_millis(2);
/// Different questions with a query of one source that may wait: anybody can make up another one, and it would wait for its
/// deadline.
const WAITING: usize = 64;
/// In the journal, at most once a minute.
const NOT_UNDERSTOOD: &str = "agent-send line not understood (the reply says why)";
/// Usage, in sysexits(3).
const USAGE: u8 = 64;

/// When Patroni was asked, and what came of it.
type Timed = (Times, Heard);

/// Those who ask for the same path, where Patroni is looked for at the same address.
type SameQuestion = (String, Option<IpAddr>);

/// A process for one check, which locks itself in.
pub fn one(options: &Options, mut connection: Connection, started: Instant) -> ExitCode {
    // HAProxy's checks ask Patroni once
    let explain = options.explain && matches!(connection, Connection::Standard);
    let prepare = |connection: &Connection, memory: &Memory| {
        let prepared = options.patroni.prepare(local(options, connection));
        // without_sandbox: only tests/bench/check builds it so, to tell the sandbox's cost from the rest
        if !cfg!(without_sandbox) {
            let port = options.patroni.connect_to.port;
            match sandbox::enter(port, memory.descriptor(), syslog::descriptor()) {
                Err(missing) => connection.remark(&missing),
                Ok(()) if explain => connection.remark("sandbox: complete"),
                Ok(()) => {}
            }
        }
        move |connection: &Connection, check: &Check, patience: &Patience| {
            let deadline = patience.deadline;
            let asked = timed(|| match &prepared {
                Ok(prepared) => prepared.ask(check, patience),
                Err(no_answer) => unheard(options, connection, no_answer.clone()),
            });
            let Connection::Standard = connection else { return asked };
            if explain {
                let lines = by_hand::asked(prepared.as_ref().ok(), check, &asked.1, deadline);
                lines.iter().for_each(|text| connection.remark(text));
            }
            if let (Ok(prepared), Ok(_)) = (&prepared, &asked.1.answer) {
                let elsewhere = by_hand::elsewhere(&options.patroni, &asked.1);
                let too_long = too_long(options, prepared.lock_outlives(deadline));
                elsewhere.iter().chain(&too_long).for_each(|text| connection.remark(text));
            }
            asked
        }
    };
    let answered = answer(options, &mut connection, started, prepare);
    say(&connection, &answered)
}

/// A process for many, which locks itself in as far as it does not need the same again for the next.
pub fn many(options: &Result<Options, Stop>, listeners: &[TcpListener]) -> ExitCode {
    let idle = options.as_ref().map_or_else(|_| options::default_idle(), |options| options.idle);
    let shared = Shared::new(AT_ONCE, APART, WAITING);
    let lock_in = |systemd| {
        if let Ok(options) = options {
            options.patroni.sockets();
        }
        if let Err(missing) = sandbox::enter_listening(&again(options, systemd)) {
            connection::log(4, &missing);
        }
    };
    let served = serve::serve(listeners, idle, lock_in, |mut connection, place| match options {
        Ok(options) => {
            let started = Instant::now();
            let prepare = |_: &Connection, _: &Memory| {
                |connection: &Connection, check: &Check, patience: &Patience| {
                    place.heard();
                    together(&shared, options, connection, check, patience)
                }
            };
            let answered = answer(options, &mut connection, started, prepare);
            say(&connection, &answered);
            reply::words(answered.reply.verdict)
        }
        Err(stop) => {
            self::stop(&connection, stop);
            reply::words(Verdict::Fail)
        }
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => usage_error(&format!("cannot serve: {error}")),
    }
}

/// Where on this machine HAProxy asked, if Patroni may be there.
fn local(options: &Options, connection: &Connection) -> Option<SocketAddr> {
    if options.patroni.elsewhere { connection.local() } else { None }
}

/// What nobody was asked for.
fn unheard(options: &Options, connection: &Connection, no_answer: NoAnswer) -> Heard {
    let from = options.patroni.would_be(local(options, connection));
    Heard { from, answer: Err(no_answer) }
}

/// What each check of a listening process needs: next to nothing, if the command line is wrong.
fn again(options: &Result<Options, Stop>, systemd: Option<RawFd>) -> Again {
    let options = options.as_ref().ok();
    let read = |options: &Options| {
        let mut files = options.patroni.files();
        files.extend([options.hold_file.clone(), options.before_stop_file.clone()]);
        files
    };
    Again {
        port: options.map(|options| options.patroni.connect_to.port),
        read: options.map(read).unwrap_or_default(),
        memory: options.map(|options| options.memory_file.clone()),
        log: syslog::descriptor(),
        systemd,
    }
}

/// Asks, and looks at the clock before and after.
fn timed(ask: impl FnOnce() -> Heard) -> Timed {
    let (asked, since) = (memory::now(), Instant::now());
    let heard = ask();
    (Times { asked, answered: asked + since.elapsed() }, heard)
}

/// Asks for all who want to know the same, and only then reads the certificates.
fn together(
    shared: &Shared<SameQuestion, Option<IpAddr>, Timed>,
    options: &Options,
    connection: &Connection,
    check: &Check,
    patience: &Patience,
) -> Timed {
    let came = memory::now();
    let (patroni, local) = (&options.patroni, local(options, connection));
    let ask = || {
        let prepared = patroni.prepare(local);
        timed(|| match prepared {
            Ok(prepared) => prepared.ask(check, patience),
            Err(no_answer) => unheard(options, connection, no_answer),
        })
    };
    let first = check.plain_number().is_some();
    // those who ask on localhost ask the same, whatever its address
    let ip = local.map(|local| local.ip()).filter(|ip| !ip.is_loopback());
    let (question, source) = ((check.path().to_owned(), ip), connection.source());
    shared.ask(question, source, first, patience.deadline, ask).unwrap_or_else(|missed| {
        let why = match missed {
            Missed::Unasked => {
                "no answer before the deadline (--timeout): too many others are waiting"
            }
            Missed::Crowded => "not asked: too many different questions are waiting",
            Missed::Unanswered => "no answer before the deadline (--timeout)",
            Missed::Broken => "not asked because of a bug in patroni-agent-check",
        };
        let times = Times { asked: came, answered: memory::now() };
        (times, unheard(options, connection, patroni.blame(why)))
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

/// Says that the grace could outlive the leader lock, if it could: with HAProxy's interval of units/examples/haproxy.cfg.
fn too_long(options: &Options, lock: Option<Duration>) -> Option<String> {
    let (grace, timeout) = (options.policy.grace, options.timeout);
    let needed = grace + 2 * timeout + Duration::from_millis(500);
    let lock = lock.filter(|lock| *lock < needed && !grace.is_zero())?;
    let seconds = |time: Duration| time.as_secs_f32();
    Some(format!(
        "--grace {} s is too long for this cluster: its leader lock may end {} s after a good answer (ttl less retry_timeout, less the larger of loop_wait and retry_timeout), and --grace plus twice --timeout plus HAProxy's agent-inter must not exceed that",
        seconds(grace),
        seconds(lock)
    ))
}

/// One check, down the pipe. `prepare` comes before the first byte is read, and returns the step that asks.
fn answer<Ask: FnOnce(&Connection, &Check, &Patience) -> Timed>(
    options: &Options,
    connection: &mut Connection,
    started: Instant,
    prepare: impl FnOnce(&Connection, &Memory) -> Ask,
) -> Answered {
    catch_panic(options.policy.unreachable, || {
        // who looks leaves nothing, and the journal hears nothing of it
        let by_hand = matches!(connection, Connection::Standard);
        let memory = Memory::open(&options.memory_file, by_hand);
        let (hold, unseen) = match hold::read(&options.hold_file) {
            Ok(hold) => (hold, None),
            Err(error) => (None, Some(error)),
        };
        if let Some(hold) = &hold {
            connection.remark(&format!(
                "a hold is active: {}, {}",
                Otherwise::from(hold.word),
                hold.reason
            ));
        }
        let note = Note::open(&options.before_stop_file);
        let ask = prepare(connection, &memory);
        let question = match question(&options.asked, connection, started, options.timeout) {
            Ok(Some(question)) => question,
            Ok(None) => return Answered { reply: decide::hold(hold, unseen), news: None },
            Err(why @ NoQuestion::NobodyAsked) => return decide::no_question(why, false).into(),
            Err(why) => {
                let patroni = [options.patroni.connect_to.clone()];
                let recalled = memory.recall(&patroni, None, connection.source());
                let reply = decide::no_question(why, recalled.is_well(options.policy.grace));
                return Answered { reply, news: recalled.news_of_no_check() };
            }
        };
        let patience = Patience::new(started, options.timeout, note.clone());
        let (times, Heard { from, answer }) = ask(connection, &question.check, &patience);
        let recalled = memory.recall(&from, Some(&question.check), connection.source());
        if let Some(error) = recalled.error() {
            connection.remark(&format!("no grace period: {error}"));
        }
        let last = recalled.last();
        if options.explain {
            connection.remark(&by_hand::memory(&last, times));
        }
        let stop_noted = note.is_left();
        let decide = |policy| {
            decide::decide(&question, policy, &answer, hold.clone(), stop_noted, &last, times)
        };
        let (mut reply, mut record) = decide(options.policy);
        let news = if by_hand { None } else { recalled.news(&mut record) };
        let lost = recalled.lost().filter(|_| !by_hand).map(str::to_owned);
        // before it is said, for whoever asks in the next moment
        if !recalled.leave(&record) && !by_hand {
            // nobody would know when the drain has begun
            reply = decide(Policy { stopping: Otherwise::Maint, ..options.policy }).0;
        }
        if let (Ok(_), Some(patroni)) = (&answer, options.patroni.named()) {
            reply.reason = format!("{} (Patroni {patroni})", reply.reason);
        }
        // seen by hand as well: it is part of the reason
        if let Some(unseen) = unseen {
            reply.reason = format!("{}; {unseen}", reply.reason);
        }
        if let Some(error) = lost {
            reply.reason = format!("{}; no grace period: {error}", reply.reason);
        }
        Answered { reply, news }
    })
}

/// The question of the command line, or the one that HAProxy sends; none if HAProxy only asks for a hold.
fn question(
    asked: &Asked,
    connection: &mut Connection,
    started: Instant,
    timeout: Duration,
) -> Result<Option<Question>, NoQuestion> {
    match asked {
        Asked::Fixed(question) => Ok(Some(question.clone())),
        Asked::AgentSend(otherwise) => {
            let line = connection.read_line(started, timeout)?;
            if line.trim_ascii() == HOLD.as_bytes() {
                return Ok(None);
            }
            let question = Question::from_agent_send(&line, *otherwise);
            question.map(Some).map_err(NoQuestion::NotUnderstood)
        }
    }
}

/// Answers, and tells how to exit: behind a socket always 0, since systemd keeps a failed unit's
/// place; else 0 in the pool, 1 healthy but not in the pool, 2 broken.
fn say(connection: &Connection, Answered { reply, news }: &Answered) -> ExitCode {
    let peer = news.and_then(|_| connection.peer());
    connection.send(&reply::line(reply));
    if let Connection::Standard = connection {
        connection::complain(&about(reply, &reply.check));
        return ExitCode::from(match reply.verdict {
            Verdict::Ready => 0,
            Verdict::Out(_) => 1,
            _ => 2,
        });
    }
    if let (Some(news), Some(peer)) = (news, peer) {
        let (level, since) = match news {
            News::Began => (4, String::new()),
            News::Lasts(time) => (4, format!(" (trouble for {:.0} s)", time.as_secs_f32())),
            News::Ended(time) => (5, format!(" (after {:.1} s of trouble)", time.as_secs_f32())),
        };
        let about = match reply.verdict {
            // nothing that a peer may make up gets into the journal, and so no query
            Verdict::NotUnderstood => NOT_UNDERSTOOD.to_owned(),
            _ => about(reply, reply.check.split('?').next().unwrap_or_default()),
        };
        let words = reply::words(reply.verdict);
        connection::log(level, &format!("replied '{words}' to {peer}: {about}{since}"));
    }
    ExitCode::SUCCESS
}

/// The check and the whole reason, for the journal or a human.
fn about(reply: &Reply, check: &str) -> String {
    let nothing = if reply.verdict == Verdict::Keep { "nothing changes in HAProxy: " } else { "" };
    match check {
        "" => format!("{nothing}{}", reply.reason),
        check => format!("{check}: {nothing}{}", reply.reason),
    }
}

/// Says what is wrong with the command line, or prints what it asks for.
pub fn stop(connection: &Connection, stop: &Stop) -> ExitCode {
    let reason = match (connection, stop) {
        (Connection::Standard, Stop::Print(text)) => {
            connection::print(text);
            return ExitCode::SUCCESS;
        }
        (Connection::Standard, Stop::Usage(error)) => return usage_error(error),
        (_, Stop::Usage(error)) => format!("{NAME}: {error}"),
        (_, Stop::Print(_)) => format!("{NAME}: {}", options::FOR_A_TERMINAL),
    };
    // Silence would leave HAProxy with what it heard last, which may be READY.
    let reply = Reply { verdict: Verdict::Fail, check: String::new(), reason };
    say(connection, &Answered { reply, news: Some(News::Began) })
}

/// Says how this program was started wrongly, where there is nobody to answer.
pub fn usage_error(error: &str) -> ExitCode {
    connection::complain(error);
    ExitCode::from(USAGE)
}

/// Even a bug is answered: silence would leave HAProxy with what it heard last, which may be READY.
pub fn catch_panic<T: From<Reply>>(unreachable: Unreachable, answer: impl FnOnce() -> T) -> T {
    panic::catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
        let reason = format!("bug in patroni-agent-check, please report it: {text}");
        Reply { verdict: unreachable.verdict(), check: String::new(), reason }.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::thread;

    #[test]
    fn a_panic_is_answered() {
        let text = "bug in patroni-agent-check, please report it: ";
        let reply: Reply = catch_panic(Unreachable::Down, || panic!("at {}", 3));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Down, format!("{text}at 3")));
        let reply: Reply = catch_panic(Unreachable::Keep, || panic!("here"));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Keep, format!("{text}here")));
    }

    #[test]
    fn an_answer_comes_after_its_question() {
        let took = Duration::from_millis(1);
        let no_answer = NoAnswer { refused: false, unasked: false, reason: "none".to_owned() };
        let (times, _) = timed(|| {
            thread::sleep(took);
            Heard { from: vec![], answer: Err(no_answer) }
        });
        assert!(times.answered >= times.asked + took, "{times:?}");
    }

    #[test]
    fn patroni_may_be_where_haproxy_asked_unless_its_url_is_given() {
        let listener = TcpListener::bind("127.0.0.2:0").expect("a free port");
        let asked = listener.local_addr().expect("an address");
        let _haproxy = TcpStream::connect(asked).expect("a connection");
        let connection = Connection::Socket(listener.accept().expect("a connection").0);
        let local = |arguments: &[&str]| {
            let options = Options::parse(arguments.iter().map(Into::into));
            local(&options.expect("options"), &connection)
        };
        assert_eq!(local(&[]), Some(asked));
        assert_eq!(local(&["--url", "http://127.0.0.1:8008"]), None);
    }
}
