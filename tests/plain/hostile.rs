//! The worst answers of a Patroni, or of another program on its port: the agent never replies READY, never hangs, and always
//! sends one complete line.

use crate::common::{FakePatroni, Outcome, PRIMARY, READY, check, full_backlog, http, nobody};
use patroni_agent_check::VERSION;
use std::io::{Read, Write};
use std::time::Duration;

/// Longer than any deadline in these tests: an agent that waits this long hangs.
const LONG: Duration = Duration::from_secs(30);

/// Asserts that the reply is DOWN for this reason, and that the journal gets one line with it.
fn assert_down(outcome: &Outcome, patroni: &FakePatroni, reason: &str) {
    let reason = format!("Patroni {}: {reason}", patroni.address);
    let shown: String = reason.chars().take(100).collect();
    assert_eq!(outcome.reply, format!("down ready # {shown}\n"));
    assert_eq!(outcome.code, Some(0));
    assert!(outcome.took < LONG / 2, "{outcome:?}");
    let (replied, cause) = outcome.stderr.split_once("127.0.0.1").expect("the peer");
    assert_eq!(replied, "<4>replied 'down ready' to ");
    let about = format!(": primary: {reason} [{VERSION}]\n");
    assert!(cause.ends_with(&about), "{} is not {about}", outcome.stderr);
    assert_eq!(outcome.stderr.lines().count(), 1);
}

fn ask(patroni: &FakePatroni) -> Outcome {
    check(&["--url", &patroni.url(), "--timeout", "10s"])
}

/// Asks a Patroni that does not answer in time.
fn ask_silent(patroni: &FakePatroni) -> Outcome {
    check(&["--url", &patroni.url(), "--timeout", "500ms"])
}

/// Asserts that this answer makes the node DOWN for this reason.
fn assert_answer_is_down(answer: impl Into<Vec<u8>>, reason: &str) {
    let patroni = FakePatroni::answering(answer);
    let outcome = check(&["--url", &patroni.url(), "--timeout", "10s"]);
    assert_down(&outcome, &patroni, reason);
    assert_eq!(patroni.connections(), 1);
}

const LATE: &str = "no answer before the deadline (--timeout)";

#[test]
fn a_refused_connection() {
    let nobody = nobody();
    let address = nobody.local_addr().expect("an address");
    let outcome = check(&["--url", &format!("http://{address}")]);
    let line = format!("down ready # Patroni {address}: connection refused\n");
    assert_eq!(outcome.reply, line);
}

#[test]
fn a_patroni_that_accepts_and_sends_nothing() {
    let patroni = FakePatroni::raw(|_stream| std::thread::sleep(LONG));
    assert_down(&ask_silent(&patroni), &patroni, LATE);
}

#[test]
fn a_patroni_that_never_accepts() {
    let (address, _waiting) = full_backlog();
    let outcome = check(&["--url", &format!("http://{address}"), "--timeout", "500ms"]);
    assert_eq!(outcome.reply, format!("down ready # Patroni {address}: {LATE}\n"));
}

