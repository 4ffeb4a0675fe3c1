//! The shipped units on a real systemd, a process for each check and one for many: nothing that a peer, a broken handler or an administrator does
//! kills the port, lingers, or fills the journal. On Debian 12 (systemd 252, HAProxy 2.6) and Debian 13
//! (systemd 257, HAProxy 3.0). Needs root and what tests/install installs; tests/run runs it.

mod common;

use common::{FakePatroni, lab};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

const DEBIAN_13: &str = "/var/cache/patroni-agent-check/trixie";
const INTERVAL: Duration = Duration::from_secs(2);

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The units: a process for each check, one process for many.
const UNITS: &str = "patroni-agent-check";
const LISTEN: &str = "patroni-agent-check-listen";

/// A machine with the shipped units, a fake Patroni, and HAProxy.
struct Machine {
    name: String,
    /// Which pair of units is in use.
    units: &'static str,
    leader: String,
    /// The timeline that Patroni names.
    said: Arc<AtomicU64>,
}

impl Machine {
    fn boot(name: &str, root: &str) -> Machine {
        Machine::with(UNITS, name, root)
    }

    fn with(units: &'static str, name: &str, root: &str) -> Machine {
        let name = format!("{name}-{}", std::process::id());
        let mut machine = Machine { name, units, leader: String::new(), said: Arc::default() };
        lab("machine", &["start", &machine.name, "--root", root]).expect("it boots");
        machine.leader = lab("machine", &["pid", &machine.name]).expect("pid").trim().to_owned();
        let handler = env!("CARGO_BIN_EXE_patroni-agent-check");
        lab("machine", &["agent", &machine.name, handler]).expect("it is installed");
        // what a test replaces it with and by
        machine.put(Path::new(handler), "/root/patroni-agent-check");
        machine.sh("chmod 755 /root");
        let said = machine.said.clone();
        machine.network(|| {
            FakePatroni::on("127.0.0.1:8008", move |mut stream, _| {
                common::read_request(&mut stream);
                let timeline = said.load(Ordering::SeqCst);
                let body =
                    format!(r#"{{"state": "running", "role": "primary", "timeline": {timeline}}}"#);
                let _ = stream.write_all(&common::http(200, &body));
            })
        });
        machine.sh(&format!("systemctl start {units}.socket"));
        machine
    }

    fn try_sh(&self, line: &str) -> Result<String, String> {
        lab("machine", &["run", &self.name, "sh", "-c", line])
    }

    fn sh(&self, line: &str) -> String {
        self.try_sh(line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.leader))
    }

    fn put(&self, from: &Path, to: &str) {
        fs::copy(from, self.inside(to)).unwrap_or_else(|error| panic!("{to}: {error}"));
    }

    fn file(&self, path: &str, text: &str) {
        fs::write(self.inside(path), text).unwrap_or_else(|error| panic!("{path}: {error}"));
    }

