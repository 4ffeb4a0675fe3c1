//! Strangers on the machine: wherever a stranger listens, the agent asks Patroni alone. In a network of its own, since the
//! port without `--url` is 8008.

use crate::common::{self, AGENT, Start};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Users of every Debian; the first is Patroni's here.
const PATRONI: u32 = 33;
const NOBODY: u32 = 65534;
const DAEMON: u32 = 1;
const READY: &str = "up ready # primary, running\n";

/// A REST API that this user runs at this address until it is dropped.
struct Api(Child);

impl Api {
    fn new(uid: u32, address: &str, role: &str) -> Api {
        let script = r#"
import http.server, socket, sys
class Api(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"state": "running", "role": "%s"}' % sys.argv[2].encode()
        self.send_response(200 if sys.argv[2] == "primary" else 503)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = Server((sys.argv[1], 8008), Api)
print("there", flush=True)
server.serve_forever()
"#;
        let mut child = Command::new("python3")
            .args(["-c", script, address, role])
            .uid(uid)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        assert_eq!(line, "there\n", "{uid} at {address}");
        Api(child)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The agent behind one port on all addresses, as a listener and as a process for one check, with one memory file.
struct Agent {
    folder: TempDir,
    listener: TcpListener,
    many: Child,
}

impl Agent {
    fn start() -> Agent {
        let folder = common::folder("strangers");
        let listener = TcpListener::bind("[::]:5555").expect("a free port");
        let stream = TcpStream::from(OwnedFd::from(listener.try_clone().expect("a descriptor")));
        let memory = common::path_in(&folder, "memory");
        let many = common::start(Start::ListenFds, stream, &options(&memory, "3s")).spawn();
        Agent { many: many.expect("the agent starts"), folder, listener }
    }

    fn memory(&self) -> String {
        common::path_in(&self.folder, "memory")
    }

    /// The reply to a HAProxy that asks on this address. A listener and a process for one check must agree.
    fn tells(&self, address: &str) -> String {
        self.asked(address, "primary", "3s")
    }

    fn asked(&self, address: &str, check: &str, grace: &str) -> String {
        let send = |stream: &mut TcpStream| writeln!(stream, "{check}").expect("it listens");
        let ip: std::net::IpAddr = address.parse().expect("an address");
        let mut many = TcpStream::connect((ip, 5555)).expect("the agent");
        send(&mut many);
        let many = common::listen(many);
        let one = TcpListener::bind(SocketAddr::new(ip, 0)).expect("a free port");
        let mut haproxy = TcpStream::connect(one.local_addr().expect("it")).expect("it listens");
        let (stream, _) = one.accept().expect("a connection");
        let memory = self.memory();
        let mut child = common::start(Start::Inetd, stream, &options(&memory, grace))
            .spawn()
            .expect("the agent");
        send(&mut haproxy);
        let alone = common::listen(haproxy);
        child.wait().expect("its end");
        let words = |reply: &str| reply.split(['#', ':']).next().map(str::to_owned);
        assert_eq!(words(&alone), words(&many), "{address}: {many}");
        alone
    }

    fn by_hand(&self) -> (String, String) {
        let memory = self.memory();
        let mut command = Command::new(AGENT);
        command.args(["--patroni-user", "33", "--memory-file", &memory]).stdin(Stdio::null());
        let output = command.output().expect("the agent");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&output.stdout), text(&output.stderr))
    }

    /// Removes the memory file, so that there is no grace period.
    fn forgets(&self) {
        fs::write(self.memory(), "").expect("the memory");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.many.kill();
        let _ = self.many.wait();
        let _ = &self.listener;
    }
}

fn options<'a>(memory: &'a str, grace: &'a str) -> Vec<&'a str> {
    vec![
        "--agent-send",
        "--patroni-user",
        "33",
        "--memory-file",
        memory,
        "--grace",
        grace,
        "--timeout",
        "5s",
        "--idle",
        "1h",
    ]
}

const NODE: &str = "10.1.0.11";
const VIP: &str = "10.1.0.99";

