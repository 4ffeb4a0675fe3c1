//! The end of a check. In go what was left in /run and what was heard, out come the reply, the record for the next check,
//! and what the journal hears. Knows nothing of HTTP and the clock.

use crate::by_hand::explain;
use crate::decide::grace::{self, Case, Policy};
use crate::decide::{decide, no_question};
use crate::haproxy::connection::{Connection, NoQuestion};
use crate::haproxy::question::Question;
use crate::haproxy::reply::{Otherwise, Reply};
use crate::journal::news::{self, News};
use crate::options::Options;
use crate::patroni::ask::Heard;
use crate::run::Files;

/// The end of a check.
pub struct Concluded {
    /// What HAProxy is told.
    pub reply: Reply,
    /// What the journal is told.
    pub news: Option<News>,
}

impl From<Reply> for Concluded {
    /// A reply that is always news, since nothing is remembered of it.
    fn from(reply: Reply) -> Concluded {
        Concluded { reply, news: Some(News::Began) }
    }
}

/// Concludes a check that does not ask Patroni.
pub fn without_question(
    options: &Options,
    connection: &Connection,
    files: Files,
    why: &NoQuestion,
) -> Concluded {
    if let NoQuestion::OnlyHold | NoQuestion::Closed = why {
        return Concluded { reply: no_question(why, files.hold, false), news: None };
    }
    let patroni = std::slice::from_ref(&options.patroni.connect_to);
    let recalled = files.memory.recall(patroni, None, connection.source());
    let (records, now) = (recalled.plain_records(), recalled.now);
    let is_well = grace::is_well(records, now, options.policy.grace);
    let reply = no_question(why, files.hold, is_well);
    let news = news::of_invalid_line(recalled, reply.verdict);
    Concluded { reply, news }
}

/// Concludes a check that has asked Patroni. The record is left before HAProxy is answered, since another check may follow
/// at once.
pub fn conclude(
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
    let last = &recalled.last.clone();
    if options.explain {
        connection.remark(&explain::explain_memory(last, heard.asked));
    }
    let case = Case { question, heard, last, stop_noted: files.note.is_left() };
    let hold = files.hold.as_ref().ok().and_then(Option::as_ref);
    let (mut reply, mut record) = decide(case, options.policy, hold);
    let news = if by_hand { None } else { news::of_trouble(&recalled, &mut record) };
    let lost = recalled.lost().filter(|_| !by_hand).map(str::to_owned);
    if !recalled.leave(&record) && !by_hand {
        // the next check would not know when the drain has begun
        let policy = Policy { stopping: Otherwise::Maint, ..options.policy };
        reply = decide(case, policy, hold).0;
    }
    if let (Ok(_), Some(patroni)) = (&heard.answer, options.patroni.named()) {
        reply.reason += &format!(" (Patroni {patroni})");
    }
    // by hand as well, since it is part of the reason
    if let Err(unseen) = &files.hold {
        reply.reason += &format!("; {unseen}");
    }
    if let Some(error) = lost {
        reply.reason += &format!("; no grace period: {error}");
    }
    Concluded { reply, news }
}