    /// Runs something in a thread in this machine's network.
    fn network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let network = File::open(format!("/proc/{}/ns/net", self.leader)).expect("its network");
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter it");
                work()
            });
            inside.join().expect("no panic")
        })
    }

    fn haproxies(&self, count: u32) {
        for number in 1..=count {
            self.file(&format!("/run/haproxy{number}.cfg"), &format!(
                "global\n stats socket /run/haproxy{number}.sock\ndefaults\n mode tcp\n timeout connect 1s\n \
                 timeout client 1s\n timeout server 1s\nbackend pool\n server pg 127.0.0.1:5432 agent-check \
                 agent-port 5555 agent-inter {}ms agent-send \"primary\\n\"\n", INTERVAL.as_millis()));
            self.file(
                &format!("/etc/systemd/system/haproxy{number}.service"),
                &format!(
                    "[Service]\nExecStart=/usr/sbin/haproxy -db -f /run/haproxy{number}.cfg\n"
                ),
            );
        }
        self.sh("systemctl daemon-reload");
        for number in 1..=count {
            self.sh(&format!("systemctl start haproxy{number}"));
        }
    }

    /// What HAProxy's agent said last.
    fn heard(&self) -> String {
        let Ok(mut socket) = UnixStream::connect(self.inside("/run/haproxy1.sock")) else {
            return String::new();
        };
        socket.write_all(b"show stat\n").expect("HAProxy");
        socket.shutdown(Shutdown::Write).expect("HAProxy");
        let mut text = String::new();
        socket.read_to_string(&mut text).expect("HAProxy");
        text
    }

    /// One check leaves its record.
    fn assert_remembers(&self, what: &str) {
        let memory = "/run/patroni-agent-check/memory";
        self.sh(&format!(": > {memory}"));
        assert!(self.network(|| check(5555)).starts_with("up ready"), "{what}");
        let left = fs::metadata(self.inside(memory)).expect("a memory").len();
        assert_ne!(left, 0, "{what}: nothing is left for the next check");
    }

    /// The next answer must reach HAProxy within two intervals, with the time of a check on top.
    fn assert_alive(&self, after: &str) {
        // something that HAProxy cannot have heard before
        let wanted = format!("timeline {})", self.said.fetch_add(1, Ordering::SeqCst) + 1);
        let started = Instant::now();
        while !self.heard().contains(&wanted) {
            let state =
                || self.sh(&format!("systemctl status {}.socket --no-pager || true", self.units));
            assert!(
                started.elapsed() < 2 * INTERVAL + Duration::from_millis(1500),
                "{after}: {}",
                state()
            );
            sleep(Duration::from_millis(20));
        }
        println!(
            "{}: next answer {:.1} s after: {after}",
            self.name,
            started.elapsed().as_secs_f64()
        );
    }

    fn assert_nothing_lingers(&self) {
        self.sh("systemctl stop 'haproxy*'");
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let units =
                self.sh("systemctl list-units --plain --no-legend 'patroni-agent-check*.service'");
            let processes = self.sh("pgrep -x patroni-agent-c || true");
            if units.is_empty() && processes.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "{units}{processes}");
            sleep(Duration::from_millis(100));
        }
    }

    /// Resident memory of PID 1 in kB.
    fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.leader)).expect("proc");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
    }

    fn journal_lines(&self) -> usize {
        self.sh("journalctl --sync; journalctl -q --no-pager | wc -l")
            .trim()
            .parse()
            .expect("a number")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{:?}", self.try_sh("journalctl -q --no-pager -n 30"));
        }
        let _ = lab("machine", &["stop", &self.name]);
    }
}

fn agent(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Another address than HAProxy's.
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);

fn stranger() -> Option<TcpStream> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::empty(), None);
    let socket = socket.expect("a socket");
    bind(&socket, &SocketAddr::from((STRANGER, 0))).expect("another address");
    connect(&socket, &agent(5555)).ok()?;
    Some(TcpStream::from(socket))
}

fn check(port: u16) -> String {
    let mut reply = String::new();
    if let Ok(mut stream) = TcpStream::connect(agent(port)) {
        let _ = stream.write_all(b"primary\n");
        let _ = stream.read_to_string(&mut reply);
    }
    reply
}

/// So many connections, spread over two seconds as far as this machine can; none is waited for.
fn flood(count: u32) {
    let started = Instant::now();
    let mut made = VecDeque::new();
    for number in 0..count {
        let due = Duration::from_secs(2) * number / count;
        sleep(due.saturating_sub(started.elapsed()));
        let flags = SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None);
        let socket = socket.expect("a socket");
        bind(&socket, &SocketAddr::from((STRANGER, 0))).expect("another address");
        let _ = connect(&socket, &agent(5555));
        made.push_back(socket);
        // some time to get through
        if made.len() > 300 {
            made.pop_front();
        }
    }
    println!("{count} connections in {:.1} s", started.elapsed().as_secs_f64());
}

