//! The shipped units on a real systemd, a process for each check and one for many: nothing that a peer, a broken agent or an administrator does
//! kills the port, lingers, or fills the journal. On Debian 12 (systemd 252, HAProxy 2.6) and Debian 13
//! (systemd 257, HAProxy 3.0). Needs root and what tests/install installs; tests/run runs it.

use crate::common::machine::Machine;
use crate::common::{self, AGENT, FakePatroni, haproxy, lab};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

pub const DEBIAN_13: &str = "/var/cache/patroni-agent-check/trixie";
const INTERVAL: Duration = Duration::from_secs(2);
/// `timeout check` of units/examples/haproxy.cfg.
const PATIENCE: Duration = Duration::from_secs(2);

/// The units: a process for each check, one process for many.
pub const UNITS: &str = "patroni-agent-check";
pub const LISTEN: &str = "patroni-agent-check-listen";

/// A machine with the shipped units, a fake Patroni, and HAProxy.
pub struct Node {
    pub machine: Machine,
    /// Which pair of units is in use.
    units: &'static str,
    /// The timeline that Patroni names.
    said: Arc<AtomicU64>,
}

impl Deref for Node {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Node {
    pub fn boot(name: &str, root: &str) -> Node {
        Node::with(UNITS, name, root)
    }

    pub fn with(units: &'static str, name: &str, root: &str) -> Node {
        Node::with_patroni(units, name, root, "127.0.0.1")
    }

    /// With a Patroni that listens on this address alone, which becomes one of the machine's.
    fn with_patroni(units: &'static str, name: &str, root: &str, address: &str) -> Node {
        let node = Node { machine: Machine::boot(name, root), units, said: Arc::default() };
        lab("machine", &["agent", &node.name, AGENT]).expect("it is installed");
        // what a test replaces it with and by
        node.put(Path::new(AGENT), "/root/patroni-agent-check");
        node.sh("chmod 755 /root");
        if address != "127.0.0.1" {
            node.sh(&format!("ip address add {address}/32 dev lo"));
        }
        let said = node.said.clone();
        node.network(|| {
            FakePatroni::on(&format!("{address}:8008"), move |mut stream, _| {
                common::read_request(&mut stream);
                let timeline = said.load(Ordering::SeqCst);
                let body =
                    format!(r#"{{"state": "running", "role": "primary", "timeline": {timeline}}}"#);
                let _ = stream.write_all(&common::http(200, &body));
            })
        });
        node.sh(&format!("systemctl start {units}.socket"));
        node
    }

    /// Runs something in a thread in this machine's network.
    pub fn network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
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

    /// units/examples/fence.conf with two addresses of this machine, while the socket listens.
    fn fence(&self) {
        self.fence_for("127.0.0.1 ::1");
    }

    fn fence_for(&self, addresses: &str) {
        let text = fs::read_to_string(common::file("units/examples/fence.conf")).expect("units");
        let folder = format!("/etc/systemd/system/{}.socket.d", self.units);
        self.sh(&format!("mkdir {folder}"));
        self.file(&format!("{folder}/fence.conf"), &text.replace("localhost", addresses));
        self.sh("systemctl daemon-reload");
    }

    /// Starts tests/lab/flood in this machine's network. It ends by itself.
    fn strangers(&self, arguments: &str) -> Child {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.leader, "--net"]).arg(common::file("tests/lab/flood"));
        command.args(arguments.split(' ')).stdout(Stdio::piped());
        let mut child = command.spawn().expect("nsenter");
        let mut begun = [0; 9];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut begun).expect("flooding");
        child
    }

    /// HAProxy's own checks, ten a second, until the strangers are gone: how many, how many of them were not answered
    /// in time, and the longest.
    fn checks_among(&self, mut strangers: Vec<Child>) -> (usize, usize, Duration) {
        let (mut asked, mut missed, mut longest) = (0, 0, Duration::ZERO);
        while strangers.iter_mut().any(|child| child.try_wait().expect("a child").is_none()) {
            let started = Instant::now();
            let reply = self.network(|| {
                let mut reply = String::new();
                if let Ok(mut stream) = TcpStream::connect_timeout(&agent(5555), PATIENCE) {
                    let _ = stream.set_read_timeout(Some(PATIENCE));
                    let _ = stream.write_all(b"primary\n");
                    let _ = stream.read_to_string(&mut reply);
                }
                reply
            });
            let took = started.elapsed();
            asked += 1;
            missed += usize::from(!reply.starts_with("up ready") || took > PATIENCE);
            longest = longest.max(took);
            sleep(Duration::from_millis(100).saturating_sub(took));
        }
        for child in strangers {
            let said = child.wait_with_output().expect("a child").stdout;
            println!("{}: {}", self.name, String::from_utf8_lossy(&said).trim());
        }
        println!("{}: {asked} checks, {missed} missed, {longest:?} at most", self.name);
        (asked, missed, longest)
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
        let socket = self.inside("/run/haproxy1.sock");
        // it is just starting
        haproxy::stat(&socket, "pool", "pg", "last_agt").unwrap_or_default()
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

pub fn agent(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Another address than HAProxy's.
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);

pub fn stranger() -> Option<TcpStream> {
    connect_from(STRANGER)
}

pub fn connect_from(address: Ipv4Addr) -> Option<TcpStream> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::empty(), None);
    let socket = socket.expect("a socket");
    bind(&socket, &SocketAddr::from((address, 0))).expect("another address");
    connect(&socket, &agent(5555)).ok()?;
    Some(TcpStream::from(socket))
}

