//! Patroni's answer, or why there is none. In goes the body, out come its keys. Knows nothing of what an answer means.

use crate::file;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::time::{SystemTime, UNIX_EPOCH};

/// Patroni's answer: top-level keys only. The body is the same with 200 and with 503.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status, 200 or 503.
    pub status: u16,
    /// PostgreSQL's state as Patroni sees it.
    pub state: String,
    /// The node's role as Patroni sees it.
    pub role: String,
    /// `streaming`, `in archive recovery` or nothing.
    pub replication_state: Option<String>,
    /// A replica does not report its `replication_state` because Patroni is older than 3.0.4.
    pub predates_replication_state: bool,
    /// PostgreSQL's timeline, if PostgreSQL answers Patroni.
    pub timeline: Option<u64>,
    /// Patroni's tag that takes a standby out of load balancing.
    pub noloadbalance: bool,
    /// The cluster is paused.
    pub pause: bool,
    /// Patroni sees no leader lock in the DCS: it is in failsafe mode or paused, or the lock has just run out.
    pub cluster_unlocked: bool,
    /// When Patroni last read the cluster from the DCS, in seconds since 1970 (since Patroni 2.1.2).
    pub dcs_last_seen: Option<u32>,
    /// When Patroni answered, by its own clock, in seconds since 1970.
    pub date: u32,
}

/// Why there is no usable answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoAnswer {
    /// The cause, on which the decision depends.
    pub cause: Cause,
    /// What failed and how, with a hint if there is one.
    pub reason: String,
}

/// What kept Patroni from answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nobody listens: Patroni does not run, or not yet.
    Refused,
    /// This machine kept the agent from asking, which says nothing about Patroni.
    NotAsked,
    /// Anything else, such as a silent Patroni, an answer that is not valid, or a certificate that cannot be read.
    Failed,
}

impl Cause {
    /// The cause of an error of the operating system. A lack of ports, descriptors or memory may soon be over.
    pub fn of(error: &io::Error) -> Cause {
        match error.raw_os_error() {
            _ if file::is_shortage(error) => Cause::NotAsked,
            Some(libc::EADDRNOTAVAIL | libc::ENOBUFS) => Cause::NotAsked,
            _ if error.kind() == ErrorKind::ConnectionRefused => Cause::Refused,
            _ => Cause::Failed,
        }
    }

    /// The cause if none of several addresses answered. One that refuses may be Patroni's, so it counts.
    pub fn of_all(causes: &[Cause]) -> Cause {
        match causes {
            [first, rest @ ..] if rest.iter().all(|cause| cause == first) => *first,
            causes if causes.contains(&Cause::Refused) => Cause::Refused,
            _ => Cause::Failed,
        }
    }
}

impl From<String> for NoAnswer {
    fn from(reason: String) -> NoAnswer {
        NoAnswer { cause: Cause::Failed, reason }
    }
}

/// Converts a time to seconds since 1970.
pub fn seconds(time: SystemTime) -> u32 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
}

/// Reads the body, which must be a JSON object with a `state` and a `role`. Another key of an unexpected type counts as
/// absent.
pub fn read(status: u16, body: &[u8]) -> Result<Answer, String> {
    let keys: Keys = serde_json::from_slice(body)
        .map_err(|error| format!("answer is not Patroni's JSON: {error}"))?;
    let string = |key: &str| serde_json::from_str::<String>(keys.get(key)?.get()).ok();
    let is_true = |keys: &Keys, key: &str| keys.get(key).is_some_and(|value| value.get() == "true");
    let required = |key: &str| string(key).ok_or(format!("answer has no '{key}'"));
    let (state, role) = (required("state")?, required("role")?);
    let replication_state = string("replication_state");
    let is_missing = role == "replica" && replication_state.is_none();
    Ok(Answer {
        status,
        state,
        predates_replication_state: is_missing
            && version(&keys).is_some_and(|version| version < [3, 0, 4]),
        role,
        replication_state,
        timeline: keys.get("timeline").and_then(|timeline| timeline.get().parse().ok()),
        noloadbalance: object(&keys, "tags").is_some_and(|tags| is_true(&tags, "noloadbalance")),
        pause: is_true(&keys, "pause"),
        cluster_unlocked: is_true(&keys, "cluster_unlocked"),
        dcs_last_seen: keys.get("dcs_last_seen").and_then(|seen| seen.get().parse().ok()),
        date: seconds(SystemTime::now()),
    })
}

