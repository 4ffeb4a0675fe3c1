//! Properties that hold for any input. The fuzz targets use them, and tests/plain/properties.rs checks them on the recorded
//! answers and on a fixed series of changes to these.

use patroni_agent_check::clock::now;
use patroni_agent_check::decide::decide;
use patroni_agent_check::decide::grace::{self, Case, Policy};
use patroni_agent_check::haproxy::question::Question;
use patroni_agent_check::haproxy::reply::{self, AdminState, Otherwise, Reply, Verdict};
use patroni_agent_check::journal::news;
use patroni_agent_check::options::Options;
use patroni_agent_check::patroni::answer::{self, Answer, Cause, NoAnswer};
use patroni_agent_check::patroni::ask::Outcome;
use patroni_agent_check::patroni::check::Check;
use patroni_agent_check::patroni::location::Endpoint;
use patroni_agent_check::run::memory::{Memory, RECORD, Record, SIZE};
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::Duration;

fn policy(grace: Duration) -> Policy {
    Policy { keep: false, grace, stopping: AdminState::Drain }
}

fn outcome(answer: Result<Answer, NoAnswer>, [asked, answered]: [Duration; 2]) -> Outcome {
    Outcome { from: Vec::new(), answer, asked, answered }
}

/// The path of a valid check is plain, and its text parses to the same check.
fn assert_plain(check: &Check) {
    let path = check.path();
    assert!(path.starts_with('/') && path.len() < 2 + 256, "{path}");
    assert!(
        path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#' && byte != b'%'),
        "{path}"
    );
    let text = check.text().to_owned();
    assert_eq!(&text.parse::<Check>().expect("the same check"), check);
}

/// `agent-send`, the line that HAProxy sends.
pub fn agent_send(line: &[u8]) {
    let line = &line[..line.len().min(256)];
    match Question::from_agent_send(line, Otherwise::Maint) {
        Ok(question) => assert_plain(&question.check),
        Err(error) => assert!(error.starts_with("agent-send line: ")),
    }
}

/// The words that HAProxy reads from a line. It splits at blanks, tabs and commas, and stops at a word that starts with `#`
/// (its manual, "agent-check").
fn words(line: &str) -> Vec<&str> {
    let line = line.strip_suffix('\n').expect("a line");
    assert!(!line.contains(['\n', '\r', '\0']), "{line:?}");
    let words = line.split([' ', '\t', ',']).filter(|word| !word.is_empty());
    words.take_while(|word| !word.starts_with('#')).collect()
}

/// A reply with any reason and any verdict.
pub fn reply(bytes: &[u8]) {
    let (first, reason) = bytes.split_first().unwrap_or((&0, &[]));
    let all = [
        (Verdict::Ready, "up ready"),
        (Verdict::Out(Otherwise::Maint), "up maint"),
        (Verdict::Out(Otherwise::Drain), "up drain"),
        (Verdict::Out(Otherwise::Down), "down ready"),
        (Verdict::Fail, "fail ready"),
        (Verdict::Stopped, "stopped ready"),
        (Verdict::Down, "down ready"),
        (Verdict::Keep, "!"),
    ];
    let (verdict, expected) = all[usize::from(*first) % all.len()];
    let reason = String::from_utf8_lossy(reason).into_owned();
    let line = reply::format_line(&Reply { verdict, check: String::new(), reason });
    assert!(line.len() <= 100 + "stopped ready # \n".len(), "{line:?}");
    assert!(
        line.trim_end_matches('\n').bytes().all(|byte| (b' '..=b'~').contains(&byte)),
        "{line:?}"
    );
    match verdict {
        Verdict::Keep => {
            let [word] = words(&line)[..] else { panic!("{line:?}") };
            assert!(word.starts_with("!unreachable:_"), "{line:?}");
        }
        _ => assert_eq!(words(&line).join(" "), expected, "{line:?}"),
    }
}