pub fn check(port: u16) -> String {
    ask(port, "primary")
}

fn ask(port: u16, line: &str) -> String {
    ask_at(agent(port), line)
}

pub fn ask_at(address: SocketAddr, line: &str) -> String {
    let mut reply = String::new();
    if let Ok(mut stream) = TcpStream::connect(address) {
        let _ = writeln!(stream, "{line}");
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

/// A test of Debian 12 and of Debian 13 at the same time: most of the time it waits.
pub fn on_both(name: &str, test: impl Fn(&str, &str) + Sync) {
    std::thread::scope(|scope| {
        for (debian, root) in [(12, "/"), (13, DEBIAN_13)] {
            let test = &test;
            scope.spawn(move || test(&format!("{name}-{debian}"), root));
        }
    });
}

fn attack(units: &'static str, name: &str, root: &str) {
    let machine = Node::with(units, name, root);
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

    let instead = |script: &str| {
        machine.file("/usr/bin/new", &format!("#!/bin/sh\n{script}\n"));
        machine.sh("chmod 755 /usr/bin/new; mv /usr/bin/new /usr/bin/patroni-agent-check");
        machine.sh(&format!("systemctl stop {LISTEN}.service"));
    };
    let back = || {
        machine.sh("cp /root/patroni-agent-check /usr/bin/new; mv /usr/bin/new /usr/bin/patroni-agent-check")
    };
    // deaf to SIGTERM as well, with which systemd sends a SIGCONT
    let deaf = "trap '' TERM; kill -STOP $$; while :; do sleep 1; done";
    for (what, script) in [("crashes", "kill -SEGV $$"), ("hangs", deaf)] {
        instead(script);
        machine.network(|| {
            (0..30).for_each(|_| {
                let stream = TcpStream::connect(agent(5555)).expect("the port lives");
                drop(stream.set_read_timeout(Some(Duration::from_millis(50))));
                let _ = (&stream).read(&mut [0]);
            })
        });
        sleep(3 * INTERVAL);
        back();
        if script == deaf {
            // those that hang are ended by RuntimeMaxSec and TimeoutStopSec, and give their places back; one for many by
            // TimeoutStartSec
            sleep(Duration::from_secs(if units == LISTEN { 25 } else { 18 }));
        }
        machine.assert_alive(&format!("an agent that {what} at every check"));
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
            back();
            machine.assert_alive(&format!("a program that {what}"));
        }
        // and by the clock, since a busy machine may not start it more than ten times anyway
        let starts = "/run/patroni-agent-check/starts";
        machine.sh(&format!("install -m 666 /dev/null {starts}"));
        instead(&format!("date +%s%N >> {starts}; exit 1"));
        sleep(2 * INTERVAL);
        back();
        let starts = machine.sh(&format!("cat {starts}; rm {starts}"));
        let starts: Vec<u64> =
            starts.lines().map(|time| time.parse().expect("nanoseconds")).collect();
        let apart: Vec<u64> =
            starts.windows(2).map(|times| (times[1] - times[0]) / 1_000_000).collect();
        println!("{}: milliseconds between starts: {apart:?}", machine.name);
        assert!(apart.len() > 1 && apart.iter().all(|time| *time >= 500), "{apart:?}");
        machine.assert_alive("a program that fails at once");
        // what ends well is started again by the waiting connections, at once, and not by the timer
        instead("exec systemd-notify --ready");
        sleep(2 * INTERVAL);
        back();
        machine.assert_alive("a program that ends at once");
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

/// Both pairs of units on both Debians at the same time.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn never_dead() {
    std::thread::scope(|scope| {
        for (units, name) in [(UNITS, "each"), (LISTEN, "many")] {
            scope.spawn(move || on_both(name, |name, root| attack(units, name, root)));
        }
    });
}

/// Each setting is there for something that happens without it.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn without_the_settings() {
    let machine = Node::boot("without", "/");
    assert!(machine.network(|| check(5555)).starts_with("up ready"));
    // which would open the port again
    machine
        .sh("rm /etc/systemd/system/patroni-agent-check-reopen@.service; systemctl daemon-reload");
    let units = "/etc/systemd/system/patroni-agent-check";
    let remove = |key: &str| {
        machine.sh(&format!(
            "sed -i '/^{key}/d' {units}.socket {units}@.service; systemctl daemon-reload"
        ));
    };
    let restore = || {
        for unit in ["patroni-agent-check.socket", "patroni-agent-check@.service"] {
            machine.put(&common::file("units").join(unit), &format!("/etc/systemd/system/{unit}"));
        }
        machine.sh("systemctl daemon-reload; systemctl reset-failed; systemctl restart patroni-agent-check.socket");
        assert!(machine.network(|| check(5555)).starts_with("up ready"));
    };

    remove("TriggerLimitIntervalSec");
    // 200 in two seconds, which a busy machine need not reach at once
    let failed =
        || machine.sh("systemctl is-failed patroni-agent-check.socket || true") == "failed\n";
    let tries = (1..=10).find(|_| {
        machine.network(|| flood(1000));
        failed()
    });
    assert!(tries.is_some(), "the trigger limit is a switch for the port");
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
        on_both("hold", |name, root| {
            let machine = Node::with(units, name, root);
            machine.assert_remembers(&format!("{units} {name}"));
            machine.sh("umask 077; echo 'drain by hand' > /run/patroni-agent-check/hold");
            let reply = machine.network(|| check(5555));
            assert_eq!(reply, "up drain # hold: by hand\n", "{units} {name}");
        });
    }
}