fn never_dead(units: &'static str, name: &str, root: &str) {
    let machine = Machine::with(units, name, root);
    machine.haproxies(4);
    machine.assert_alive("start");

    // one hour of one pool, and not one line
    machine.sh("systemctl stop 'haproxy*'");
    for _ in 0..20 {
        machine.network(|| check(5555));
    }
    // without any settings either; HAProxy's question is then not looked at
    machine.sh("mv /etc/default/patroni-agent-check /etc/default/away");
    machine.sh(&format!("systemctl stop {LISTEN}.service"));
    let lines = machine.journal_lines();
    machine.network(|| (0..10).for_each(|_| assert!(check(5555).starts_with("up ready"))));
    assert_eq!(machine.journal_lines(), lines, "lines without settings");
    machine.sh("mv /etc/default/away /etc/default/patroni-agent-check");
    machine.sh(&format!("systemctl stop {LISTEN}.service"));
    let (lines, memory) = (machine.journal_lines(), machine.memory());
    let answered =
        machine.network(|| (0..1800).filter(|_| check(5555).starts_with("up ready")).count());
    assert_eq!(answered, 1800);
    assert_eq!(machine.journal_lines(), lines, "lines for 1,800 healthy checks");
    machine.haproxies(4);
    machine.assert_alive("1,800 checks");

    machine.network(|| flood(5000));
    machine.assert_alive("5,000 connections in two seconds");

    let silent = machine.network(|| (0..200).filter_map(|_| stranger()).collect::<Vec<_>>());
    assert_eq!(silent.len(), 200);
    machine.assert_alive("200 peers that say nothing, while they are there");
    drop(silent);
    let mut slow = machine.network(|| (0..200).filter_map(|_| stranger()).collect::<Vec<_>>());
    for _ in 0..3 {
        slow.iter_mut().for_each(|stream| drop(stream.write_all(b"p")));
        sleep(Duration::from_secs(1));
    }
    machine.assert_alive("200 peers that send one byte a second, while they are there");
    drop(slow);

    machine.network(|| {
        for number in 0..200 {
            let Some(mut stream) = stranger() else { continue };
            match number % 3 {
                // closing with the answer unread resets
                0 => drop(stream.write_all(b"primary\n")),
                1 => drop(stream.shutdown(Shutdown::Write)),
                _ => drop(stream.write_all(&[b'x'; 100_000])),
            }
        }
    });
    machine.assert_alive("200 peers that reset, half-close, never read");

    for (what, signal) in [("crashes", "SEGV"), ("hangs", "STOP")] {
        machine.file("/usr/bin/new", &format!("#!/bin/sh\nkill -{signal} $$\n"));
        machine.sh("chmod 755 /usr/bin/new; mv /usr/bin/new /usr/bin/patroni-agent-check");
        machine.sh(&format!("systemctl stop {LISTEN}.service"));
        machine.network(|| {
            (0..30).for_each(|_| {
                let stream = TcpStream::connect(agent(5555)).expect("the port lives");
                drop(stream.set_read_timeout(Some(Duration::from_millis(50))));
                let _ = (&stream).read(&mut [0]);
            })
        });
        sleep(3 * INTERVAL);
        machine.sh("cp /root/patroni-agent-check /usr/bin/new; mv /usr/bin/new /usr/bin/patroni-agent-check");
        if signal == "STOP" {
            // those that hang are ended by RuntimeMaxSec and TimeoutStopSec, and give their places back; one for many by
            // TimeoutStartSec
            sleep(Duration::from_secs(if units == LISTEN { 25 } else { 18 }));
        }
        machine.assert_alive(&format!("a handler that {what} at every check"));
    }

    if units == LISTEN {
        let half = "head -c 9999 /root/patroni-agent-check > /usr/bin/new; chmod 755 /usr/bin/new";
        for (what, new) in [("is missing", "rm -f /usr/bin/new"), ("is half a program", half)] {
            machine.sh(&format!("rm /usr/bin/patroni-agent-check; {new}; ! [ -e /usr/bin/new ] || mv /usr/bin/new /usr/bin/patroni-agent-check"));
            machine.sh(&format!("systemctl stop {LISTEN}.service"));
            sleep(2 * INTERVAL);
            let tried = machine.sh(&format!("systemctl show -P NRestarts {LISTEN}.service"));
            let tried: u64 = tried.trim().parse().expect("a number");
            // twice a second, though four HAProxies ask and nobody is answered
            assert!(
                (1..=10).contains(&tried),
                "a program that {what} was started {tried} times in 4 s"
            );
            machine.sh("cp /root/patroni-agent-check /usr/bin/new; mv /usr/bin/new /usr/bin/patroni-agent-check");
            machine.assert_alive(&format!("a program that {what}"));
        }
        for signal in ["SEGV", "KILL", "STOP"] {
            let running = format!("systemctl show -P MainPID {LISTEN}.service");
            machine.sh(&format!("kill -{signal} $({running})"));
            machine.assert_alive(&format!("SIG{signal} while it serves"));
        }
        let end = Instant::now() + INTERVAL;
        let told = || machine.sh(&format!("systemctl show -P StatusText {LISTEN}.service"));
        while !told().ends_with(" running, last said: up ready\n") {
            assert!(Instant::now() < end, "systemd is told: {}", told());
        }
    }

    let used = machine.sh("df --output=used -k /run | tail -1");
    machine.sh(&format!("mount -o remount,size={}k /run", used.trim()));
    assert!(machine.try_sh("head -c 100000 /dev/zero > /run/more").is_err(), "/run is full");
    let reply = machine.network(|| check(5555));
    assert!(reply.starts_with("up ready"), "/run is full: {reply:?}");
    machine.sh("rm -f /run/more; mount -o remount,size=100m /run");
    machine.assert_alive("a full /run");

    let replace = "for i in $(seq 100); do cp /root/patroni-agent-check /usr/bin/new; \
        mv /usr/bin/new /usr/bin/patroni-agent-check; done";
    let lost = std::thread::scope(|scope| {
        let replacing = scope.spawn(|| machine.sh(replace));
        let mut lost = 0;
        while !replacing.is_finished() {
            lost += usize::from(!machine.network(|| check(5555)).starts_with("up ready"));
        }
        lost
    });
    assert_eq!(lost, 0, "checks while the program was replaced 100 times");
    machine.assert_alive("100 replacements of the program");

    let restart = format!(
        "for i in $(seq 100); do systemctl restart {units}.socket || exit 1; \
         [ $((i % 10)) != 0 ] || systemctl daemon-reload; done"
    );
    let (asked, refused) = std::thread::scope(|scope| {
        let restarting = scope.spawn(|| machine.sh(&restart));
        let (mut asked, mut refused) = (0, 0);
        while !restarting.is_finished() {
            machine.network(|| {
                for _ in 0..20 {
                    asked += 1;
                    refused += usize::from(check(5555).is_empty());
                }
            });
        }
        (asked, refused)
    });
    let in_use = machine.sh("journalctl -q --no-pager | grep -c 'already in use' || true");
    assert_eq!(in_use.trim(), "0");
    println!("{}: 100 restarts: {refused} of {asked} connections without an answer", machine.name);
    machine.assert_alive("100 restarts of the socket with daemon-reloads");

    machine.assert_nothing_lingers();
    let grown = machine.memory().saturating_sub(memory);
    println!("{}: PID 1 grew by {grown} kB, from {memory} kB", machine.name);
    assert!(grown < 2048, "PID 1 grew by {grown} kB");
    assert_eq!(machine.sh(&format!("systemctl is-active {units}.socket")), "active\n");
}