/// An answer with any body and either status: READY only for a running node whose role matches.
pub fn answer(bytes: &[u8]) {
    let (first, body) = bytes.split_first().unwrap_or((&0, &[]));
    let status = if first % 2 == 0 { 200 } else { 503 };
    let answer =
        answer::read(status, body).map_err(|reason| NoAnswer { cause: Cause::Failed, reason });
    let policy = policy(Duration::from_secs(3));
    let times = [100, 101].map(Duration::from_secs);
    let outcome = outcome(answer, times);
    let answer = &outcome.answer;
    for check in [
        "primary",
        "leader",
        "standby-leader",
        "replica",
        "read-only",
        "health",
        "replica?replication_state=streaming",
    ] {
        let check: Check = check.parse().expect("a check");
        let question = Question { check, otherwise: Otherwise::Drain };
        let last = &Record::default();
        let case = Case { question: &question, outcome: &outcome, last, stop_noted: false };
        let (reply, left) = decide(case, policy, None);
        // only a running node starts a grace period
        let healthy = answer.as_ref().is_ok_and(|answer| answer.state == "running");
        assert!(left.lease.is_zero() || healthy);
        assert_eq!(words(&reply::format_line(&reply)).len(), 2);
        match answer {
            Ok(answer) if answer.status == 200 && answer.state == "running" => {}
            _ => assert_ne!(reply.verdict, Verdict::Ready),
        }
        if let Ok(answer) = answer {
            let fits = question.check.matches_role(&answer.role);
            assert!(fits || reply.verdict != Verdict::Ready);
        }
    }
}

/// The place of a record's checksum, which is that of the bytes before.
const SUM: usize = RECORD - 4;

fn checksum(record: &[u8]) -> [u8; 4] {
    let mut hasher = DefaultHasher::new();
    record[..SUM].hash(&mut hasher);
    (hasher.finish() as u32).to_le_bytes()
}

