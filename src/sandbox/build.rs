//! The build script: compiles the seccomp filters that `mod.rs` installs. seccompiler takes a quarter of a check's
//! instructions to compile one, which is too much at each start. Knows system calls and what their arguments may be; the
//! descriptors are left open.

use libc::c_int;
use serde_json::{Value, json};
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

/// The system calls that are left as they are. Each one costs: the kernel runs the filter once for
/// every number there is when it is installed.
const ALLOWED: &[&str] = &[
    // the connections, and who listens
    "read",
    "pread64",
    "recvfrom",
    "getpeername",
    "shutdown",
    "close",
    "ppoll",
    // memory, time, chance
    "brk",
    "munmap",
    "clock_gettime",
    "getrandom",
    "futex",
    // after SIGSTOP and SIGCONT
    "restart_syscall",
    // the end
    "sigaltstack",
    "rt_sigreturn",
    // a crash must end the process: Rust's handler of SIGSEGV gives the signal back
    "rt_sigaction",
    "exit_group",
];

/// What the checks of a process with a listening socket need beyond [`ALLOWED`]: connections that come, files, threads.
const ALLOWED_AGAIN: &[&str] = &[
    "accept4",
    "getsockname",
    "openat",
    "fstat",
    "newfstatat",
    "statx",
    "lseek",
    "write",
    // the other filter has a word on it
    "clone3",
    "set_robust_list",
    "rseq",
    "rt_sigprocmask",
    "sched_getaffinity",
    "gettid",
    "madvise",
    "exit",
    "clock_nanosleep",
];

/// Stand for the descriptors of the memory file and of the sockets to the log and to systemd, which only the process
/// knows. None can be opened.
const MEMORY: u32 = 0x8000_0001;
const LOG: u32 = 0x8000_0002;
const SYSTEMD: u32 = 0x8000_0003;
/// One record of the memory file, and the whole file, in bytes. The agent is not built if they are not those of `memory.rs`.
const RECORD: u64 = 64;
const SIZE: u64 = 64 * RECORD;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/sandbox/build.rs");
    let architecture = std::env::var("CARGO_CFG_TARGET_ARCH")?;
    let old = architecture == "x86_64";
    let filters = [
        ("CHECK", check(old)),
        ("LISTENING", listening(old)),
        // glibc starts a thread by clone3, whose flags no filter can see, and by clone where there is none
        ("NO_CLONE3", filter("allow".into(), errno(libc::ENOSYS), vec![plain("clone3")])),
    ];
    let mut text = format!(
        "pub const MEMORY: u32 = {MEMORY}; pub const LOG: u32 = {LOG}; pub const SYSTEMD: u32 = {SYSTEMD};\n\
         const _: () = assert!(crate::run::memory::RECORD == {RECORD} && crate::run::memory::SIZE == {SIZE});\n"
    );
    for (name, filter) in filters {
        let instructions = match architecture.as_str().try_into() {
            Ok(architecture) => {
                let json = json!({ name: filter }).to_string();
                seccompiler::compile_from_json(json.as_bytes(), architecture)?.remove(name)
            }
            // the agent says at each start that it runs without
            Err(_) => None,
        };
        let instructions = instructions.unwrap_or_default();
        writeln!(
            text,
            "pub const {name}: [sock_filter; {}] = {instructions:?};",
            instructions.len()
        )?;
    }
    Ok(std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("filters.rs"), text)?)
}

/// Forbidden calls fail with EPERM; the process is not killed, since it still has to answer.
fn allow_only(calls: Vec<Value>) -> Value {
    filter(errno(libc::EPERM), "allow".into(), calls)
}

fn filter(otherwise: Value, action: Value, calls: Vec<Value>) -> Value {
    json!({ "mismatch_action": otherwise, "match_action": action, "filter": calls })
}

fn errno(number: c_int) -> Value {
    json!({ "errno": number })
}

/// A call, whatever its arguments are.
fn plain(call: &str) -> Value {
    json!({ "syscall": call })
}

/// A call of whose arguments all this is true.
fn call(name: &str, arguments: &[Value]) -> Value {
    json!({ "syscall": name, "args": arguments })
}

