//! The grace period and the memory file, with the program started behind a socket.

use crate::common::{self, Outcome, PRIMARY, READY, Start, check, check_with, http, read_request};
use patroni_agent_check::VERSION;
use std::fs::{self, Permissions};
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const STANDBY: &str = r#"{"state": "running", "role": "replica"}"#;
const HELD: &str = "!unreachable:_held_";

/// An address at which Patroni may answer, and a folder with the memory file.
struct Site {
    folder: TempDir,
    address: String,
}

/// A Patroni that answers every question with the same bytes until it is dropped, and then refuses connections.
struct Patroni {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Site {
    fn new(name: &str) -> Site {
        // no other test uses this address: they use ports that the kernel chooses
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        Site { folder: common::folder(name), address: format!("127.55.0.1:{port}") }
    }

    fn memory(&self) -> String {
        common::path_in(&self.folder, "memory")
    }

    fn start_patroni(&self, status: u16, body: &str) -> Patroni {
        let answer = http(status, body);
        // a process that another test is just starting may still have the socket
        let end = Instant::now() + Duration::from_secs(5);
        let listener = loop {
            match TcpListener::bind(&self.address) {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < end, "{}: {error}", self.address),
            }
        };
        listener.set_nonblocking(true).expect("a socket");
        let over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let over = over.clone();
            move || {
                while !over.load(Ordering::SeqCst) {
                    let Ok((mut stream, _)) = listener.accept() else {
                        sleep(Duration::from_millis(1));
                        continue;
                    };
                    stream.set_nonblocking(false).expect("a socket");
                    read_request(&mut stream);
                    let _ = stream.write_all(&answer);
                }
            }
        });
        Patroni { over, thread: Some(thread) }
    }

    fn arguments<'a>(&'a self, url: &'a str, memory: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        // --grace is longer than a test takes on a busy machine, unless the test waits for its end
        [&["--url", url, "--memory-file", memory, "--grace", "15s"], more].concat()
    }

    fn run_check(&self, more: &[&str]) -> Outcome {
        let (url, memory) = (format!("http://{}", self.address), self.memory());
        check(&self.arguments(&url, &memory, more))
    }

    /// Lets Patroni answer one check, after which nobody listens.
    fn answer_once(&self, status: u16, body: &str) -> String {
        let _patroni = self.start_patroni(status, body);
        self.run_check(&[]).reply
    }
}

impl Drop for Patroni {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let _ = self.thread.take().expect("a thread").join();
    }
}

#[test]
fn trouble_is_bridged_for_the_grace_period_and_then_it_is_down() {
    for (name, status, body) in [("primary", 200, PRIMARY), ("standby", 503, STANDBY)] {
        let site = Site::new(name);
        let refused = format!("down ready # Patroni {}: connection refused\n", site.address);
        assert_eq!(site.run_check(&[]).reply, refused, "no good answer yet");
        let before = Instant::now();
        site.answer_once(status, body);
        let short = ["--grace", "1500ms"];
        let reply = site.run_check(&[]).reply;
        assert!(reply.starts_with(HELD), "{reply}");
        let end = format!("_of_15_s:_Patroni_{}:_connection_refused\n", site.address);
        assert!(reply.ends_with(&end), "{reply}");
        // the passed time is counted from the good answer, and bridging does not renew it
        loop {
            let asked = before.elapsed();
            let reply = site.run_check(&short).reply;
            if reply == refused {
                assert!(before.elapsed() > Duration::from_millis(1500));
                break;
            }
            assert!(reply.starts_with(HELD) && asked < Duration::from_secs(10), "{reply}");
        }
        assert_eq!(site.run_check(&["--grace", "0"]).reply, refused);
        // another check, which has no record
        assert_eq!(site.run_check(&["read-only"]).reply, refused);
    }
}

