//! The sandbox's part of the build script. In go system calls and their arguments, out come the seccomp filters that
//! `mod.rs` installs. To compile a filter at each start would cost a quarter of a check's instructions.

use libc::c_int;
use serde_json::{Value, json};
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

/// The system calls that are allowed with any arguments. Each costs time: the kernel runs a new filter for every number.
#[rustfmt::skip] // a line for each purpose
const ALLOWED: &[&str] = &[
    // the connections, and the lists of sockets
    "read", "pread64", "recvfrom", "getpeername", "getsockname", "shutdown", "close", "ppoll",
    // memory, time, random numbers
    "brk", "munmap", "clock_gettime", "getrandom", "futex",
    // after SIGSTOP and SIGCONT
    "restart_syscall",
    // the end of a thread and of the process
    "sigaltstack", "rt_sigreturn",
    // a crash must end the process: Rust's handler of SIGSEGV gives the signal back
    "rt_sigaction", "exit_group",
];

/// The other system calls that a listener needs.
#[rustfmt::skip] // a line for each purpose
const ALLOWED_TO_LISTENERS: &[&str] = &[
    // new connections
    "accept4",
    // files
    "openat", "fstat", "newfstatat", "statx", "lseek", "write",
    // threads; NO_CLONE3 lets clone3 fail
    "clone3", "set_robust_list", "rseq", "rt_sigprocmask", "sched_getaffinity", "gettid", "madvise", "exit",
    "clock_nanosleep",
];

/// Placeholders for the descriptors of the memory file and of the sockets to the system log and to systemd, which only the
/// process knows. No descriptor has such a number.
const MEMORY: u32 = 0x8000_0001;
const LOG: u32 = 0x8000_0002;
const SYSTEMD: u32 = 0x8000_0003;
/// The sizes of a record and of the whole memory file in bytes. `memory.rs` must have the same.
const RECORD: u64 = 64;
const SIZE: u64 = 64 * RECORD;

/// Writes the filters for `mod.rs`.
pub fn write_filters() -> Result<(), Box<dyn Error>> {
    let architecture = std::env::var("CARGO_CFG_TARGET_ARCH")?;
    let old = architecture == "x86_64";
    let filters = [
        ("CHECK", check_filter(old)),
        ("LISTENER", listener_filter(old)),
        // glibc starts a thread by clone3, whose flags no filter can see, or by clone if there is no clone3
        ("NO_CLONE3", filter("allow".into(), errno(libc::ENOSYS), vec![any("clone3")])),
    ];
    let mut text = format!(
        "pub const MEMORY: u32 = {MEMORY}; pub const LOG: u32 = {LOG}; pub const SYSTEMD: u32 = {SYSTEMD};\n\
         const _: () = assert!(crate::run::memory::RECORD == {RECORD} && crate::run::memory::SIZE == {SIZE});\n"
    );
    for (name, filter) in filters {
        let mut instructions = Vec::new();
        // on any other architecture, the agent reports at each start that there is no filter
        if let Ok(architecture) = architecture.as_str().try_into() {
            let json = json!({ name: filter }).to_string();
            let mut compiled = seccompiler::compile_from_json(json.as_bytes(), architecture)?;
            instructions = compiled.remove(name).unwrap_or_default();
        }
        let length = instructions.len();
        writeln!(text, "pub const {name}: [sock_filter; {length}] = {instructions:?};")?;
    }
    Ok(std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("filters.rs"), text)?)
}

/// Allows only these calls. The others fail with EPERM and do not kill the process, which still has to answer.
fn allow_only(calls: Vec<Value>) -> Value {
    filter(errno(libc::EPERM), "allow".into(), calls)
}

fn filter(otherwise: Value, action: Value, calls: Vec<Value>) -> Value {
    json!({ "mismatch_action": otherwise, "match_action": action, "filter": calls })
}

fn errno(number: c_int) -> Value {
    json!({ "errno": number })
}

/// A call with any arguments.
fn any(call: &str) -> Value {
    json!({ "syscall": call })
}

/// A call whose arguments meet all of these conditions.
fn call(name: &str, arguments: &[Value]) -> Value {
    json!({ "syscall": name, "args": arguments })
}

/// Compares the bits of a 32-bit argument that are in the mask.
fn bits(argument: u8, mask: c_int, value: c_int) -> Value {
    let op = json!({ "masked_eq": mask as u32 });
    json!({ "index": argument, "type": "dword", "op": op, "val": value as u32 })
}

fn descriptor(op: &str, fd: u32) -> Value {
    json!({ "index": 0, "type": "dword", "op": op, "val": fd })
}

/// Compares all 64 bits of an argument.
fn whole(argument: u8, op: &str, value: u64) -> Value {
    json!({ "index": argument, "type": "qword", "op": op, "val": value })
}

/// The arguments of a write of one record to its place.
fn record() -> [Value; 3] {
    [whole(2, "eq", RECORD), whole(3, "lt", SIZE), bits(3, RECORD as c_int - 1, 0)]
}

/// TCP as far as Landlock restricts it, sending to the system log and to systemd, and memory that never becomes code.
fn sockets_and_memory() -> Vec<Value> {
    // IPv4 and IPv6 are 2 and 10
    let internet = bits(0, !(libc::AF_INET ^ libc::AF_INET6), libc::AF_INET);
    let stream = bits(1, 0xf, libc::SOCK_STREAM);
    // not MPTCP, whose ports Landlock does not restrict
    let tcp = bits(2, !libc::IPPROTO_TCP, 0);
    // with an address, TCP fast open would connect without Landlock
    let to_the_peer = bits(5, !0, 0);
    let socket_level = bits(1, !0, libc::SOL_SOCKET);
    let tcp_level = bits(1, !0, libc::IPPROTO_TCP);
    // the two options differ in their last bit
    let timeouts = bits(2, !(libc::SO_RCVTIMEO ^ libc::SO_SNDTIMEO), libc::SO_RCVTIMEO);
    let no_code = bits(2, libc::PROT_EXEC, 0);
    // no memory is shared with a file
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

/// The filter of a process for one check. On an `old` architecture, old calls such as poll are still in use.
fn check_filter(old: bool) -> Value {
    let mut calls: Vec<_> = ALLOWED.iter().map(|call| any(call)).collect();
    calls.extend(old.then(|| any("poll")));
    calls.extend(sockets_and_memory());
    let [record, place, whole] = record();
    calls.extend([
        call("write", &[descriptor("ne", MEMORY)]),
        call("pwrite64", &[descriptor("eq", MEMORY), record, place, whole]),
    ]);
    allow_only(calls)
}

/// The filter of a listener: threads, but no process and no program; files as Landlock allows; pwrite64 only of a record.
fn listener_filter(old: bool) -> Value {
    let mut calls: Vec<_> =
        ALLOWED.iter().chain(ALLOWED_TO_LISTENERS).map(|call| any(call)).collect();
    if old {
        calls.extend(["poll", "open", "stat", "lstat"].map(any));
    }
    calls.extend(sockets_and_memory());
    calls.extend([
        call("clone", &[bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)]),
        call("pwrite64", &record()),
        // to read a limit of its own, not to set one
        call("prlimit64", &[bits(0, !0, 0), whole(2, "eq", 0)]),
        // a copy would be another descriptor
        call(
            "fcntl",
            &[descriptor("ne", LOG), descriptor("ne", SYSTEMD), bits(1, !0, libc::F_DUPFD_CLOEXEC)],
        ),
    ]);
    allow_only(calls)
}
