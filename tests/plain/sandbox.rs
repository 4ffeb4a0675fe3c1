//! Attempts to break out of the sandbox: each works outside and fails inside. A process cannot leave the sandbox, so each
//! attempt runs in another process of this program.

use landlock::ABI;
use memmap2::{MmapMut, MmapOptions};
use patroni_agent_check::agent;
use patroni_agent_check::haproxy::reply::{Reply, Verdict};
use patroni_agent_check::sandbox::{Confinement, user};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socket_with};
use rustix::process::{Pid, Signal, Uid, kill_process};
use rustix::thread::set_thread_res_uid;
use std::fmt::Display;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A file that can be written and removed.
fn file() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("break-out")
}

/// This process's memory file.
fn memory() -> PathBuf {
    file().with_file_name(format!("break-out-memory-{}", std::process::id()))
}

/// A socket to which every process may send.
fn foreign_socket() -> PathBuf {
    foreign_socket_of(std::process::id())
}

fn foreign_socket_of(process: u32) -> PathBuf {
    std::env::temp_dir().join(format!("patroni-agent-check-break-out-{process}"))
}

const OUTSIDE: &str = "outside";
const INSIDE: &str = "inside";
/// Inside, in a process that has become its user (`--user`), if root runs the tests.
const AS_USER: &str = "as user";

const TRY: &str = "PATRONI_AGENT_CHECK_TRY";

fn connect_over_mptcp(port: u16) -> rustix::io::Result<()> {
    let flags = SocketFlags::empty();
    let mptcp = Some(rustix::net::ipproto::MPTCP);
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, mptcp)?;
    rustix::net::connect(&socket, &SocketAddr::from(([127, 0, 0, 1], port)))
}

/// Sends data with the first packet, so without connect(2). rustix has no name for the flag.
fn connect_fast(port: u16) -> rustix::io::Result<()> {
    let fast_open = SendFlags::from_bits_retain(0x2000_0000);
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    rustix::net::sendto(&socket, b"x", fast_open, &address).map(drop)
}

/// What an intruder would try in a process for one check and in a listener.
const ATTEMPTS: [&str; 20] = [
    "read a file",
    "write more than a record",
    "write a record out of its place",
    "write beside the memory",
    "share the memory",
    "write beyond the memory",
    "shorten the memory",
    "start a program",
    CONNECT,
    CONNECT_6,
    "connect elsewhere over MPTCP",
    "connect elsewhere by fast open",
    "send a datagram",
    "talk to the journal",
    RAW,
    "listen",
    "make code",
    "signal another process",
    "list a directory",
    "remove a file",
];
const CONNECT: &str = "connect elsewhere";
const CONNECT_6: &str = "connect elsewhere over IPv6";
const RAW: &str = "open a raw socket";

/// What an intruder would try only in a process for one check.
const MORE_ATTEMPTS: [&str; 12] = [
    "connect the log elsewhere",
    "send to somebody else",
    "have the kernel send a signal",
    "copy a descriptor",
    "change a socket",
    "read a socket's settings",
    "write a file",
    "write the memory's file on",
    "write a record elsewhere",
    "start a thread",
    "talk to a Unix socket",
    "become root again",
];

/// Maps the file, so that the process could write to it without a system call.
fn share(memory: &File) -> io::Result<()> {
    MmapOptions::new().len(64).map_raw(memory).map(drop)
}

/// The files, sockets and processes that an attempt may use.
struct Target<'a> {
    elsewhere: u16,
    parent: Pid,
    memory: &'a File,
    folder: &'a Path,
    file: &'a Path,
}

