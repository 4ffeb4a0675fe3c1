//! A real HAProxy with units/examples/haproxy.cfg, in front of three fake nodes. HAPROXY names another HAProxy program.

use crate::common::{FakePatroni, http};
use crate::haproxy::{HaProxy, shipped};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// PostgreSQL refuses more sessions, as with `max_connections = 100`.
const SESSIONS: usize = 97;

#[derive(Default)]
pub struct NodeState {
    pub primary: AtomicBool,
    pub lock_lost: AtomicBool,
    /// an operator's hold with `drain`
    pub held_drain: AtomicBool,
    /// an operator's hold with `maint`
    pub held_maint: AtomicBool,
    /// the agent does not answer
    pub silent: AtomicBool,
    /// Patroni stops PostgreSQL on purpose
    pub stopping: AtomicBool,
    /// Patroni does not answer
    pub gone: AtomicBool,
    /// PostgreSQL refuses connections
    pub stopped: AtomicBool,
    pub sessions: AtomicUsize,
}

impl NodeState {
    pub fn set(what: &AtomicBool, value: bool) {
        what.store(value, Ordering::SeqCst);
    }

    fn get(what: &AtomicBool) -> bool {
        what.load(Ordering::SeqCst)
    }
}

/// A node with Patroni, an agent, and a PostgreSQL that sends the node's number, or `!` if it has too many clients.
pub struct Node {
    pub state: Arc<NodeState>,
    _patroni: FakePatroni,
    _agent: FakePatroni,
}

