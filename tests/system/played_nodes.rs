//! The whole of units/examples/haproxy.cfg on a real HAProxy, in front of three nodes that are played here. HAPROXY names
//! another HAProxy.

use crate::common::{FakePatroni, http};
use crate::haproxy::{HaProxy, free_port, shipped};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// PostgreSQL refuses more sessions, as with `max_connections = 100`.
const SESSIONS: usize = 97;

#[derive(Default)]
pub struct Truth {
    pub primary: AtomicBool,
    pub lock_lost: AtomicBool,
    /// an operator's hold, `drain` or `maint`
    pub held: AtomicBool,
    pub cut: AtomicBool,
    pub silent: AtomicBool,
    /// Patroni stops it on purpose
    pub stopping: AtomicBool,
    /// Patroni answers nothing
    pub gone: AtomicBool,
    /// PostgreSQL refuses connections
    pub stopped: AtomicBool,
    pub sessions: AtomicUsize,
}

impl Truth {
    pub fn set(what: &AtomicBool, value: bool) {
        what.store(value, Ordering::SeqCst);
    }

    fn is(what: &AtomicBool) -> bool {
        what.load(Ordering::SeqCst)
    }
}

/// A node with Patroni and an agent, and a PostgreSQL that says its number, or `!` if it has too many clients.
pub struct Node {
    pub is: Arc<Truth>,
    _patroni: FakePatroni,
    _agent: FakePatroni,
}

