//! A primary that Patroni stops: how long the node drains, the hook that Patroni runs before the stop, and the hook's note.

use crate::common::{
    self, FakePatroni, Outcome, PRIMARY, READY, Start, check, check_with, http, path_in,
};
use patroni_agent_check::clock::now as clock;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, Permissions};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

const HOOK: &str = env!("CARGO_BIN_EXE_patroni-before-stop");
const STANDBY: &str = r#"{"state": "running", "role": "replica"}"#;

/// The answer of a Patroni that stops its primary, and saw the DCS this many seconds ago.
fn stopping(seen: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs();
    format!(r#"{{"state": "stopping", "role": "primary", "dcs_last_seen": {}}}"#, now - seen)
}

/// A node's files, and a psql that runs the test's script.
struct Node {
    folder: TempDir,
}

impl Node {
    fn new(name: &str) -> Node {
        let node = Node { folder: common::folder(name) };
        fs::write(node.file("note"), "").expect("written");
        node.psql("true");
        node
    }

    fn file(&self, name: &str) -> String {
        path_in(&self.folder, name)
    }

    fn psql(&self, script: &str) {
        let file = self.file("psql");
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&file, Permissions::from_mode(0o755)).expect("a program");
    }

    fn agent_options(&self, url: &str) -> [String; 6] {
        let (memory, note) = (self.file("memory"), self.file("note"));
        ["--url", url, "--memory-file", &memory, "--before-stop-file", &note].map(str::to_owned)
    }

    fn run_check(&self, url: &str, more: &[&str]) -> Outcome {
        let options = self.agent_options(url);
        check(&[&options.each_ref().map(String::as_str), more].concat())
    }

    fn hook(&self, url: &str, own: &[&str]) -> Child {
        self.hook_with(&self.agent_options(url).each_ref().map(String::as_str), own)
    }

    fn hook_with(&self, agent: &[&str], own: &[&str]) -> Child {
        let path = format!("{}:/usr/bin:/bin", self.folder.path().display());
        let mut command = Command::new(HOOK);
        command.args(own).arg("--").args(agent).env("PATH", path);
        command.stderr(Stdio::piped()).stdin(Stdio::null()).spawn().expect("the hook starts")
    }

    /// Returns how long the hook took, its stderr and its exit status.
    fn run_hook(&self, url: &str, own: &[&str]) -> (Duration, String, Option<i32>) {
        self.run_hook_with(&self.agent_options(url).each_ref().map(String::as_str), own)
    }

    fn run_hook_with(&self, agent: &[&str], own: &[&str]) -> (Duration, String, Option<i32>) {
        let began = Instant::now();
        let output = self.hook_with(agent, own).wait_with_output().expect("the hook ends");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (began.elapsed(), said, output.status.code())
    }
}

/// A fake Patroni with these answers to /primary, and with Patroni's default settings at /config.
fn patroni(primary: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> FakePatroni {
    FakePatroni::on("127.0.0.1:0", move |mut stream, _| {
        let request = common::read_request(&mut stream);
        if request.starts_with("GET /config ") {
            let _ = stream
                .write_all(&http(200, r#"{"ttl": 30, "loop_wait": 10, "retry_timeout": 10}"#));
        } else {
            assert!(!request.starts_with("GET /cluster"), "it would renew dcs_last_seen");
            primary(&mut stream);
        }
    })
}

fn patroni_that_says(
    status: u16,
    body: impl Fn() -> String + Send + Sync + 'static,
) -> FakePatroni {
    patroni(move |stream| {
        let _ = stream.write_all(&http(status, &body()));
    })
}

/// An address on which nobody listens. No other test uses it: they use ports of 127.0.0.1 that the kernel chooses.
fn unused_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    format!("127.56.0.1:{}", listener.local_addr().expect("an address").port())
}

/// Answers one question on that address, on which nobody listens afterwards.
fn answer_once(address: &str, body: &'static str) -> JoinHandle<()> {
    let listener = TcpListener::bind(address).expect("a free address");
    spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        common::read_request(&mut stream);
        let _ = stream.write_all(&http(200, body));
    })
}

const SECOND: Duration = Duration::from_secs(1);
const LONG: [&str; 4] = ["--agent-inter", "100ms", "--bound", "20s"];