/// Each way to start the agent leaves and finds the same record.
#[test]
fn the_memory_file_works_however_the_agent_is_started() {
    let site = Site::new("started");
    let (url, memory) = (format!("http://{}", site.address), site.memory());
    let arguments = site.arguments(&url, &memory, &[]);
    for how in [Start::ListenFds, Start::Stdin, Start::Inetd] {
        let _ = fs::remove_file(&memory);
        {
            let _patroni = site.start_patroni(200, PRIMARY);
            let reply = check_with(how, "127.0.0.1:0", &arguments, common::listen).reply;
            assert_eq!(reply, READY);
        }
        let reply = check_with(how, "127.0.0.1:0", &arguments, common::listen).reply;
        assert!(reply.starts_with(HELD), "{how:?}: {reply}");
    }
}

#[test]
fn a_restarted_patroni_does_not_know_its_lock_yet() {
    let site = Site::new("restarted");
    site.answer_once(200, PRIMARY);
    {
        // without a restart of Patroni, the lock is lost
        let _patroni = site.start_patroni(503, PRIMARY);
        assert_eq!(site.run_check(&[]).reply, "fail ready # primary without the leader lock\n");
    }
    assert!(
        site.run_check(&[]).reply.starts_with("down ready # "),
        "nothing is bridged after a bad answer"
    );
    assert_eq!(site.answer_once(200, PRIMARY), READY);
    let reply = site.run_check(&[]).reply;
    assert!(reply.starts_with(HELD), "{reply}");
    let _patroni = site.start_patroni(503, PRIMARY);
    let reply = site.run_check(&[]).reply;
    assert!(reply.starts_with(HELD) && reply.contains("has_just_started"), "{reply}");
    // the check of another pool has another record
    assert!(site.run_check(&["leader"]).reply.starts_with("fail ready # "));
}