#[test]
#[ignore = "needs root and systemd: tests/run"]
fn never_dead_on_debian_12() {
    never_dead(UNITS, "bookworm", "/");
}

#[test]
#[ignore = "needs root and systemd: tests/run"]
fn never_dead_on_debian_13() {
    never_dead(UNITS, "trixie", DEBIAN_13);
}

#[test]
#[ignore = "needs root and systemd: tests/run"]
fn listening_never_dead_on_debian_12() {
    never_dead(LISTEN, "listen-bookworm", "/");
}

#[test]
#[ignore = "needs root and systemd: tests/run"]
fn listening_never_dead_on_debian_13() {
    never_dead(LISTEN, "listen-trixie", DEBIAN_13);
}

/// Each setting is there for something that happens without it.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn without_the_settings() {
    let machine = Machine::boot("without", "/");
    assert!(machine.network(|| check(5555)).starts_with("up ready"));
    let units = "/etc/systemd/system/patroni-agent-check";
    let remove = |key: &str| {
        machine.sh(&format!(
            "sed -i '/^{key}/d' {units}.socket {units}@.service; systemctl daemon-reload"
        ));
    };
    let restore = || {
        for unit in ["patroni-agent-check.socket", "patroni-agent-check@.service"] {
            machine.put(&top().join("units").join(unit), &format!("/etc/systemd/system/{unit}"));
        }
        machine.sh("systemctl daemon-reload; systemctl reset-failed; systemctl restart patroni-agent-check.socket");
        assert!(machine.network(|| check(5555)).starts_with("up ready"));
    };

    remove("TriggerLimitIntervalSec");
    machine.network(|| flood(1000));
    let state = machine.sh("systemctl is-failed patroni-agent-check.socket || true");
    assert_eq!(state, "failed\n", "the trigger limit is a switch for the port");
    restore();

    remove("StartLimitIntervalSec");
    let restarts =
        "for i in $(seq 20); do systemctl restart patroni-agent-check.socket || exit 1; done";
    assert!(machine.try_sh(restarts).is_err(), "the start limit of sockets");
    restore();

    let program = "/usr/bin/patroni-agent-check";
    machine.sh(&format!("printf '#!/bin/sh\\nkill -SEGV $$\\n' > /run/new; chmod 755 /run/new; cp /run/new /usr/bin/new; mv /usr/bin/new {program}"));
    let failed =
        "systemctl list-units --failed --plain --no-legend 'patroni-agent-check@*' | wc -l";
    machine.network(|| (0..5).for_each(|_| drop(check(5555))));
    assert_eq!(machine.sh(failed).trim(), "0");
    remove("CollectMode");
    machine.network(|| (0..5).for_each(|_| drop(check(5555))));
    assert_eq!(machine.sh(failed).trim(), "5", "failed units linger");
    machine.sh(&format!("cp /root/patroni-agent-check /usr/bin/new; mv /usr/bin/new {program}"));
    restore();

    remove("LogLevelMax=notice");
    let lines = machine.journal_lines();
    machine.network(|| (0..10).for_each(|_| drop(check(5555))));
    assert!(machine.journal_lines() >= lines + 20, "two lines for each healthy check");
}

