//! The listener: one process for all checks, which ends when nobody asks any more.

use crate::common::{
    self, AGENT, FakePatroni, NotifySocket, PRIMARY, READY, Start, connect_from, file, http,
    listen, path_in, start,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A listener with its socket, which stays open here as systemd keeps it open.
struct Server {
    listener: TcpListener,
    child: Child,
}

impl Server {
    fn start(how: Start, address: &str, arguments: &[&str]) -> Server {
        let listener = TcpListener::bind(address).expect("a free port");
        // as in the unit: a SYN that finds the backlog full comes again after a second
        rustix::net::listen(&listener, 1024).expect("a longer queue");
        let child = spawn(how, &listener, arguments);
        Server { listener, child }
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("an address")
    }

    fn ask(&self) -> String {
        listen(self.connect())
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address()).expect("a connection")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(how: Start, listener: &TcpListener, arguments: &[&str]) -> Command {
    let stream = TcpStream::from(OwnedFd::from(listener.try_clone().expect("a descriptor")));
    start(how, stream, arguments)
}

fn spawn(how: Start, listener: &TcpListener, arguments: &[&str]) -> Child {
    command(how, listener, arguments).spawn().expect("the agent starts")
}

/// Sends a signal to a process, or to one of its threads.
fn send(signal: &str, number: u32) {
    let status = Command::new("kill").args([signal, &number.to_string()]).status();
    assert!(status.expect("kill").success());
}

/// The next process knows the records of the one before, however that one ended.
#[test]
fn the_grace_outlives_the_process() {
    let over = Arc::new(AtomicBool::new(false));
    let patroni = FakePatroni::new({
        let over = over.clone();
        move |stream| {
            if !over.load(Ordering::SeqCst) {
                let _ = stream.write_all(&http(200, PRIMARY));
            }
        }
    });
    let (folder, url) = (common::folder("grace"), patroni.url());
    let memory = path_in(&folder, "memory");
    let arguments = ["--url", &url, "--memory-file", &memory, "--grace", "15s", "--idle", "1s"];
    for crash in [false, true] {
        over.store(false, Ordering::SeqCst);
        let mut server = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments);
        assert_eq!(server.ask(), READY);
        over.store(true, Ordering::SeqCst);
        let reply = server.ask();
        assert!(reply.starts_with("!unreachable:_held_"), "{reply}");
        if crash {
            send("-KILL", server.child.id());
        }
        assert_eq!(server.child.wait().expect("it ends").success(), !crash);
        server.child = spawn(Start::ListenFds, &server.listener, &arguments);
        let reply = server.ask();
        assert!(reply.starts_with("!unreachable:_held_"), "crash: {crash}: {reply}");
    }
}

#[test]
fn the_listener_ends_when_nobody_asks() {
    for how in [Start::ListenFds, Start::Stdin] {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let patroni = FakePatroni::primary();
            let mut server =
                Server::start(how, address, &["--url", &patroni.url(), "--idle", "1s"]);
            let mut last = Instant::now();
            for _ in 0..3 {
                last = Instant::now();
                assert_eq!(server.ask(), READY, "{how:?} {address}");
            }
            assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
            assert!(last.elapsed() >= Duration::from_secs(1), "{:?}", last.elapsed());
            // a connection that comes meanwhile waits for the next process
            let late = server.connect();
            server.child = spawn(how, &server.listener, &["--url", &patroni.url(), "--idle", "1s"]);
            assert_eq!(listen(late), READY);
        }
    }
}

/// Two `ListenStream=` lines.
#[test]
fn every_socket_is_served() {
    let patroni = FakePatroni::primary();
    let [one, two] = ["127.0.0.1:0", "[::1]:0"].map(|at| TcpListener::bind(at).expect("a port"));
    let fd = |listener: &TcpListener| OwnedFd::from(listener.try_clone().expect("a descriptor"));
    let script = r#"export LISTEN_FDS=2 LISTEN_PID=$$; exec "$0" "$@" 3<&0 4<&1 0</dev/null 1>&2"#;
    let mut child = Command::new("sh")
        .args(["-c", script, AGENT, "--url", &patroni.url(), "--idle", "1s"])
        .stdin(fd(&one))
        .stdout(fd(&two))
        .spawn()
        .expect("the agent starts");
    for listener in [&one, &two, &one] {
        let address = listener.local_addr().expect("an address");
        assert_eq!(listen(TcpStream::connect(address).expect("a connection")), READY);
    }
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}