/// The drop-ins that a site may choose still answer, and are as closed as the README says.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn drop_ins() {
    on_both("drop-ins", |name, root| {
        let machine = Node::boot(name, root);
        // the first instance brings its slice, and a line for that
        assert!(machine.network(|| check(5555)).starts_with("up ready"));
        let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
        for (drop_in, most) in [("", 7.3), ("lean", 3.3), ("strict", 1.3)] {
            machine.sh(&format!("rm -rf {folder}; mkdir {folder}"));
            if !drop_in.is_empty() {
                let file = common::file("units/examples").join(format!("{drop_in}.conf"));
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
    });
}

/// The settings of the units hold for a check by hand, too, and `--explain` says so.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn by_hand_it_says_what_haproxy_is_told() {
    let settings = "/etc/default/patroni-agent-check";
    let machine = Node::boot("by-hand", "/");
    let by_hand = |arguments| machine.sh(&format!("patroni-agent-check {arguments} 2>&1 || true"));
    machine.file(settings, "OPTIONS=\"--agent-send --else drain\"\n");
    let told = machine.network(|| ask(5555, "replica"));
    assert_eq!(told, "up drain # primary, running\n");
    let explained = by_hand("--explain replica");
    for line in [
        told.trim(),
        "settings: /etc/default/patroni-agent-check: --agent-send --else drain",
        "asked: Patroni 127.0.0.1:8008 for /replica",
        "status 200, state 'running', role 'primary', replication_state none, timeline 0",
        "memory: the last answer to this check came ",
        "sandbox: complete",
    ] {
        assert!(explained.contains(line), "{line}: {explained}");
    }
    for nothing in ["nobody listens", "another program", "drop-ins", "not here"] {
        assert!(!explained.contains(nothing), "{nothing}: {explained}");
    }
    // root has the eyes of the units' user: what is in a folder of root's, HAProxy's checks do not see either
    machine.sh("mkdir -m 700 /run/locked; echo drain > /run/locked/hold");
    machine.file(settings, "OPTIONS='--agent-send --hold-file /run/locked/hold'\n");
    let told = machine.network(|| ask(5555, "primary"));
    assert!(told.contains("; cannot see whether there is a hold: /run/locked/hold"), "{told}");
    assert!(by_hand("").starts_with(told.trim()), "{told}: {}", by_hand(""));
    // but for the settings, which systemd reads as root
    machine.sh(&format!("chmod 600 {settings}"));
    assert!(by_hand("").starts_with(told.trim()), "{told}: {}", by_hand(""));
    // nor for a copy that is tried and that nobody but root can read
    machine.sh(&format!("cp {settings} /root/settings; chmod 600 /root/settings"));
    let tried = by_hand("--settings /root/settings");
    assert!(tried.starts_with(told.trim()), "{told}: {tried}");
    let joe = machine.sh("setpriv --reuid 65534 --clear-groups patroni-agent-check 2>&1");
    let unread = "settings: /etc/default/patroni-agent-check: Permission denied (os error 13), so the defaults hold here";
    assert!(joe.contains(unread) && joe.contains("up ready # primary, running"), "{joe}");
    machine.sh(&format!("chmod 644 {settings}"));
    // a user that is not there yet is no reason not to answer
    let unlike = "user: uid 0; the units run each check as patroni-agent-check; not here: not in /etc/passwd";
    machine.sh("cp -p /etc/passwd /root/passwd; sed -i /^patroni-agent-check:/d /etc/passwd");
    let explained = by_hand("--explain");
    assert!(explained.contains(unlike) && explained.contains("up drain # hold: "), "{explained}");
    machine.sh("cp -p /root/passwd /etc/passwd");
    // its own options leave the file aside
    assert!(by_hand("--grace 0 replica").starts_with("up maint"));
    assert!(by_hand("").starts_with("up ready"));
    machine.file(settings, "export OPTIONS=\"--agent-send\"\n");
    assert!(by_hand("").contains("is not OPTIONS=..., so the units ignore it"));
    machine.file(settings, "OPTIONS=--agent-sent\n");
    let wrong = "/etc/default/patroni-agent-check: invalid option '--agent-sent'";
    assert!(by_hand("").contains(wrong), "{}", by_hand(""));
    machine.file(settings, "OPTIONS=--help\n");
    let wrong = "/etc/default/patroni-agent-check: --help and --version are for a terminal";
    assert!(by_hand("").contains(wrong), "{}", by_hand(""));
    machine.file(settings, "OPTIONS=--agent-send\n");
    let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
    machine.sh(&format!("mkdir {folder}"));
    machine.file(&format!("{folder}/none.conf"), "[Service]\nIPAddressDeny=any\n");
    machine.sh("systemctl daemon-reload");
    let told = machine.network(|| ask(5555, "leader"));
    assert_eq!(
        told,
        "down ready # Patroni 127.0.0.1:8008: no answer before the deadline (--timeout)\n"
    );
    let explained = by_hand("--explain leader");
    assert!(explained.contains("up ready"), "{explained}");
    let drop_in = "drop-ins, which hold for HAProxy's checks and not for this one: ";
    assert!(explained.contains(&format!("{drop_in}{folder}/none.conf\n")), "{explained}");
    machine.sh("systemctl stop patroni-agent-check.socket");
    assert!(by_hand("--explain").contains("nobody listens on port 5555"));
    let other = machine.network(|| TcpListener::bind(agent(5555)).expect("the port is free"));
    let foreign = "not systemd, but xinetd or another program listens on port 5555";
    assert!(by_hand("--explain").contains(foreign), "{}", by_hand("--explain"));
    drop(other);
    machine.sh(&format!("systemctl start {LISTEN}.socket"));
    assert!(machine.network(|| ask(5555, "primary")).starts_with("up ready"));
    let explained = by_hand("--explain");
    assert!(!explained.contains("listens on port 5555"), "{explained}");
}