/// A JSON object.
type Keys<'a> = BTreeMap<String, &'a RawValue>;

fn object<'a>(keys: &Keys<'a>, key: &str) -> Option<Keys<'a>> {
    serde_json::from_str(keys.get(key)?.get()).ok()
}

/// Patroni's version; a part that is no number counts as 0.
fn version(keys: &Keys) -> Option<[u32; 3]> {
    let text: String = serde_json::from_str(object(keys, "patroni")?.get("version")?.get()).ok()?;
    let mut numbers = text.split('.').map(|number| number.parse().unwrap_or(0));
    Some([(); 3].map(|()| numbers.next().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn true_keys_and_the_date_are_read() {
        let body = br#"{"state": "running", "role": "replica", "pause": true,
            "cluster_unlocked": false, "tags": {"noloadbalance": true}}"#;
        let answer = read(200, body).expect("an answer");
        assert!(answer.pause && !answer.cluster_unlocked && answer.noloadbalance);
        assert!(answer.date > 1_700_000_000, "seconds since 1970");
    }

    #[test]
    fn only_top_level_keys_count() {
        let body =
            br#"{"replication": [{"state": "streaming", "role": "primary"}], "role": "replica"}"#;
        assert_eq!(read(200, body), Err("answer has no 'state'".to_owned()));
    }

    #[test]
    fn keys_of_unexpected_types_count_as_absent() {
        let body = br#"{"state": "running", "role": "primary", "timeline": "5", "tags": [1],
            "replication_state": {"a": null}, "xlog": 3, "server_version": {}, "patroni": []}"#;
        let answer = read(200, body).expect("an answer");
        assert_eq!((answer.timeline, answer.noloadbalance), (None, false));
        assert_eq!(answer.replication_state, None);
    }

    #[test]
    fn only_a_version_before_3_0_4_counts_as_old() {
        for (version, old) in [
            (r#""3.0.3""#, true),
            (r#""1.6.5""#, true),
            (r#""2.1""#, true),
            (r#""3.0.4""#, false),
            (r#""3.1.0rc1""#, false),
            (r#""10.0.0""#, false),
            ("3", false),
        ] {
            let body = format!(
                r#"{{"state": "running", "role": "replica", "patroni": {{"version": {version}}}}}"#
            );
            let answer = read(200, body.as_bytes()).expect("an answer");
            assert_eq!(answer.predates_replication_state, old, "{version}");
        }
    }

    #[test]
    fn a_body_without_a_state_and_a_role_is_no_answer() {
        for body in [
            r#"{"state": ["running"], "role": "primary"}"#,
            r#"{"state": "running", "role": null}"#,
            r#"{"state": "running", "role": "primary"} x"#,
            r#"{"state": "running", "role": "primary""#,
            r#"["running", "primary"]"#,
            "",
        ] {
            assert!(read(200, body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn one_of_several_addresses_that_refuses_counts() {
        use Cause::{Failed, NotAsked, Refused};
        for (causes, cause) in [
            (&[][..], Failed),
            (&[NotAsked], NotAsked),
            (&[NotAsked, NotAsked], NotAsked),
            (&[Failed, NotAsked], Failed),
            (&[Failed, Refused], Refused),
            (&[Refused, NotAsked, Refused], Refused),
        ] {
            assert_eq!(Cause::of_all(causes), cause, "{causes:?}");
        }
    }
}
