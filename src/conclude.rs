//! The end of a check. In go the files in /run and the outcome of the question, out come the reply, the record for the next
//! check, and news for the journal. Knows nothing of HTTP and the clock.

use crate::by_hand::explain;
use crate::decide::grace::{self, Case, Policy};
use crate::decide::{decide, reply_to};
use crate::haproxy::connection::{Connection, NoQuestion};
use crate::haproxy::question::Question;
use crate::haproxy::reply::{AdminState, Reply};
use crate::journal::news::{self, News};
use crate::options::Options;
use crate::patroni::ask::Outcome;
use crate::run::Files;

/// What stands before the error if the memory file cannot be used.
pub const NO_GRACE: &str = "no grace period: ";

/// What a check ends with.
pub struct Conclusion {
    /// The reply to HAProxy.
    pub reply: Reply,
    /// What the journal is told, if anything.
    pub news: Option<News>,
}

impl From<Reply> for Conclusion {
    /// A reply that is always logged, since no record remembers it.
    fn from(reply: Reply) -> Conclusion {
        Conclusion { reply, news: Some(News::Began) }
    }
}

/// Concludes a check whose line is no question to Patroni.
pub fn conclude_without_question(
    options: &Options,
    connection: &Connection,
    files: Files,
    why: &NoQuestion,
) -> Conclusion {
    if let NoQuestion::OnlyHold | NoQuestion::Closed = why {
        return Conclusion { reply: reply_to(why, files.hold, false), news: None };
    }
    let patroni = std::slice::from_ref(&options.patroni.connect_to);
    let recalled = files.memory.recall(patroni, None, connection.source());
    let is_within = |record| grace::is_within_grace(&record, recalled.now, options.policy.grace);
    let within_grace = recalled.plain_records().any(is_within);
    let reply = reply_to(why, files.hold, within_grace);
    let news = news::invalid_line_news(recalled, reply.verdict);
    Conclusion { reply, news }
}

/// Concludes a check that has asked Patroni. It stores the record before it replies, since the next check may come at once.
pub fn conclude(
    options: &Options,
    connection: &Connection,
    files: Files,
    question: &Question,
    outcome: &Outcome,
) -> Conclusion {
    let by_hand = connection.is_by_hand();
    let recalled = files.memory.recall(&outcome.from, Some(&question.check), connection.source());
    if let Some(error) = recalled.error() {
        connection.tell_operator(&format!("{NO_GRACE}{error}"));
    }
    let last = &recalled.last.clone();
    if options.explain {
        connection.tell_operator(&explain::explain_memory(last, outcome.asked));
    }
    let case = Case { question, outcome, last, stop_noted: files.note.is_valid() };
    let hold = files.hold.as_ref().ok().and_then(Option::as_ref);
    let (mut reply, mut record) = decide(case, options.policy, hold);
    let news = if by_hand { None } else { news::trouble_news(&recalled, &mut record) };
    let (now, is_installed) = (recalled.now, recalled.is_installed);
    let not_stored = recalled.store(&record).err().filter(|_| !by_hand);
    if not_stored.is_some() {
        // the next check would not know when the drain began
        let policy = Policy { stopping: AdminState::Maint, ..options.policy };
        reply = decide(case, policy, hold).0;
    }
    let not_stored = not_stored.filter(|_| is_installed);
    let news = news.or(not_stored.as_ref().and_then(|_| news::lost_memory_news(now)));
    if let (Ok(_), Some(patroni)) = (&outcome.answer, options.patroni.remote_endpoint()) {
        reply.reason += &format!(" (Patroni {patroni})");
    }
    if let Err(error) = &files.hold {
        reply.reason += &format!("; {error}");
    }
    if let Some(error) = not_stored {
        reply.reason += &format!("; {NO_GRACE}{error}");
    }
    Conclusion { reply, news }
}