/// A few questions that hang delay no other check.
#[test]
fn a_hung_question_does_not_keep_the_next_check_waiting() {
    let asked = AtomicUsize::new(0);
    let patroni = FakePatroni::new(move |stream| {
        if asked.fetch_add(1, Ordering::SeqCst) < 3 {
            let _ = stream.read(&mut [0]); // until the agent gives up
        } else {
            let _ = stream.write_all(&http(200, PRIMARY));
        }
    });
    let server = Server::start(
        Start::ListenFds,
        "127.0.0.1:0",
        &["--url", &patroni.url(), "--timeout", "5s"],
    );
    let started = Instant::now();
    let mut waiting = Vec::new();
    for number in 1..=3 {
        waiting.push(server.connect());
        while patroni.requests().len() < number {
            assert!(started.elapsed() < Duration::from_secs(4), "three questions at once");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!(server.ask(), READY);
    assert!(started.elapsed() < Duration::from_secs(5), "before the first deadline");
    for stream in waiting {
        let reply = listen(stream);
        assert!(reply.ends_with("no answer before the deadline (--timeout)\n"), "{reply}");
    }
}

/// Makes this many checks at the same moment, with these lines in turn.
fn burst(server: &Server, checks: &[&str], count: usize) -> Vec<String> {
    // at once: the line is due 300 ms after the connection
    let ask = |number| {
        let mut peer = server.connect();
        writeln!(peer, "{}", checks[number % checks.len()]).expect("it listens");
        peer
    };
    let peers: Vec<_> = (0..count).map(ask).collect();
    peers.into_iter().map(listen).collect()
}

/// A Patroni that counts the questions in flight, and answers after this time, if at all. A closed connection no longer
/// counts, even if this process has not seen that yet.
fn counting_patroni(takes: Duration) -> (FakePatroni, Arc<AtomicUsize>) {
    let asking: Mutex<Vec<(usize, TcpStream)>> = Mutex::default();
    let (number, most) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let counted = most.clone();
    let patroni = FakePatroni::new(move |stream| {
        let own = number.fetch_add(1, Ordering::SeqCst);
        {
            let mut asking = asking.lock().expect("no panic");
            let look = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            asking.retain(|(_, other)| recv(other, &mut [0; 1], look) == Err(Errno::AGAIN));
            asking.push((own, stream.try_clone().expect("a descriptor")));
            counted.fetch_max(asking.len(), Ordering::SeqCst);
        }
        stream.set_read_timeout(Some(takes)).expect("a socket");
        let gave_up = matches!(stream.read(&mut [0]), Ok(0));
        asking.lock().expect("no panic").retain(|(other, _)| *other != own);
        if !gave_up {
            let _ = stream.write_all(&http(200, PRIMARY));
        }
    });
    (patroni, most)
}

#[test]
fn patroni_is_not_overrun() {
    let (patroni, most) = counting_patroni(Duration::from_millis(30));
    let arguments = ["--agent-send", "--url", &patroni.url(), "--timeout", "10s"];
    let server = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments);
    let checks = ["primary", "read-write", "read-only", "read-only?lag=16MB", "read-only?lag=32MB"];
    let replies = burst(&server, &checks, 120);
    assert!(replies.iter().all(|reply| reply == READY), "{replies:?}");
    let asked = patroni.requests().len();
    println!("{asked} questions for 120 checks");
    assert!((5..60).contains(&asked), "equal questions are shared: {asked}");
    let most = most.load(Ordering::SeqCst);
    assert!((2..=4).contains(&most), "{most} questions of one source at once");
    for check in checks {
        let requests = patroni.requests();
        assert!(requests.iter().any(|head| head.starts_with(&format!("GET /{check} "))), "{check}");
    }
}

/// Trouble that all checks meet at the same moment is one line in the journal.
#[test]
fn trouble_of_many_threads_is_logged_once() {
    let patroni = FakePatroni::new(|stream| {
        std::thread::sleep(Duration::from_millis(200));
        let _ = stream.write_all(&http(503, r#"{"state": "crashed", "role": "primary"}"#));
    });
    let (folder, url) = (common::folder("once"), patroni.url());
    let memory = path_in(&folder, "memory");
    let arguments = ["--agent-send", "--url", &url, "--memory-file", &memory, "--timeout", "10s"];
    let mut server = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments);
    let replies = burst(&server, &["primary"], 120);
    assert!(replies.iter().all(|reply| reply == "fail ready # primary, crashed\n"), "{replies:?}");
    assert_eq!(stderr(&mut server).lines().count(), 1);
}

/// Ends the process and returns its stderr.
fn stderr(server: &mut Server) -> String {
    send("-TERM", server.child.id());
    let mut said = String::new();
    server.child.stderr.take().expect("a pipe").read_to_string(&mut said).expect("it");
    said
}

/// No check waits longer than its deadline.
#[test]
fn a_hung_patroni_is_not_overrun_either() {
    let (patroni, most) = counting_patroni(Duration::from_secs(60));
    let arguments = ["--agent-send", "--url", &patroni.url(), "--timeout", "1s"];
    let server = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments);
    let checks = ["primary", "primary", "primary", "read-write", "master", "leader", "replica"];
    let started = Instant::now();
    let replies = burst(&server, &checks, 120);
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    let late = "down ready # Patroni ";
    assert!(replies.iter().all(|reply| reply.starts_with(late)), "{replies:?}");
    let late = "no answer before the deadline (--timeout)";
    assert!(replies.iter().all(|reply| reply.contains(late)), "{replies:?}");
    let most = most.load(Ordering::SeqCst);
    assert!((2..=4).contains(&most), "{most} questions of one source at once");
}

/// Reads the reply, which is empty if the connection ends or is reset without one.
fn read_reply(mut stream: TcpStream) -> String {
    let mut reply = String::new();
    let _ = stream.write_all(b"primary\n");
    stream.set_read_timeout(Some(Duration::from_secs(15))).expect("a socket");
    let _ = stream.read_to_string(&mut reply);
    reply
}

/// Waits until every thread of the process sleeps: each has read its line and waits for Patroni.
fn wait_until_settled(server: &Server) {
    let tasks = format!("/proc/{}/task", server.child.id());
    let sleeps = || {
        let mut tasks = fs::read_dir(&tasks).expect("proc");
        tasks.all(|task| {
            let stat = fs::read_to_string(task.expect("a thread").path().join("stat"));
            stat.is_ok_and(|stat| stat.rsplit_once(") ").expect("a state").1.starts_with('S'))
        })
    };
    let end = Instant::now() + Duration::from_secs(30);
    while !(sleeps() && sleeps()) {
        assert!(Instant::now() < end, "the agent does not come to rest");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A Patroni that answers when the test lets it.
fn waiting_patroni() -> (FakePatroni, Arc<AtomicBool>) {
    let may = Arc::new(AtomicBool::new(false));
    let allowed = may.clone();
    let patroni = FakePatroni::new(move |stream| {
        while !allowed.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = stream.write_all(&http(200, PRIMARY));
    });
    (patroni, may)
}

/// A silent peer loses its place to a new peer, the longest silent one first, if its address has all its places or all
/// places are taken. A check that has sent its line does not.
#[test]
fn silent_peers_keep_nobody_from_an_answer() {
    if !common::in_network("serve::silent_peers_keep_nobody_from_an_answer") {
        return;
    }
    let address = |number: usize| Ipv4Addr::from(0x0a01_0042 + u32::try_from(number).expect("it"));
    // checks that leave few places: 120 of one address's 128, or 500 of all 512
    for (busy, each, silent_from) in [(1, 120, 0..1), (4, 125, 4..13)] {
        let (patroni, may) = waiting_patroni();
        let arguments = ["--agent-send", "--url", &patroni.url(), "--timeout", "10s"];
        let mut server = Server::start(Start::ListenFds, "10.1.0.1:0", &arguments);
        let at = server.address();
        let mut journal = BufReader::new(server.child.stderr.take().expect("a pipe"));
        let begun = Instant::now();
        let check = |source: Ipv4Addr| {
            let mut check = connect_from(source, at);
            check.write_all(b"primary\n").expect("it listens");
            check
        };
        let mut checks: Vec<_> = (0..busy * each).map(|n| check(address(n % busy))).collect();
        wait_until_settled(&server);
        // a silent peer gets a reply after 300 ms, unless it lost its place
        let mut closed = 0;
        while closed == 0 {
            assert!(
                begun.elapsed() < Duration::from_secs(8),
                "no silent peer is closed for another"
            );
            let silent: Vec<_> = silent_from
                .clone()
                .cycle()
                .take(40)
                .map(|n| connect_from(address(n), at))
                .collect();
            checks.extend([Ipv4Addr::new(10, 1, 9, 9), address(silent_from.start)].map(check));
            for mut stream in silent {
                stream.set_read_timeout(Some(Duration::from_secs(15))).expect("a socket");
                let mut said = String::new();
                stream.read_to_string(&mut said).expect("an end");
                assert!(said.is_empty() || said.starts_with("fail ready # no agent-send line"));
                closed += usize::from(said.is_empty());
            }
        }
        may.store(true, Ordering::SeqCst);
        let replies: Vec<_> = checks.into_iter().map(listen).collect();
        assert!(replies.iter().all(|reply| reply == READY), "{replies:?}");
        // the line comes with the next tick
        let mut line = String::new();
        journal.read_line(&mut line).expect("a line");
        assert!(line.starts_with("<4>all places were taken (512, 128 for each"), "{line}");
        send("-TERM", server.child.id());
        line.clear();
        journal.read_to_string(&mut line).expect("its end");
        assert_eq!(line, "", "one line a minute");
    }
}

/// A silent check holds most descriptors. The unit allows as many as checks in all places hold.
#[test]
fn the_unit_allows_descriptors_for_all_places() {
    const SILENT: usize = 50;
    let folder = common::folder("descriptors");
    let path = |name: &str| path_in(&folder, name);
    fs::write(path("hold"), "drain let sessions end\n").expect("a file");
    fs::write(path("note"), "").expect("a file");
    let patroni = FakePatroni::primary();
    let (url, hold, note, memory) = (patroni.url(), path("hold"), path("note"), path("memory"));
    let files = ["--hold-file", &hold, "--before-stop-file", &note, "--memory-file", &memory];
    let arguments = [&["--agent-send", "--url", &url][..], &files].concat();
    let server = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments);
    let mut check = server.connect();
    check.write_all(b"primary\n").expect("it listens");
    assert_eq!(listen(check), "up drain # hold: let sessions end\n");
    let held = || {
        let open = fs::read_dir(format!("/proc/{}/fd", server.child.id()));
        open.expect("proc").count()
    };
    wait_until_settled(&server);
    let before = held();
    let (mut most, end) = (0, Instant::now() + Duration::from_secs(20));
    // a busy machine may need some turns until all checks are open at the same time
    for turn in 1.. {
        let silent: Vec<_> = (0..SILENT).map(|_| server.connect()).collect();
        let until = Instant::now() + Duration::from_millis(200);
        while Instant::now() < until {
            most = most.max(held().saturating_sub(before));
        }
        silent.into_iter().for_each(|stream| drop(listen(stream)));
        if turn >= 10 && most > 3 * SILENT {
            break;
        }
        assert!(Instant::now() < end, "{most} descriptors for {SILENT} checks, and not four each");
    }
    let each = most.div_ceil(SILENT);
    let unit = fs::read_to_string(file("units/patroni-agent-check-listen.service")).expect("it");
    let limit = unit.lines().find_map(|line| line.strip_prefix("LimitNOFILE=")).expect("a limit");
    let limit: usize = limit.parse().expect("a number");
    assert!(limit >= 512 * each + 100, "{each} for each check");
}

/// One source has at most a quarter of all places. This machine is one source, whatever address it asks from.
#[test]
fn the_places_of_one_source_are_bounded() {
    if !common::in_network("serve::the_places_of_one_source_are_bounded") {
        return;
    }
    let (patroni, _) = counting_patroni(Duration::from_secs(2));
    let arguments = ["--agent-send", "--url", &patroni.url(), "--timeout", "10s"];
    let server = Server::start(Start::ListenFds, "10.1.0.1:0", &arguments);
    let ask = |source: u8, count: usize| {
        let one = |_| {
            let mut stream = connect_from(Ipv4Addr::new(10, 1, 1, source), server.address());
            // at once, since the line is due 300 ms after the connection; an error is a reset, since no place is left
            let _ = stream.write_all(b"primary\n");
            stream
        };
        (0..count).map(one).collect::<Vec<_>>()
    };
    let answered = |streams: Vec<TcpStream>| {
        let replies: Vec<_> = streams.into_iter().map(read_reply).collect();
        assert!(replies.iter().all(|reply| reply.is_empty() || reply == READY), "{replies:?}");
        replies.iter().filter(|reply| *reply == READY).count()
    };
    let (many, one) = (ask(1, 200), ask(2, 1));
    assert_eq!((answered(many), answered(one)), (128, 1));
    wait_until_settled(&server);
    let all = (1..=5).flat_map(|source| ask(source, 128)).collect();
    assert_eq!(answered(all), 512);
    wait_until_settled(&server);
    assert_eq!(answered(ask(1, 128)), 128, "places come back");
    wait_until_settled(&server);
    // the address on which the agent is asked is this machine's as well
    let of_this = |number: u8| match number {
        0 => Ipv4Addr::new(10, 1, 0, 1),
        number => Ipv4Addr::new(127, 0, 0, number),
    };
    let mut streams: Vec<_> =
        (0..200).map(|number| connect_from(of_this(number), server.address())).collect();
    streams.iter_mut().for_each(|stream| drop(stream.write_all(b"primary\n")));
    assert_eq!(answered(streams), 128);
}

/// The listener confines itself before the first check, and still reads and writes what later checks need, even if that is
/// replaced.
#[test]
fn the_listener_confines_itself_and_goes_on() {
    let patroni = FakePatroni::primary();
    let (folder, other) = (common::folder("in"), common::folder("other"));
    let path = |name: &str| path_in(&folder, name);
    fs::create_dir(path("run")).expect("a folder");
    // the hold's folder is made later
    let (memory, hold, url) = (path("run/memory"), path("holds/hold"), patroni.url());
    let arguments = ["--url", &url, "--memory-file", &memory, "--hold-file", &hold];
    let mut server = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments);
    assert_eq!(server.ask(), READY);
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).expect("proc");
    assert!(status.contains("NoNewPrivs:\t1\nSeccomp:\t2\n"), "{status}");
    fs::remove_file(&memory).expect("a memory");
    fs::create_dir(path("holds")).expect("a folder");
    fs::write(&hold, "drain by hand").expect("a hold");
    assert_eq!(server.ask(), "up drain # hold: by hand\n");
    assert_ne!(fs::metadata(&memory).expect("a memory").len(), 0);
    // a file elsewhere, which could be read before, cannot be read any more
    fs::remove_file(&hold).expect("a hold");
    fs::write(other.path().join("hold"), "drain from elsewhere").expect("a file");
    std::os::unix::fs::symlink(other.path().join("hold"), &hold).expect("a link");
    let reply = server.ask();
    assert!(reply.starts_with("up maint # hold: "), "{reply}");
    assert!(reply.ends_with("Permission denied (os error 13)\n"), "{reply}");
    assert_eq!(stderr(&mut server), "", "nothing is missing");
    // the certificates are read at each check
    let patroni = FakePatroni::raw(drop);
    let (url, ca) = (format!("https://{}", patroni.address), file("tests/data/tls/ca.pem"));
    let arguments = ["--url", &url, "--cacert", ca.to_str().expect("UTF-8")];
    let reply = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments).ask();
    assert!(reply.contains(": closed the connection"), "{reply}");
}