/// The health checks, and the answers of Patroni.
const ASKED: [&str; 4] = ["primary", "replica", "health", "replica?lag=1MB"];
const SAID: [Option<(u16, &str)>; 8] = [
    None,
    Some((200, r#"{"state": "running", "role": "primary"}"#)),
    Some((503, r#"{"state": "running", "role": "primary"}"#)),
    Some((503, r#"{"state": "running", "role": "primary", "pause": true}"#)),
    Some((200, r#"{"state": "running", "role": "replica"}"#)),
    Some((503, r#"{"state": "stopped", "role": "replica"}"#)),
    Some((200, r#"{"state": "unknown", "role": "primary"}"#)),
    Some((503, r#"{"state": "crashed", "role": "primary"}"#)),
];

/// A memory file of any bytes, or a record that a check has left with any changes. If the second byte says so,
/// each record then gets its right checksum, which random changes do not find.
pub fn memory(bytes: &[u8]) {
    let [first, second, bytes @ ..] = bytes else { return };
    let path = std::env::temp_dir().join(format!("memory-{}", std::process::id()));
    let patroni = Endpoint { host: "pg1".to_owned(), port: 8008 };
    let check: Check = ASKED[usize::from(first % 4)].parse().expect("a check");
    let recall =
        || Memory::open(&path, false).recall(std::slice::from_ref(&patroni), Some(&check), None);
    let read = |path: &Path| fs::read(path).expect("the memory file");
    let mut before = bytes.to_vec();
    if second & 1 == 0 {
        let _ = fs::remove_file(&path);
        let at = now();
        let lease = Duration::from_secs(15);
        let mut ready = Record::default();
        (ready.at, ready.lease, ready.ready) = (at, lease, Some(at));
        let _ = recall().store(&ready);
        before = read(&path);
        let place = before.len() - RECORD;
        before[place..].iter_mut().zip(bytes).for_each(|(byte, change)| *byte ^= change);
    }
    if second & 2 != 0 {
        before.chunks_exact_mut(RECORD).for_each(|record| {
            let checksum = checksum(record);
            record[SUM..].copy_from_slice(&checksum);
        });
    }
    fs::write(&path, &before).expect("a memory file");

    let grace = Duration::from_secs(3);
    let policy = policy(grace);
    let question = Question { check: check.clone(), otherwise: Otherwise::Maint };
    let answer = match SAID[usize::from(first / 4 % 8)] {
        Some((status, body)) => answer::read(status, body.as_bytes()),
        None => Err("nothing".to_owned()),
    };
    let answer = answer.map_err(|reason| NoAnswer {
        cause: if second & 4 != 0 { Cause::Refused } else { Cause::Failed },
        reason,
    });
    let decide = |last: &Record, time| {
        let outcome = outcome(answer.clone(), [time; 2]);
        decide(
            Case { question: &question, outcome: &outcome, last, stop_noted: false },
            policy,
            None,
        )
    };

    let at = now();
    let recalled = recall();
    let last = recalled.last.clone();
    let is_within = |record| grace::is_within_grace(&record, recalled.now, Duration::ZERO);
    assert!(!recalled.plain_records().any(is_within));
    if last != Record::default() {
        let intact = |record: &[u8]| record[SUM..] == checksum(record);
        assert!(before.chunks_exact(RECORD).any(intact), "a torn record counts: {last:?}");
    }
    let (alone, _) = decide(&Record::default(), at);
    let (reply, mut record) = decide(&last, at);
    assert!(!words(&reply::format_line(&reply)).is_empty());
    assert!(reply.verdict != Verdict::Ready || alone.verdict == Verdict::Ready);
    let _ = news::trouble_news(&recalled, &mut record);
    let foreign = recalled.error().is_some();
    let _ = recalled.store(&record);

    // one record was written, or none if the file is no memory file
    let after = read(&path);
    if foreign {
        assert_eq!(after, before);
        return fs::remove_file(&path).expect("no memory file");
    }
    // a hole in the file reads as zeros
    assert!(after.len() >= before.len());
    let longest = SIZE.max(before.len());
    before.resize(after.len(), 0);
    let pairs = after.chunks(RECORD).zip(before.chunks(RECORD));
    let written = pairs.filter(|(after, before)| after != before).count();
    assert!(written <= 1 && after.len() <= longest, "{written} records, {} bytes", after.len());
    // the next check reads it, and bridges no trouble for longer than --grace
    let recalled = recall();
    let again = recalled.last.clone();
    let millis = |time: Duration| time.as_millis();
    assert_eq!(millis(again.at), millis(record.at));
    assert_eq!(millis(again.lease), millis(record.lease));
    assert_eq!(again.ready.map(millis), record.ready.map(millis));
    assert_eq!(again.trouble.map(millis), record.trouble.map(millis));
    assert_eq!(
        (again.date, again.pause, again.refused),
        (record.date, record.pause, record.refused)
    );
    let (later, _) = decide(&again, now() + grace);
    assert_eq!((later.verdict, later.reason), (alone.verdict, alone.reason));
    drop(recalled);
    // an invalid line changes no record of a check
    let recalled = Memory::open(&path, false).recall(std::slice::from_ref(&patroni), None, None);
    let _ = news::invalid_line_news(recalled, Verdict::Fail);
    assert_eq!(recall().last, again);
    fs::remove_file(&path).expect("no memory file");
}

/// Arguments, separated by NUL.
pub fn options(bytes: &[u8]) {
    let arguments =
        bytes.split(|byte| *byte == 0).map(|argument| OsString::from_vec(argument.to_vec()));
    if let Ok(options) = Options::parse(arguments) {
        assert!(options.policy.grace.as_secs() <= 15);
        assert!((10..=10_000).contains(&options.timeout.as_millis()));
        assert!(
            options.patroni.url.host().is_some() && !options.patroni.connect_to.host.is_empty()
        );
        assert_eq!(
            options.patroni.tls.is_some(),
            options.patroni.url.scheme_str() == Some("https")
        );
    }
}
