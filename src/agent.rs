//! One agent check in five steps: open, confine, read the question, ask, conclude. In goes a connection, out come a reply
//! and perhaps a line for the journal. Knows nothing of HTTP.

use crate::NAME;
use crate::conclude::{self, Conclusion};
use crate::haproxy::connection::{self, Connection};
use crate::haproxy::question::Question;
use crate::haproxy::reply::{self, Reply, Verdict};
use crate::journal::{self, news, news::News};
use crate::listen::{questions::Questions, serve};
use crate::options::{self, Options, Stop};
use crate::process::{self, Process};
use crate::run::before_stop::Patience;
use std::net::TcpListener;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::Instant;

/// Answers one check, for which this process was started.
pub fn answer_one(options: &Options, mut connection: Connection, started: Instant) -> ExitCode {
    let conclusion = answer(options, &mut connection, started, None);
    send(&connection, &conclusion)
}

/// Answers every check that comes to these listening sockets, until [`serve::serve`] ends.
pub fn answer_all(options: &Result<Options, Stop>, listeners: &[TcpListener]) -> ExitCode {
    let defaults = Options::defaults().unwrap_or_default();
    let idle = options.as_ref().unwrap_or(&defaults).idle;
    let questions = Questions::default();
    let confine = |systemd| process::confine_listener(options.as_ref().ok(), systemd);
    let served = serve::serve(listeners, idle, confine, |mut connection, place| match options {
        Ok(options) => {
            let process = Process::Listener(&questions, place);
            let conclusion = answer(options, &mut connection, Instant::now(), Some(process));
            send(&connection, &conclusion);
            reply::words(conclusion.reply.verdict)
        }
        Err(stop) => {
            answer_without_check(&connection, stop);
            reply::words(Verdict::Fail)
        }
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_usage_error(&format!("cannot serve: {error}")),
    }
}

/// Takes the five steps. A process that was started for this check alone is confined here.
fn answer(
    options: &Options,
    connection: &mut Connection,
    started: Instant,
    process: Option<Process>,
) -> Conclusion {
    catch_panic(options.policy.without_answer(), || {
        let files = options.files.open(connection.is_by_hand());
        let process = process.unwrap_or_else(|| Process::confine(options, connection, &files));
        let (fixed, otherwise) = (options.fixed_check(), options.otherwise);
        match Question::read(fixed, otherwise, connection, started, options.timeout) {
            Ok(question) => {
                let patience = Patience::new(started, options.timeout, files.note.clone());
                let outcome = process.ask(options, connection, &question.check, &patience);
                conclude::conclude(options, connection, files, &question, &outcome)
            }
            Err(why) => conclude::conclude_without_question(options, connection, files, &why),
        }
    })
}

/// Sends the reply and logs it. Behind a socket, the exit status is 0, since a failed unit still counts for
/// `MaxConnections=`.
fn send(connection: &Connection, Conclusion { reply, news }: &Conclusion) -> ExitCode {
    let peer = news.and_then(|_| connection.peer());
    connection.send(&reply::format_line(reply));
    if let Connection::Standard = connection {
        journal::tell_operator(&news::describe(reply, &reply.check));
        return ExitCode::from(match reply.verdict {
            Verdict::Ready => options::IN_THE_POOL,
            Verdict::Out(_) => options::OUT_OF_THE_POOL,
            _ => options::IN_TROUBLE,
        });
    }
    if let (Some(news), Some(peer)) = (news, peer) {
        let (priority, line) = news::format_line(reply, *news, &peer);
        journal::log(priority, &line);
    }
    ExitCode::SUCCESS
}

/// Reports what is wrong with the command line, or prints the help or the version.
pub fn answer_without_check(connection: &Connection, stop: &Stop) -> ExitCode {
    let reason = match (connection, stop) {
        (Connection::Standard, Stop::Print(text)) => {
            connection::print(text);
            return ExitCode::SUCCESS;
        }
        (Connection::Standard, Stop::Usage(error)) => return report_usage_error(error),
        (_, Stop::Usage(error)) => format!("{NAME}: {error}"),
        (_, Stop::Print(_)) => format!("{NAME}: {}", options::FOR_A_TERMINAL),
    };
    // silence would leave HAProxy with the last reply, which may be READY
    let reply = Reply { verdict: Verdict::Fail, check: String::new(), reason };
    send(connection, &Conclusion { reply, news: Some(News::Began) })
}

/// Reports what is wrong with the command line or with the start to whoever started the program.
pub fn report_usage_error(error: &str) -> ExitCode {
    journal::tell_operator(error);
    ExitCode::from(options::USAGE)
}

/// Answers even if a bug makes `answer` panic: silence would leave HAProxy with the last reply, which may be READY.
pub fn catch_panic<T: From<Reply>>(without_answer: Verdict, answer: impl FnOnce() -> T) -> T {
    panic::catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
        let reason = format!("bug in patroni-agent-check, please report it: {text}");
        Reply { verdict: without_answer, check: String::new(), reason }.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_answered_with_its_text() {
        let text = "bug in patroni-agent-check, please report it: ";
        let reply: Reply = catch_panic(Verdict::Down, || panic!("at {}", 3));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Down, format!("{text}at 3")));
        let reply: Reply = catch_panic(Verdict::Keep, || panic!("here"));
        assert_eq!((reply.verdict, reply.reason), (Verdict::Keep, format!("{text}here")));
    }
}