/// A settings file, however it is written: what a check by hand makes of it is what systemd makes of it.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn by_hand_the_settings_are_those_of_systemd() {
    on_both("settings", |name, root| {
        let machine = Node::boot(name, root);
        for text in [
            "OPTIONS=replica",
            "OPTIONS = replica\n",
            "  OPTIONS\t=\treplica  \n",
            "# a comment that goes on \\\nOPTIONS=replica\n",
            "; and so does this \\\nOPTIONS=health\nOPTIONS=replica\n",
            "OPTIONS='replica'\n",
            "OPTIONS=\"replica\" # no comment\n",
            "OPTIONS=replica # no comment\n",
            "OPTIONS=--else \\\n drain replica\n",
            "OPTIONS=\"--else \\\ndrain replica\"\n",
            "OPTIONS='--else \\\ndrain replica'\n",
            "OPTIONS=\"--else\n down\n replica\"\n",
            "OPTIONS='--else' ' drain' replica\n",
            "OPTIONS=\"--else\" \"down\"\n",
            "OPTIONS=repl\\ica\n",
            "OPTIONS=\"repl\\ica\"\n",
            "OPTIONS='\"replica\"'\n",
            "OPTIONS=\"\\\"replica\\\"\"\n",
            "OPTIONS=\"\\$replica\"\n",
            "OPTIONS=$replica\n",
            "OPTIONS=--else \"drain\" replica\n",
            "OPTIONS=--else 'dra'in replica\n",
            "OPTIONS=replica\\\n",
            "OPTIONS=replica\\",
            "OPTIONS='replica",
            "OPTIONS=\"replica\n",
            "OPTIONS=replica\r\n",
            "OPTIONS=health\rOPTIONS=replica\n",
            "OPTIONS=replica\nOPTIONS=\n",
            "OPTIONS=replica\nOPTIONS\n",
            "export OPTIONS=replica\n",
            "OPTION=replica\n",
            "replica\n",
            "X=\"\nOPTIONS=replica\n\"\n",
            "OPTIONS=replica\nX='\u{e4}'\n",
            "=x\nOPTIONS=replica\n",
            "OPTIONS=\u{a0}replica\n",
            "OPTIONS=--else\u{a0}drain replica\n",
        ] {
            machine.file("/etc/default/patroni-agent-check", text);
            let told = machine.network(|| ask(5555, ""));
            let by_hand = machine.sh("patroni-agent-check 2>&1 || true");
            // what is wrong with the settings is for a terminal
            let wrong = told.strip_prefix("fail ready # patroni-agent-check: ");
            let same = match wrong {
                Some(wrong) => {
                    by_hand.contains(&wrong.trim_end().chars().take(40).collect::<String>())
                }
                None => by_hand.lines().any(|line| line == told.trim_end()),
            };
            assert!(same, "{name}: {text:?}: {told}{by_hand}");
        }
    });
}

