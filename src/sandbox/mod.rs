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

/// What a process may still do once it is confined.
#[derive(Clone, Debug)]
pub struct Confinement<'a> {
    /// No more of Landlock is used than a kernel of this ABI knows. Only tests change it, to see what that leaves open.
    pub known: ABI,
    /// Patroni's port. No other can be connected to, where the kernel knows ports (Landlock ABI 4, Linux 6.7).
    port: Option<u16>,
    /// Files that are read again. They may be replaced, or not be there yet, so all that is in their folders can be read, and
    /// in the folders that links lead to.
    read: Vec<PathBuf>,
    /// The memory file, if it is opened again. It may have to be made.
    memory: Option<&'a Path>,
    limits: &'static [(Resource, u64)],
    /// One after the other. Each forbids the next ones nothing.
    filters: &'static [&'static [sock_filter]],
    /// The descriptors that the build script left open.
    descriptors: [(u32, Option<RawFd>); 3],
}

impl<'a> Confinement<'a> {
    /// Of a process for one check. To `memory` only a record can be written, in its place, and `log` stays connected to whom it
    /// is.
    pub fn of_check(port: u16, memory: Option<RawFd>, log: Option<RawFd>) -> Confinement<'a> {
        Confinement {
            known: ABI::V7,
            port: Some(port),
            read: Vec::new(),
            memory: None,
            limits: &CHECK_LIMITS,
            filters: &[&filters::CHECK],
            descriptors: [(filters::MEMORY, memory), (filters::LOG, log), (filters::SYSTEMD, None)],
        }
    }

    /// Of a listener: what each of its checks needs again. `log` and `systemd` stay connected to whom they are.
    pub fn of_listener(
        port: Option<u16>,
        read: Vec<PathBuf>,
        memory: Option<&'a Path>,
        log: Option<RawFd>,
        systemd: Option<RawFd>,
    ) -> Confinement<'a> {
        Confinement {
            known: ABI::V7,
            port,
            read,
            memory,
            limits: &LISTENER_LIMITS,
            filters: &[&filters::NO_CLONE3, &filters::LISTENING],
            descriptors: [
                (filters::MEMORY, None),
                (filters::LOG, log),
                (filters::SYSTEMD, systemd),
            ],
        }
    }

    /// Confines this process for good.
    ///
    /// # Errors
    ///
    /// This kernel has not all of it: the text says what is missing. The rest holds, and the check can go on.
    pub fn enter(&self) -> Result<(), String> {
        let limits = limit(self.limits);
        let landlock = self.restrict_files_and_ports();
        // last, since it forbids the others
        let seccomp = self.filters.iter().try_for_each(|filter| self.filter_calls(filter));
        let parts = [("rlimits", limits), ("Landlock", landlock), ("seccomp", seccomp)];
        let missing = |(what, result): (_, Result<(), Box<dyn Error>>)| {
            Some(format!("{what}: {}", result.err()?))
        };
        let missing: Vec<_> = parts.into_iter().filter_map(missing).collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(format!("sandbox incomplete: {}", missing.join("; "))),
        }
    }

    /// Installs a filter from here on, with the descriptors that the build script left open.
    fn filter_calls(&self, filter: &[sock_filter]) -> Result<(), Box<dyn Error>> {
        if filter.is_empty() {
            return Err(format!("not supported on {}", std::env::consts::ARCH).into());
        }
        let mut filter = filter.to_vec();
        for instruction in &mut filter {
            let open = self.descriptors.iter().find(|(open, _)| *open == instruction.k);
            if let Some((_, Some(descriptor))) = open {
                instruction.k = descriptor.unsigned_abs();
            }
        }
        // sets no_new_privs as well
        Ok(seccompiler::apply_filter(&filter)?)
    }

    /// No file but in the folders that are needed again, no TCP port but Patroni's, no abstract Unix socket, no signal to
    /// others.
    fn restrict_files_and_ports(&self) -> Result<(), Box<dyn Error>> {
        let known = self.known;
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
        if let Some(port) = self.port.filter(|_| known >= ABI::V4) {
            rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
        }
        for folder in self.read.iter().flat_map(|file| folders(file)) {
            rules = rules.add_rule(PathBeneath::new(folder, AccessFs::ReadFile))?;
        }
        let memory = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeReg;
        for folder in self.memory.iter().flat_map(|file| folders(file)) {
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
}

/// A bug or an intruder shall not dump memory, spin (the longest --timeout is 10 s), start a process or collect
/// descriptors.
const CHECK_LIMITS: [(Resource, u64); 4] =
    [(Resource::Core, 0), (Resource::Cpu, 11), (Resource::Nproc, 0), (Resource::Nofile, 64)];

/// No file is larger than the memory.
const LISTENER_LIMITS: [(Resource, u64); 1] = [(Resource::Fsize, SIZE as u64)];

/// Sets limits for good; a stricter one stays.
fn limit(limits: &[(Resource, u64)]) -> Result<(), Box<dyn Error>> {
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