#[test]
fn a_primary_that_stops_drains_from_its_first_answer_on() {
    let (node, patroni) = (Node::new("drains"), patroni_that_says(200, || stopping(1)));
    let run_check = |more: &[&str]| node.run_check(&patroni.url(), more).reply;
    assert_eq!(run_check(&[]), "up drain # primary, stopping\n");
    assert_eq!(run_check(&["--stopping", "maint"]), "up maint # primary, stopping\n");
    assert_eq!(run_check(&["read-only"]), "up maint # primary, stopping\n");
    let began = Instant::now();
    while run_check(&[]) == "up drain # primary, stopping\n" {
        assert!(began.elapsed() < 20 * SECOND);
        sleep(Duration::from_millis(100));
    }
    assert!(began.elapsed() > 9 * SECOND, "{:?}", began.elapsed());
    assert_eq!(run_check(&[]), "up maint # primary, stopping\n");
}

/// No check would know when the drain began.
#[test]
fn without_a_memory_nothing_drains() {
    let (node, patroni) = (Node::new("forgets"), patroni_that_says(200, || stopping(1)));
    fs::write(node.file("foreign"), "not ours\n").expect("written");
    for file in ["/dev/null", &node.file("foreign"), "/nonexistent/memory"] {
        let reply = node.run_check(&patroni.url(), &["--memory-file", file]).reply;
        assert!(reply.starts_with("up maint # primary, stopping"), "{file}: {reply}");
    }
}

#[test]
fn a_note_drains_a_node_whose_patroni_is_silent() {
    let (node, address) = (Node::new("note"), unused_address());
    let url = format!("http://{address}");
    let note = |text: &str| fs::write(node.file("note"), text).expect("written");
    let now = || clock().as_millis();
    let drains = format!("up drain # PostgreSQL is about to stop: Patroni {address}");
    let grace = ["--grace", "15s"];
    let answer = answer_once(&address, PRIMARY);
    // an answer counts more than a note that was left behind
    note(&now().to_string());
    assert_eq!(node.run_check(&url, &grace).reply, READY);
    answer.join().expect("one answer");
    note(&format!("{:020}\n", now()));
    assert!(node.run_check(&url, &grace).reply.starts_with(&drains));
    assert!(
        node.run_check(&url, &["--grace", "15s", "--stopping", "maint"]).reply.starts_with("!")
    );
    // after the grace period
    let expected = drains.replace("up drain", "up maint");
    assert!(node.run_check(&url, &["--grace", "0"]).reply.starts_with(&expected));
    for text in [
        (now() - 10_000).to_string(),
        (now() + 60_000).to_string(),
        String::new(),
        "x".repeat(9_999),
        "-1".to_owned(),
        u128::MAX.to_string(),
    ] {
        note(&text);
        let reply = node.run_check(&url, &grace).reply;
        assert!(reply.starts_with("!unreachable:_held_"), "{text}: {reply}");
    }
    // a check that begins before the note, and one that would tell HAProxy too late
    let silent = TcpListener::bind(&address).expect("a free address");
    for before in [true, false] {
        note(&if before { String::new() } else { now().to_string() });
        let late = spawn({
            let file = node.file("note");
            move || {
                sleep(SECOND);
                fs::write(file, clock().as_millis().to_string()).expect("written");
            }
        });
        let outcome = node.run_check(&url, &["--grace", "15s", "--timeout", "9s"]);
        assert!(outcome.reply.starts_with(&drains), "{before}: {outcome:?}");
        assert!(outcome.took < 6 * SECOND, "{outcome:?}");
        late.join().expect("a note");
    }
    drop(silent);
    fs::remove_file(node.file("note")).expect("removed");
    assert!(node.run_check(&url, &grace).reply.starts_with("!unreachable:_held_"));
}

#[test]
fn the_hook_waits_for_haproxy_and_then_for_transactions() {
    let (node, patroni) = (Node::new("waits"), patroni_that_says(200, || stopping(1)));
    let (took, said, code) =
        node.run_hook(&patroni.url(), &["--agent-inter", "300ms", "--bound", "20s"]);
    assert_eq!((said.as_str(), code), ("", Some(0)));
    assert!(took > Duration::from_millis(500), "an agent-inter and a check: {took:?}");
    let note = fs::read_to_string(node.file("note")).expect("a note");
    let noted: u128 = note.trim().parse().expect("milliseconds");
    assert!(clock().as_millis() - noted < 20_000);
    node.psql("sleep 1");
    let (longer, said, _) =
        node.run_hook(&patroni.url(), &["--agent-inter", "300ms", "--bound", "20s"]);
    assert!(longer > took.max(Duration::from_millis(1500)), "{longer:?}: {said}");
}