/// As Debian's Patroni package sets it up: its REST API has the node's address only, and nobody has told the agent.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_patroni_on_the_nodes_address() {
    let node: SocketAddr = "10.99.0.1:5555".parse().expect("an address");
    on_both("address", |name, root| {
        for units in [UNITS, LISTEN] {
            let machine = Node::with_patroni(units, name, root, "10.99.0.1");
            let settings = |options: &str| {
                let text = format!("OPTIONS='{options}'\n");
                machine.file("/etc/default/patroni-agent-check", &text);
                machine.sh(&format!("systemctl try-restart {LISTEN}.service"));
            };
            machine.network(|| {
                assert_eq!(ask_at(node, "primary"), "up ready # primary, running, timeline 0\n", "{units} {name}");
                // nowhere but at the address that was asked; a question without an answer yet, so without a grace
                let refused = "down ready # Patroni 127.0.0.1:8008: connection refused (see restapi.listen and --url)\n";
                assert_eq!(ask(5555, "leader"), refused, "{units} {name}");
            });
            settings("--agent-send --url http://127.0.0.1:8008");
            let refused = "down ready # Patroni 127.0.0.1:8008: connection refused\n";
            assert_eq!(
                machine.network(|| ask_at(node, "master")),
                refused,
                "with --url nothing is guessed"
            );
            settings("--agent-send --url http://10.99.0.1:8008");
            let named = "up ready # primary, running, timeline 0 (Patroni 10.99.0.1:8008)\n";
            assert_eq!(
                machine.network(|| ask(5555, "master")),
                named,
                "the same settings on another node would be seen"
            );
            settings("--agent-send");
            machine.fence_for("10.99.0.1");
            assert!(
                machine.network(|| ask_at(node, "primary")).starts_with("up ready"),
                "{units} {name}"
            );
            for drop_in in ["lean", "strict"] {
                let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
                machine.sh(&format!("rm -rf {folder}; mkdir {folder}"));
                let file = common::file("units/examples").join(format!("{drop_in}.conf"));
                machine.put(&file, &format!("{folder}/{drop_in}.conf"));
                machine.sh("systemctl daemon-reload");
                assert!(
                    machine.network(|| ask_at(node, "primary")).starts_with("up ready"),
                    "{drop_in} {name}"
                );
            }
            // as xinetd starts it, and by hand
            machine.network(|| {
                let elsewhere = ["--memory-file", "/nonexistent/memory"];
                let (haproxy, stream) = common::connection("10.99.0.1:0");
                let mut child = common::start(common::Start::Inetd, stream, &elsewhere)
                    .spawn()
                    .expect("it starts");
                assert!(common::listen(haproxy).starts_with("up ready"));
                assert!(child.wait().expect("it ends").success());
                let mut by_hand = Command::new(AGENT);
                by_hand.args(elsewhere).stdin(Stdio::null());
                let said = by_hand.output().expect("it starts").stdout;
                assert!(said.starts_with(b"up ready"), "{}", String::from_utf8_lossy(&said));
            });
        }
    });
}

/// units/examples/container.conf, where systemd may make no namespace, or nothing in one.
#[test]
#[ignore = "needs root, systemd and strace: tests/run"]
fn a_container_without_namespaces() {
    on_both("container", |name, root| {
        let machine = Node::with(LISTEN, name, root);
        let service = format!("{LISTEN}.service");
        let folder = format!("/etc/systemd/system/{service}.d");
        // no namespace at all is the usual case, and systemd goes on without; here nothing may be mounted in it
        for (calls, status) in [("mount,mount_setattr,move_mount,fsmount", "226")] {
            machine
                .sh(&format!("rm -rf {folder}; systemctl stop {service}; systemctl daemon-reload"));
            let mut strace = Command::new("strace");
            strace.args(["-f", "-qq", "-o", "/dev/null", "-p", &machine.leader]);
            strace.args(["-e", &format!("inject={calls}:error=EPERM")]);
            let mut strace = strace.spawn().expect("strace; see tests/install");
            let traced = format!("/proc/{}/status", machine.leader);
            while fs::read_to_string(&traced).expect("PID 1").contains("TracerPid:\t0\n") {
                sleep(Duration::from_millis(5));
            }
            assert!(
                machine.try_sh(&format!("systemctl start {service}")).is_err(),
                "{calls} {name}"
            );
            let ended = machine.sh(&format!("systemctl show -P ExecMainStatus {service}"));
            assert_eq!(ended.trim(), status, "{calls} {name}");
            machine.sh(&format!("mkdir {folder}"));
            let file = common::file("units/examples/container.conf");
            machine.put(&file, &format!("{folder}/container.conf"));
            machine.sh("systemctl daemon-reload");
            let said = machine.network(|| check(5555));
            assert!(said.starts_with("up ready"), "{calls} {name}: {said}");
            let pid = Pid::from_child(&strace);
            kill_process(pid, Signal::TERM).expect("it is there");
            strace.wait().expect("it ends");
        }
    });
}

/// As on a machine with many containers, of which each has some.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn many_mounts() {
    on_both("mounts", |name, root| {
        for units in [UNITS, LISTEN] {
            let machine = Node::with(units, name, root);
            machine.sh(
                "mkdir /run/many; cd /run/many
                for i in $(seq 1600); do mkdir $i; echo \"/run/many/$i /run/many/$i none bind\"; done > /run/fstab
                mount -a -T /run/fstab",
            );
            let said = machine.network(|| check(5555));
            assert!(said.starts_with("up ready"), "{units} {name}: {said}");
        }
    });
}

