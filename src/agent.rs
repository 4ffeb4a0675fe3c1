//! One agent check, from the connection to the reply: open, confine, read the question, ask, conclude. In goes a connection,
//! out comes a reply and perhaps a line for the journal. Knows all the steps and does none of them itself.

use crate::before_stop::{Note, Patience};
use crate::connection::{self, Connection, NoLine};
use crate::decide::{self, Case, Policy, Unreachable};
use crate::hold::{self, Hold};
use crate::memory::{Memory, News};
use crate::options::{self, Options, Stop};
use crate::patroni::Heard;
use crate::process::{self, Process};
use crate::question::{NoQuestion, Question};
use crate::questions::Questions;
use crate::reply::{self, Otherwise, Reply, Verdict};
use crate::{NAME, by_hand, serve};
use std::net::TcpListener;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::Instant;

/// In the journal, at most once a minute.
const NOT_UNDERSTOOD: &str = "agent-send line not understood (the reply says why)";
/// Usage, in sysexits(3).
const USAGE: u8 = 64;

/// Answers one check in a process of its own.
pub fn answer_one(options: &Options, mut connection: Connection, started: Instant) -> ExitCode {
    let concluded = answer(options, &mut connection, started, None);
    send(&connection, &concluded)
}

/// Answers all checks that come by these sockets, until none has come for a while.
pub fn answer_all(options: &Result<Options, Stop>, listeners: &[TcpListener]) -> ExitCode {
    let idle = options.as_ref().map_or_else(|_| options::default_idle(), |options| options.idle);
    let questions = Questions::default();
    let confine = |systemd| process::confine_listener(options.as_ref().ok(), systemd);
    let served = serve::serve(listeners, idle, confine, |mut connection, place| match options {
        Ok(options) => {
            let process = Process::Listener(&questions, place);
            let concluded = answer(options, &mut connection, Instant::now(), Some(process));
            send(&connection, &concluded);
            reply::words(concluded.reply.verdict)
        }
        Err(stop) => {
            refuse(&connection, stop);
            reply::words(Verdict::Fail)
        }
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_usage_error(&format!("cannot serve: {error}")),
    }
}

/// Answers one check, by a listener or by a process of its own, which is confined here. Each step hands on to the next.
fn answer(
    options: &Options,
    connection: &mut Connection,
    started: Instant,
    listener: Option<Process>,
) -> Concluded {
    catch_panic(options.policy.unreachable, || {
        let files = Files::open(options, connection);
        let process =
            listener.unwrap_or_else(|| Process::confine(options, connection, &files.memory));
        let question = match options.asked.read(connection, started, options.timeout) {
            Ok(question) => question,
            Err(why) => return conclude_without_question(options, connection, files, &why),
        };
        let patience = Patience::new(started, options.timeout, files.note.clone());
        let heard = process.ask(options, connection, &question.check, &patience);
        conclude(options, connection, files, &question, &heard)
    })
}

/// What an operator, the last check and the before-stop hook left in /run.
struct Files {
    memory: Memory,
    /// Or why nobody can tell whether there is one.
    hold: Result<Option<Hold>, String>,
    note: Note,
}

impl Files {
    fn open(options: &Options, connection: &Connection) -> Files {
        // a check by hand leaves nothing
        let memory = Memory::open(&options.memory_file, connection.is_by_hand());
        let hold = hold::read(&options.hold_file);
        if let Ok(Some(Hold { word, reason })) = &hold {
            let word = Otherwise::from(*word);
            connection.remark(&format!("a hold is active: {word}, {reason}"));
        }
        Files { memory, hold, note: Note::open(&options.before_stop_file) }
    }
}

/// The end of a check.
struct Concluded {
    reply: Reply,
    /// What the journal is told.
    news: Option<News>,
}

impl From<Reply> for Concluded {
    /// A reply that nothing is remembered of, and that is news if it is bad.
    fn from(reply: Reply) -> Concluded {
        let news = (reply.verdict != Verdict::Unasked).then_some(News::Began);
        Concluded { reply, news }
    }
}

/// What HAProxy is told if it asked nothing of Patroni.
fn conclude_without_question(
    options: &Options,
    connection: &Connection,
    files: Files,
    why: &NoQuestion,
) -> Concluded {
    if let NoQuestion::OnlyHold = why {
        return Concluded { reply: decide::no_question(why, files.hold, false), news: None };
    }
    if let NoQuestion::NoLine(NoLine::Closed) = why {
        return decide::no_question(why, files.hold, false).into();
    }
    let patroni = [options.patroni.connect_to.clone()];
    let recalled = files.memory.recall(&patroni, None, connection.source());
    let reply = decide::no_question(why, files.hold, recalled.is_well(options.policy.grace));
    Concluded { reply, news: recalled.news_of_no_check() }
}

/// What HAProxy is told of what was heard. It is left for the next check before it is said, for whoever asks in the next
/// moment.
fn conclude(
    options: &Options,
    connection: &Connection,
    files: Files,
    question: &Question,
    heard: &Heard,
) -> Concluded {
    let by_hand = connection.is_by_hand();
    let recalled = files.memory.recall(&heard.from, Some(&question.check), connection.source());
    if let Some(error) = recalled.error() {
        connection.remark(&format!("no grace period: {error}"));
    }
    let last = &recalled.last();
    if options.explain {
        connection.remark(&by_hand::explain_memory(last, heard.asked));
    }
    let case = Case { question, heard, last, stop_noted: files.note.is_left() };
    let hold = files.hold.as_ref().ok().and_then(Option::as_ref);
    let (mut reply, mut record) = decide::decide(case, options.policy, hold);
    let news = if by_hand { None } else { recalled.news(&mut record) };
    let lost = recalled.lost().filter(|_| !by_hand).map(str::to_owned);
    if !recalled.leave(&record) && !by_hand {
        // nobody would know when the drain has begun
        let policy = Policy { stopping: Otherwise::Maint, ..options.policy };
        reply = decide::decide(case, policy, hold).0;
    }
    if let (Ok(_), Some(patroni)) = (&heard.answer, options.patroni.named()) {
        reply.reason += &format!(" (Patroni {patroni})");
    }
    // by hand as well: it is part of the reason
    if let Err(unseen) = &files.hold {
        reply.reason += &format!("; {unseen}");
    }
    if let Some(error) = lost {
        reply.reason += &format!("; no grace period: {error}");
    }
    Concluded { reply, news }
}

/// Answers, and tells how to exit: behind a socket always 0, since systemd keeps a failed unit's
/// place; else 0 in the pool, 1 healthy but not in the pool, 2 broken.
fn send(connection: &Connection, Concluded { reply, news }: &Concluded) -> ExitCode {
    let peer = news.and_then(|_| connection.peer());
    connection.send(&reply::line(reply));
    if let Connection::Standard = connection {
        connection::complain(&describe(reply, &reply.check));
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
        let text = match reply.verdict {
            // nothing that a peer may make up gets into the journal, and so no query
            Verdict::NotUnderstood => NOT_UNDERSTOOD.to_owned(),
            _ => describe(reply, reply.check.split('?').next().unwrap_or_default()),
        };
        let words = reply::words(reply.verdict);
        connection::log(level, &format!("replied '{words}' to {peer}: {text}{since}"));
    }
    ExitCode::SUCCESS
}

/// The check and the whole reason, for the journal or a human.
fn describe(reply: &Reply, check: &str) -> String {
    let nothing = if reply.verdict == Verdict::Keep { "nothing changes in HAProxy: " } else { "" };
    match check {
        "" => format!("{nothing}{}", reply.reason),
        check => format!("{check}: {nothing}{}", reply.reason),
    }
}

/// Says what is wrong with the command line, or prints what it asks for.
pub fn refuse(connection: &Connection, stop: &Stop) -> ExitCode {
    let reason = match (connection, stop) {
        (Connection::Standard, Stop::Print(text)) => {
            connection::print(text);
            return ExitCode::SUCCESS;
        }
        (Connection::Standard, Stop::Usage(error)) => return report_usage_error(error),
        (_, Stop::Usage(error)) => format!("{NAME}: {error}"),
        (_, Stop::Print(_)) => format!("{NAME}: {}", options::FOR_A_TERMINAL),
    };
    // Silence would leave HAProxy with what it heard last, which may be READY.
    let reply = Reply { verdict: Verdict::Fail, check: String::new(), reason };
    send(connection, &Concluded { reply, news: Some(News::Began) })
}

/// Says how this program was started wrongly, where there is nobody to answer.
pub fn report_usage_error(error: &str) -> ExitCode {
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

    #[test]
    fn a_panic_is_answered() {
        let text = "bug in patroni-agent-check, please report it: ";
        let reply: Reply = catch_panic(Unreachable::Down, || panic!("at {}", 3));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Down, format!("{text}at 3")));
        let reply: Reply = catch_panic(Unreachable::Keep, || panic!("here"));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Keep, format!("{text}here")));
    }
}