/// Root's umask does not turn a drain into a file that the agent cannot read; the memory it can write.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_hold_is_readable_and_the_memory_is_written() {
    for units in [UNITS, LISTEN] {
        for (name, root) in [("hold-12", "/"), ("hold-13", DEBIAN_13)] {
            let machine = Machine::with(units, name, root);
            machine.assert_remembers(&format!("{units} {name}"));
            machine.sh("umask 077; echo 'drain by hand' > /run/patroni-agent-check/hold");
            let reply = machine.network(|| check(5555));
            assert_eq!(reply, "up drain # hold: by hand\n", "{units} {name}");
        }
    }
}

/// The drop-ins that a site may choose still answer, and are as closed as the README says.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn drop_ins() {
    for (name, root) in [("drop-ins-12", "/"), ("drop-ins-13", DEBIAN_13)] {
        let machine = Machine::boot(name, root);
        // the first instance brings its slice, and a line for that
        assert!(machine.network(|| check(5555)).starts_with("up ready"));
        let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
        for (drop_in, most) in [("", 6.6), ("lean", 2.7), ("strict", 1.0)] {
            machine.sh(&format!("rm -rf {folder}; mkdir {folder}"));
            if !drop_in.is_empty() {
                let file = top().join("units").join(format!("{drop_in}.conf"));
                machine.put(&file, &format!("{folder}/{drop_in}.conf"));
            }
            machine.sh("systemctl daemon-reload");
            let lines = machine.journal_lines();
            machine.assert_remembers(&format!("{name} {drop_in}"));
            assert_eq!(machine.journal_lines(), lines, "{name} {drop_in}");
            // its last line: "Overall exposure level for UNIT: 2.4 OK"
            let said =
                machine.sh("systemd-analyze security --no-pager patroni-agent-check@0.service");
            let exposure = said.rsplit_once("service: ").expect("an exposure level").1;
            let exposure: f64 =
                exposure.split(' ').next().expect("a number").parse().expect("a number");
            assert!(exposure <= most, "{name} {drop_in}: {exposure}");
            println!("{name} {drop_in}: {exposure}");
        }
    }
}

/// The commented fence in the .socket, with somebody who may ask and somebody who may not.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn who_may_ask() {
    for (name, root) in [("fence-12", "/"), ("fence-13", DEBIAN_13)] {
        let machine = Machine::boot(name, root);
        let unit = "/etc/systemd/system/patroni-agent-check.socket";
        machine.sh(&format!(
            "sed -i 's/^#\\(IPAddressDeny=any\\)/\\1/; s/^#IPAddressAllow=.*/IPAddressAllow=127.0.0.1/' {unit}; \
             systemctl daemon-reload; systemctl restart patroni-agent-check.socket"
        ));
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        let accepted = "systemctl show -P NAccepted patroni-agent-check.socket";
        assert_eq!(machine.sh(accepted).trim(), "1", "{name}");
        // their packets are dropped, so nobody of them gets through
        machine.network(|| flood(500));
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        assert_eq!(machine.sh(accepted).trim(), "2", "{name}");
    }
}

/// A kernel without Landlock or seccomp: the check goes on, and a human is told.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn an_old_kernel() {
    let machine = Machine::boot("old-kernel", "/");
    let run = |missing: &str| {
        machine.sh(&format!(
            "systemd-run --quiet --wait --pipe -p SystemCallArchitectures=native -p SystemCallFilter='~{missing}' \
             -p SystemCallErrorNumber=ENOSYS /usr/bin/patroni-agent-check 2>&1"
        ))
    };
    let said = run("landlock_create_ruleset");
    let note = "patroni-agent-check: no full sandbox: Landlock: not in this kernel\n";
    assert!(said.starts_with(note) && said.contains("up ready # primary"), "{said}");
    let said = run("seccomp landlock_create_ruleset");
    assert!(
        said.contains("not in this kernel; seccomp: ") && said.contains("up ready # primary"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 3, "{said}");
}