/// The 32 bits of an argument, as far as the mask goes.
fn bits(argument: u8, mask: c_int, value: c_int) -> Value {
    let op = json!({ "masked_eq": mask as u32 });
    json!({ "index": argument, "type": "dword", "op": op, "val": value as u32 })
}

fn descriptor(op: &str, fd: u32) -> Value {
    json!({ "index": 0, "type": "dword", "op": op, "val": fd })
}

/// All 64 bits of an argument.
fn whole(argument: u8, op: &str, value: u64) -> Value {
    json!({ "index": argument, "type": "qword", "op": op, "val": value })
}

/// A record in its place.
fn record() -> [Value; 3] {
    [whole(2, "eq", RECORD), whole(3, "lt", SIZE), bits(3, RECORD as c_int - 1, 0)]
}

/// TCP to whom Landlock allows it, the sockets to others stay with them, and no memory becomes code.
fn sockets_and_memory() -> Vec<Value> {
    // IPv4 and IPv6 are 2 and 10
    let internet = bits(0, !(libc::AF_INET ^ libc::AF_INET6), libc::AF_INET);
    let stream = bits(1, 0xf, libc::SOCK_STREAM);
    // not MPTCP, for which Landlock knows no ports
    let tcp = bits(2, !libc::IPPROTO_TCP, 0);
    // an address would connect by TCP fast open, without asking Landlock
    let to_the_peer = bits(5, !0, 0);
    let socket_level = bits(1, !0, libc::SOL_SOCKET);
    let tcp_level = bits(1, !0, libc::IPPROTO_TCP);
    // the two differ in their last bit
    let timeouts = bits(2, !(libc::SO_RCVTIMEO ^ libc::SO_SNDTIMEO), libc::SO_RCVTIMEO);
    let no_code = bits(2, libc::PROT_EXEC, 0);
    // no file's memory is everybody's
    let private = bits(3, 0xf, libc::MAP_PRIVATE);
    vec![
        call("socket", &[internet, stream, tcp]),
        call("connect", &[descriptor("ne", LOG), descriptor("ne", SYSTEMD)]),
        call("sendto", &[to_the_peer]),
        call("ioctl", &[bits(1, !0, libc::FIONBIO as c_int)]),
        call("getsockopt", &[socket_level.clone(), bits(2, !0, libc::SO_ERROR)]),
        call("setsockopt", &[socket_level, timeouts]),
        call("setsockopt", &[tcp_level.clone(), bits(2, !0, libc::TCP_NODELAY)]),
        call("setsockopt", &[tcp_level, bits(2, !0, libc::TCP_QUICKACK)]),
        call("mmap", &[no_code.clone(), private]),
        call("mprotect", &[no_code]),
    ]
}

/// For a process that answers one check. `old` says that the architecture has calls that later ones leave to others.
fn check(old: bool) -> Value {
    let mut calls: Vec<_> = ALLOWED.iter().map(|call| plain(call)).collect();
    calls.extend(old.then(|| plain("poll")));
    calls.extend(sockets_and_memory());
    let [record, place, whole] = record();
    calls.extend([
        call("write", &[descriptor("ne", MEMORY)]),
        call("pwrite64", &[descriptor("eq", MEMORY), record, place, whole]),
    ]);
    allow_only(calls)
}

/// For a process with a listening socket: threads, but no process and no program; files as Landlock allows them, none
/// beyond the memory's size, and with an offset only a record in its place.
fn listening(old: bool) -> Value {
    let mut calls: Vec<_> = ALLOWED.iter().chain(ALLOWED_AGAIN).map(|call| plain(call)).collect();
    if old {
        calls.extend(["poll", "open", "stat", "lstat"].map(plain));
    }
    calls.extend(sockets_and_memory());
    calls.extend([
        call("clone", &[bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)]),
        call("pwrite64", &record()),
        // to look at its own limit, not to set one
        call("prlimit64", &[bits(0, !0, 0), whole(2, "eq", 0)]),
        // a copy would be another descriptor
        call(
            "fcntl",
            &[descriptor("ne", LOG), descriptor("ne", SYSTEMD), bits(1, !0, libc::F_DUPFD_CLOEXEC)],
        ),
    ]);
    allow_only(calls)
}