/// By the commands of units/README.md.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_second_patroni() {
    let machine = Node::boot("second", "/");
    machine.network(|| {
        FakePatroni::on("127.0.0.1:8009", move |mut stream, _| {
            let request = common::read_request(&mut stream);
            let status = if request.starts_with("GET /health ") { 200 } else { 503 };
            let body = r#"{"state": "running", "role": "replica"}"#;
            let _ = stream.write_all(&common::http(status, body));
        })
    });
    let text = fs::read_to_string(common::file("units/README.md")).expect("units");
    let (_, section) = text.split_once("### Several Patronis on one machine").expect("its section");
    let (section, _) = section.split_once("\n## ").expect("the next one");
    let commands: Vec<_> = section.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    machine.sh(&format!("set -e\n{}", commands.join("\n")));
    let both = || machine.network(|| [5555, 5556].map(|port| ask(port, "primary")));
    let ready = "up ready # primary, running, timeline 0\n";
    assert_eq!(both(), [ready, "up maint # replica, running\n"]);
    machine.sh("echo drain second > /run/patroni-agent-check/hold-2");
    assert_eq!(machine.network(|| ask(5555, "primary")), ready);
    assert_eq!(machine.network(|| ask(5556, "health")), "up drain # hold: second\n");
    machine
        .sh("[ -s /run/patroni-agent-check/memory ] && [ -s /run/patroni-agent-check/memory-2 ]");
}

/// The fence, put up while the socket listens, with somebody who may ask and somebody who may not.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn who_may_ask() {
    on_both("fence", |name, root| {
        let machine = Node::boot(name, root);
        machine.fence();
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        let accepted = "systemctl show -P NAccepted patroni-agent-check.socket";
        assert_eq!(machine.sh(accepted).trim(), "1", "{name}");
        // their packets are dropped, so nobody of them gets through
        machine.network(|| flood(500));
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        assert_eq!(machine.sh(accepted).trim(), "2", "{name}");
    });
}

/// 3,000 connections a second from 128 addresses of both families, and 2,000 peers that say nothing.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_flood_before_the_fence() {
    for units in [UNITS, LISTEN] {
        for (name, root) in [("flood-12", "/"), ("flood-13", DEBIAN_13)] {
            let machine = Node::with(units, name, root);
            machine.sh("ip route add local fd00:66::/64 dev lo");
            machine.fence();
            let half = "--count 64 --rate 1500 --silent 1000 --seconds 3";
            let strangers = [
                machine.strangers(&format!("127.0.0.1 5555 --from 127.0.0.0/8 {half}")),
                machine.strangers(&format!("::1 5555 --from fd00:66::/64 {half}")),
            ];
            let (asked, missed, _) = machine.checks_among(strangers.into());
            assert!(asked >= 10 && missed == 0, "{units} {name}: {missed} of {asked} missed");
        }
    }
}

/// Without the fence, two addresses that keep open what they can get and say nothing: 43 a second would keep 64 places,
/// if each were kept for the whole `--timeout`.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn two_silent_strangers() {
    for (name, root) in [("silent-12", "/"), ("silent-13", DEBIAN_13)] {
        let machine = Node::boot(name, root);
        machine.put(&common::shipped(), "/usr/bin/patroni-agent-check");
        let silent = "127.0.0.1 5555 --from 127.0.0.0/8 --count 2 --rate 0 --silent 200 --pace 43 --seconds 5";
        let (asked, missed, _) = machine.checks_among(vec![machine.strangers(silent)]);
        assert!(asked >= 10 && missed == 0, "{name}: {missed} of {asked} missed");
    }
}

/// One health check hangs, which four HAProxies ask in 18 pools each, and a stranger as often as it can: the places that
/// are left suffice for another check, and nobody writes a line for those that are refused.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_stranger_while_patroni_hangs() {
    on_both("hangs", |name, root| {
        let machine = Node::boot(name, root);
        let settings = "OPTIONS='--agent-send --timeout 10s --url http://127.0.0.1:8010'\n";
        machine.file("/etc/default/patroni-agent-check", settings);
        machine.network(|| {
            FakePatroni::on("127.0.0.1:8010", move |mut stream, _| {
                let _ = match common::read_request(&mut stream).starts_with("GET /primary ") {
                    true => stream.write_all(&common::http(200, common::PRIMARY)),
                    false => stream.read_exact(&mut [0]), // until the agent gives up
                };
            })
        });
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        let lines = machine.journal_lines();
        let ask_from = |address| {
            let mut stream = connect_from(address)?;
            stream.write_all(b"replica\n").ok()?;
            Some(stream)
        };
        let reply = machine.network(|| {
            let haproxies = (1..=4).map(|number| Ipv4Addr::new(127, 0, 1, number));
            let asked: Vec<_> = haproxies.flat_map(|address| [address; 18]).map(ask_from).collect();
            let stranger: Vec<_> = (0..300).map(|_| ask_from(STRANGER)).collect();
            let reply = check(5555);
            drop((asked, stranger));
            reply
        });
        let places = machine.sh("systemctl show -P NConnections patroni-agent-check.socket");
        assert!(reply.starts_with("up ready"), "{name}: {reply:?}, {places}");
        assert_eq!(places.trim(), "104", "{name}: 4 times 18, and 32");
        assert_eq!(machine.journal_lines(), lines, "{name}");
    });
}

