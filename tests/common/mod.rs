//! A fake Patroni, and the agent, started as systemd and xinetd start it.
#![allow(dead_code)] // each program uses its part

pub mod machine;
pub mod stats_socket;

use std::fs::{self, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const AGENT: &str = env!("CARGO_BIN_EXE_patroni-agent-check");

/// The agent as it is shipped, static and optimised, which tests/install builds.
pub fn shipped() -> PathBuf {
    let target = Path::new(AGENT).ancestors().nth(2).expect("two folders");
    target.join("x86_64-unknown-linux-gnu/release/patroni-agent-check")
}

/// A healthy primary's answer.
pub const PRIMARY: &str = r#"{"state": "running", "role": "primary", "timeline": 5}"#;

/// The reply to HAProxy for that answer.
pub const READY: &str = "up ready # primary, running, timeline 5\n";

pub fn http(status: u16, body: &str) -> Vec<u8> {
    format!("HTTP/1.0 {status} Whatever\r\nContent-Type: application/json\r\n\r\n{body}")
        .into_bytes()
}

/// A server that handles each connection in a thread, as a test tells it to, and counts the connections.
pub struct FakePatroni {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl FakePatroni {
    /// Hands each connection to `behave`, unread.
    pub fn raw(behave: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::on("127.0.0.1:0", move |stream, _| behave(stream))
    }

    /// Reads the request, and then hands the connection to `reply`.
    pub fn new(reply: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> Self {
        Self::on("127.0.0.1:0", move |mut stream, requests| {
            let request = read_request(&mut stream);
            requests.lock().expect("no panic").push(request);
            reply(&mut stream);
        })
    }

    pub fn on(
        address: &str,
        behave: impl Fn(TcpStream, &Mutex<Vec<String>>) + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let patroni =
            FakePatroni { address, connections: Arc::default(), requests: Arc::default() };
        let (connections, requests) = (patroni.connections.clone(), patroni.requests.clone());
        let behave = Arc::new(behave);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                connections.fetch_add(1, Ordering::SeqCst);
                let (behave, requests) = (behave.clone(), requests.clone());
                std::thread::spawn(move || behave(stream.expect("a connection"), &requests));
            }
        });
        patroni
    }

    /// Answers with these bytes and closes, as Patroni does.
    pub fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::new(move |stream| {
            let _ = stream.write_all(&answer);
        })
    }

    /// A healthy primary.
    pub fn primary() -> Self {
        Self::answering(http(200, PRIMARY))
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The heads of the requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

/// A port that refuses connections for as long as this lives: it is bound, so that no other test gets it, but nobody
/// listens.
pub fn nobody() -> TcpListener {
    use rustix::net::{AddressFamily, SocketType, bind, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
    TcpListener::from(socket)
}

/// The head of one request.
pub fn read_request(stream: &mut impl Read) -> String {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
        request.push(byte[0]);
    }
    String::from_utf8_lossy(&request).into_owned()
}

/// Whether this test runs in a network of its own, in which all of 10.1.0.0/16 are addresses of this machine. If not, runs
/// the test there, and it must pass.
pub fn in_network(test: &str) -> bool {
    in_network_by(&["--user", "--map-root-user", "--net"], test)
}

/// The same as root, who can become other users there.
pub fn in_network_of_root(test: &str) -> bool {
    in_network_by(&["--net"], test)
}

fn in_network_by(unshare: &[&str], test: &str) -> bool {
    const INSIDE: &str = "PATRONI_AGENT_CHECK_IN_NETWORK";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let script = r#"
        ip link set lo up
        ip address add 10.1.0.1/16 dev lo
        ip address add fd01::11/128 dev lo nodad
        exec "$0" "$@""#;
    let status = Command::new("unshare")
        .args(unshare)
        .args(["sh", "-ec", script])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", test, "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(INSIDE, "1")
        .status();
    assert!(status.expect("unshare").success(), "{test}");
    false
}

/// The outcome of one check.
#[derive(Debug)]
pub struct Outcome {
    /// All bytes that the peer got.
    pub reply: String,
    pub stderr: String,
    pub code: Option<i32>,
    pub took: Duration,
}

/// How the agent is started.
#[derive(Clone, Copy, Debug)]
pub enum Start {
    /// systemd, `Accept=yes`: the connection is fd 3, stdin is /dev/null, stderr the journal.
    ListenFds,
    /// systemd, `StandardInput=socket`: fd 0 and 1, stderr the journal.
    Stdin,
    /// xinetd: fd 0, 1 and 2.
    Inetd,
}

fn socket(stream: &TcpStream) -> Stdio {
    Stdio::from(OwnedFd::from(stream.try_clone().expect("a second descriptor")))
}

/// The command that starts the agent with this connection.
pub fn start(start: Start, stream: TcpStream, arguments: &[&str]) -> Command {
    let mut command = match start {
        // Only a shell can set LISTEN_PID to its own pid without unsafe code.
        Start::ListenFds => {
            let mut shell = Command::new("sh");
            let script = r#"export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" "$@" 3<&0 0</dev/null"#;
            shell.args(["-c", script, AGENT]);
            shell
        }
        _ => Command::new(AGENT),
    };
    command.args(arguments).stdin(socket(&stream)).stderr(Stdio::piped());
    match start {
        Start::ListenFds => command.stdout(Stdio::piped()),
        Start::Stdin => command.stdout(socket(&stream)),
        Start::Inetd => command.stdout(socket(&stream)).stderr(socket(&stream)),
    };
    command
}

/// A port whose backlog is full, as long as the second value lives: the kernel completes no connection, as with a Patroni
/// whose workers all hang.
pub fn full_backlog() -> (SocketAddr, (TcpListener, Vec<TcpStream>)) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let mut waiting = Vec::new();
    let refused = loop {
        match TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
        assert!(waiting.len() < 5000, "the backlog does not fill");
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut);
    (address, (listener, waiting))
}

