//! strace makes each system call of a check fail, one at a time, and kills the process at each. Only a kill, or a call that
//! fails before main, may leave HAProxy without a reply.

use crate::common::{AGENT, FakePatroni, PRIMARY, READY, connection, http};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const STANDBY: &str = r#"{"state": "running", "role": "replica"}"#;
const ERRORS: [&str; 5] = ["EINTR", "EAGAIN", "ENOMEM", "EMFILE", "EIO"];

/// Makes a check under strace, which changes one of its calls. Returns the reply.
fn traced(url: &str, memory: &Path, strace: &[String]) -> String {
    let (mut haproxy, stream) = connection("127.0.0.1:0");
    haproxy.write_all(b"primary\n").expect("a socket");
    // as systemd starts it: the connection is fd 3
    let mut command = Command::new("sh");
    let script = r#"export LISTEN_FDS=1; exec strace "$@" 3<&0 0</dev/null"#;
    command.args(["-c", script, "sh", "-f", "-qq"]).args(strace);
    command.args([AGENT, "--agent-send", "--url", url, "--memory-file"]).arg(memory);
    command.stdin(OwnedFd::from(stream)).stdout(Stdio::null()).stderr(Stdio::null());
    // cargo sets it, which costs the loader a hundred calls
    command.env_remove("LD_LIBRARY_PATH");
    let started = Instant::now();
    let mut child = command.spawn().expect("strace; see tests/install");
    // closes this side's copy of the connection
    drop(command);
    // HAProxy gets a reset if the process ends without reading the line
    let mut reply = Vec::new();
    haproxy.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
    let _ = haproxy.read_to_end(&mut reply);
    child.wait().expect("strace");
    // the deadline is 1.5 s, so a process that takes longer hangs
    assert!(started.elapsed() < Duration::from_secs(15), "{strace:?}: {:?}", started.elapsed());
    String::from_utf8(reply).expect("ASCII")
}

/// A call: its name, its place among those of that name, and whether it belongs to Rust's own start.
type Call = (String, usize, bool);

/// The calls of a healthy check, from Rust's start on. Those of the dynamic loader come before, and do not exist in the
/// static program.
fn calls(trace: &str) -> Vec<Call> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut calls = Vec::new();
    let (mut begun, mut starting) = (false, true);
    for line in trace.lines() {
        let call = line.split_once(' ').and_then(|(_, call)| call.trim_start().split_once('('));
        let Some((name, arguments)) = call else { continue };
        let count = seen.entry(name).or_default();
        *count += 1;
        // the first thing that Rust does, and the first that the agent does
        begun |= name == "poll" && arguments.contains("fd=2");
        starting &= !(begun && arguments.starts_with("3,"));
        if begun && name != "exit_group" {
            calls.push((name.to_owned(), *count, starting));
        }
    }
    calls
}

#[test]
#[ignore = "needs strace: tests/run"]
fn a_system_call_that_fails_leaves_haproxy_a_reply() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (trace, memory) = (folder.join("calls"), folder.join("calls-memory"));
    let trace_of = |patroni: &FakePatroni| {
        let write = ["-o".to_owned(), trace.to_str().expect("UTF-8").to_owned()];
        let reply = traced(&patroni.url(), &memory, &write);
        (reply, calls(&fs::read_to_string(&trace).expect("the trace")))
    };
    let silences = Mutex::new(BTreeMap::<String, Vec<String>>::new());
    for (answer, healthy) in
        [(http(200, PRIMARY), READY), (http(503, STANDBY), "up maint # replica, running\n")]
    {
        let patroni = FakePatroni::answering(answer);
        let _ = fs::remove_file(&memory);
        let (reply, calls) = trace_of(&patroni);
        assert_eq!(reply, healthy);
        assert!(calls.len() > 50, "{calls:?}");
        let faults = ERRORS.map(|error| format!("error={error}"));
        let faults: Vec<_> = faults.into_iter().chain(["signal=KILL".to_owned()]).collect();
        let tries: Vec<_> =
            calls.iter().flat_map(|call| faults.iter().map(move |fault| (call, fault))).collect();
        let attempt = |((name, number, starting), fault): &(&Call, &String)| {
            let inject = format!("inject={name}:{fault}:when={number}");
            let options =
                ["-e".to_owned(), format!("trace={name}"), "-e".to_owned(), inject.clone()];
            let options = [&options[..], &["-o".to_owned(), "/dev/null".to_owned()]].concat();
            let memory = folder.join(format!("calls-memory-{:?}", std::thread::current().id()));
            let _ = fs::remove_file(&memory);
            let reply = traced(&patroni.url(), &memory, &options);
            let one_line = reply.matches('\n').count() == 1 && reply.ends_with('\n');
            assert!(reply.is_empty() || one_line, "{inject}: {reply:?}");
            // the reply says that the memory file cannot be read
            let same = reply.split("; no grace period: ").next().map(str::trim_end);
            let same = same == Some(healthy.trim_end());
            assert!(!reply.starts_with("up ready") || same, "{inject}: {reply}");
            if reply.is_empty() {
                // before main, no code can answer, and nothing answers after a kill
                assert!(*starting || *fault == "signal=KILL", "{inject} silences it");
                let mut silences = silences.lock().expect("no panic");
                silences.entry((*fault).clone()).or_default().push(format!("{name} {number}"));
            }
        };
        std::thread::scope(|scope| {
            for half in tries.chunks(tries.len().div_ceil(2)) {
                scope.spawn(move || half.iter().for_each(attempt));
            }
        });
    }
    let silences = silences.into_inner().expect("no panic");
    println!("no reply at all: {silences:?}");
    assert!(silences.contains_key("signal=KILL"), "strace does nothing");
}
