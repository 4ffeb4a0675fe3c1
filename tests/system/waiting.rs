//! A client waits while its pool has no server (units/examples/haproxy.cfg): the whole file on a real HAProxy, in front of
//! three nodes that are played here. HAPROXY names another HAProxy.

use crate::common::{FakePatroni, http};
use crate::haproxy::{HaProxy, free_port, shipped};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// PostgreSQL refuses more sessions, as with `max_connections = 100`.
const SESSIONS: usize = 97;

#[derive(Default)]
struct Truth {
    primary: AtomicBool,
    held: AtomicBool,
    silent: AtomicBool,
    /// PostgreSQL refuses connections
    stopped: AtomicBool,
    sessions: AtomicUsize,
}

impl Truth {
    fn set(what: &AtomicBool, value: bool) {
        what.store(value, Ordering::SeqCst);
    }

    fn is(what: &AtomicBool) -> bool {
        what.load(Ordering::SeqCst)
    }
}

/// A node with Patroni and an agent, and a PostgreSQL that says its number, or `!` if it has too many clients.
struct Node {
    is: Arc<Truth>,
    _patroni: FakePatroni,
    _agent: FakePatroni,
}

impl Node {
    fn new(network: usize, number: u8, primary: bool) -> Node {
        let is = Arc::new(Truth { primary: primary.into(), ..Truth::default() });
        let address = move |port: u16| format!("127.1.{network}.{number}:{port}");
        let now = is.clone();
        let patroni = FakePatroni::on(&address(8008), move |mut stream, _| {
            let request = crate::common::read_request(&mut stream);
            let primary = Truth::is(&now.primary);
            let (role, other) =
                if primary { ("primary", "/replica") } else { ("replica", "/primary") };
            let body = format!(r#"{{"state": "running", "role": "{role}"}}"#);
            let status = if request.contains(other) { 503 } else { 200 };
            let _ = stream.write_all(&http(status, &body));
        });
        let now = is.clone();
        let agent = FakePatroni::on(&address(5555), move |mut stream, _| {
            let mut line = [0; 64];
            let read = stream.read(&mut line).unwrap_or(0);
            let role = if Truth::is(&now.primary) { "primary" } else { "replica" };
            let word = match (line[..read].starts_with(role.as_bytes()), Truth::is(&now.held)) {
                (true, true) => "up drain # hold\n",
                (true, false) => "up ready\n",
                (false, _) => "up maint\n",
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

/// HAProxy and its nodes; pg1 is the primary.
struct Site {
    haproxy: HaProxy,
    nodes: [Node; 3],
    writes: u16,
    reads: u16,
    page: u16,
}

impl Deref for Site {
    type Target = HaProxy;

    fn deref(&self) -> &HaProxy {
        &self.haproxy
    }
}

/// A client's session: what PostgreSQL said, or nothing if HAProxy closed it, and how long that took.
#[derive(Debug)]
struct Session {
    answer: Option<char>,
    at: Instant,
    stream: TcpStream,
}

impl Site {
    /// With the shipped file, in which some words are replaced. HAProxy asks ten times as often, so that tests are short.
    fn new(name: &str, replaced: &[(&str, &str)]) -> Site {
        static NETWORKS: AtomicUsize = AtomicUsize::new(1); // what plays a node never ends
        let network = NETWORKS.fetch_add(1, Ordering::SeqCst);
        let [writes, reads, page] = [(); 3].map(|()| free_port());
        let nodes = [1, 2, 3].map(|number| Node::new(network, number, number == 1));
        let mut text =
            shipped().replace("inter 2s", "inter 200ms").replace("inter 500ms", "inter 50ms");
        for (from, to) in replaced {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        for number in 1..=3 {
            text = text.replace(&format!(" pg{number}:"), &format!(" 127.1.{network}.{number}:"));
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

    /// A client, which sends its first words at once as all do, and gives up after `patience`.
    fn client(port: u16, patience: Duration) -> Session {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("HAProxy");
        stream.set_read_timeout(Some(patience)).expect("a socket");
        let mut answer = [0];
        let _ = stream.write_all(b"let me in");
        let answer = stream.read_exact(&mut answer).is_ok().then_some(char::from(answer[0]));
        Session { answer, at: Instant::now(), stream }
    }

    /// So many clients at once, each of which keeps its session for a moment.
    fn clients(&self, number: usize) -> Vec<JoinHandle<Session>> {
        let port = self.writes;
        let client = move || {
            let session = Self::client(port, Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(20));
            let _ = session.stream.shutdown(std::net::Shutdown::Both);
            session
        };
        (0..number).map(|_| std::thread::spawn(client)).collect()
    }

    /// The primary is none any more, or is one again.
    fn turn(&self, node: usize, primary: bool) {
        Truth::set(&self.nodes[node].is.primary, primary);
    }

    fn no_primary(&self) {
        self.turn(0, false);
        self.until("postgres-write", "pg1", "status", |status| status == "MAINT");
    }

    fn waiting(&self, number: usize) {
        self.until("write-sessions", "BACKEND", "scur", |waiting| waiting == number.to_string());
    }
}

fn answers(clients: Vec<JoinHandle<Session>>) -> Vec<Session> {
    clients.into_iter().map(|client| client.join().expect("a session")).collect()
}

const MOMENT: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(30);

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn clients_wait_for_the_first_server_and_reach_it_at_once() {
    let site = Site::new("waits", &[]);
    site.no_primary();
    let clients = site.clients(80);
    site.waiting(80);
    std::thread::sleep(MOMENT);
    site.turn(1, true);
    site.until("postgres-write", "pg2", "status", |status| status.starts_with("UP"));
    let up = Instant::now();
    let sessions = answers(clients);
    let last = sessions.iter().map(|session| session.at).max().expect("a session");
    println!("the last of them {:?} after the server was UP", last - up);
    assert!(sessions.iter().all(|session| session.answer == Some('2')), "{sessions:?}");
    assert!(last - up < Duration::from_secs(1));

    println!("reads, too");
    let replica = |number: usize, status: &'static str| {
        site.until("postgres-read", &format!("pg{}", number + 1), "status", |shown| {
            shown.starts_with(status)
        });
    };
    for node in 0..3 {
        Truth::set(&site.nodes[node].is.held, true);
    }
    (0..3).for_each(|node| replica(node, if node == 1 { "MAINT" } else { "DRAIN" }));
    let reads = site.reads;
    let client = std::thread::spawn(move || Site::client(reads, LONG));
    site.until("read-sessions", "BACKEND", "scur", |waiting| waiting == "1");
    std::thread::sleep(MOMENT);
    assert!(!client.is_finished());
    Truth::set(&site.nodes[2].is.held, false);
    assert_eq!(client.join().expect("a session").answer, Some('3'));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_that_postgresql_refuses_waits() {
    // HAProxy's own check would notice, too
    let site = Site::new("refused", &[]);
    Truth::set(&site.nodes[0].is.stopped, true);
    std::thread::sleep(Duration::from_millis(50));
    let clients = site.clients(20);
    site.waiting(20);
    std::thread::sleep(MOMENT);
    assert!(site.stat("postgres-write", "pg1", "status").starts_with("UP"));
    println!("now HAProxy hears of it, and then of another primary");
    site.no_primary();
    std::thread::sleep(MOMENT);
    site.turn(1, true);
    let sessions = answers(clients);
    assert!(sessions.iter().all(|session| session.answer == Some('2')), "{sessions:?}");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_that_gives_up_leaves_nothing() {
    let site = Site::new("gives-up", &[]);
    site.no_primary();
    let sessions: Vec<_> =
        (0..50).map(|_| Site::client(site.writes, Duration::from_millis(1))).collect();
    site.waiting(50);
    drop(sessions);
    let gone = Instant::now();
    site.waiting(0);
    println!("forgotten after {:?}", gone.elapsed());
    assert!(gone.elapsed() < Duration::from_secs(3), "ten seconds is how long they might wait");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_full_room_refuses_and_blocks_nobody_else() {
    let site = Site::new(
        "full",
        &[
            ("ge 1000", "ge 100"),
            ("    maxconn 2000\n", "    maxconn 150\n"),
            ("    maxconn 7000\n", "    maxconn 200\n"),
        ],
    );
    let others_work = || {
        let read = Site::client(site.reads, LONG).answer;
        assert!(matches!(read, Some('2' | '3')), "{read:?}");
        let mut page = TcpStream::connect(("127.0.0.1", site.page)).expect("HAProxy");
        page.set_read_timeout(Some(LONG)).expect("a socket");
        page.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("a request");
        let mut shown = String::new();
        page.read_to_string(&mut shown).expect("the statistics page");
        assert!(shown.contains("postgres-write"));
    };
    println!("too many for the pool: the rest is not even accepted");
    let filled: Vec<_> = (0..250)
        .map(|_| TcpStream::connect(("127.0.0.1", site.writes)).expect("HAProxy"))
        .collect();
    site.until("postgres-write", "FRONTEND", "scur", |sessions| sessions == "150");
    others_work();
    drop(filled);
    site.waiting(0);

    println!("too many who wait");
    site.no_primary();
    let clients = site.clients(100);
    site.waiting(100);
    let refused = Instant::now();
    for _ in 0..20 {
        assert_eq!(Site::client(site.writes, LONG).answer, None);
    }
    assert!(refused.elapsed() < Duration::from_secs(5), "at once");
    others_work();
    site.turn(0, true);
    assert!(answers(clients).iter().all(|session| session.answer == Some('1')));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn nobody_waits_where_no_agent_can_be_reached() {
    let site = Site::new("alone", &[]);
    site.no_primary();
    site.nodes.iter().for_each(|node| Truth::set(&node.is.silent, true));
    for node in ["pg1", "pg2", "pg3"] {
        site.until("agents", node, "status", |status| status == "DOWN");
    }
    for port in [site.writes, site.reads] {
        // the read pool keeps the last answers
        if port == site.reads {
            let answer = Site::client(port, LONG).answer;
            assert!(matches!(answer, Some('2' | '3')), "{answer:?}");
            continue;
        }
        let session = Site::client(port, MOMENT);
        assert_eq!(session.answer, None);
        let closed = Instant::now();
        assert!(
            (&session.stream).read(&mut [0]).is_ok_and(|read| read == 0)
                || closed.elapsed() < MOMENT
        );
    }
    println!("but Patroni has a primary for the reserve");
    site.turn(1, true);
    site.until("reserve", "pg2", "status", |status| status.starts_with("UP"));
    assert_eq!(Site::client(site.writes, LONG).answer, Some('2'));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn those_who_waited_are_not_too_many_clients() {
    let site = Site::new("many", &[]);
    site.no_primary();
    let clients = site.clients(300);
    site.waiting(300);
    site.turn(1, true);
    let sessions = answers(clients);
    let refused = sessions.iter().filter(|session| session.answer != Some('2')).count();
    assert_eq!(refused, 0, "of 300");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_waits_in_the_reserve_for_a_node_whose_agent_is_silent() {
    let site = Site::new("silent", &[]);
    Truth::set(&site.nodes[1].is.silent, true);
    site.until("agents", "pg2", "status", |status| status == "DOWN");
    site.no_primary();
    site.until("reserve", "pg1", "status", |status| status == "NOLB");
    let clients = site.clients(20);
    site.until("reserve-sessions", "BACKEND", "scur", |waiting| waiting == "20");
    std::thread::sleep(MOMENT);
    site.turn(1, true);
    let sessions = answers(clients);
    assert!(sessions.iter().all(|session| session.answer == Some('2')), "{sessions:?}");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_node_that_is_held_gets_nothing_new_until_the_hold_ends() {
    let site = Site::new("held", &[]);
    let mut old = Site::client(site.writes, LONG).stream;
    let is = &site.nodes[0].is;
    Truth::set(&is.held, true);
    site.until("write-sessions", "pg1", "status", |status| status.starts_with("DRAIN"));
    let sessions = || is.sessions.load(Ordering::SeqCst);
    let clients = site.clients(20);
    site.waiting(21);
    let end = Instant::now() + 2 * MOMENT;
    while Instant::now() < end {
        assert_eq!(sessions(), 1, "the one from before");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(old.write_all(b"I am still here").is_ok());
    Truth::set(&is.held, false);
    assert!(answers(clients).iter().all(|session| session.answer == Some('1')));
    old.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket");
    let open = old.read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(open, Err(ErrorKind::WouldBlock)), "{open:?}");
}