/// Each of these ends the hook long before its `--bound` of 20 s.
#[test]
fn the_hook_ends_at_the_first_bound_that_is_reached() {
    let node = Node::new("bounds");
    node.psql("exec sleep 30");
    let third = |status: u16, body: fn() -> String| {
        let asked = AtomicUsize::new(0);
        patroni(move |stream| {
            let good = asked.fetch_add(1, Ordering::SeqCst) < 2;
            let _ = match good {
                true => stream.write_all(&http(200, &stopping(1))),
                false if status == 0 => Ok(()),
                false => stream.write_all(&http(status, &body())),
            };
        })
    };
    for (why, patroni) in [
        ("Patroni answers 503 to /primary", third(503, || stopping(1))),
        ("Patroni answers 503 to /primary", third(503, || STANDBY.to_owned())),
        ("", third(0, String::new)),
        // the lock may be gone: 30 s less 10, 10, 2 and the age of `dcs_last_seen`
        ("the time is over", third(200, || stopping(8))),
        ("the time is over", patroni_that_says(200, || stopping(8))),
        ("the time is over", patroni_that_says(200, || stopping(1000))),
        ("Patroni answers 503 to /primary", patroni_that_says(503, || stopping(1))),
    ] {
        let (took, said, _) = node.run_hook(&patroni.url(), &LONG);
        assert!(
            took < 10 * SECOND && said.contains(why) && said.contains("after"),
            "{took:?}: {said}"
        );
    }
    // the age shortens the time
    let (took, said, _) = node.run_hook(&patroni_that_says(200, || stopping(5)).url(), &LONG);
    assert!(
        took < 6 * SECOND && took > SECOND && said.contains("the time is over"),
        "{took:?}: {said}"
    );
    // `--bound`
    let short = ["--agent-inter", "100ms", "--bound", "1s"];
    let (took, said, _) = node.run_hook(&patroni_that_says(200, || stopping(0)).url(), &short);
    assert!(took >= SECOND && took < 8 * SECOND, "{took:?}: {said}");
    // a Patroni that hangs before any check has left a record, and a Patroni that hangs later
    let (took, said, _) = node.run_hook(&patroni(|_| sleep(30 * SECOND)).url(), &LONG);
    assert!(took < 8 * SECOND && said.contains("no check of a write pool"), "{took:?}: {said}");
    let asked = AtomicUsize::new(0);
    let hangs = patroni(move |stream| match asked.fetch_add(1, Ordering::SeqCst) {
        0 => drop(stream.write_all(&http(200, &stopping(0)))),
        _ => sleep(30 * SECOND),
    });
    let (took, said, _) = node.run_hook(&hangs.url(), &short);
    assert!(took >= SECOND && took < 8 * SECOND, "{took:?}: {said}");
    // a psql that fails or is missing
    let patroni = patroni_that_says(200, || stopping(0));
    node.psql("exit 2");
    let (took, said, code) = node.run_hook(&patroni.url(), &LONG);
    assert!(
        took < 8 * SECOND && said.contains("psql: exit status: 2") && code == Some(1),
        "{said}"
    );
}

#[test]
fn the_hook_runs_once_at_a_time_and_ends_at_sigterm() {
    let (node, patroni) = (Node::new("once"), patroni_that_says(200, || stopping(0)));
    node.psql("exec sleep 30");
    let mut first = node.hook(&patroni.url(), &LONG);
    let end = Instant::now() + 10 * SECOND;
    while fs::read_to_string(node.file("note")).expect("a file").is_empty() {
        assert!(Instant::now() < end);
        sleep(Duration::from_millis(5));
    }
    let (_, said, code) = node.run_hook(&patroni.url(), &LONG);
    assert!(said.contains("another hook is running") && code == Some(1), "{said}");
    kill_process(Pid::from_child(&first), Signal::TERM).expect("a signal");
    let began = Instant::now();
    assert_eq!(first.wait().expect("the hook ends").signal(), Some(15));
    assert!(began.elapsed() < SECOND);
}

