//! Locks this process in before it reads a byte from a peer. What is left: its open descriptors,
//! memory, time, TCP connections to Patroni's port, and one record in the memory file; with a listening socket also
//! threads, and the folders of the files that the next check reads. Knows nothing of what they are used for.

use crate::memory::{RECORD, SIZE};
use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, prlimit};
use seccompiler::{
    BackendError as Backend, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::error::Error;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

/// The system calls that are left as they are. Each one costs: the kernel runs the filter once for
/// every number there is when it is installed.
const ALLOWED: &[i64] = &[
    // the connections
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // memory, time, chance
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_futex,
    // after SIGSTOP and SIGCONT
    libc::SYS_restart_syscall,
    // the end
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigreturn,
    // a crash must end the process: Rust's handler of SIGSEGV gives the signal back
    libc::SYS_rt_sigaction,
    libc::SYS_exit_group,
];

/// Locks this process in for good. Only `port` can be connected to, where the kernel knows ports
/// (Landlock ABI 4, Linux 6.7), to `memory` only a record can be written, in its place, and `log` stays with whom it
/// is connected.
///
/// # Errors
///
/// This kernel has not all of it: the text says what is missing. The rest holds, and the check can go on.
pub fn enter(port: u16, memory: Option<RawFd>, log: Option<RawFd>) -> Result<(), String> {
    enter_with(ABI::V7, port, memory, log)
}

/// [`enter`] with no more of Landlock than an older kernel knows, to see what that leaves open.
///
/// # Errors
///
/// As those of [`enter`].
pub fn enter_with(
    known: ABI,
    port: u16,
    memory: Option<RawFd>,
    log: Option<RawFd>,
) -> Result<(), String> {
    let limits = limits(&LIMITS);
    let landlock = landlock(known, &Again { port: Some(port), ..Again::default() });
    // last, since it forbids the others
    let seccomp = seccomp(memory, log);
    all_of(vec![("rlimits", limits), ("Landlock", landlock), ("seccomp", seccomp)])
}

/// A part of the sandbox and what came of it.
type Part = (&'static str, Result<(), Box<dyn Error>>);

/// What is missing, in words.
fn all_of(parts: Vec<Part>) -> Result<(), String> {
    let missing: Vec<_> = parts
        .into_iter()
        .filter_map(|(what, result)| Some(format!("{what}: {}", result.err()?)))
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(format!("sandbox incomplete: {}", missing.join("; ")))
    }
}

/// A bug or an intruder shall not dump memory, spin (the longest --timeout is 10 s), start a process or collect
/// descriptors.
const LIMITS: [(Resource, u64); 4] =
    [(Resource::Core, 0), (Resource::Cpu, 11), (Resource::Nproc, 0), (Resource::Nofile, 64)];

/// Sets limits for good; a stricter one stays.
fn limits(limits: &[(Resource, u64)]) -> Result<(), Box<dyn Error>> {
    for (resource, limit) in limits.iter().copied() {
        let both = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
        match prlimit(None, resource, both(limit)) {
            Ok(Rlimit { maximum: Some(hard), .. }) if hard < limit => {
                prlimit(None, resource, both(hard))?;
            }
            Ok(_) | Err(Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A system call, and what must be true of its arguments.
type Allowed = (i64, Vec<SeccompCondition>);

/// The 32 bits of an argument, as far as the mask goes.
fn bits(argument: u8, mask: libc::c_int, value: libc::c_int) -> Result<SeccompCondition, Backend> {
    let masked = SeccompCmpOp::MaskedEq(mask as u32 as u64);
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, masked, value as u32 as u64)
}

/// A descriptor; none is none that can be opened.
fn descriptor(is: SeccompCmpOp, fd: Option<RawFd>) -> Result<SeccompCondition, Backend> {
    let number = fd.map_or(u32::MAX, RawFd::unsigned_abs).into();
    SeccompCondition::new(0, SeccompCmpArgLen::Dword, is, number)
}

fn whole(argument: u8, is: SeccompCmpOp, value: usize) -> Result<SeccompCondition, Backend> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, is, value as u64)
}

/// A record in its place.
fn record() -> Result<[SeccompCondition; 2], Backend> {
    Ok([whole(2, SeccompCmpOp::Eq, RECORD)?, whole(3, SeccompCmpOp::Lt, SIZE)?])
}

/// TCP to whom Landlock allows it, the log stays with its peer, and no memory becomes code.
fn sockets_and_memory(log: Option<RawFd>) -> Result<Vec<Allowed>, Backend> {
    // IPv4 and IPv6 are 2 and 10
    let internet = bits(0, !(libc::AF_INET ^ libc::AF_INET6), libc::AF_INET)?;
    let stream = bits(1, 0xf, libc::SOCK_STREAM)?;
    // not MPTCP, for which Landlock knows no ports
    let tcp = bits(2, !libc::IPPROTO_TCP, 0)?;
    // an address would connect by TCP fast open, without asking Landlock
    let to_the_peer = bits(5, !0, 0)?;
    let socket_level = bits(1, !0, libc::SOL_SOCKET)?;
    let tcp_level = bits(1, !0, libc::IPPROTO_TCP)?;
    // the two differ in their last bit
    let timeouts = bits(2, !(libc::SO_RCVTIMEO ^ libc::SO_SNDTIMEO), libc::SO_RCVTIMEO)?;
    let no_code = bits(2, libc::PROT_EXEC, 0)?;
    Ok(vec![
        (libc::SYS_socket, vec![internet, stream, tcp]),
        (libc::SYS_connect, vec![descriptor(SeccompCmpOp::Ne, log)?]),
        (libc::SYS_sendto, vec![to_the_peer]),
        (libc::SYS_ioctl, vec![bits(1, !0, libc::FIONBIO as libc::c_int)?]),
        (libc::SYS_getsockopt, vec![socket_level.clone(), bits(2, !0, libc::SO_ERROR)?]),
        (libc::SYS_setsockopt, vec![socket_level, timeouts]),
        (libc::SYS_setsockopt, vec![tcp_level.clone(), bits(2, !0, libc::TCP_NODELAY)?]),
        (libc::SYS_setsockopt, vec![tcp_level, bits(2, !0, libc::TCP_QUICKACK)?]),
        (libc::SYS_mmap, vec![no_code.clone()]),
        (libc::SYS_mprotect, vec![no_code]),
    ])
}

/// Forbidden calls fail with EPERM; the process is not killed, since it still has to answer.
fn allow_only(
    plain: impl Iterator<Item = i64>,
    others: Vec<Allowed>,
) -> Result<(), Box<dyn Error>> {
    let mut rules: BTreeMap<_, _> = plain.map(|call| (call, vec![])).collect();
    for (call, conditions) in others {
        rules.entry(call).or_insert_with(Vec::new).push(SeccompRule::new(conditions)?);
    }
    install(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn install(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<(), Box<dyn Error>> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, action, architecture)?;
    // sets no_new_privs as well
    Ok(seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?)
}

fn seccomp(memory: Option<RawFd>, log: Option<RawFd>) -> Result<(), Box<dyn Error>> {
    let mut others = sockets_and_memory(log)?;
    let [record, place] = record()?;
    others.extend([
        (libc::SYS_write, vec![descriptor(SeccompCmpOp::Ne, memory)?]),
        (libc::SYS_pwrite64, vec![descriptor(SeccompCmpOp::Eq, memory)?, record, place]),
    ]);
    allow_only(ALLOWED.iter().copied(), others)
}

/// What a process with a listening socket needs again at each check.
#[derive(Clone, Debug, Default)]
pub struct Again {
    /// Patroni's port.
    pub port: Option<u16>,
    /// The files that it reads. They may be replaced, or not be there yet, so all that is in their folders can be read, and
    /// in the folders that links lead to.
    pub read: Vec<PathBuf>,
    /// The memory file. It may have to be made.
    pub memory: Option<PathBuf>,
    /// The system log, which stays with whom it is connected.
    pub log: Option<RawFd>,
}

/// What the checks of such a process need beyond [`ALLOWED`]: connections that come, files, threads.
const ALLOWED_AGAIN: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    libc::SYS_lseek,
    libc::SYS_write,
    // the other filter has a word on it
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_exit,
    libc::SYS_clock_nanosleep,
];

/// Locks a process with a listening socket in for good, before it accepts a connection.
///
/// # Errors
///
/// As those of [`enter`].
pub fn enter_listening(again: &Again) -> Result<(), String> {
    enter_listening_with(ABI::V7, again)
}

/// [`enter_listening`] with no more of Landlock than an older kernel knows, to see what that leaves open.
///
/// # Errors
///
/// As those of [`enter`].
pub fn enter_listening_with(known: ABI, again: &Again) -> Result<(), String> {
    // no file is larger than the memory
    let limits = limits(&[(Resource::Fsize, SIZE as u64)]);
    let landlock = landlock(known, again);
    let seccomp = seccomp_again(again.log);
    all_of(vec![("rlimits", limits), ("Landlock", landlock), ("seccomp", seccomp)])
}

/// No file but in the folders that are needed again, no TCP port but Patroni's, no abstract Unix socket, no signal to
/// others.
fn landlock(known: ABI, again: &Again) -> Result<(), Box<dyn Error>> {
    if known == ABI::Unsupported {
        return Err("not supported by this kernel".into());
    }
    let mut rules = Ruleset::default().handle_access(AccessFs::from_all(known))?;
    if known >= ABI::V4 {
        rules = rules.handle_access(AccessNet::from_all(known))?;
    }
    if known >= ABI::V6 {
        rules = rules.scope(Scope::from_all(known))?;
    }
    let mut rules = rules.create()?;
    if let Some(port) = again.port.filter(|_| known >= ABI::V4) {
        rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
    }
    for folder in again.read.iter().flat_map(|file| folders(file)) {
        rules = rules.add_rule(PathBeneath::new(folder, AccessFs::ReadFile))?;
    }
    let memory = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeReg;
    for folder in again.memory.iter().flat_map(|file| folders(file)) {
        rules = rules.add_rule(PathBeneath::new(folder, memory))?;
    }
    match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => {
            Err("only partly supported (Linux 6.12 supports all of it)".into())
        }
        RulesetStatus::NotEnforced => Err("not supported by this kernel".into()),
    }
}

/// The folder in which a file is looked for, and the one in which it is. In the place of a folder that is not there yet
/// the one above it, but never all of the file system.
fn folders(file: &Path) -> Vec<PathFd> {
    let named = std::path::absolute(file).ok();
    let real = file.canonicalize().ok();
    let folder = |file: PathBuf| {
        let folder = file.ancestors().skip(1).find(|folder| folder.is_dir())?;
        PathFd::new(folder).ok().filter(|_| folder != Path::new("/"))
    };
    named.into_iter().chain(real).filter_map(folder).collect()
}

/// Threads, but no process and no program; files as Landlock allows them, none beyond the memory's size, and with an
/// offset only a record in its place.
fn seccomp_again(log: Option<RawFd>) -> Result<(), Box<dyn Error>> {
    // glibc starts a thread by clone3, whose flags no filter can see, and by clone where there is none
    let clone3 = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    install(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    let mut others = sockets_and_memory(log)?;
    others.extend([
        (libc::SYS_clone, vec![bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?]),
        (libc::SYS_pwrite64, record()?.into()),
        // to look at its own limit, not to set one
        (libc::SYS_prlimit64, vec![bits(0, !0, 0)?, whole(2, SeccompCmpOp::Eq, 0)?]),
        (libc::SYS_fcntl, vec![bits(1, !0, libc::F_DUPFD_CLOEXEC)?]),
    ]);
    allow_only(ALLOWED.iter().chain(ALLOWED_AGAIN).copied(), others)
}