impl Node {
    fn new(network: usize, number: u8, primary: bool) -> Node {
        let is = Arc::new(Truth { primary: primary.into(), ..Truth::default() });
        let address = move |port: u16| format!("{}.{number}:{port}", addresses(network));
        let now = is.clone();
        let patroni = FakePatroni::on(&address(8008), move |mut stream, _| {
            let request = crate::common::read_request(&mut stream);
            if Truth::is(&now.gone) {
                return;
            }
            let primary = Truth::is(&now.primary);
            let (role, other) =
                if primary { ("primary", "/replica") } else { ("replica", "/primary") };
            let state = if Truth::is(&now.stopping) { "stopping" } else { "running" };
            let body = format!(r#"{{"state": "{state}", "role": "{role}"}}"#);
            let none = request.contains(other) || primary && Truth::is(&now.lock_lost);
            let status = if none { 503 } else { 200 };
            let _ = stream.write_all(&http(status, &body));
        });
        let now = is.clone();
        let agent = FakePatroni::on(&address(5555), move |mut stream, _| {
            let mut line = [0; 64];
            let read = stream.read(&mut line).unwrap_or(0);
            let role = if Truth::is(&now.primary) { "primary" } else { "replica" };
            let asked = line[..read].starts_with(role.as_bytes());
            let held = Truth::is(&now.held) || Truth::is(&now.cut);
            let word = if line[..read].starts_with(b"hold") {
                if held { "up drain # hold\n" } else { "up ready # no hold\n" }
            } else if asked && Truth::is(&now.lock_lost) {
                "fail ready\n"
            } else if asked && (Truth::is(&now.held) || Truth::is(&now.stopping)) {
                "up drain # hold\n"
            } else if asked && !Truth::is(&now.cut) {
                "up ready\n"
            } else {
                "up maint\n"
            };
            if !Truth::is(&now.silent) {
                let _ = stream.write_all(word.as_bytes());
            }
        });
        let now = is.clone();
        std::thread::spawn(move || serve(number, &address(5432), &now));
        Node { is, _patroni: patroni, _agent: agent }
    }
}

/// The addresses of a site's nodes, but for the last number: other processes test at the same time.
fn addresses(network: usize) -> String {
    format!("127.{}.{network}", 100 + std::process::id() % 100)
}

fn serve(number: u8, address: &str, is: &Arc<Truth>) {
    loop {
        let listener = TcpListener::bind(address).expect("PostgreSQL's port");
        listener.set_nonblocking(true).expect("a socket");
        while !Truth::is(&is.stopped) {
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let is = is.clone();
            std::thread::spawn(move || {
                stream.set_nonblocking(false).expect("a socket");
                let full = is.sessions.fetch_add(1, Ordering::SeqCst) >= SESSIONS;
                let answer = if full { b'!' } else { b'0' + number };
                let _ = stream.write_all(&[answer]);
                while !full && stream.read(&mut [0; 8]).is_ok_and(|read| read > 0) {}
                is.sessions.fetch_sub(1, Ordering::SeqCst);
            });
        }
        drop(listener);
        while Truth::is(&is.stopped) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// HAProxy and its nodes. At first, pg1 is the primary.
pub struct Site {
    haproxy: HaProxy,
    pub nodes: [Node; 3],
    pub writes: u16,
    pub reads: u16,
    pub page: u16,
}

impl Deref for Site {
    type Target = HaProxy;

    fn deref(&self) -> &HaProxy {
        &self.haproxy
    }
}

/// A client's session: what PostgreSQL said, or nothing if HAProxy closed it, and how long that took.
#[derive(Debug)]
pub struct Session {
    pub answer: Option<char>,
    pub at: Instant,
    pub stream: TcpStream,
}

impl Site {
    /// With the shipped file, in which some words are replaced. HAProxy asks ten times as often, so that tests are short.
    pub fn new(name: &str, replaced: &[(&str, &str)]) -> Site {
        static NETWORKS: AtomicUsize = AtomicUsize::new(1); // what plays a node never ends
        let network = NETWORKS.fetch_add(1, Ordering::SeqCst);
        let [writes, reads, page] = [(); 3].map(|()| free_port());
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
            .replace(":5000", &format!("127.0.0.1:{writes}"))
            .replace(":5001", &format!("127.0.0.1:{reads}"))
            .replace(":7000", &format!(":{page}"));
        let lines = text.lines().filter(|line| {
            !["user ", "group ", "log /dev", "server-state-file"]
                .iter()
                .any(|word| line.trim().starts_with(word))
        });
        let haproxy = HaProxy::run(name, &(lines.collect::<Vec<_>>().join("\n") + "\n"));
        let site = Site { haproxy, nodes, writes, reads, page };
        site.until("postgres-write", "pg1", "status", |status| status.starts_with("UP"));
        site.until("postgres-read", "pg3", "status", |status| status.starts_with("UP"));
        site.until("reserve", "pg3", "status", |status| status == "NOLB");
        site
    }

    /// A client, which sends its first words at once, as all clients do, and gives up after `patience`.
    pub fn client(port: u16, patience: Duration) -> Session {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("HAProxy");
        stream.set_read_timeout(Some(patience)).expect("a socket");
        let mut answer = [0];
        let _ = stream.write_all(b"let me in");
        let answer = stream.read_exact(&mut answer).is_ok().then_some(char::from(answer[0]));
        Session { answer, at: Instant::now(), stream }
    }

    /// Starts so many clients at once, each of which keeps its session for this long.
    pub fn clients(&self, number: usize, keeps: Duration) -> Vec<JoinHandle<Session>> {
        let port = self.writes;
        let client = move || {
            let session = Self::client(port, LONG);
            std::thread::sleep(keeps);
            let _ = session.stream.shutdown(std::net::Shutdown::Both);
            session
        };
        (0..number).map(|_| std::thread::spawn(client)).collect()
    }

    /// Turns the primary into a standby, or back.
    pub fn turn(&self, node: usize, primary: bool) {
        Truth::set(&self.nodes[node].is.primary, primary);
    }

    pub fn no_primary(&self) {
        self.turn(0, false);
        self.until("postgres-write", "pg1", "status", |status| status == "MAINT");
    }

    pub fn waiting(&self, number: usize) {
        self.until("postgres-write", "BACKEND", "scur", |waiting| waiting == number.to_string());
    }
}

pub fn answers(clients: Vec<JoinHandle<Session>>) -> Vec<Session> {
    clients.into_iter().map(|client| client.join().expect("a session")).collect()
}

pub const SHORT: Duration = Duration::from_millis(20);
pub const MOMENT: Duration = Duration::from_millis(500);
pub const LONG: Duration = Duration::from_secs(30);
