//! A machine with the shipped units, a fake Patroni and HAProxy, and the clients that ask its agent.

use crate::common::machine::Machine;
use crate::common::{self, AGENT, FakePatroni, lab, stats_socket};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Deref;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

pub const DEBIAN_13: &str = "/var/cache/patroni-agent-check/trixie";
pub const INTERVAL: Duration = Duration::from_secs(2);
/// `timeout check` of units/examples/haproxy.cfg.
const PATIENCE: Duration = Duration::from_secs(2);

/// The usual pair and the listening pair of units.
pub const UNITS: &str = "patroni-agent-check";
pub const LISTEN: &str = "patroni-agent-check-listen";

/// A machine with the shipped units, a fake Patroni, and HAProxy.
pub struct Node {
    pub machine: Machine,
    /// Which pair of units is in use.
    units: &'static str,
    /// The timeline in Patroni's answers.
    timeline: Arc<AtomicU64>,
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

    /// Boots with a Patroni that listens only on this address, which the machine gets.
    pub fn with_patroni(units: &'static str, name: &str, root: &str, address: &str) -> Node {
        let node = Node { machine: Machine::boot(name, root), units, timeline: Arc::default() };
        lab("machine", &["agent", &node.name, AGENT]).expect("it is installed");
        // for tests that replace the program
        node.put(Path::new(AGENT), "/root/patroni-agent-check");
        node.sh("chmod 755 /root");
        if address != "127.0.0.1" {
            node.sh(&format!("ip address add {address}/32 dev lo"));
        }
        let next = node.timeline.clone();
        node.network(|| {
            FakePatroni::on(&format!("{address}:8008"), move |mut stream, _| {
                common::read_request(&mut stream);
                let timeline = next.load(Ordering::SeqCst);
                let body =
                    format!(r#"{{"state": "running", "role": "primary", "timeline": {timeline}}}"#);
                let _ = stream.write_all(&common::http(200, &body));
            })
        });
        node.sh(&format!("systemctl start {units}.socket"));
        node
    }

    /// Runs a closure in a thread in this machine's network.
    pub fn network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let network = File::open(format!("/proc/{}/ns/net", self.host_pid)).expect("its network");
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter it");
                work()
            });
            inside.join().expect("no panic")
        })
    }

    /// Copies an access list with the machine's loopback addresses, while the socket listens.
    pub fn allow_itself(&self) {
        self.allow("127.0.0.1 ::1");
    }

    pub fn allow(&self, addresses: &str) {
        let text =
            fs::read_to_string(common::file("units/examples/access-list.conf")).expect("units");
        let folder = format!("/etc/systemd/system/{}.socket.d", self.units);
        self.sh(&format!("mkdir {folder}"));
        self.file(&format!("{folder}/access-list.conf"), &text.replace("localhost", addresses));
        self.sh("systemctl daemon-reload");
    }

    /// Starts tests/lab/flood in this machine's network. The flood ends by itself.
    pub fn start_flood(&self, arguments: &str) -> Child {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.host_pid, "--net"]).arg(common::file("tests/lab/flood"));
        command.args(arguments.split(' ')).stdout(Stdio::piped());
        let mut child = command.spawn().expect("nsenter");
        let mut begun = [0; 9];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut begun).expect("flooding");
        child
    }

    /// Makes agent checks as HAProxy does, ten a second, until the floods end. Returns how many were made, how many got
    /// no reply in time, and the longest time.
    pub fn check_during(&self, mut floods: Vec<Child>) -> (usize, usize, Duration) {
        let (mut asked, mut missed, mut longest) = (0, 0, Duration::ZERO);
        while floods.iter_mut().any(|child| child.try_wait().expect("a child").is_none()) {
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
        for child in floods {
            let said = child.wait_with_output().expect("a child").stdout;
            println!("{}: {}", self.name, String::from_utf8_lossy(&said).trim());
        }
        println!("{}: {asked} checks, {missed} missed, {longest:?} at most", self.name);
        (asked, missed, longest)
    }

    pub fn start_haproxies(&self, count: u32) {
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

    /// The agent's last reply, as HAProxy shows it.
    fn last_reply(&self) -> String {
        let socket = self.inside("/run/haproxy1.sock");
        // HAProxy may still be starting
        stats_socket::stat(&socket, "pool", "pg", "last_agt").unwrap_or_default()
    }

    /// Asserts that one check leaves its record.
    pub fn assert_remembers(&self, what: &str) {
        let memory = "/run/patroni-agent-check/memory";
        self.sh(&format!(": > {memory}"));
        assert!(self.network(|| check(5555)).starts_with("up ready"), "{what}");
        let left = fs::metadata(self.inside(memory)).expect("a memory").len();
        assert_ne!(left, 0, "{what}: nothing is left for the next check");
    }

    /// Asserts that the next reply reaches HAProxy within two intervals and the time of one check.
    pub fn assert_alive(&self, after: &str) {
        // a reply that HAProxy cannot have got before
        let wanted = format!("timeline {})", self.timeline.fetch_add(1, Ordering::SeqCst) + 1);
        let started = Instant::now();
        while !self.last_reply().contains(&wanted) {
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

    pub fn assert_nothing_lingers(&self) {
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
    pub fn pid_1_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.host_pid)).expect("proc");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
    }

    pub fn journal_lines(&self) -> usize {
        self.sh("journalctl --sync; journalctl -q --no-pager | wc -l")
            .trim()
            .parse()
            .expect("a number")
    }
}

pub fn agent(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// An address that no HAProxy has.
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);

pub fn stranger() -> Option<TcpStream> {
    connect_from(STRANGER)
}

pub fn connect_from(address: Ipv4Addr) -> Option<TcpStream> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::empty(), None);
    let socket = socket.expect("a socket");
    bind(&socket, &SocketAddr::from((address, 0))).expect("another address");
    // An access list drops the packets, and the kernel would try for two minutes. Without one, systemd 257 may leave the
    // backlog full for two seconds, and a SYN that the kernel drops is sent again after one, two or three.
    set_socket_timeout(&socket, Timeout::Send, Some(Duration::from_secs(10))).expect("a limit");
    connect(&socket, &agent(5555)).ok()?;
    Some(TcpStream::from(socket))
}

pub fn check(port: u16) -> String {
    ask(port, "primary")
}

pub fn ask(port: u16, line: &str) -> String {
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

/// Makes this many connections, within two seconds if this machine can, and waits for none.
pub fn flood(count: u32) {
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
        // time for the connections to arrive
        if made.len() > 300 {
            made.pop_front();
        }
    }
    println!("{count} connections in {:.1} s", started.elapsed().as_secs_f64());
}

/// Runs a test on Debian 12 and on Debian 13 at the same time, since it mostly waits.
pub fn on_both(name: &str, test: impl Fn(&str, &str) + Sync) {
    std::thread::scope(|scope| {
        for (debian, root) in [(12, "/"), (13, DEBIAN_13)] {
            let test = &test;
            scope.spawn(move || test(&format!("{name}-{debian}"), root));
        }
    });
}