impl Node {
    fn new(network: usize, number: u8, primary: bool) -> Node {
        let state = Arc::new(NodeState { primary: primary.into(), ..NodeState::default() });
        let address = move |port: u16| format!("{}.{number}:{port}", addresses(network));
        let now = state.clone();
        let patroni = FakePatroni::on(&address(8008), move |mut stream, _| {
            let request = crate::common::read_request(&mut stream);
            if NodeState::get(&now.gone) {
                return;
            }
            let primary = NodeState::get(&now.primary);
            let (role, other) =
                if primary { ("primary", "/replica") } else { ("replica", "/primary") };
            let state = if NodeState::get(&now.stopping) { "stopping" } else { "running" };
            let body = format!(r#"{{"state": "{state}", "role": "{role}"}}"#);
            let none = request.contains(other) || primary && NodeState::get(&now.lock_lost);
            let status = if none { 503 } else { 200 };
            let _ = stream.write_all(&http(status, &body));
        });
        let now = state.clone();
        let agent = FakePatroni::on(&address(5555), move |mut stream, _| {
            let mut line = [0; 64];
            let read = stream.read(&mut line).unwrap_or(0);
            let role = if NodeState::get(&now.primary) { "primary" } else { "replica" };
            let asked = line[..read].starts_with(role.as_bytes());
            let held = NodeState::get(&now.held_drain) || NodeState::get(&now.held_maint);
            let word = if line[..read].starts_with(b"hold") {
                if held { "up drain # hold\n" } else { "up ready # no hold\n" }
            } else if asked && NodeState::get(&now.lock_lost) {
                "fail ready\n"
            } else if asked && (NodeState::get(&now.held_drain) || NodeState::get(&now.stopping)) {
                "up drain # hold\n"
            } else if asked && !NodeState::get(&now.held_maint) {
                "up ready\n"
            } else {
                "up maint\n"
            };
            if !NodeState::get(&now.silent) {
                let _ = stream.write_all(word.as_bytes());
            }
        });
        let now = state.clone();
        std::thread::spawn(move || serve(number, &address(5432), &now));
        Node { state, _patroni: patroni, _agent: agent }
    }
}

/// The addresses of a site's nodes without the last number. Other test processes have others.
fn addresses(network: usize) -> String {
    format!("127.{}.{network}", 100 + std::process::id() % 100)
}

fn serve(number: u8, address: &str, state: &Arc<NodeState>) {
    loop {
        let listener = TcpListener::bind(address).expect("PostgreSQL's port");
        listener.set_nonblocking(true).expect("a socket");
        while !NodeState::get(&state.stopped) {
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let state = state.clone();
            std::thread::spawn(move || {
                stream.set_nonblocking(false).expect("a socket");
                let full = state.sessions.fetch_add(1, Ordering::SeqCst) >= SESSIONS;
                let answer = if full { b'!' } else { b'0' + number };
                let _ = stream.write_all(&[answer]);
                while !full && stream.read(&mut [0; 8]).is_ok_and(|read| read > 0) {}
                state.sessions.fetch_sub(1, Ordering::SeqCst);
            });
        }
        drop(listener);
        while NodeState::get(&state.stopped) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// HAProxy and its nodes. At first, pg1 is the primary.
pub struct Site {
    haproxy: HaProxy,
    pub nodes: [Node; 3],
    pub writes: SocketAddr,
    pub reads: SocketAddr,
    pub page: SocketAddr,
    pub metrics: SocketAddr,
}

impl Deref for Site {
    type Target = HaProxy;

    fn deref(&self) -> &HaProxy {
        &self.haproxy
    }
}

/// A client's session: what PostgreSQL sent, nothing if HAProxy closed the session, and when.
#[derive(Debug)]
pub struct Session {
    pub answer: Option<char>,
    pub at: Instant,
    pub stream: TcpStream,
}

impl Site {
    /// Starts HAProxy with the shipped file after these replacements. It asks ten times as often, so that tests are short.
    pub fn new(name: &str, replaced: &[(&str, &str)]) -> Site {
        static NETWORKS: AtomicUsize = AtomicUsize::new(1); // a fake node never ends
        let network = NETWORKS.fetch_add(1, Ordering::SeqCst);
        // two HAProxies on one address would share a port, and neither would fail
        let address = format!("{}.4", addresses(network));
        let [writes, reads, page, metrics] = [5000, 5001, 7000, 8404]
            .map(|port| format!("{address}:{port}").parse().expect("an address"));
        let nodes = [1, 2, 3].map(|number| Node::new(network, number, number == 1));
        let mut text =
            shipped().replace("inter 2s", "inter 200ms").replace("inter 500ms", "inter 50ms");
        for (from, to) in replaced {
            text = text.replace(from, to);
        }
        for number in 1..=3 {
            let address = format!(" {}.{number}:", addresses(network));
            text = text.replace(&format!(" pg{number}:"), &address);
        }
        let text = text
            .replace("/run/haproxy/admin.sock mode 660", "SOCKET")
            .replace("bind 127.0.0.1:", "bind :")
            .replace("bind :", &format!("bind {address}:"));
        let lines = text.lines().filter(|line| {
            !["user ", "group ", "log /dev", "server-state-file"]
                .iter()
                .any(|word| line.trim().starts_with(word))
        });
        let haproxy = HaProxy::run(name, &(lines.collect::<Vec<_>>().join("\n") + "\n"));
        let site = Site { haproxy, nodes, writes, reads, page, metrics };
        site.wait_until("postgres-write", "pg1", "status", |status| status.starts_with("UP"));
        site.wait_until("postgres-read", "pg3", "status", |status| status.starts_with("UP"));
        site.wait_until("reserve", "pg3", "status", |status| status == "NOLB");
        site
    }

    /// Opens a session. The client sends first, as all clients of PostgreSQL do, and gives up after `patience`.
    pub fn client(pool: SocketAddr, patience: Duration) -> Session {
        let mut stream = TcpStream::connect(pool).expect("HAProxy");
        stream.set_read_timeout(Some(patience)).expect("a socket");
        let mut answer = [0];
        let _ = stream.write_all(b"let me in");
        let answer = stream.read_exact(&mut answer).is_ok().then_some(char::from(answer[0]));
        Session { answer, at: Instant::now(), stream }
    }

    /// Starts this many clients at once, which keep their sessions for this long.
    pub fn clients(&self, number: usize, keeps: Duration) -> Vec<JoinHandle<Session>> {
        let pool = self.writes;
        let client = move || {
            let session = Self::client(pool, LONG);
            std::thread::sleep(keeps);
            let _ = session.stream.shutdown(std::net::Shutdown::Both);
            session
        };
        (0..number).map(|_| std::thread::spawn(client)).collect()
    }

    /// Makes a node the primary or a standby.
    pub fn set_primary(&self, node: usize, primary: bool) {
        NodeState::set(&self.nodes[node].state.primary, primary);
    }

    pub fn lose_primary(&self) {
        self.set_primary(0, false);
        self.wait_until("postgres-write", "pg1", "status", |status| status == "MAINT");
    }

    pub fn wait_for_clients(&self, number: usize) {
        self.wait_until("postgres-write", "BACKEND", "scur", |waiting| {
            waiting == number.to_string()
        });
    }
}

pub fn join_clients(clients: Vec<JoinHandle<Session>>) -> Vec<Session> {
    clients.into_iter().map(|client| client.join().expect("a session")).collect()
}

pub const SHORT: Duration = Duration::from_millis(20);
pub const MOMENT: Duration = Duration::from_millis(500);
pub const LONG: Duration = Duration::from_secs(30);