/// Makes one of [`ATTEMPTS`], if that is its name.
fn attempt(name: &str, target: &Target) -> Option<io::Result<()>> {
    Some(match name {
        "read a file" => File::open("/etc/passwd").map(drop),
        "list a directory" => {
            fs::read_dir(target.folder).and_then(|mut list| list.next().transpose()).map(drop)
        }
        "remove a file" => fs::remove_file(target.file),
        "write more than a record" => target.memory.write_at(&[0; 65], 0).map(drop),
        "write a record out of its place" => target.memory.write_at(&[0; 64], 1).map(drop),
        "write beside the memory" => target.memory.write_at(&[0; 64], 4095).map(drop),
        "share the memory" => share(target.memory),
        "write beyond the memory" => target.memory.write_at(&[0; 64], 4096).map(drop),
        "shorten the memory" => target.memory.set_len(0),
        "start a program" => Command::new("/bin/true").spawn().map(drop),
        CONNECT => TcpStream::connect(("127.0.0.1", target.elsewhere)).map(drop),
        CONNECT_6 => TcpStream::connect(("::1", target.elsewhere)).map(drop),
        "connect elsewhere over MPTCP" => connect_over_mptcp(target.elsewhere).map_err(Into::into),
        "connect elsewhere by fast open" => connect_fast(target.elsewhere).map_err(Into::into),
        "send a datagram" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "talk to the journal" => UnixDatagram::unbound().map(drop),
        RAW => {
            let (family, flags) = (AddressFamily::INET, SocketFlags::empty());
            socket_with(family, SocketType::RAW, flags, None).map(drop).map_err(Into::into)
        }
        "listen" => TcpListener::bind("127.0.0.1:0").map(drop),
        "make code" => MmapMut::map_anon(4096).and_then(MmapMut::make_exec).map(drop),
        "signal another process" => kill_process(target.parent, Signal::CONT).map_err(Into::into),
        _ => return None,
    })
}

/// The error's number, or 0.
fn error_number(done: io::Result<()>) -> i32 {
    done.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0)
}

/// Makes one of [`MORE_ATTEMPTS`].
fn attempt_more(
    name: &str,
    (mut memory, other): (&File, &File),
    socket: &TcpStream,
    log: &UnixDatagram,
) -> io::Result<()> {
    match name {
        "write a file" => File::create(file()).map(drop),
        "write the memory's file on" => memory.write_all(b"x"),
        "write a record elsewhere" => other.write_at(&[0; 64], 0).map(drop),
        "start a thread" => std::thread::Builder::new().spawn(|| ()).map(drop),
        "talk to a Unix socket" => UnixStream::pair().map(drop),
        "connect the log elsewhere" => log.connect(foreign_socket()),
        "send to somebody else" => log.send_to(b"x", foreign_socket()).map(drop),
        // with F_SETOWN and F_SETSIG it kills a process of the same user, if Landlock knows no signals
        "have the kernel send a signal" => {
            rustix::fs::fcntl_setfl(socket, rustix::fs::OFlags::from_bits_retain(0x2000))
                .map_err(Into::into)
        }
        "copy a descriptor" => {
            rustix::io::fcntl_dupfd_cloexec(memory, 9).map(drop).map_err(Into::into)
        }
        "change a socket" => {
            rustix::net::sockopt::set_socket_broadcast(socket, true).map_err(Into::into)
        }
        "read a socket's settings" => {
            rustix::net::sockopt::socket_recv_buffer_size(socket).map(drop).map_err(Into::into)
        }
        "become root again" => {
            set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).map_err(Into::into)
        }
        name => panic!("{name}?"),
    }
}

/// Listens on one port with both families. Returns the port and the listeners.
fn elsewhere() -> (u16, [TcpListener; 2]) {
    loop {
        let four = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = four.local_addr().expect("an address").port();
        if let Ok(six) = TcpListener::bind(("::1", port)) {
            break (port, [four, six]);
        }
    }
}

/// Finds the result that the process has printed.
fn find_result(name: &str, output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let result = said.lines().find_map(|line| line.split_once("outcome: "));
    result.unwrap_or_else(|| panic!("{name}: {output:?}")).1.to_owned()
}

/// Prints the result and ends the process: libtest itself would need more than the sandbox leaves.
fn print_result(result: impl Display) -> ! {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "outcome: {result}").expect("stdout");
    stdout.flush().expect("stdout");
    std::process::exit(0);
}

fn child(name: &str, elsewhere: u16, sandbox: &str) -> Output {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "sandbox::inside", "--nocapture", "--test-threads=1"])
        .env(TRY, format!("{name}|{elsewhere}|{sandbox}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this program");
    let process = child.id();
    let output = child.wait_with_output().expect("its end");
    let _ = fs::remove_file(foreign_socket_of(process));
    output
}

/// Makes one attempt in a process of its own, [`OUTSIDE`] the sandbox, [`INSIDE`], inside [`AS_USER`], or with the Landlock
/// of that ABI. Returns the error's number.
fn outcome(name: &str, sandbox: &str) -> String {
    let (port, _listeners) = elsewhere();
    find_result(name, &child(name, port, sandbox))
}