/// The sandbox limits the length of every file that the listener writes to, and a log may be longer.
#[test]
fn a_long_log_file_ends_no_check() {
    let folder = common::folder("log");
    let (log, memory) = (path_in(&folder, "log"), path_in(&folder, "memory"));
    fs::write(&log, [b'\n'; 5000]).expect("a log");
    let nobody = common::nobody();
    let url = format!("http://{}", nobody.local_addr().expect("an address"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let arguments = ["--url", &url, "--memory-file", &memory];
    let mut agent = command(Start::ListenFds, &listener, &arguments);
    agent.stderr(fs::File::options().append(true).open(&log).expect("a log"));
    let server = Server { listener, child: agent.spawn().expect("the agent starts") };
    for _ in 0..2 {
        let reply = server.ask();
        assert!(reply.starts_with("down ready # "), "{reply}");
    }
    assert_eq!(fs::metadata(&log).expect("a log").len(), 5000, "nothing was logged");
}

/// Starts a listener with one check, which waits for Patroni.
fn start_with_a_waiting_check() -> (Server, TcpStream) {
    let patroni = FakePatroni::new(|stream| {
        std::thread::sleep(Duration::from_millis(500));
        let _ = stream.write_all(&http(200, PRIMARY));
    });
    let arguments = ["--url", &patroni.url(), "--timeout", "10s"];
    let server = Server::start(Start::ListenFds, "127.0.0.1:0", &arguments);
    let waiting = server.connect();
    while patroni.requests().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    (server, waiting)
}

#[test]
fn sigterm_lets_checks_finish() {
    let (mut server, waiting) = start_with_a_waiting_check();
    send("-TERM", server.child.id());
    assert_eq!(listen(waiting), READY);
    assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
}

/// The kernel may deliver a signal to any thread. A read with a timeout then fails even with SA_RESTART (signal(7)).
#[test]
fn sigterm_in_the_thread_of_a_check_lets_it_finish() {
    let (server, waiting) = start_with_a_waiting_check();
    let main = server.child.id();
    let threads = fs::read_dir(format!("/proc/{main}/task")).expect("its threads");
    let number =
        |thread: std::io::Result<fs::DirEntry>| thread.ok()?.file_name().to_str()?.parse().ok();
    let checks: Vec<u32> = threads.filter_map(number).filter(|thread| *thread != main).collect();
    let [check] = checks[..] else { panic!("one thread for the check: {checks:?}") };
    send("-TERM", check);
    assert_eq!(listen(waiting), READY);
}

#[test]
fn a_wrong_command_line_is_answered() {
    for arguments in [&["--nonsense"][..], &["--agent-send", "primary"], &["--idle", "1ms"]] {
        let server = Server::start(Start::ListenFds, "127.0.0.1:0", arguments);
        for _ in 0..2 {
            let reply = server.ask();
            assert!(reply.starts_with("fail ready # patroni-agent-check: "), "{reply}");
        }
    }
}

#[test]
fn the_listener_tells_systemd_its_status() {
    let systemd = NotifySocket::new();
    let patroni = FakePatroni::primary();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let started = Instant::now();
    let mut child = Command::new(AGENT)
        .args(["--url", &patroni.url(), "--timeout", "10s"])
        .env("NOTIFY_SOCKET", &systemd.path)
        .env("WATCHDOG_USEC", "900000")
        .stdin(Stdio::from(OwnedFd::from(listener.try_clone().expect("a descriptor"))))
        .spawn()
        .expect("the agent starts");
    assert_eq!(systemd.said(), "READY=1");
    assert_eq!(listen(TcpStream::connect(listener.local_addr().expect("it")).expect("it")), READY);
    let served =
        "STATUS=1 checks served, 0 refused, 0 silent ones closed, 0 running, last said: up ready";
    let mut heard = Vec::new();
    let told = |heard: &[String], line| heard.iter().filter(|other| *other == line).count();
    while told(&heard, served) == 0 || told(&heard, "WATCHDOG=1") < 3 {
        heard.push(systemd.said());
    }
    let most = started.elapsed().as_millis() / 300 + 1;
    let alive = told(&heard, "WATCHDOG=1") as u128;
    assert!(alive <= most, "three times in each watchdog interval: {heard:?}");
    send("-TERM", child.id());
    while systemd.said() != "STOPPING=1" {}
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}