#[test]
fn on_a_standby_the_hook_waits_for_the_read_pool_and_for_nothing_else() {
    let (node, patroni) = (Node::new("standby"), patroni_that_says(503, || STANDBY.to_owned()));
    node.psql("exec sleep 30");
    let read = ["--read-agent-inter", "800ms", "--bound", "100ms"];
    let (took, said, code) = node.run_hook(&patroni.url(), &read);
    assert_eq!((said.as_str(), code), ("", Some(0)));
    assert!(took > SECOND && took < 8 * SECOND, "{took:?}");
}

/// When Patroni's own service stops, Patroni closes its REST API first. The records of the checks then bound the hook.
#[test]
fn the_hook_of_a_patroni_that_is_away_waits_for_the_grace_period() {
    let (node, address) = (Node::new("away"), unused_address());
    let url = format!("http://{address}");
    let (took, said, code) = node.run_hook(&url, &LONG);
    assert!(took < 8 * SECOND && code == Some(1), "{took:?}");
    assert!(said.contains("no check of a write pool"), "{said}");
    let answer = answer_once(&address, PRIMARY);
    assert_eq!(node.run_check(&url, &[]).reply, READY);
    answer.join().expect("one answer");
    node.psql("exec sleep 30");
    // the grace period of 3 s counts from that answer
    let (took, said, _) = node.run_hook(&url, &LONG);
    assert!(took < 4 * SECOND && said.contains("the time is over"), "{took:?}: {said}");
}

/// HAProxy asks on the node's address, on which Patroni listens. The hook has to find that address itself.
#[test]
fn the_hook_finds_the_records_of_the_nodes_address() {
    if !common::in_network("before_stop::the_hook_finds_the_records_of_the_nodes_address") {
        return;
    }
    let node = Node::new("found");
    let options = node.agent_options("");
    let answer = answer_once("10.1.0.1:8008", PRIMARY);
    let options = options[2..].iter().map(String::as_str).collect::<Vec<_>>();
    let reply = check_with(Start::ListenFds, "10.1.0.1:0", &options, common::listen).reply;
    assert_eq!(reply, READY);
    answer.join().expect("one answer");
    node.psql("exec sleep 30");
    let (took, said, _) = node.run_hook_with(&options, &LONG);
    assert!(took < 4 * SECOND && said.contains("the time is over"), "{took:?}: {said}");
}

#[test]
fn the_hook_names_a_wrong_argument() {
    let node = Node::new("wrong");
    for (own, error) in [
        (["--bound", "2"], "'2': write 0ms to 60s"),
        (["--bound", "61s"], "'61s': write 0ms to 60s"),
        (["--nothing", "1s"], "--nothing"),
    ] {
        let (_, said, code) = node.run_hook("http://127.0.0.1:1", &own);
        assert!(said.contains(error) && code == Some(1), "{said}");
    }
    let (_, said, code) = node.run_hook_with(&["--grase", "4s"], &[]);
    let wrong = "patroni-before-stop: patroni-agent-check: invalid option '--grase'; see --help";
    assert!(said.starts_with(wrong) && code == Some(1), "{said}");
}

#[test]
fn the_hook_names_a_file_that_it_cannot_read() {
    let node = Node::new("unread");
    let options = node.agent_options("https://127.0.0.1:1");
    let mut options: Vec<_> = options.iter().map(String::as_str).collect();
    let file = node.file("no.pem");
    options.extend(["--cacert", &file]);
    let (_, said, code) = node.run_hook_with(&options, &[]);
    assert!(said.contains(&file) && code == Some(1), "{said}");
}

#[test]
fn without_its_file_the_hook_covers_what_patroni_announces() {
    let (node, patroni) = (Node::new("no-note"), patroni_that_says(200, || stopping(0)));
    fs::remove_file(node.file("note")).expect("removed");
    let (took, said, code) =
        node.run_hook(&patroni.url(), &["--agent-inter", "300ms", "--bound", "20s"]);
    assert!(took > Duration::from_millis(500), "{took:?}");
    assert_eq!((said.as_str(), code), ("", Some(0)));
    // HAProxy is not told of a stop that Patroni does not announce
    let address = unused_address();
    let answer = answer_once(&address, PRIMARY);
    assert_eq!(node.run_check(&format!("http://{address}"), &[]).reply, READY);
    answer.join().expect("one answer");
    let (_, said, code) = node.run_hook(&format!("http://{address}"), &LONG);
    assert!(said.contains("belong to Patroni's user") && code == Some(1), "{said}");
}