/// Not a test: the process that [`outcome`] starts.
#[test]
#[ignore = "started by the other tests"]
fn inside() {
    let Ok(what) = std::env::var(TRY) else { return };
    let what: Vec<_> = what.split('|').collect();
    let elsewhere = what[1].parse().expect("a port");
    let patroni = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = patroni.local_addr().expect("an address").port();
    let mut status = File::open("/proc/thread-self/status").expect("proc");
    let parent = rustix::process::getppid().expect("a parent");
    let memory = File::options().read(true).write(true).create(true).truncate(true).open(memory());
    let memory = memory.expect("a file");
    let other = memory.try_clone().expect("a copy");
    fs::remove_file(self::memory()).expect("a file");
    if what[2] == AS_USER {
        user::become_user("nobody").expect("every machine has it");
    }
    let memory_fd = Some(memory.as_raw_fd());
    let (log, journal) = UnixDatagram::pair().expect("a log and its reader");
    let another = UnixDatagram::bind(foreign_socket()).expect("a foreign socket");
    fs::set_permissions(self::foreign_socket(), Permissions::from_mode(0o777)).expect("its file");
    let mut confinement = Confinement::of_check(port, memory_fd, Some(log.as_raw_fd()));
    match what[2] {
        OUTSIDE => {}
        INSIDE | AS_USER => confinement.enter().expect("this kernel has all of it"),
        abi => {
            let known = ABI::from(abi.parse::<i32>().expect("a number"));
            confinement.abi = known;
            let _ = confinement.enter();
        }
    }
    let result = if what[0] == "status" {
        let mut text = String::new();
        status.read_to_string(&mut text).expect("proc");
        let keep =
            |line: &&str| ["NoNewPrivs:", "Seccomp:"].iter().any(|key| line.starts_with(key));
        text.lines().filter(keep).collect::<Vec<_>>().join(" ").replace('\t', " ")
    } else if what[0] == "abort" {
        std::process::abort()
    } else if what[0] == "panic" {
        std::panic::set_hook(Box::new(|_| {}));
        agent::catch_panic::<Reply>(Verdict::Down, || panic!("here")).reason
    } else {
        // what the agent does is still possible
        let socket = TcpStream::connect(("127.0.0.1", port)).expect("Patroni");
        memory.write_at(&[0; 64], 4032).expect("a record");
        log.send(b"x").expect("the log");
        let (folder, file) = (Path::new("/"), file());
        let target = Target { elsewhere, parent, memory: &memory, folder, file: &file };
        let done = attempt(what[0], &target);
        let done = done.unwrap_or_else(|| attempt_more(what[0], (&memory, &other), &socket, &log));
        drop((journal, another));
        error_number(done).to_string()
    };
    print_result(result);
}

#[test]
fn every_break_out_works_outside_and_fails_inside() {
    for name in ATTEMPTS.into_iter().chain(MORE_ATTEMPTS) {
        fs::write(file(), "").expect("a file");
        // EPERM from seccomp, EACCES from Landlock; musl has EAGAIN for any thread that cannot start
        for place in [INSIDE, AS_USER] {
            let inside = outcome(name, place);
            assert!(["1", "13", "11"].contains(&inside.as_str()), "{name}, {place}: {inside}");
            assert!(file().exists(), "{name}, {place}");
        }
        let outside = outcome(name, OUTSIDE);
        let for_root = [RAW, "become root again"].contains(&name);
        assert!(outside == "0" || for_root, "{name}: {outside}");
    }
}

/// Landlock's ABI is 2 on Debian 12, 1 on Ubuntu 22.04 and missing on RHEL 8. ABI 4 restricts ports.
#[test]
fn an_older_kernel_leaves_open_only_connections_to_other_ports() {
    for abi in ["0", "1", "2", "4"] {
        for name in ATTEMPTS.into_iter().chain(MORE_ATTEMPTS) {
            fs::write(file(), "").expect("a file");
            let open = abi < "4" && [CONNECT, CONNECT_6].contains(&name);
            let inside = outcome(name, abi);
            let failed = ["1", "13", "11"].contains(&inside.as_str());
            assert!(if open { inside == "0" } else { failed }, "ABI {abi}: {name}: {inside}");
        }
    }
}

#[test]
fn landlock_restricts_the_port_and_seccomp_the_rest() {
    assert_eq!(outcome("connect elsewhere", INSIDE), "13");
    assert_eq!(outcome("send a datagram", INSIDE), "1");
}

#[test]
fn a_panic_inside_is_answered() {
    assert!(outcome("panic", INSIDE).ends_with("please report it: here"));
}