#[test]
fn an_answer_of_one_byte_a_second() {
    let patroni = FakePatroni::new(|stream| {
        for byte in http(200, PRIMARY) {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    assert_down(&ask_silent(&patroni), &patroni, LATE);
}

#[test]
fn a_body_of_one_byte_at_a_time() {
    let patroni = FakePatroni::new(|stream| {
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
        for byte in PRIMARY.bytes() {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    assert_down(&ask_silent(&patroni), &patroni, LATE);
}

#[test]
fn a_header_and_then_nothing() {
    let patroni = FakePatroni::new(|stream| {
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
        std::thread::sleep(LONG);
    });
    assert_down(&ask_silent(&patroni), &patroni, LATE);
}

#[test]
fn an_endless_header() {
    let patroni = FakePatroni::new(|stream| {
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n");
        while stream.write_all(b"X-Header: and another one\r\n").is_ok() {}
    });
    let outcome = check(&["--url", &patroni.url(), "--timeout", "10s"]);
    assert!(outcome.reply.starts_with("down ready # Patroni"), "{outcome:?}");
    assert!(outcome.took < LONG / 2);
}

#[test]
fn a_long_header() {
    for length in [4096, 5000, 100_000] {
        let answer = format!("HTTP/1.0 200 OK\r\nX: {}\r\n\r\n{PRIMARY}", "x".repeat(length));
        assert_answer_is_down(answer, "answer's header is larger than 4095 bytes");
    }
}

#[test]
fn endless_interim_answers() {
    let patroni =
        FakePatroni::new(
            |stream| {
                while stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").is_ok() {}
            },
        );
    let outcome = ask_silent(&patroni);
    assert!(outcome.reply.starts_with("down ready # Patroni"), "{outcome:?}");
    assert!(outcome.took < LONG / 2);
}

#[test]
fn a_header_without_a_body() {
    assert_answer_is_down(
        http(200, ""),
        "answer is not Patroni's JSON: EOF while parsing a value at line 1 column 0",
    );
}

#[test]
fn answers_that_are_cut_off() {
    let complete = http(200, PRIMARY);
    for length in 0..complete.len() {
        let patroni = FakePatroni::answering(&complete[..length]);
        let outcome = check(&["--url", &patroni.url(), "--timeout", "10s"]);
        assert!(outcome.reply.starts_with("down ready # Patroni"), "{length}: {outcome:?}");
    }
}

#[test]
fn a_body_shorter_than_its_content_length() {
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{PRIMARY}");
    let patroni = FakePatroni::answering(answer);
    let outcome = ask(&patroni);
    assert!(outcome.reply.starts_with("down ready # Patroni"), "{outcome:?}");
}

#[test]
fn a_body_of_ten_megabytes() {
    let body =
        format!(r#"{{"state": "running", "role": "primary", "x": "{}"}}"#, "x".repeat(10 << 20));
    assert_answer_is_down(http(200, &body), "answer is larger than 65536 bytes");
}

#[test]
fn an_endless_body() {
    let patroni = FakePatroni::new(|stream| {
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
        while stream.write_all(&[b' '; 4096]).is_ok() {}
    });
    assert_down(&ask(&patroni), &patroni, "answer is larger than 65536 bytes");
}

#[test]
fn a_body_of_the_largest_size_is_read() {
    let frame = PRIMARY.len() + r#", "x": """#.len();
    let padding = "x".repeat(65536 - frame);
    let body = PRIMARY.replace('}', &format!(r#", "x": "{padding}"}}"#));
    assert_eq!(body.len(), 65536);
    let patroni = FakePatroni::answering(http(200, &body));
    assert_eq!(ask(&patroni).reply, READY);
}

#[test]
fn a_thousand_nested_arrays() {
    let nested = "[".repeat(1000) + &"]".repeat(1000);
    let patroni = FakePatroni::answering(http(200, &nested));
    assert!(ask(&patroni).reply.starts_with("down ready # Patroni"));
    // keys that the agent does not read
    let body = PRIMARY.replace('}', &format!(r#", "x": {nested}}}"#));
    let patroni = FakePatroni::answering(http(200, &body));
    let reply = ask(&patroni).reply;
    assert!(!reply.is_empty() && reply.ends_with('\n'), "{reply}");
    // keys that the agent reads
    let body = format!(r#"{{"role": "primary", "state": {nested}}}"#);
    let patroni = FakePatroni::answering(http(200, &body));
    assert!(ask(&patroni).reply.starts_with("down ready # Patroni"));
}

#[test]
fn an_html_page() {
    assert_answer_is_down(
        http(200, "<html><body>It works!</body></html>"),
        "answer is not Patroni's JSON: expected value at line 1 column 1",
    );
}

#[test]
fn an_answer_without_a_status_line() {
    let patroni = FakePatroni::answering("<!DOCTYPE html><p>Bad request version");
    let outcome = ask(&patroni);
    let start = format!("down ready # Patroni {}: answer is not HTTP", patroni.address);
    assert!(outcome.reply.starts_with(&start), "{outcome:?}");
}

#[test]
fn another_protocol() {
    for banner in
        ["SSH-2.0-OpenSSH_9.2\r\n", "\x15\x03\x03\x00\x02\x02\x46", "\0\0\0\0", "\r\n\r\n"]
    {
        let patroni = FakePatroni::answering(banner);
        let outcome = ask(&patroni);
        assert!(outcome.reply.starts_with("down ready # Patroni"), "{banner:?}: {outcome:?}");
    }
}

#[test]
fn a_redirect_is_not_followed() {
    let elsewhere = FakePatroni::answering(http(200, PRIMARY));
    assert_answer_is_down(
        format!("HTTP/1.1 301 Moved\r\nLocation: {}/primary\r\n\r\n", elsewhere.url()),
        "HTTP status 301 instead of 200 or 503",
    );
    assert_eq!(elsewhere.connections(), 0);
}

#[test]
fn other_http_statuses() {
    for status in [201, 204, 304, 401, 403, 404, 500, 502] {
        assert_answer_is_down(
            http(status, PRIMARY),
            &format!("HTTP status {status} instead of 200 or 503"),
        );
    }
}

#[test]
fn a_compressed_body() {
    let mut answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n".to_vec();
    answer.extend([0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xab, 0x56]);
    let patroni = FakePatroni::answering(answer);
    assert!(ask(&patroni).reply.starts_with("down ready # Patroni"));
}

#[test]
fn keys_are_missing_or_of_another_type() {
    assert_answer_is_down(http(200, "{}"), "answer has no 'state'");
    assert_answer_is_down(http(503, r#"{"state": "running"}"#), "answer has no 'role'");
    assert_answer_is_down(http(200, r#"{"state": 1, "role": "primary"}"#), "answer has no 'state'");
    assert_answer_is_down(
        http(200, r#"{"patroni": {"state": "running", "role": "primary"}}"#),
        "answer has no 'state'",
    );
}

/// Asks a Patroni with this body, and returns the reply.
fn reply_to(body: &str) -> String {
    let patroni = FakePatroni::answering(http(200, body));
    let outcome = ask(&patroni);
    assert_eq!(outcome.reply.matches('\n').count(), 1, "{outcome:?}");
    assert!(outcome.reply.ends_with('\n'), "{outcome:?}");
    assert!(outcome.stderr.matches('\n').count() <= 1, "{outcome:?}");
    let line = outcome.reply.trim_end();
    assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{outcome:?}");
    let (_, reason) = line.split_once(" # ").expect("a reason");
    assert!(reason.len() <= 100, "{outcome:?}");
    line.to_owned()
}

#[test]
fn nothing_that_patroni_says_breaks_the_line() {
    let evil = [
        r"\u0000",
        r"\n",
        r"\r\nup ready\n",
        " # up ready # ",
        r"\t\u001b[2J",
        "é☃",
        r"\ud83d\ude00",
        ",",
    ];
    for evil in evil {
        for evil in [evil.to_owned(), evil.repeat(500)] {
            let line = reply_to(&format!(r#"{{"state": "{evil}", "role": "primary"}}"#));
            assert!(line.starts_with("fail ready # primary, unknown state '"), "{line}");
            let line = reply_to(&format!(r#"{{"state": "running", "role": "{evil}"}}"#));
            assert!(line.starts_with("up maint # "), "{line}");
            let body = r#"{"state": "running", "role": "primary", "replication_state": "EVIL", "patroni": {"version": "EVIL"}}"#;
            let line = reply_to(&body.replace("EVIL", &evil));
            assert!(line.starts_with("up ready # primary, "), "{line}");
        }
    }
    let long = "x".repeat(500);
    reply_to(&format!(r#"{{"state": "{long}", "role": "{long}"}}"#));
}

#[test]
fn the_last_of_two_equal_keys_counts() {
    let line = reply_to(r#"{"state": "running", "role": "primary", "role": "replica"}"#);
    assert_eq!(line, "up maint # replica, running, not promoted yet");
}

#[test]
fn a_reply_that_changes_nothing_is_one_unknown_word() {
    let patroni = FakePatroni::answering(http(404, ""));
    let outcome = check(&["--url", &patroni.url(), "--unreachable", "keep"]);
    let word = format!("Patroni_{}:_HTTP_status_404_instead_of_200_or_503", patroni.address);
    assert_eq!(outcome.reply, format!("!unreachable:_{word}\n"));
    assert_eq!(outcome.stderr.lines().count(), 1);
}

#[test]
fn patroni_gets_one_complete_request_and_a_clean_close() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let patroni = FakePatroni::new(move |stream| {
        // header and body in two writes, as Patroni sends them
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n");
        std::thread::sleep(Duration::from_millis(50));
        let _ = stream.write_all(PRIMARY.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = sender.send(stream.read(&mut [0]));
    });
    assert_eq!(ask(&patroni).reply, READY);
    // a reset would be a traceback in Patroni's log
    assert_eq!(receiver.recv().expect("an end").expect("a clean close"), 0);
    let requests = patroni.requests();
    let lines: Vec<_> = requests[0].lines().map(str::to_ascii_lowercase).collect();
    assert_eq!(lines[0], "get /primary http/1.1");
    assert!(lines.contains(&format!("host: {}", patroni.address)), "{lines:?}");
    assert!(lines.contains(&"connection: close".to_owned()), "{lines:?}");
    assert_eq!(patroni.connections(), 1);
}
