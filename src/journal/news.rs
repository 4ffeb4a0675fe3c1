//! Which trouble is logged, and in which words: HAProxy asks far more often than an operator wants to read. In go the
//! records and a reply, out come a line or none and a changed record. Knows nothing of what an answer means.

use super::{NOTICE, REPEAT, WARNING};
use crate::VERSION;
use crate::haproxy::reply::{self, Reply, Verdict};
use crate::run::memory::{Recalled, Record};
use std::time::Duration;

/// The most lines about trouble within [`REPEAT`], no matter how often trouble begins and ends.
const MOST_LINES: u8 = 20;
/// The highest count of lines that a record can hold.
const COUNTED: u8 = 31;
/// One check in this many logs that the memory cannot be used: about one a minute for each HAProxy with the shipped
/// intervals.
const ONE_IN: u32 = 128;

/// What the journal is told about trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Trouble has begun.
    Began,
    /// Trouble has lasted for this long.
    Lasts(Duration),
    /// Trouble is over, after this long.
    Ended(Duration),
    /// The memory cannot be used.
    LostMemory,
    /// HAProxy or a stranger has sent an invalid agent-send line.
    InvalidLine,
}

/// Decides whether the journal gets a line about trouble: when trouble begins, once a minute while it lasts, and when it
/// ends, no matter how many checks meet it. Without a memory file, each check logs its trouble.
pub fn trouble_news(recalled: &Recalled, record: &mut Record) -> Option<News> {
    news(&recalled.last, recalled.comparable_records(), recalled.now, record)
}

fn news(
    last: &Record,
    comparable: impl Iterator<Item = Record>,
    now: Duration,
    record: &mut Record,
) -> Option<News> {
    let lines = if is_recent(last.logged, now) { (last.lines + 1).min(COUNTED) } else { 1 };
    let Some(since) = record.trouble else {
        let began = last.trouble.filter(|_| last.own_line)?;
        (record.logged, record.lines, record.own_line) = (now, lines, false);
        return Some(News::Ended(now.saturating_sub(began)));
    };
    let logged: Vec<_> = comparable.filter(|other| is_recent(other.logged, now)).collect();
    let in_trouble = logged.iter().filter(|other| other.trouble.is_some());
    if let Some(logged) = in_trouble.map(|other| other.logged).max() {
        // the next record must remember that line
        record.logged = logged;
        return None;
    }
    if logged.iter().map(|other| other.lines).fold(0, u8::saturating_add) >= MOST_LINES {
        return None;
    }
    (record.logged, record.lines, record.own_line) = (now, lines, true);
    Some(match last.trouble {
        None => News::Began,
        Some(_) => News::Lasts(now.saturating_sub(since)),
    })
}

/// Decides whether the journal gets a line about an invalid agent-send line: once a minute, and never without a memory file.
pub fn invalid_line_news(recalled: Recalled, verdict: Verdict) -> Option<News> {
    let (mut record, now) = (recalled.last.clone(), recalled.now);
    if is_recent(record.logged, now) || recalled.error().is_some() {
        return None;
    }
    record.logged = now;
    let _ = recalled.store(&record);
    Some(if verdict == Verdict::Keep { News::Began } else { News::InvalidLine })
}

/// Whether the journal gets a line about a memory that cannot be used. Nothing counts the lines then, so the microseconds
/// of the clock choose one check in [`ONE_IN`].
pub fn lost_memory_news(now: Duration) -> Option<News> {
    (now.subsec_micros() % ONE_IN == 0).then_some(News::LostMemory)
}

fn is_recent(logged: Duration, now: Duration) -> bool {
    !logged.is_zero() && now.saturating_sub(logged) < REPEAT
}

/// Formats the line about a reply, with its priority.
pub fn format_line(reply: &Reply, news: News, peer: &str) -> (u8, String) {
    let (priority, since) = match news {
        // who reads the first line may want to know which build it is
        News::Began | News::LostMemory | News::InvalidLine => (WARNING, format!(" [{VERSION}]")),
        News::Lasts(time) => (WARNING, format!(" (trouble for {:.0} s)", time.as_secs_f32())),
        News::Ended(time) => (NOTICE, format!(" (after {:.1} s of trouble)", time.as_secs_f32())),
    };
    let text = match news {
        // the journal gets nothing that a peer can make up: no invalid line and no query
        News::InvalidLine => "agent-send line not understood (the reply says why)".to_owned(),
        _ => describe(reply, reply.check.split('?').next().unwrap_or_default()),
    };
    (priority, format!("replied '{}' to {peer}: {text}{since}", reply::words(reply.verdict)))
}

/// Describes a reply: the check and the whole reason.
pub fn describe(reply: &Reply, check: &str) -> String {
    let nothing = if reply.verdict == Verdict::Keep { "nothing changes in HAProxy: " } else { "" };
    let colon = if check.is_empty() { "" } else { ": " };
    format!("{check}{colon}{nothing}{}", reply.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_that_lasts_is_logged_again_after_a_minute() {
        let now = Duration::from_secs(1000);
        let minute = Duration::from_secs(60);
        for (ago, expected) in
            [(minute - Duration::from_millis(1), None), (minute, Some(News::Lasts(2 * minute)))]
        {
            let trouble = Some(now - 2 * minute);
            let mut record = Record { trouble, logged: now - ago, ..Record::default() };
            let last = record.clone();
            assert_eq!(is_recent(last.logged, now), expected.is_none());
            assert_eq!(news(&last, [last.clone()].into_iter(), now, &mut record), expected);
        }
    }
}