/// Rust's handler of SIGSEGV resets the signal, and abort() sends one. Both must work inside.
#[test]
fn a_crash_ends_the_process() {
    let started = std::time::Instant::now();
    let status = child("abort", 1, INSIDE).status;
    assert!(!status.success() && status.code().is_none(), "{status:?}");
    // RLIMIT_CPU would end a process that spins after 11 s
    assert!(started.elapsed().as_secs() < 8, "{:?}", started.elapsed());
}

#[test]
fn the_kernel_confirms_the_filter() {
    assert_eq!(outcome("status", INSIDE), "NoNewPrivs: 1 Seccomp: 2");
}

/// In a listener, only what the next check needs stays possible.
mod listening {
    use super::{
        ATTEMPTS, CONNECT, CONNECT_6, RAW, Target, attempt, elsewhere, error_number, file,
        find_result, print_result,
    };
    use landlock::ABI;
    use patroni_agent_check::sandbox::Confinement;
    use rustix::process::{Pid, Resource, Rlimit, getppid, setrlimit};
    use std::fs::{self, File};
    use std::io::{self, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output};

    const TRY: &str = "PATRONI_AGENT_CHECK_TRY_LISTENING";
    const ABIS: [(&str, Option<ABI>); 6] = [
        ("outside", None),
        ("none", Some(ABI::Unsupported)),
        ("1", Some(ABI::V1)),
        ("2", Some(ABI::V2)),
        ("4", Some(ABI::V4)),
        ("7", Some(ABI::V7)),
    ];

    /// What an intruder would try only in a listener.
    const MORE_ATTEMPTS: [&str; 7] = [
        "tell another by a copy what systemd is told",
        "write a file",
        "write to /dev/shm",
        "write beside the hold",
        "talk to D-Bus",
        "raise a limit",
        "tell another what systemd is told",
    ];