/// The socket on which systemd listens for a service's messages (`NOTIFY_SOCKET`).
pub struct NotifySocket {
    pub path: PathBuf,
    socket: UnixDatagram,
    _folder: TempDir,
}

impl NotifySocket {
    pub fn new() -> Self {
        let folder = folder("notify");
        let path = folder.path().join("socket");
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket");
        NotifySocket { path, socket, _folder: folder }
    }

    /// The next message, without the newline at its end.
    pub fn said(&self) -> String {
        let mut message = [0; 512];
        let length = self.socket.recv(&mut message).expect("a message");
        String::from_utf8_lossy(&message[..length]).trim_end().to_owned()
    }
}

/// A folder for this test that every user may enter; it is removed when it is dropped.
pub fn folder(name: &str) -> TempDir {
    let prefix = format!("patroni-agent-check-{name}-");
    let open = Permissions::from_mode(0o755);
    tempfile::Builder::new().prefix(&prefix).permissions(open).tempdir().expect("a folder")
}

/// The path of a file in it.
pub fn path_in(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).to_str().expect("UTF-8").to_owned()
}

/// One connection to a port of this machine, both ends.
pub fn connection(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).expect("a free port");
    let address = listener.local_addr().expect("an address");
    let client = TcpStream::connect(address).expect("a connection");
    (client, listener.accept().expect("a connection").0)
}

/// Connects from one of this machine's many addresses.
pub fn connect_from(source: Ipv4Addr, to: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&socket, &SocketAddr::from((source, 0))).expect("an address");
    connect(&socket, &to).expect("a connection");
    TcpStream::from(socket)
}

/// A memory file for checks of any user.
pub fn memory() -> (TempDir, String) {
    let folder = folder("memory");
    let memory = path_in(&folder, "memory");
    fs::write(&memory, "").expect("a file");
    fs::set_permissions(&memory, Permissions::from_mode(0o666)).expect("a file");
    (folder, memory)
}

/// Makes one check through a socket. `client` does what HAProxy does: it may send, and returns the reply.
pub fn check_with(
    how: Start,
    address: &str,
    arguments: &[&str],
    client: impl FnOnce(TcpStream) -> String,
) -> Outcome {
    let (haproxy, stream) = connection(address);
    let started = Instant::now();
    let child = start(how, stream, arguments).spawn().expect("the agent starts");
    let reply = client(haproxy);
    let took = started.elapsed();
    let output = child.wait_with_output().expect("the agent ends");
    if let Start::ListenFds = how {
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "nothing on stdout");
    }
    Outcome {
        reply,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code(),
        took,
    }
}

/// Sends nothing and reads to the end.
pub fn listen(mut haproxy: TcpStream) -> String {
    let mut reply = Vec::new();
    haproxy.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
    haproxy.read_to_end(&mut reply).expect("the reply, and a clean close");
    let _ = haproxy.shutdown(Shutdown::Both);
    String::from_utf8(reply).expect("ASCII")
}

/// Makes one check as systemd starts it, in which HAProxy sends nothing.
pub fn check(arguments: &[&str]) -> Outcome {
    check_with(Start::ListenFds, "127.0.0.1:0", arguments, listen)
}

/// A file of the project.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The commands below this heading of a document, from the line that begins so to the end of the block.
pub fn commands(document: &str, heading: &str, begins: &str) -> String {
    let text = fs::read_to_string(file(document)).expect(document);
    let (_, section) = text.split_once(&format!("# {heading}\n")).expect(heading);
    let begins = format!("    {begins}");
    let lines = section.lines().skip_while(|line| !line.starts_with(&begins));
    let lines: Vec<_> = lines.map_while(|line| line.strip_prefix("    ")).collect();
    assert!(!lines.is_empty(), "{document} has no {begins}");
    lines.join("\n")
}

/// The recorded answers, a folder for each version of Patroni. They are unpacked once for all processes of cargo-nextest.
pub fn answers() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let packed = file("tests/data/answers/answers.tar.xz");
        let mut hasher = DefaultHasher::new();
        fs::read(&packed).expect("the answers").hash(&mut hasher);
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = parent.join(format!("answers-{:x}", hasher.finish()));
        if !folder.exists() {
            let own = tempfile::tempdir_in(parent).expect("a folder");
            let tar =
                Command::new("tar").arg("-xJf").arg(packed).arg("-C").arg(own.path()).status();
            assert!(tar.expect("tar").success(), "tar and xz unpack the answers");
            // another process may have been quicker
            let _ = fs::rename(own.path().join("answers"), &folder);
        }
        folder
    })
}

/// Runs one of the scripts in `tests/lab`. Each test program has machines of its own.
pub fn lab(script: &str, arguments: &[&str]) -> Result<String, String> {
    let folder = std::env::temp_dir().join(format!("patroni-agent-check-{}", std::process::id()));
    let output = Command::new(file("tests/lab").join(script))
        .args(arguments)
        .env("LAB", folder)
        .stdin(Stdio::null())
        .output()
        .expect("bash");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(stdout),
        false => Err(format!("{arguments:?}: {stdout}{}", String::from_utf8_lossy(&output.stderr))),
    }
}