/// Each layout of Patroni, with a stranger on every other address. The stranger first says that it is a standby and then,
/// while Patroni is away, that it is the primary.
#[test]
#[ignore = "needs root: tests/run"]
fn no_stranger_is_asked_wherever_he_listens() {
    if !common::in_network_of_root("strangers::no_stranger_is_asked_wherever_he_listens") {
        return;
    }
    for (patroni, asked, elsewhere) in [
        ("127.0.0.1", NODE, &[NODE, VIP, "127.0.0.9", "::1", "fd01::11"][..]),
        (NODE, NODE, &["127.0.0.1", VIP, "127.0.0.9", "::1", "fd01::11"]),
        ("::1", NODE, &["127.0.0.1", NODE, VIP, "fd01::11"]),
        ("fd01::11", "fd01::11", &["127.0.0.1", NODE, VIP, "::1"]),
        ("0.0.0.0", NODE, &["::1", "fd01::11"]),
        ("::", NODE, &[]),
        ("::", "fd01::11", &[]),
    ] {
        let agent = Agent::start();
        {
            let _patroni = Api::new(PATRONI, patroni, "primary");
            let mut strangers = Vec::new();
            for (number, address) in elsewhere.iter().enumerate() {
                let uid = if number % 2 == 0 { NOBODY } else { DAEMON };
                strangers.push(Api::new(uid, address, "replica"));
            }
            assert_eq!(agent.tells(asked), READY, "{patroni}");
            let (by_hand, _) = agent.by_hand();
            assert_eq!(by_hand, READY, "{patroni}");
        }
        // Patroni is away for a restart, and strangers also take its address
        agent.forgets();
        let taken = ["127.0.0.1", NODE, VIP, "127.0.0.9", "::1", "fd01::11"];
        let _strangers = taken.map(|address| Api::new(NOBODY, address, "primary"));
        for address in ["127.0.0.1", NODE, VIP, "127.0.0.9", "::1", "fd01::11"] {
            let reply = agent.tells(address);
            assert!(reply.starts_with("down ready # Patroni "), "{patroni}, {address}: {reply}");
            assert!(reply.contains("not asked, uid 65534 listens there"), "{address}: {reply}");
        }
        assert!(agent.by_hand().0.starts_with("down ready # "), "{patroni}");
    }
}

/// A check on another address changes no record of HAProxy's, and no grace period covers another Patroni that is dead.
#[test]
#[ignore = "needs root: tests/run"]
fn a_record_belongs_to_the_address_that_was_asked() {
    if !common::in_network_of_root("strangers::a_record_belongs_to_the_address_that_was_asked") {
        return;
    }
    let agent = Agent::start();
    let record = || {
        let memory = fs::read(agent.memory()).expect("the memory");
        memory[..64].to_vec()
    };
    let patroni = Api::new(PATRONI, NODE, "primary");
    assert_eq!(agent.tells(NODE), READY);
    let left = record();
    for address in [VIP, "127.0.0.9", "127.0.0.1", "::1", "fd01::11"] {
        let reply = agent.tells(address);
        assert!(reply.starts_with("down ready # ") && reply.contains("refused"), "{reply}");
        assert_eq!(record(), left, "{address}");
    }
    // another Patroni behind the same socket
    let other = Api::new(PATRONI, VIP, "primary");
    assert_eq!(agent.tells(VIP), READY);
    drop(patroni);
    std::thread::sleep(std::time::Duration::from_millis(3100));
    assert_eq!(agent.tells(VIP), READY);
    let reply = agent.tells(NODE);
    assert!(reply.starts_with("down ready # ") && reply.contains("refused"), "{reply}");
    drop(other);
    let reply = agent.asked(VIP, "primary", "3s");
    assert!(reply.starts_with("!unreachable:_held_"), "{reply}");
}

/// A check by hand asks on no address, and says which of HAProxy's checks get the answer.
#[test]
#[ignore = "needs root: tests/run"]
fn a_check_by_hand_says_which_checks_get_the_answer() {
    if !common::in_network_of_root("strangers::a_check_by_hand_says_which_checks_get_the_answer") {
        return;
    }
    let agent = Agent::start();
    let told = "HAProxy gets this answer if it asks the agent at that address";
    for (patroni, says) in [(NODE, true), ("127.0.0.1", false), ("::1", false), ("0.0.0.0", false)]
    {
        let _patroni = Api::new(PATRONI, patroni, "primary");
        let (reply, said) = agent.by_hand();
        assert_eq!((reply.as_str(), said.contains(told)), (READY, says), "{patroni}: {said}");
    }
}