    /// The oldest ABI of Landlock that forbids this attempt, if seccomp does not.
    fn abi_that_forbids(name: &str) -> &'static str {
        match name {
            "read a file" | "write a file" | "write to /dev/shm" | "write beside the hold" => "1",
            CONNECT | CONNECT_6 => "4",
            _ => "",
        }
    }

    struct Setup {
        folder: PathBuf,
        elsewhere: u16,
        parent: Option<Pid>,
        systemd: UnixDatagram,
    }

    impl Setup {
        fn path(&self, name: &str) -> PathBuf {
            self.folder.join(name)
        }

        fn memory(&self) -> io::Result<File> {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(self.path("run/memory"))
        }
    }

    fn attempt_more(name: &str, setup: &Setup) -> io::Result<()> {
        match name {
            "write a file" => File::create(setup.path("new")).map(drop),
            "write to /dev/shm" => {
                let path = Path::new("/dev/shm").join(format!("break-out-{}", std::process::id()));
                File::create(&path).map(|_| drop(fs::remove_file(path)))
            }
            "write beside the hold" => File::create(setup.path("hold/folder/new")).map(drop),
            "fill the memory's folder" => setup.memory()?.write_all(&[1; 1 << 20]),
            "talk to D-Bus" => UnixStream::connect(setup.path("bus")).map(drop),
            "raise a limit" => {
                let limit = Rlimit { current: Some(1000), maximum: Some(1000) };
                setrlimit(Resource::Nofile, limit).map_err(Into::into)
            }
            "tell another by a copy what systemd is told" => {
                setup.systemd.try_clone()?.connect(setup.path("other"))
            }
            "tell another what systemd is told" => setup.systemd.connect(setup.path("other")),
            name => panic!("{name}?"),
        }
    }

    fn child(name: &str, abi: &str, setup: &Setup) -> Output {
        fs::write(setup.path("victim"), "").expect("a file");
        Command::new(std::env::current_exe().expect("this program"))
            .args([
                "--ignored",
                "--exact",
                "sandbox::listening::inside",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(TRY, format!("{name}|{abi}|{}|{}", setup.elsewhere, setup.folder.display()))
            .output()
            .expect("this program")
    }

    /// Not a test: the process that confines itself.
    #[test]
    #[ignore = "started by the other tests"]
    fn inside() {
        let Ok(what) = std::env::var(TRY) else { return };
        let what: Vec<_> = what.split('|').collect();
        let (elsewhere, folder) = (what[2].parse().expect("a port"), PathBuf::from(what[3]));
        let systemd = UnixDatagram::unbound().expect("a socket");
        let setup = Setup { folder, elsewhere, parent: getppid(), systemd };
        let patroni = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = patroni.local_addr().expect("an address").port();
        // its folder is not there yet
        let (hold, memory) = (setup.path("hold/folder/hold"), setup.path("run/memory"));
        let read = vec![hold.clone(), setup.path("links/ca.pem")];
        let systemd = Some(setup.systemd.as_raw_fd());
        let mut confinement =
            Confinement::of_listener(Some(port), read, Some(&memory), None, systemd);
        let (_, abi) = ABIS.iter().find(|(name, _)| *name == what[1]).expect("an ABI");
        if let Some(abi) = abi {
            confinement.abi = *abi;
            let entered = confinement.enter();
            assert_eq!(entered.is_err(), *abi == ABI::Unsupported, "{entered:?}");
        }
        if what[0] == "abort" {
            std::process::abort();
        }
        // what the next check needs, in a thread
        let works = std::thread::spawn(move || {
            let _ = TcpStream::connect(("127.0.0.1", port)).expect("Patroni");
            let _ = patroni.accept().expect("a connection");
            assert_eq!(fs::read_to_string(hold).expect("a hold"), "drain");
            assert_eq!(fs::read_to_string(setup.path("links/ca.pem")).expect("a link"), "CA");
            setup.memory().expect("made").write_at(&[0; 64], 4032).expect("a record");
            setup
        });
        let setup = works.join().expect("a check");
        let (memory, folder) = (setup.memory().expect("its memory"), setup.path("hold"));
        let (parent, file) = (setup.parent.expect("one"), setup.path("victim"));
        let target = Target { elsewhere, parent, memory: &memory, folder: &folder, file: &file };
        let done = attempt(what[0], &target).unwrap_or_else(|| attempt_more(what[0], &setup));
        print_result(error_number(done));
    }

    fn with_setup(test: &str, work: impl FnOnce(&Setup)) {
        let folder = file().with_file_name(format!("listening-{test}-{}", std::process::id()));
        for name in ["hold/folder", "run", "links", "archive"] {
            fs::create_dir_all(folder.join(name)).expect("a folder");
        }
        fs::write(folder.join("hold/folder/hold"), "drain").expect("a file");
        fs::write(folder.join("archive/ca.pem"), "CA").expect("a file");
        std::os::unix::fs::symlink("../archive/ca.pem", folder.join("links/ca.pem"))
            .expect("a link");
        let _bus = UnixListener::bind(folder.join("bus")).expect("a socket");
        let _other = UnixDatagram::bind(folder.join("other")).expect("a socket");
        let (elsewhere, _listeners) = elsewhere();
        let systemd = UnixDatagram::unbound().expect("a socket");
        work(&Setup { folder: folder.clone(), elsewhere, parent: None, systemd });
        fs::remove_dir_all(folder).expect("the folder");
    }

    #[test]
    fn every_break_out_works_outside_and_fails_inside() {
        with_setup("all", |setup| {
            for name in ATTEMPTS.into_iter().chain(MORE_ATTEMPTS) {
                for (abi, _) in ABIS {
                    let result = find_result(name, &child(name, abi, setup));
                    let open = match abi {
                        "outside" => true,
                        "none" => !abi_that_forbids(name).is_empty(),
                        abi => abi < abi_that_forbids(name),
                    };
                    // EPERM from seccomp, EACCES from Landlock; a raw socket is for root
                    let expected: &[&str] = if open { &["0"] } else { &["1", "13"] };
                    let raw = open && name == RAW;
                    assert!(raw || expected.contains(&result.as_str()), "{name}, {abi}: {result}");
                }
            }
        });
    }

    /// SIGXFSZ: a file of more than a page cannot be the memory file.
    #[test]
    fn the_listener_cannot_fill_the_folder_of_the_memory_file() {
        with_setup("full", |setup| {
            for (abi, _) in ABIS {
                let _ = fs::remove_file(setup.path("run/memory"));
                let status = child("fill the memory's folder", abi, setup).status;
                let left = fs::metadata(setup.path("run/memory")).expect("a memory").len();
                let inside = abi != "outside";
                assert_eq!((status.success(), left > 4096), (!inside, !inside), "{abi}: {left}");
            }
        });
    }

    #[test]
    fn a_crash_ends_the_process() {
        with_setup("crash", |setup| {
            let status = child("abort", "7", setup).status;
            assert!(!status.success() && status.code().is_none(), "{status:?}");
        });
    }
}
