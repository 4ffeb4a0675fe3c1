//! Locks this process in before it reads a byte from a peer. What is left: its open descriptors,
//! memory, time, TCP connections to Patroni's port, and one record in the memory file; with a listening socket also
//! threads, and the folders of the files that the next check reads. Knows nothing of what they are used for.

pub mod user;

use crate::run::memory::SIZE;
use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, prlimit};
use seccompiler::sock_filter;
use std::error::Error;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

/// What the build script made.
mod filters {
    use seccompiler::sock_filter;
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

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
    let descriptors = [(filters::MEMORY, memory), (filters::LOG, log)];
    let seccomp = seccomp(&filters::CHECK, &descriptors);
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

/// Installs a filter from here on, with the descriptors that the build script left open.
fn seccomp(
    filter: &[sock_filter],
    descriptors: &[(u32, Option<RawFd>)],
) -> Result<(), Box<dyn Error>> {
    if filter.is_empty() {
        return Err(format!("not supported on {}", std::env::consts::ARCH).into());
    }
    let mut filter = filter.to_vec();
    for instruction in &mut filter {
        let open = descriptors.iter().find(|(open, _)| *open == instruction.k);
        if let Some((_, Some(descriptor))) = open {
            instruction.k = descriptor.unsigned_abs();
        }
    }
    // sets no_new_privs as well
    Ok(seccompiler::apply_filter(&filter)?)
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
    /// systemd's socket, which stays with it.
    pub systemd: Option<RawFd>,
}

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
    let descriptors = [(filters::LOG, again.log), (filters::SYSTEMD, again.systemd)];
    let seccomp =
        seccomp(&filters::NO_CLONE3, &[]).and_then(|()| seccomp(&filters::LISTENING, &descriptors));
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