/// A kernel without Landlock or seccomp: the check goes on, and a human is told.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn an_old_kernel() {
    let machine = Node::boot("old-kernel", "/");
    let run = |missing: &str| {
        machine.sh(&format!(
            "systemd-run --quiet --wait --pipe -p SystemCallArchitectures=native -p SystemCallFilter='~{missing}' \
             -p SystemCallErrorNumber=ENOSYS /usr/bin/patroni-agent-check 2>&1"
        ))
    };
    let said = run("landlock_create_ruleset");
    let note = "patroni-agent-check: sandbox incomplete: Landlock: not supported by this kernel\n";
    assert!(said.starts_with(note) && said.contains("up ready # primary"), "{said}");
    let said = run("seccomp landlock_create_ruleset");
    assert!(
        said.contains("not supported by this kernel; seccomp: ")
            && said.contains("up ready # primary"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 3, "{said}");
}

/// glibc in a static program loads the modules that nsswitch.conf names, of another version than its own: SIGFPE.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn no_module_is_loaded() {
    let machine = Node::boot("names", DEBIAN_13);
    machine.put(&common::shipped(), "/usr/bin/patroni-agent-check");
    machine.file("/etc/hosts", "127.0.0.1 localhost\n127.0.0.2 pg1.example # here\n");
    for services in ["files compat dns", "files myhostname resolve [!UNAVAIL=return] dns"] {
        machine.file("/etc/nsswitch.conf", &format!("passwd: files\nhosts: {services}\n"));
        for (url, arguments, told) in [
            ("http://pg1.example:1", "", "Patroni pg1.example:1: connection refused"),
            (
                "http://nowhere.example:1",
                "--connect-to 127.0.0.2",
                "Patroni 127.0.0.2:1: connection refused",
            ),
            (
                "http://nowhere.example:1",
                "",
                "Patroni nowhere.example:1: not in /etc/hosts, and DNS is not used: give --connect-to ADDRESS",
            ),
        ] {
            let line = format!("patroni-agent-check --url {url} {arguments} 2> /dev/null; echo $?");
            assert_eq!(machine.sh(&line), format!("down ready # {told}\n2\n"), "{services}");
        }
    }
    for (made, why) in [
        ("true", "No such file or directory (os error 2)"),
        ("mkfifo /etc/hosts", "not a regular file"),
    ] {
        let line = format!(
            "rm -f /etc/hosts; {made}; timeout 5 patroni-agent-check --url http://pg1:1 2>&1 > /dev/null; echo $?"
        );
        let told = format!(
            "patroni-agent-check: primary: Patroni pg1:1: not in /etc/hosts ({why}), and DNS is not used: give \
             --connect-to ADDRESS\n2\n"
        );
        assert_eq!(machine.sh(&line), told);
    }
}

/// A check whose stderr is a stream to the journal waits for journald as soon as some thousands are in its queue.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_journal_that_hangs() {
    on_both("journal", |name, root| {
        let machine = Node::boot(name, root);
        let queue = || {
            let streams = ["-xlH", "src", "/run/systemd/journal/stdout"];
            let streams = machine.network(|| Command::new("ss").args(streams).output());
            let streams = String::from_utf8(streams.expect("ss").stdout).expect("UTF-8");
            streams.split_whitespace().nth(2).expect("a queue").parse::<u32>().expect("a number")
        };
        machine.sh("systemctl kill -s STOP --kill-whom=main systemd-journald");
        let before = queue();
        for _ in 0..20 {
            assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        }
        assert_eq!(queue(), before, "{name}: streams that wait for journald");
        assert!(machine.network(|| ask(5555, "junk")).starts_with("fail ready # "), "{name}");
        machine.sh("systemctl kill -s CONT --kill-whom=main systemd-journald");
        let heard =
            "journalctl --sync; journalctl -q --no-pager -o cat -p warning -t patroni-agent-check";
        let end = Instant::now() + Duration::from_secs(10);
        while !machine.sh(heard).contains("agent-send line not understood") {
            assert!(Instant::now() < end, "{name}: {}", machine.sh(heard));
        }
        // the name carries the process's number, which the sandbox does not tell any more
        let pids = "journalctl -q --no-pager -o json -t patroni-agent-check | grep -o '\"_\\?\\(SYSLOG_\\)\\?PID\":\"[0-9]*\"' | sort -u";
        let pids = machine.sh(pids);
        let number = |key: &str| {
            let mut lines = pids.lines().filter_map(|line| line.strip_prefix(key));
            lines.next().map(str::to_owned)
        };
        assert!(number("\"_PID\":").is_some(), "{name}: {pids}");
        assert_eq!(number("\"_PID\":"), number("\"SYSLOG_PID\":"), "{name}: {pids}");
    });
}