#[test]
fn a_torn_foreign_or_future_record_does_not_count() {
    let site = Site::new("torn");
    let down = |what: &str| {
        let reply = site.run_check(&[]).reply;
        assert!(reply.starts_with("down ready # Patroni "), "{what}: {reply}");
    };
    // a fresh record each time, because on a busy machine the grace period would end before the test does
    let good = || {
        let _ = fs::remove_file(site.memory());
        site.answer_once(200, PRIMARY);
        fs::read(site.memory()).expect("a memory")
    };
    let memory = good();
    assert_eq!(memory.len() % 64, 0);
    let used = memory.chunks(64).position(|record| record.iter().any(|byte| *byte != 0));
    let record = used.expect("a record") * 64;
    for byte in 0..64 {
        let good = good();
        for bit in 0..8 {
            let mut torn = good.clone();
            torn[record + byte] ^= 1 << bit;
            fs::write(site.memory(), &torn).expect("written");
            down(&format!("byte {byte}, bit {bit}"));
        }
        fs::write(site.memory(), &good[..record + byte]).expect("written");
        down(&format!("{byte} bytes"));
    }
    let good = good();
    assert!(site.run_check(&[]).reply.starts_with(HELD), "this record is intact");
    fs::write(site.memory(), &good).expect("written");
    // a record of another Patroni, although it is the same check
    let url = site.address.replace("127.55.0.1", "127.55.0.2");
    let reply = check(&["--url", &format!("http://{url}"), "--memory-file", &site.memory()]).reply;
    assert!(reply.starts_with("down ready # "), "{reply}");
    // a record from another boot, whose CLOCK_BOOTTIME is less or more
    let reply = |offset: &str| {
        fs::write(site.memory(), &good).expect("written");
        let check = ["--grace", "15s", "--memory-file", &site.memory()].join(" ");
        let check = format!("{} {check} --url http://{} </dev/null", common::AGENT, site.address);
        let output = Command::new("unshare")
            .args([
                "--user",
                "--map-root-user",
                "--time",
                "--fork",
                "--boottime",
                offset,
                "sh",
                "-c",
                &check,
            ])
            .output()
            .expect("unshare");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(reply("0").starts_with(HELD), "{}", reply("0"));
    for offset in ["100", "-100"] {
        assert!(reply(offset).starts_with("down ready # "), "{offset}");
    }
}

#[test]
fn without_a_usable_memory_file_there_is_no_grace_period() {
    let site = Site::new("nothing");
    let folder = site.folder.path().to_str().expect("UTF-8");
    let foreign = format!("{folder}/foreign");
    fs::write(&foreign, "not ours\n").expect("written");
    let fifo = format!("{folder}/fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    let link = format!("{folder}/link");
    std::os::unix::fs::symlink(&foreign, &link).expect("a link");
    let long = format!("{folder}/long");
    fs::write(&long, [0; 5000]).expect("written");
    // where the agent was not even installed, only an operator is told
    let none = format!("{folder}/none/memory");
    for (file, why) in [
        (none.clone(), "; systemd-tmpfiles --create creates it"),
        (folder.to_owned(), "not a regular file"),
        (foreign.clone(), "not a memory file"),
        (format!("{foreign}/memory"), "Not a directory"),
        (fifo, "not a regular file"),
        (link, "symbolic links"),
        (long, "not a memory file"),
        ("/dev/zero".to_owned(), "not a regular file"),
        ("/proc/version".to_owned(), ""),
    ] {
        let arguments = ["--url", &format!("http://{}", site.address), "--memory-file", &file];
        {
            let _patroni = site.start_patroni(200, PRIMARY);
            let outcome = check(&arguments);
            // HAProxy shows that the file cannot be used
            let lost = if file == none { "\n" } else { "; no grace period: " };
            let (reply, said) = (&outcome.reply, &outcome.stderr);
            assert!(reply.starts_with(&format!("{}{lost}", READY.trim_end())), "{reply}");
            assert!(said.is_empty() || said.contains("no grace period: "), "{file}: {said}");
        }
        let reply = check(&arguments).reply;
        assert!(reply.starts_with("down ready # Patroni "), "{file}: {reply}");
        assert_eq!(reply.contains("; no grace period: "), file != none, "{file}: {reply}");
        // a check by hand says so as well
        let output = Command::new(common::AGENT).args(arguments).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        let told =
            said.lines().any(|line| line.contains("no grace period: ") && line.contains(why));
        assert!(told, "{file}: {said}");
    }
    assert_eq!(fs::read(&foreign).expect("it is there"), b"not ours\n");
}

/// systemd-tmpfiles makes the file, and the agent may not.
#[test]
fn a_missing_memory_file_is_called_missing() {
    // a short name, since HAProxy is told no more than 100 characters
    let folder = tempfile::Builder::new().prefix("m").tempdir().expect("a folder");
    let (memory, patroni) = (common::path_in(&folder, "m"), common::FakePatroni::primary());
    let ask_with = |mode: u32| {
        fs::set_permissions(folder.path(), Permissions::from_mode(mode)).expect("our folder");
        // root may write to every folder
        let (url, user) = (patroni.url(), "nobody");
        check(&["--url", &url, "--user", user, "--memory-file", &memory]).reply
    };
    let missing = ask_with(0o555);
    assert!(missing.contains(&format!("{memory}: missing; ")), "{missing}");
    // whether the file is there cannot be seen in a folder that may not be searched
    let closed = ask_with(0o000);
    assert!(closed.contains(&format!("{memory}: Permission denied")), "{closed}");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("our folder");
}

/// One check in 128 on average, because without a memory nothing counts the lines.
#[test]
fn the_journal_says_that_the_memory_cannot_be_used() {
    let site = Site::new("heard");
    let _patroni = site.start_patroni(200, PRIMARY);
    let url = format!("http://{}", site.address);
    let memory = site.folder.path().display().to_string();
    let arguments = ["--url", &url, "--memory-file", &memory];
    let logs = |_: &u32| !check(&arguments).stderr.is_empty();
    let heard = (0..3000).filter(logs).take(3).collect::<Vec<_>>();
    assert!(heard.len() == 3 && heard[2] > 20, "{heard:?}");
    let said = (0..3000).map(|_| check(&arguments).stderr).find(|said| !said.is_empty());
    let said = said.expect("a line");
    let line = format!("primary: primary, running, timeline 5; no grace period: {memory}: ");
    assert!(said.starts_with("<4>replied 'up ready' to 127.0.0.1:"), "{said}");
    assert!(said.contains(&line) && said.lines().count() == 1, "{said}");
}

/// A full file system has the file but no room for a record.
#[test]
fn a_record_that_cannot_be_stored_is_reported() {
    let site = Site::new("full");
    let folder = site.folder.path().display();
    for (fill, said) in [
        ("true", "\n"),
        ("cat /dev/zero > fill", "; no grace period: the memory cannot be written: No space"),
    ] {
        let _patroni = site.start_patroni(200, PRIMARY);
        let script = format!(
            "mount -t tmpfs -o size=8k none {folder} && cd {folder} && : > memory && {fill} 2> /dev/null; exec {} --url http://{} --memory-file {folder}/memory",
            common::AGENT,
            site.address
        );
        let (haproxy, stream) = common::connection("127.0.0.1:0");
        let mut command = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
            .stdin(OwnedFd::from(stream))
            .spawn()
            .expect("unshare");
        let reply = common::listen(haproxy);
        assert!(reply.starts_with(&format!("{}{said}", READY.trim_end())), "{fill}: {reply}");
        command.wait().expect("unshare");
    }
}

/// A write beyond the limit would kill the process, and HAProxy would get no reply.
#[test]
fn a_limit_of_file_sizes_kills_no_check() {
    let site = Site::new("limit");
    for kilobytes in ["0", "3", "4"] {
        let _patroni = site.start_patroni(200, PRIMARY);
        let _ = fs::remove_file(site.memory());
        let command = format!(
            "ulimit -f {kilobytes}; exec {} --url http://{} --memory-file {}",
            common::AGENT,
            site.address,
            site.memory()
        );
        let (haproxy, stream) = common::connection("127.0.0.1:0");
        let mut command = Command::new("bash")
            .args(["-c", &command])
            .stdin(OwnedFd::from(stream))
            .spawn()
            .expect("bash");
        let reply = common::listen(haproxy);
        assert!(reply.starts_with(READY.trim_end()), "{kilobytes}: {reply}");
        assert_eq!(reply.contains("; no grace period: "), kilobytes != "4", "{kilobytes}: {reply}");
        command.wait().expect("bash");
        let left = fs::metadata(site.memory()).is_ok_and(|memory| memory.len() > 0);
        assert_eq!(left, kilobytes == "4", "{kilobytes}");
    }
}

#[test]
fn a_good_answer_bridges_no_other_check() {
    let site = Site::new("other");
    {
        let _patroni = site.start_patroni(200, STANDBY);
        site.run_check(&["replica?lag=16MB"]);
    }
    assert!(site.run_check(&["replica?lag=16MB"]).reply.starts_with(HELD));
    for other in ["replica?lag=1MB", "replica", "read-only?lag=16MB"] {
        assert!(site.run_check(&[other]).reply.starts_with("down ready # Patroni "), "{other}");
    }
}

/// Any peer can make up queries, and must not take the records of the checks without a query.
#[test]
fn a_stranger_with_many_questions_takes_no_place() {
    let site = Site::new("stranger");
    {
        let _patroni = site.start_patroni(200, STANDBY);
        site.run_check(&["replica"]);
        site.run_check(&["replica?lag=16MB"]);
        for number in 0..100 {
            site.run_check(&[&format!("replica?lag={number}")]);
            // the check of HAProxy, which comes again and again
            if number % 10 == 0 {
                site.run_check(&["replica?lag=16MB"]);
            }
        }
    }
    assert!(site.run_check(&["replica?lag=16MB"]).reply.starts_with(HELD));
    assert!(fs::metadata(site.memory()).expect("a memory").len() <= 4096);
    assert!(site.run_check(&["replica"]).reply.starts_with(HELD));
    // all checks with a query share some places
    assert!(site.run_check(&["replica?lag=99"]).reply.starts_with(HELD));
}

#[test]
fn the_journal_gets_a_line_when_trouble_begins_and_one_when_it_ends() {
    let site = Site::new("journal");
    let said = |check: &str| site.run_check(&[check]).stderr;
    site.answer_once(200, PRIMARY);
    let began = said("primary");
    let bridged = "<4>replied '!unreachable' to 127.0.0.1:";
    assert!(
        began.starts_with(bridged)
            && began.contains(": primary: nothing changes in HAProxy: held "),
        "{began}"
    );
    for _ in 0..5 {
        assert_eq!(said("primary"), "");
        assert_eq!(said("replica"), "", "it is the same trouble for each check");
        assert_eq!(said("replica?lag=16MB"), "");
    }
    {
        let _patroni = site.start_patroni(200, PRIMARY);
        let ended = said("primary");
        assert!(ended.starts_with("<5>replied 'up ready' to 127.0.0.1:"), "{ended}");
        assert!(ended.ends_with(" s of trouble)\n"), "{ended}");
        for check in ["primary", "replica", "replica?lag=16MB"] {
            assert_eq!(said(check), "", "nothing for a healthy check");
        }
    }
    // trouble that a stranger makes up does not keep real trouble out of the journal
    assert!(said("primary?tag_none=1").starts_with("<4>"));
    assert!(said("primary").starts_with("<4>"));
    assert_eq!(said("primary"), "");
}

/// Trouble that begins and ends 25 times.
#[test]
fn trouble_that_comes_and_goes_does_not_fill_the_journal() {
    let site = Site::new("flaps");
    let mut lines = 0;
    for _ in 0..25 {
        let patroni = site.start_patroni(200, PRIMARY);
        lines += site.run_check(&[]).stderr.lines().count();
        drop(patroni);
        lines += site.run_check(&[]).stderr.lines().count();
    }
    assert!((10..=22).contains(&lines), "{lines}");
}

/// A broken process costs at most one record, until the next check of that kind stores one.
#[test]
fn a_damaged_memory_file_is_repaired() {
    let site = Site::new("spoilt");
    assert_eq!(site.answer_once(200, PRIMARY), READY);
    let good = fs::read(site.memory()).expect("a memory");
    let record = &good[..64];
    for (at, bytes) in [(4095, record), (20, record), (64, &[7; 64][..])] {
        let mut spoilt = good.clone();
        spoilt.resize(spoilt.len().max(at + bytes.len()), 0);
        spoilt[at..][..bytes.len()].copy_from_slice(bytes);
        fs::write(site.memory(), &spoilt).expect("written");
        assert_eq!(site.answer_once(200, PRIMARY), READY, "{at}");
        let reply = site.run_check(&[]).reply;
        assert!(reply.starts_with(HELD), "{at}: {reply}");
    }
}

/// A late line is trouble between HAProxy and the agent, and changes nothing within the grace period.
#[test]
fn a_late_line_changes_nothing_within_the_grace_period() {
    let late = "no agent-send line within 300 ms";
    for (body, status, check) in [(PRIMARY, 200, "primary"), (STANDBY, 503, "primary")] {
        let site = Site::new(&format!("late-{status}"));
        let (url, memory) = (format!("http://{}", site.address), site.memory());
        let arguments = site.arguments(&url, &memory, &["--agent-send"]);
        let silent = || check_with(Start::ListenFds, "127.0.0.1:0", &arguments, common::listen);
        assert!(silent().reply.starts_with(&format!("fail ready # {late}")), "nothing is known");
        site.answer_once(status, body);
        let reply = silent().reply;
        assert!(reply.starts_with(&format!("!unreachable:_{}", late.replace(' ', "_"))), "{reply}");
        // a late line is not logged, and begins no grace period
        let refused = site.run_check(&[check]).reply;
        assert!(refused.starts_with(HELD), "{refused}");
        let _crashed = site.start_patroni(503, r#"{"state": "crashed", "role": "primary"}"#);
        site.run_check(&[check]);
        assert!(silent().reply.starts_with("fail ready # "), "{check}");
    }
}

/// Any peer can send an invalid line: the journal gets one line a minute, without the peer's text.
#[test]
fn invalid_lines_are_logged_once() {
    let site = Site::new("junk");
    let (url, memory) = (format!("http://{}", site.address), site.memory());
    let arguments = site.arguments(&url, &memory, &["--agent-send", "--timeout", "300ms"]);
    let ask = |line: &str| {
        check_with(Start::ListenFds, "127.0.0.1:0", &arguments, |mut client| {
            client.write_all(line.as_bytes()).expect("a socket");
            common::listen(client)
        })
    };
    let said = ask("primary <4>ALARM\n").stderr;
    assert!(said.starts_with("<4>replied 'fail ready' to 127.0.0.1:"), "{said}");
    let end = format!(": agent-send line not understood (the reply says why) [{VERSION}]\n");
    assert!(said.ends_with(&end), "{said}");
    for line in ["ALARM\n", "primry\n", "primary", "\n"] {
        let outcome = ask(line);
        assert!(outcome.reply.starts_with("fail ready # "), "{outcome:?}");
        assert_eq!(outcome.stderr, "", "{line:?}");
    }
    // an invalid line hides no trouble
    let trouble = ask("primary\n").stderr;
    assert!(trouble.contains("connection refused"), "{trouble}");
    assert_eq!(ask("junk\n").stderr, "");
}

/// Each of many checks at the same time gets the right reply, and the memory file stays valid.
#[test]
fn many_checks_at_once_leave_one_valid_memory_file() {
    let site = Site::new("many");
    let patroni = site.start_patroni(200, PRIMARY);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let reply = site.run_check(&[]).reply;
                    assert_eq!(reply, READY);
                }
            });
        }
    });
    drop(patroni);
    assert!(site.run_check(&[]).reply.starts_with(HELD));
}

