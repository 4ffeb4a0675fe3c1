//! A real HAProxy with the agent: what each verdict does to a server in each state. Needs HAProxy (tests/install);
//! tests/run runs it. HAPROXY names another HAProxy program.

use crate::common::{self, AGENT, FakePatroni, Start, http, start, stats_socket};
use crate::fake_nodes::{LONG, NodeState, Site};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Agents that systemd would show as failed.
static FAILED_UNITS: AtomicUsize = AtomicUsize::new(0);

/// Starts the agent for each connection, as systemd does.
fn launcher(address: &str, arguments: Arc<Mutex<Vec<String>>>) -> SocketAddr {
    let listener = TcpListener::bind(address).expect("a free port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (folder, memory) = common::memory();
            let arguments = arguments.lock().expect("no panic").clone();
            let more = ["--memory-file", &memory];
            let arguments: Vec<_> = arguments.iter().map(String::as_str).chain(more).collect();
            let mut command = start(Start::ListenFds, stream.expect("a connection"), &arguments);
            let child = command.spawn().expect("the agent starts");
            drop(command);
            std::thread::spawn(move || {
                let _folder = folder;
                if !child.wait_with_output().expect("an end").status.success() {
                    FAILED_UNITS.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    address
}

/// units/examples/haproxy.cfg with its variable replaced.
pub fn shipped() -> String {
    let text = fs::read_to_string(common::file("units/examples/haproxy.cfg")).expect("haproxy.cfg");
    let text = text.replace("\"${AGENT_PORT}\"", "5555").replace(":${AGENT_PORT}\"", ":5555");
    text.replace(" \"pg", " pg")
}

/// A port of this machine that nobody listens on yet.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("it").port()
}

pub struct HaProxy {
    process: Child,
    folder: TempDir,
}

impl HaProxy {
    /// Starts HAProxy with these `backend` sections.
    pub fn start(name: &str, backends: &str) -> Self {
        let text = format!(
            "global\n stats socket SOCKET level admin\ndefaults\n mode tcp\n timeout check 2s\n \
             timeout connect 2s\n timeout client 10s\n timeout server 10s\n{backends}",
        );
        Self::run(name, &text)
    }

    /// Starts HAProxy with this configuration, in which SOCKET stands for its stats socket.
    pub fn run(name: &str, text: &str) -> Self {
        let folder = common::folder(name);
        let configuration = folder.path().join("haproxy.cfg");
        let socket = folder.path().join("socket");
        let text = text.replace("SOCKET", socket.to_str().expect("UTF-8"));
        fs::write(&configuration, text).expect("a file");
        let log = fs::File::create(folder.path().join("log")).expect("a file");
        let mut command = Command::new(std::env::var_os("HAPROXY").unwrap_or("haproxy".into()));
        let process = command.arg("-db").arg("-f").arg(&configuration).stderr(log).spawn();
        let haproxy = HaProxy { process: process.expect("haproxy; see tests/install"), folder };
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&socket).is_err() {
            let log = || fs::read_to_string(haproxy.folder.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < end, "HAProxy does not start: {}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
        haproxy
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// The report of `patroni-pools status`.
    fn status(&self) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_patroni-pools"));
        command.arg("status").arg("-f").arg(self.folder.path().join("haproxy.cfg"));
        command.arg("--socket").arg(self.socket());
        let output = command.output().expect("patroni-pools");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    pub fn command(&self, command: &str) -> String {
        stats_socket::command(&self.socket(), command).expect("HAProxy")
    }

    pub fn stat(&self, pool: &str, server: &str, field: &str) -> String {
        stats_socket::stat(&self.socket(), pool, server, field).expect("HAProxy")
    }

    /// Waits until a field of a server or of BACKEND is so, and returns it.
    pub fn wait_until(
        &self,
        pool: &str,
        server: &str,
        field: &str,
        is: impl Fn(&str) -> bool,
    ) -> String {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let shown = self.stat(pool, server, field);
            if is(&shown) {
                return shown;
            }
            assert!(Instant::now() < end, "{pool}, {server}: {field} is {shown}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Operating state, administrative state, and what the agent said last.
    fn state(&self, backend: &str) -> (u32, u32, String) {
        let states = stats_socket::states(&self.socket()).expect("HAProxy");
        let state = states[&(backend.to_owned(), "pg".to_owned())];
        (state.operating, state.administrative, self.stat(backend, "pg", "last_agt"))
    }

    /// Waits until a server is in this state and its agent said this.
    fn wait_for_state(&self, backend: &str, operating: u32, administrative: u32, said: &str) {
        let expected = (operating, administrative, said.to_owned());
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let state = self.state(backend);
            if state == expected {
                return;
            }
            assert!(Instant::now() < end, "{backend}: {state:?} instead of {expected:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for HaProxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let failed = FAILED_UNITS.load(Ordering::SeqCst);
        assert!(failed == 0 || std::thread::panicking(), "{failed} failed units");
    }
}

// srv_op_state and srv_admin_state of "show servers state"
const STOPPED: u32 = 0;
const RUNNING: u32 = 2;
const NONE: u32 = 0;
const MAINT: u32 = 1;
const DRAIN: u32 = 8;

struct Case {
    name: &'static str,
    status: u16,
    body: &'static str,
    options: &'static [&'static str],
    operating: u32,
    administrative: u32,
    said: &'static str,
}

const READY: Case = Case {
    name: "ready",
    status: 200,
    body: r#"{"state": "running", "role": "primary", "timeline": 5}"#,
    options: &[],
    operating: RUNNING,
    administrative: NONE,
    said: "via agent : up (primary, running, timeline 5)",
};
const REPLICA: &str =
    r#"{"state": "running", "role": "replica", "replication_state": "streaming"}"#;
const OUT: Case = Case {
    name: "maint",
    status: 503,
    body: REPLICA,
    options: &[],
    operating: STOPPED,
    administrative: MAINT,
    said: "via agent : up (replica, streaming)",
};
const DRAINED: Case = Case {
    name: "drain",
    options: &["--else", "drain"],
    operating: RUNNING,
    administrative: DRAIN,
    ..OUT
};
const FAILED: Case = Case {
    name: "fail",
    status: 503,
    body: r#"{"state": "running", "role": "primary"}"#,
    options: &[],
    operating: STOPPED,
    administrative: NONE,
    said: "via agent : fail (primary without the leader lock)",
};
const CASES: [Case; 7] = [
    READY,
    OUT,
    DRAINED,
    FAILED,
    Case {
        name: "else down",
        options: &["--else", "down"],
        operating: STOPPED,
        administrative: NONE,
        said: "via agent : down (replica, streaming)",
        ..OUT
    },
    Case {
        name: "stopped",
        status: 503,
        body: r#"{"state": "stopped", "role": "primary"}"#,
        said: "via agent : stopped (primary, PostgreSQL is stopped)",
        ..FAILED
    },
    Case {
        name: "unreachable",
        options: &["--url", "http://127.0.0.1:1"],
        said: "via agent : down (Patroni 127.0.0.1:1: connection refused)",
        ..FAILED
    },
];

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn each_verdict_from_each_state() {
    let answer = Arc::new(Mutex::new(Vec::new()));
    let played = answer.clone();
    let patroni = FakePatroni::new(move |stream| {
        let _ = stream.write_all(&played.lock().expect("no panic"));
    });
    let arguments = Arc::new(Mutex::new(Vec::new()));
    let url = patroni.url();
    let play = |case: &Case| {
        *answer.lock().expect("no panic") = http(case.status, case.body);
        let options = ["--url", &url].into_iter().chain(case.options.iter().copied());
        *arguments.lock().expect("no panic") = options.map(str::to_owned).collect();
    };
    play(&READY);
    let agent = launcher("127.0.0.1:0", arguments.clone()).port();
    let agent6 = launcher("[::1]:0", arguments.clone()).port();
    let postgres = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = postgres.local_addr().expect("an address").port();
    std::thread::spawn(move || postgres.incoming().for_each(drop));
    let mut backends = String::new();
    for (name, options) in [
        ("plain", format!("agent-port {agent}")),
        ("checked", format!("agent-port {agent} check inter 100ms")),
        ("six", format!("agent-port {agent6} agent-addr ::1")),
    ] {
        let _ = writeln!(
            backends,
            "backend {name}\n server pg 127.0.0.1:{port} agent-check agent-inter 100ms {options}"
        );
    }
    let haproxy = HaProxy::start("verdicts", &backends);
    let reach = |case: &Case, from: &str| {
        play(case);
        for backend in ["plain", "checked", "six"] {
            println!("{from} -> {}: {backend}", case.name);
            haproxy.wait_for_state(backend, case.operating, case.administrative, case.said);
        }
    };
    for from in [READY, OUT, DRAINED, FAILED] {
        for to in &CASES {
            reach(&from, "any");
            reach(to, from.name);
        }
        // a reply that changes nothing shows its reason
        reach(&from, "any");
        let hold = ["--url", "http://127.0.0.1:1", "--unreachable", "keep"].map(str::to_owned);
        *arguments.lock().expect("no panic") = hold.to_vec();
        for backend in ["plain", "checked", "six"] {
            let said =
                "agent reports an error : !unreachable:_Patroni_127.0.0.1:1:_connection_refused";
            // a word that HAProxy does not know changes no state
            let (operating, administrative) = (from.operating, from.administrative);
            haproxy.wait_for_state(backend, operating, administrative, said);
        }
    }
    // one "up ready" undoes what an operator or another agent has left
    reach(&READY, "any");
    for command in ["agent down", "state drain", "state maint"] {
        for backend in ["plain", "checked"] {
            assert_eq!(haproxy.command(&format!("set server {backend}/pg {command}")), "\n");
        }
        reach(&READY, command);
    }
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn pools_on_one_port_by_agent_send() {
    let patroni = FakePatroni::on("127.0.0.1:0", |mut stream, requests| {
        let request = common::read_request(&mut stream);
        let status = if request.starts_with("GET /primary ") { 503 } else { 200 };
        requests.lock().expect("no panic").push(request);
        let _ = stream.write_all(&http(status, REPLICA));
    });
    let arguments = ["--agent-send", "--url", &patroni.url()].map(str::to_owned).to_vec();
    let agent = launcher("[::]:0", Arc::new(Mutex::new(arguments))).port();
    let mut backends = String::new();
    for (name, line) in [
        ("write", r#""primary\n""#),
        ("read", r#""replica?lag=16MB\n""#),
        ("drain", r#""primary drain\n""#),
        ("typo", r#""primry\n""#),
        ("open", r#""primary""#),
    ] {
        // HAProxy waits for agent-inter, so longer than the agent for a newline
        let options = format!("agent-check agent-inter 3s agent-port {agent} agent-send {line}");
        let _ = writeln!(backends, "backend {name}\n server pg 127.0.0.1:1 {options}");
    }
    let haproxy = HaProxy::start("pools", &backends);
    haproxy.wait_for_state("write", STOPPED, MAINT, "via agent : up (replica, streaming)");
    haproxy.wait_for_state("read", RUNNING, NONE, "via agent : up (replica, streaming)");
    haproxy.wait_for_state("drain", RUNNING, DRAIN, "via agent : up (replica, streaming)");
    let said = "via agent : fail (agent-send line: unknown health check 'primry'; \
                try primary, replica, read-only (all: --help))";
    haproxy.wait_for_state("typo", STOPPED, NONE, said);
    let said = r#"via agent : fail (no agent-send line within 300 ms: end it with a newline, as in agent-send "primary\n")"#;
    haproxy.wait_for_state("open", STOPPED, NONE, said);
    for request in patroni.requests() {
        let asked = request.lines().next().expect("a request");
        assert!(
            ["GET /primary HTTP/1.1", "GET /replica?lag=16MB HTTP/1.1"].contains(&asked),
            "{asked}"
        );
    }
}

/// With the commands of docs/haproxy.md and docs/operate.md.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_server_that_is_added_at_run_time() {
    let patroni = FakePatroni::primary();
    let options = ["--agent-send", "--url", &patroni.url()].map(str::to_owned).to_vec();
    let agent = launcher("127.0.0.1:0", Arc::new(Mutex::new(options))).port();
    let haproxy = HaProxy::start("added", "backend postgres-write\n balance roundrobin\n");
    let commands = common::commands("docs/haproxy.md", "Servers added at run time", "printf")
        .replace("10.0.0.14", "127.0.0.1")
        .replace("8008", &patroni.address.port().to_string())
        .replace("5555", &agent.to_string())
        .replace("/run/haproxy/admin.sock", haproxy.socket().to_str().expect("UTF-8"));
    let said = Command::new("sh").args(["-ec", &commands]).output().expect("sh and socat");
    assert!(said.status.success(), "{said:?}");
    let stat = |field| haproxy.stat("postgres-write", "pg4", field);
    let until_up = || {
        let end = Instant::now() + Duration::from_secs(20);
        // HAProxy has nothing in last_agt while it asks the agent
        while stat("status") != "UP" || !stat("last_agt").contains("primary, running") {
            assert!(Instant::now() < end, "{}: {said:?}", haproxy.command("show servers state"));
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    until_up();
    let operate = |begins| {
        let heading = "Take a server out of one HAProxy";
        for command in common::commands("docs/operate.md", heading, begins).lines() {
            haproxy.command(&command.replace("pg1", "pg4"));
        }
    };
    operate("disable agent");
    let end = Instant::now() + 3 * Duration::from_millis(500); // its agent-inter
    while Instant::now() < end {
        assert_eq!(stat("status"), "MAINT");
    }
    operate("enable agent");
    until_up();
    for command in ["disable agent", "disable health", "set server", "del server"] {
        let state = if command == "set server" { " state maint" } else { "" };
        haproxy.command(&format!("{command} postgres-write/pg4{state}"));
    }
    assert!(!haproxy.command("show servers state").contains(" pg4 "));
}

/// The commented-out lines of units/examples/haproxy.cfg and the alerts of units/examples/prometheus-rules.yml.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn reads_fall_back_to_the_primary_and_alerts_see_it() {
    let exporter = "frontend metrics\n mode http\n bind :8404\n http-request use-service prometheus-exporter\nlisten stats";
    let room = "server waiting-room 127.0.0.1 backup no-check no-agent-check enabled maxconn 0\n    # To send reads to the primary when no replica is left, use this line instead of the waiting room above:\n    #";
    let site = Site::new("fallback", &[(room, ""), ("listen stats", exporter)]);
    let get = || {
        let mut stream = TcpStream::connect(site.metrics).expect("HAProxy");
        let _ = stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    let reads_reach = |nodes: &[char]| {
        let answer = || Site::client(site.reads, LONG).answer.expect("served");
        let end = Instant::now() + Duration::from_secs(20);
        while !nodes.contains(&answer()) {
            assert!(Instant::now() < end, "reads do not reach {nodes:?}");
        }
        assert!((0..10).all(|_| nodes.contains(&answer())));
    };
    let up = |proxy: &str| {
        let exported = get();
        let up = exported.lines().filter(|line| {
            line.starts_with(&format!("haproxy_server_status{{proxy=\"{proxy}\""))
                && !line.contains("waiting-room") // as the alerts do
                && line.ends_with("state=\"UP\"} 1")
        });
        up.count()
    };
    reads_reach(&['2', '3']);
    let hold =
        |held| site.nodes[1..].iter().for_each(|node| NodeState::set(&node.state.held_drain, held));
    hold(true);
    reads_reach(&['1']);
    assert_eq!(up("postgres-read"), 0, "while reads are on the primary");
    hold(false);
    for replica in ["pg2", "pg3"] {
        site.wait_until("postgres-read", replica, "status", |status| status.starts_with("UP"));
    }
    reads_reach(&['2', '3']);
    assert_eq!(up("postgres-read"), 2);
    assert_eq!(up("postgres-write"), 1);

    println!("a weight of 0 is exported, and the command of its alert undoes it");
    let weight = |weight: &str| {
        let line =
            format!("haproxy_server_weight{{proxy=\"postgres-write\",server=\"pg1\"}} {weight}\n");
        get().contains(&line)
    };
    assert!(weight("1"));
    site.command("set server postgres-write/pg1 weight 0");
    assert!(weight("0"));
    assert_eq!(up("postgres-write"), 1, "no other alert is raised by it");
    site.command("set server postgres-write/pg1 weight 100%");
    assert!(weight("1"));

    println!("what the alerts and the dashboard name is exported");
    let exported = get();
    let example = |name: &str| {
        fs::read_to_string(common::file(&format!("units/examples/{name}"))).expect("a file")
    };
    let rules = example("prometheus-rules.yml");
    let words = |text: &str| {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        words.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let (named, shown) = (words(&rules), words(&example("grafana-dashboard.json")));
    let metrics: Vec<_> = named.union(&shown).filter(|word| word.starts_with("haproxy_")).collect();
    assert!(metrics.len() > 5, "{metrics:?}");
    let major = site.command("show info");
    let version = major.lines().find_map(|line| line.strip_prefix("Version: ")).expect("a version");
    let numbers: Vec<u32> = version.split(['.', '-']).map_while(|n| n.parse().ok()).collect();
    for metric in metrics {
        let there = exported.lines().any(|line| line.starts_with(&format!("{metric}{{")));
        let since_3_2 = metric == "haproxy_server_agent_status";
        assert_eq!(there, !since_3_2 || numbers[..2] >= [3, 2][..], "{metric} in {version}");
    }
    for (label, values) in [
        ("state", rules.split("state=\"").skip(1).collect::<Vec<_>>()),
        ("proxy", rules.split("proxy: ").skip(1).collect()),
    ] {
        let first = |value: &&str| value.split(['"', '}']).next().expect("a value").to_owned();
        let values: BTreeSet<_> = values.iter().map(first).collect();
        assert!(values.len() > 2, "{values:?}");
        for value in values {
            assert!(exported.contains(&format!("{label}=\"{value}\"")), "{label} {value}");
        }
    }
}

/// The pools of units/examples/haproxy.cfg with one server: HAProxy keeps the last reply of a silent agent. HAProxy's own
/// check ends that if Patroni answers 503, and not if Patroni answers 200. `agents` shows the silence.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_silent_agent_is_bounded_by_haproxys_own_check() {
    let agent_speaks = Arc::new(AtomicBool::new(true));
    let patroni_agrees = Arc::new(AtomicBool::new(true));
    let speaks = Arc::clone(&agent_speaks);
    let agent = FakePatroni::raw(move |mut stream| {
        if speaks.load(Ordering::SeqCst) {
            let _ = stream.write_all(b"up ready\n");
        }
    });
    let agrees = Arc::clone(&patroni_agrees);
    let patroni = FakePatroni::new(move |stream| {
        let _ = stream.write_all(&http(if agrees.load(Ordering::SeqCst) { 200 } else { 503 }, ""));
    });
    let shipped = shipped();
    let pool = |name: &str| {
        let (_, section) = shipped.split_once(&format!(" {name}\n")).expect("the pool");
        let section = section.split("\n\n").next().expect("its lines");
        let lines = section.lines().filter(|line| {
            !["bind", "server pg", "tcp-request", "acl", "use_backend"]
                .iter()
                .any(|word| line.contains(word))
        });
        let lines = lines.collect::<Vec<_>>().join("\n");
        format!("backend {name}\n{lines}\n server pg 127.0.0.1:5555\n")
    };
    let default_server =
        shipped.lines().find(|line| line.contains("default-server agent-check")).expect("it");
    let configuration =
        [default_server.to_owned(), pool("postgres-write"), pool("postgres-read"), pool("agents")]
            .join("\n")
            .replace("inter 2s", "inter 50ms")
            .replace("inter 500ms", "inter 50ms")
            .replace("inter 5s", "inter 50ms")
            .replace("5555", &agent.address.port().to_string())
            .replace("8008", &patroni.address.port().to_string());
    let haproxy = HaProxy::start("silent", &configuration);
    // 4 only remembers "disabled" in the configuration
    let shown = |pool| (haproxy.state(pool).0, haproxy.state(pool).1 & !4);
    let until = |pool, wanted| {
        let end = Instant::now() + Duration::from_secs(20);
        while shown(pool) != wanted {
            assert!(Instant::now() < end, "{pool}: {:?} instead of {wanted:?}", shown(pool));
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    for (pool, asked) in
        [("postgres-write", "OPTIONS /primary "), ("postgres-read", "OPTIONS /replica?lag=16MB ")]
    {
        agent_speaks.store(true, Ordering::SeqCst);
        patroni_agrees.store(true, Ordering::SeqCst);
        until(pool, (RUNNING, NONE));
        until("agents", (RUNNING, NONE));
        agent_speaks.store(false, Ordering::SeqCst);
        let checks = || {
            let requests = patroni.requests();
            requests.iter().filter(|request| request.starts_with(asked)).count()
        };
        let (before, end) = (checks(), Instant::now() + Duration::from_secs(20));
        while checks() < before + 10 {
            assert!(Instant::now() < end, "{pool}: no {asked}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(shown(pool), (RUNNING, NONE), "{pool}: Patroni agrees");
        until("agents", (STOPPED, NONE));
        patroni_agrees.store(false, Ordering::SeqCst);
        until(pool, (STOPPED, NONE));
    }
}

/// An agent may take longer than its interval, as while Patroni hangs: up to the `timeout check` of
/// units/examples/haproxy.cfg.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn haproxy_waits_for_a_slow_reply() {
    let agent = FakePatroni::raw(|mut stream| {
        std::thread::sleep(Duration::from_millis(1200));
        let _ = stream.write_all(b"up ready\n");
    });
    let shipped = shipped();
    let mut defaults = "defaults\n mode tcp\n".to_owned();
    for line in shipped.lines().filter(|line| line.trim_start().starts_with("timeout c")) {
        let _ = writeln!(defaults, "{line}");
    }
    let port = agent.address.port();
    let pool = format!(
        "backend pool\n server pg 127.0.0.1:1 agent-check agent-port {port} agent-inter 500ms disabled\n"
    );
    let haproxy = HaProxy::start("slow", &(defaults + " timeout server 10s\n" + &pool));
    let end = Instant::now() + Duration::from_secs(20);
    while haproxy.state("pool").0 != RUNNING {
        assert!(Instant::now() < end, "{:?}", haproxy.state("pool"));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The pools of units/examples/haproxy.cfg: the write pool's agents are asked four times as often as the read pool's, and a
/// client finds another server if one refuses it, as a primary does that has just stopped.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn the_write_pool_asks_often_and_a_client_finds_the_other_server() {
    let shipped = shipped();
    let (_, defaults) = shipped.split_once("\ndefaults\n").expect("its defaults");
    let (defaults, _) = defaults.split_once("\n\n").expect("their end");
    let defaults: Vec<_> = defaults.lines().filter(|line| !line.contains("server-state")).collect();
    let mut configuration = format!("defaults\n{}\n", defaults.join("\n"));
    let pool_settings = |name: &str| {
        let (_, pool) = shipped.split_once(&format!("\nlisten {name}\n")).expect("the pool");
        pool.lines().find(|line| line.starts_with("    default-server ")).expect("its settings")
    };
    let asked = ["postgres-write", "postgres-read"].map(|name| {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let agent = FakePatroni::raw(move |mut stream| {
            count.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(b"up ready\n");
        });
        let port = agent.address.port();
        let _ = writeln!(
            configuration,
            "backend {name}\n{}\n server pg 127.0.0.1:1 no-check agent-port {port}",
            pool_settings(name)
        );
        asked
    });
    let server = FakePatroni::raw(|mut stream| drop(stream.write_all(b"here")));
    let bind = free_port();
    let _ = writeln!(
        configuration,
        "listen clients\n bind 127.0.0.1:{bind}\n default-server no-check no-agent-check enabled\n \
         server refuses 127.0.0.1:1\n server serves 127.0.0.1:{}",
        server.address.port()
    );
    let _haproxy = HaProxy::start("often", &configuration);
    for number in 0..6 {
        let mut stream = TcpStream::connect(("127.0.0.1", bind)).expect("HAProxy");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert_eq!(answer, "here", "client {number}");
    }
    let end = Instant::now() + Duration::from_secs(60);
    let [writes, reads] = asked.each_ref().map(|asked| asked.load(Ordering::SeqCst));
    while asked[1].load(Ordering::SeqCst) < reads + 4 {
        assert!(Instant::now() < end, "the read pool is not asked");
        std::thread::sleep(Duration::from_millis(20));
    }
    let often = asked[0].load(Ordering::SeqCst) - writes;
    assert!(often >= 8, "{often} questions of the write pool in four of the read pool");
}

/// The write pool of units/examples/haproxy.cfg and its reserve.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn the_reserve_takes_writes_for_a_silent_agent_and_for_nobody_else() {
    let site = Site::new("reserve", &[("timeout connect 200ms", "timeout connect 20ms")]);
    let write = || Site::client(site.writes, Duration::from_millis(200));
    let reaches = |node: Option<char>| {
        let end = Instant::now() + Duration::from_secs(20);
        while write().answer != node {
            assert!(Instant::now() < end, "not {node:?}:\n{}", site.command("show servers state"));
            std::thread::sleep(Duration::from_millis(20));
        }
        let until = Instant::now() + Duration::from_millis(500); // ten checks
        while Instant::now() < until {
            assert_eq!(write().answer, node);
        }
    };
    let [pg1, pg2, _] = site.nodes.each_ref().map(|node| &node.state);
    let until = |pool, server, status: &str| {
        site.wait_until(pool, server, "status", |shown| shown.starts_with(status));
    };
    reaches(Some('1'));
    println!("a hold while all agents answer: no client is served");
    for hold in [&pg1.held_drain, &pg1.held_maint] {
        NodeState::set(hold, true);
        reaches(None);
        NodeState::set(hold, false);
        reaches(Some('1'));
    }

    println!("a hold while a standby's agent is silent: no client is served");
    NodeState::set(&pg2.silent, true);
    until("agents", "pg2", "DOWN");
    reaches(Some('1'));
    for hold in [&pg1.held_drain, &pg1.held_maint] {
        NodeState::set(hold, true);
        until("reserve", "pg1", "DRAIN");
        reaches(None);
        println!("also if the agent of the held node falls silent");
        NodeState::set(&pg1.silent, true);
        until("agents", "pg1", "DOWN");
        reaches(None);
        NodeState::set(&pg1.silent, false);
        NodeState::set(hold, false);
        reaches(Some('1'));
    }
    println!(
        "a primary that drains gets no new session, and the reserve takes over after a promotion"
    );
    NodeState::set(&pg1.stopping, true);
    until("postgres-write", "pg1", "DRAIN");
    until("reserve", "pg1", "NOLB");
    reaches(None);
    site.set_primary(1, true);
    reaches(Some('2'));
    site.set_primary(1, false);
    NodeState::set(&pg1.stopping, false);
    reaches(Some('1'));
    site.set_primary(0, false);
    until("reserve", "pg1", "NOLB");
    reaches(None);
    site.set_primary(1, true);
    reaches(Some('2'));
    let said = site.status();
    let wanted =
        "postgres-write: no server is UP; if an agent is silent, clients go to reserve/pg2\n";
    assert!(said.contains(wanted), "{said}");

    println!("two primaries, as Patroni says: no client is served");
    NodeState::set(&pg1.silent, true);
    site.set_primary(0, true);
    reaches(None);
    site.set_primary(0, false);
    NodeState::set(&pg1.silent, false);
    reaches(Some('2'));

    println!("the primary loses the leader lock: sessions through the reserve end");
    let mut session = write().stream;
    session.set_read_timeout(Some(LONG)).expect("a socket");
    NodeState::set(&pg2.lock_lost, true);
    let end = session.read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{end:?}");
    NodeState::set(&pg2.lock_lost, false);
    reaches(Some('2'));

    println!("the primary's agent answers again, and a session through the reserve stays");
    let mut session = write().stream;
    NodeState::set(&pg2.silent, false);
    until("postgres-write", "pg2", "UP");
    assert!(session.read(&mut [0]).is_err(), "it is open, and nothing to read");

    println!("while an agent says READY, the reserve is not used, whichever agent is silent");
    NodeState::set(&pg1.silent, true);
    until("agents", "pg1", "DOWN");
    let used = site.stat("reserve", "BACKEND", "stot");
    reaches(Some('2'));
    assert_eq!(site.stat("reserve", "BACKEND", "stot"), used);
}

/// The states of the servers in the backend `reserve` of units/examples/haproxy.cfg for Patroni's answers. Each of its
/// `expect` lines is needed for one of them.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn the_reserve_tells_a_broken_primary_from_another_role() {
    let said = |state: &str, role: &str| format!(r#"{{"state": "{state}", "role": "{role}"}}"#);
    let answers = [
        (200, said("running", "primary"), "L7OK", "UP"),
        (200, said("running", "master"), "L7OK", "UP"),
        (503, said("running", "replica"), "L7OKC", "NOLB"),
        (503, said("running", "standby_leader"), "L7OKC", "NOLB"),
        (503, said("stopping", "primary"), "L7OKC", "NOLB"),
        (503, said("starting", "replica"), "L7OKC", "NOLB"),
        (503, said("running", "primary"), "L7STS", "DOWN"),
        (503, said("crashed", "primary"), "L7STS", "DOWN"),
        (503, said("start failed", "replica"), "L7STS", "DOWN"),
        (404, "<h1>another program</h1>".to_owned(), "L7STS", "DOWN"),
    ];
    let shipped = shipped();
    let (_, section) = shipped.split_once("backend reserve\n").expect("the reserve");
    let (section, _) = section.split_once("\n\n").expect("its end");
    let lines = section.lines().filter(|line| !line.contains(" server "));
    let patronis =
        answers.each_ref().map(|(status, body, ..)| FakePatroni::answering(http(*status, body)));
    let mut pools = String::new();
    // with all lines, and without each of these
    let expected = lines.clone().filter(|line| line.contains("http-check expect"));
    let backends: Vec<_> = std::iter::once("").chain(expected).enumerate().collect();
    for (number, left_out) in &backends {
        let lines: Vec<_> = lines.clone().filter(|line| line != left_out).collect();
        let _ = writeln!(pools, "backend reserve{number}\n{}", lines.join("\n"));
        for (server, patroni) in patronis.iter().enumerate() {
            let port = patroni.address.port();
            let _ =
                writeln!(pools, " server pg{server} 127.0.0.1:{port} port {port} check inter 50ms");
        }
    }
    let haproxy = HaProxy::start("states", &pools);
    for (number, left_out) in backends {
        let pool = format!("reserve{number}");
        let found = answers.iter().enumerate().map(|(server, (_, _, wanted, status))| {
            let server = format!("pg{server}");
            // "* " while a check is under way
            let found =
                haproxy.wait_until(&pool, &server, "check_status", |found| !found.contains("INI"));
            if number == 0 {
                haproxy.wait_until(&pool, &server, "status", |found| found == *status);
            }
            found.trim_start_matches("* ") == *wanted
        });
        assert_eq!(found.filter(|same| !same).count() > 0, number > 0, "without {left_out}");
    }
}

/// HAProxy's own regression test of agents sends words of all classes at once. This agent always sends two, and HAProxy gets
/// them in one segment, from one write.
#[test]
#[ignore = "needs strace: tests/run"]
fn a_reply_is_one_write() {
    let patroni = FakePatroni::answering(http(200, READY.body));
    let trace = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("trace");
    let (client, stream) = common::connection("127.0.0.1:0");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-s", "200", "-e", "trace=write,writev,sendto,sendmsg,shutdown", "-o"]);
    let (_folder, memory) = common::memory();
    strace.arg(&trace).args([AGENT, "--url", &patroni.url(), "--memory-file", &memory]);
    strace.stdin(OwnedFd::from(stream));
    let child = strace.spawn().expect("strace; see tests/install");
    drop(strace);
    assert_eq!(common::listen(client), common::READY);
    assert!(child.wait_with_output().expect("an end").status.success());
    let trace = fs::read_to_string(trace).expect("the trace");
    let calls: Vec<_> = trace.lines().filter(|line| !line.contains("+++")).collect();
    let [ask, say, shut] = calls[..] else { panic!("{trace}") };
    assert!(ask.contains("GET /primary HTTP/1.1"), "{trace}");
    assert!(say.contains(r#"up ready # primary, running, timeline 5\n""#), "{trace}");
    assert!(shut.contains("SHUT_WR"), "{trace}");
}