/// As after a restart of rsyslog. The sandbox keeps a process that runs from opening the new one, so another one must.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_system_log_that_is_made_anew() {
    on_both("log", |name, root| {
        let machine = Node::with(LISTEN, name, root);
        // where /dev/log leads to
        let dev_log = "/run/systemd/journal/dev-log";
        let log = || {
            machine.sh(&format!("rm -f {dev_log}"));
            let log = UnixDatagram::bind(machine.inside(dev_log)).expect("a log");
            machine.sh(&format!("chmod 666 {dev_log}"));
            log.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
            log
        };
        let junk = || {
            // it would be told once a minute
            machine.sh(": > /run/patroni-agent-check/memory");
            assert!(machine.network(|| ask(5555, "junk")).starts_with("fail ready # "), "{name}");
        };
        let hears = |log: &UnixDatagram| log.recv(&mut [0; 1024]).is_ok();
        let old = log();
        junk();
        assert!(hears(&old), "{name}");
        drop(old);
        let new = log();
        // lost, but no later one is
        junk();
        junk();
        assert!(hears(&new), "{name}");
    });
}

/// A module of the name services for which the directory is gone, which takes three seconds to see it.
const SLOW: &str = "#include <nss.h>\n#include <unistd.h>\nenum nss_status _nss_slow_initgroups_dyn(void) { sleep(3); return NSS_STATUS_UNAVAIL; }\n";

/// A check becomes its user without it, where systemd's `User=` asks it each time.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_slow_directory() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let [source, module] = ["slow.c", "libnss_slow.so.2"].map(|name| folder.join(name));
    fs::write(&source, SLOW).expect("written");
    let cc = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&module, &source]).status();
    assert!(cc.expect("cc").success());
    on_both("slow", |name, root| {
        let machine = Node::boot(name, root);
        machine.put(&module, "/usr/lib/x86_64-linux-gnu/libnss_slow.so.2");
        machine.file("/etc/nsswitch.conf", "passwd: files\ngroup: files slow\nhosts: files\n");
        let took = |wanted: &str| {
            let started = Instant::now();
            let reply = machine.network(|| check(5555));
            assert!(reply.starts_with(wanted), "{name}: {reply:?}");
            started.elapsed()
        };
        took("up ready");
        let own = took("up ready");
        // all of root is gone while it waits for the peer's line
        let status = machine.network(|| {
            let _silent = stranger().expect("a connection");
            let pid = "until pgrep -x patroni-agent-c; do sleep 0.02; done";
            let pid = machine.sh(&format!("timeout 5 sh -c '{pid}'"));
            let becoming = format!("until grep -q 'Seccomp:.2' /proc/{0}/status; do sleep 0.02; done; cat /proc/{0}/status", pid.trim());
            machine.sh(&format!("timeout 5 sh -c '{becoming}'"))
        });
        let line = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("a line");
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let id = |which| machine.sh(&format!("id -{which} patroni-agent-check")).trim().to_owned();
        assert_eq!(line("Uid:"), vec![id("u"); 4], "{name}");
        assert_eq!(line("Gid:"), vec![id("g"); 4], "{name}");
        assert_eq!(line("Groups:"), [id("g")], "{name}");
        for key in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(line(key), ["0000000000000000"], "{name}: {key}");
        }
        assert_eq!(line("NoNewPrivs:"), ["1"], "{name}");

        // a site's own user, in systemd's way
        let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
        machine.sh(&format!("mkdir {folder}"));
        machine.file(&format!("{folder}/user.conf"), "[Service]\nUser=patroni-agent-check\n");
        machine.sh("systemctl daemon-reload");
        let systemds = took("up ready");
        println!("{name}: {own:?}, with User= {systemds:?}");
        assert!(
            own < Duration::from_secs(1) && systemds > Duration::from_secs(3),
            "{name}: {own:?} {systemds:?}"
        );
        machine.sh(&format!("rm -r {folder}; systemctl daemon-reload"));

        // never as root instead
        for (line, why) in [
            (
                "d",
                "not in /etc/passwd: systemd-sysusers adds it, or, if another name service has it,",
            ),
            (
                "s/^\\(patroni-agent-check:[^:]*\\):[0-9]*:/\\1:0:/",
                "its line in /etc/passwd is root's, or invalid",
            ),
        ] {
            let edit = if line == "d" { "/^patroni-agent-check:/d" } else { line };
            machine.sh(&format!("cp -p /etc/passwd /root/passwd; sed -i '{edit}' /etc/passwd; : > /run/patroni-agent-check/memory"));
            let reply = machine.network(|| check(5555));
            let wanted =
                format!("fail ready # patroni-agent-check: --user patroni-agent-check: {why}");
            assert_eq!(reply.trim_end(), wanted.chars().take(113).collect::<String>(), "{name}");
            let left = fs::metadata(machine.inside("/run/patroni-agent-check/memory"))
                .expect("a memory")
                .len();
            assert_eq!(left, 0, "{name}: nothing is done as root");
            machine.sh("cp -p /root/passwd /etc/passwd");
        }

        // the process for many pays once, at its start
        machine.sh(&format!("systemctl stop {UNITS}.socket; systemctl start {LISTEN}.socket"));
        let first = took("up ready");
        let next = took("up ready");
        assert!(next < Duration::from_secs(1), "{name}: {first:?} {next:?}");
    });
}
