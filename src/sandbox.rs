//! Locks this process in before it reads a byte from a peer. What is left: its open descriptors,
//! memory, time, TCP connections to Patroni's port, and one record in the memory file. Knows nothing of what they
//! are used for.

use crate::memory::{RECORD, SIZE};
use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, prlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::error::Error;
use std::os::fd::RawFd;

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
    let limits = limits();
    let landlock = landlock(known, port);
    // last, since it forbids the others
    let seccomp = seccomp(memory, log);
    let missing: Vec<_> = [("rlimits", limits), ("Landlock", landlock), ("seccomp", seccomp)]
        .into_iter()
        .filter_map(|(what, result)| Some(format!("{what}: {}", result.err()?)))
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(format!("no full sandbox: {}", missing.join("; ")))
    }
}

/// A bug or an intruder shall not spin, dump memory, start a process or collect descriptors.
fn limits() -> Result<(), Box<dyn Error>> {
    // the longest --timeout is 10 s
    let limits =
        [(Resource::Core, 0), (Resource::Cpu, 11), (Resource::Nproc, 0), (Resource::Nofile, 64)];
    for (resource, limit) in limits {
        let both = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
        match prlimit(None, resource, both(limit)) {
            // a stricter one stays
            Ok(Rlimit { maximum: Some(hard), .. }) if hard < limit => {
                prlimit(None, resource, both(hard))?;
            }
            Ok(_) | Err(Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// No file at all, no other TCP port, no abstract Unix socket, no signal to others.
fn landlock(known: ABI, port: u16) -> Result<(), Box<dyn Error>> {
    if known == ABI::Unsupported {
        return Err("not in this kernel".into());
    }
    let mut rules = Ruleset::default().handle_access(AccessFs::from_all(known))?;
    if known >= ABI::V4 {
        rules = rules.handle_access(AccessNet::from_all(known))?;
    }
    if known >= ABI::V6 {
        rules = rules.scope(Scope::from_all(known))?;
    }
    let mut rules = rules.create()?;
    if known >= ABI::V4 {
        rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
    }
    let status = rules.restrict_self()?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => Err("only in part (Linux 6.12 knows all of it)".into()),
        RulesetStatus::NotEnforced => Err("not in this kernel".into()),
    }
}

/// Forbidden calls fail with EPERM; the process is not killed, since it still has to answer.
fn seccomp(memory: Option<RawFd>, log: Option<RawFd>) -> Result<(), Box<dyn Error>> {
    let only = |argument, mask: libc::c_int, value: libc::c_int| {
        let masked = SeccompCmpOp::MaskedEq(mask as u32 as u64);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, masked, value as u64)
    };
    // IPv4 and IPv6 are 2 and 10
    let internet = only(0, !(libc::AF_INET ^ libc::AF_INET6), libc::AF_INET)?;
    let stream = only(1, 0xf, libc::SOCK_STREAM)?;
    // not MPTCP, for which Landlock knows no ports
    let tcp = only(2, !libc::IPPROTO_TCP, 0)?;
    // Nobody else than the peer: an address would connect by TCP fast open, without asking Landlock.
    let to_the_peer = only(5, !0, 0)?;
    let nonblocking = only(1, !0, libc::FIONBIO as libc::c_int)?;
    let socket_level = only(1, !0, libc::SOL_SOCKET)?;
    let tcp_level = only(1, !0, libc::IPPROTO_TCP)?;
    let error = only(2, !0, libc::SO_ERROR)?;
    // the two differ in their last bit
    let timeouts = only(2, !(libc::SO_RCVTIMEO ^ libc::SO_SNDTIMEO), libc::SO_RCVTIMEO)?;
    let no_delay = only(2, !0, libc::TCP_NODELAY)?;
    let acknowledge_at_once = only(2, !0, libc::TCP_QUICKACK)?;
    // never a descriptor, if there is none
    let number = |fd: Option<RawFd>| fd.map_or(u32::MAX, RawFd::unsigned_abs).into();
    let (memory, log) = (number(memory), number(log));
    let is = |argument, operator, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value)
    };
    let elsewhere = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, memory)?;
    let not_the_log = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, log)?;
    let there = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, memory)?;
    let record = is(2, SeccompCmpOp::Eq, RECORD as u64)?;
    let within = is(3, SeccompCmpOp::Lt, SIZE as u64)?;
    let no_code = only(2, libc::PROT_EXEC, 0)?;
    let mut rules: BTreeMap<_, _> = ALLOWED.iter().map(|call| (*call, vec![])).collect();
    for (call, conditions) in [
        (libc::SYS_write, vec![elsewhere]),
        (libc::SYS_pwrite64, vec![there, record, within]),
        (libc::SYS_socket, vec![internet, stream, tcp]),
        (libc::SYS_connect, vec![not_the_log]),
        (libc::SYS_sendto, vec![to_the_peer]),
        (libc::SYS_ioctl, vec![nonblocking]),
        (libc::SYS_getsockopt, vec![socket_level.clone(), error]),
        (libc::SYS_setsockopt, vec![socket_level, timeouts]),
        (libc::SYS_setsockopt, vec![tcp_level.clone(), no_delay]),
        (libc::SYS_setsockopt, vec![tcp_level, acknowledge_at_once]),
        (libc::SYS_mmap, vec![no_code.clone()]),
        (libc::SYS_mprotect, vec![no_code]),
    ] {
        rules.entry(call).or_insert_with(Vec::new).push(SeccompRule::new(conditions)?);
    }
    let forbidden = SeccompAction::Errno(libc::EPERM as u32);
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, forbidden, SeccompAction::Allow, architecture)?;
    // sets no_new_privs as well
    seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?;
    Ok(())
}
