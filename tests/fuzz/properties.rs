//! What must hold for any bytes at all: used by the fuzz targets, and by
//! tests/plain/properties.rs on the recorded answers and what a fixed series of changes makes of them.

use patroni_agent_check::check::Check;
use patroni_agent_check::decide::{Policy, Times, Unreachable, decide};
use patroni_agent_check::memory::Record;
use patroni_agent_check::options::Options;
use patroni_agent_check::patroni::{self, NoAnswer};
use patroni_agent_check::question::Question;
use patroni_agent_check::reply::{self, Otherwise, Reply, Verdict};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

/// A check that was understood asks for a plain path, and means the same when it is read again.
fn plain(check: &Check) {
    let path = check.path();
    assert!(path.starts_with('/') && path.len() < 2 + 256, "{path}");
    assert!(
        path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#' && byte != b'%'),
        "{path}"
    );
    let text = check.to_string();
    assert_eq!(&text.parse::<Check>().expect("the same check"), check);
}

/// The line that HAProxy sends.
pub fn agent_send(line: &[u8]) {
    let line = &line[..line.len().min(256)];
    match Question::from_agent_send(line, Otherwise::Maint) {
        Ok(question) => plain(&question.check),
        Err(error) => assert!(error.starts_with("agent-send line: ")),
    }
}

/// What HAProxy makes of a line: its health and admin words. It splits at blanks, tabs and commas,
/// and stops at a word that starts with `#` (its manual, "agent-check").
fn words(line: &str) -> Vec<&str> {
    let line = line.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains(['\n', '\r', '\0']), "{line:?}");
    let words = line.split([' ', '\t', ',']).filter(|word| !word.is_empty());
    words.take_while(|word| !word.starts_with('#')).collect()
}

/// Any reason with any verdict.
pub fn reply(bytes: &[u8]) {
    let (first, reason) = bytes.split_first().unwrap_or((&0, &[]));
    let all = [
        (Verdict::Ready, "up ready"),
        (Verdict::Out(Otherwise::Maint), "up maint"),
        (Verdict::Out(Otherwise::Drain), "up drain"),
        (Verdict::Out(Otherwise::Down), "down ready"),
        (Verdict::Fail, "fail ready"),
        (Verdict::Unasked, "fail ready"),
        (Verdict::Stopped, "stopped ready"),
        (Verdict::Down, "down ready"),
        (Verdict::Keep, "!"),
    ];
    let (verdict, expected) = all[usize::from(*first) % all.len()];
    let reason = String::from_utf8_lossy(reason).into_owned();
    let line = reply::line(&Reply { verdict, check: String::new(), reason });
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

/// Any body with either status, for each kind of check: READY only for a running node that fits.
pub fn answer(bytes: &[u8]) {
    let (first, body) = bytes.split_first().unwrap_or((&0, &[]));
    let status = if first % 2 == 0 { 200 } else { 503 };
    let answer =
        patroni::answer(status, body).map_err(|reason| NoAnswer { refused: false, reason });
    let policy = Policy { unreachable: Unreachable::Down, grace: Duration::from_secs(3) };
    let times = Times { asked: Duration::from_secs(100), answered: Duration::from_secs(101) };
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
        let (reply, left) = decide(&question, policy, &answer, None, &Record::default(), times);
        // only a healthy node is bridged, and with no more than was asked for
        let healthy = answer.as_ref().is_ok_and(|answer| answer.state == "running");
        assert!(left.lease.is_zero() || healthy);
        assert_eq!(words(&reply::line(&reply)).len(), 2);
        match &answer {
            Ok(answer) if answer.status == 200 && answer.state == "running" => {}
            _ => assert_ne!(reply.verdict, Verdict::Ready),
        }
        if let Ok(answer) = &answer {
            let fits = question.check.fits(&answer.role);
            assert!(fits || reply.verdict != Verdict::Ready);
        }
    }
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