/// Only a check by hand asks for Patroni's ttl, and warns if `--grace` does not fit.
#[test]
fn a_check_by_hand_warns_of_a_grace_period_that_is_too_long() {
    let site = Site::new("hand");
    let by_hand = |config: &str, grace: &str| {
        let body = format!("{}, {config}}}", PRIMARY.trim_end_matches('}'));
        let _patroni = site.start_patroni(200, &body);
        let (url, memory) = (format!("http://{}", site.address), site.memory());
        let output = Command::new(common::AGENT)
            .args(site.arguments(&url, &memory, &["--grace", grace]))
            .stdin(std::process::Stdio::null())
            .output()
            .expect("it starts");
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8_lossy(&output.stderr).contains("is too long for this cluster")
    };
    let lopsided = r#""ttl": 20, "loop_wait": 14, "retry_timeout": 3"#;
    assert!(!by_hand(r#""ttl": 30"#, "3s") && by_hand(r#""ttl": 30"#, "8s"));
    assert!(!by_hand(r#""ttl": 20, "loop_wait": 10, "retry_timeout": 5"#, "1500ms"));
    assert!(by_hand(r#""ttl": 20, "loop_wait": 10, "retry_timeout": 5"#, "2s"));
    // after a loop that has waited long for the DCS, the next one begins at once
    assert!(by_hand(r#""ttl": 20, "loop_wait": 1, "retry_timeout": 9"#, "100ms"));
    assert!(by_hand(lopsided, "100ms") && !by_hand(lopsided, "0"));
    assert!(!by_hand(r#""ttl": "x""#, "15s"), "no warning without a ttl");
}

/// Somebody who makes up queries takes no place in the memory file from another source.
#[test]
fn a_stranger_takes_no_grace_from_haproxy() {
    if !common::in_network("grace::a_stranger_takes_no_grace_from_haproxy") {
        return;
    }
    let site = Site::new("stranger");
    let (url, memory) = (format!("http://{}", site.address), site.memory());
    let arguments = site.arguments(&url, &memory, &["--agent-send"]);
    let ask = |source: u8, question: &str| {
        let listener = TcpListener::bind("10.1.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let mut peer = common::connect_from(Ipv4Addr::new(10, 1, 7, source), address);
        peer.write_all(question.as_bytes()).expect("a connection");
        let stream = listener.accept().expect("a connection").0;
        let mut agent = common::start(Start::ListenFds, stream, &arguments);
        let mut agent = agent.spawn().expect("the agent starts");
        let reply = common::listen(peer);
        agent.wait().expect("it ends");
        reply
    };
    let patroni = site.start_patroni(200, STANDBY);
    assert_eq!(ask(1, "replica?lag=16MB\n"), "up ready # replica, running\n");
    for number in 0..45 {
        ask(2, &format!("replica?lag={number}kB\n"));
    }
    drop(patroni);
    let (haproxy, stranger) = (ask(1, "replica?lag=16MB\n"), ask(2, "replica?lag=0kB\n"));
    assert!(haproxy.starts_with(HELD), "{haproxy}");
    assert!(!stranger.starts_with(HELD), "{stranger}: no place was taken");
}
