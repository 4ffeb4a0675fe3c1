//! The sandbox, which a process enters before it reads a byte from a peer. In go a port, files and descriptors that it may
//! still use, out comes what the kernel does not support. Knows nothing of HAProxy, Patroni and the command line.

pub mod user;

use crate::run::memory::SIZE;
use filters::{LOG, MEMORY, SYSTEMD};
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

/// From build.rs.
mod filters {
    use seccompiler::sock_filter;
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// What a process may still use: its open descriptors, memory, time, TCP to Patroni's port, and one record in the memory
/// file; a listener also threads, and the folders of the files that its checks read.
#[derive(Clone, Debug)]
pub struct Confinement<'a> {
    /// The Landlock that is used. Only tests use an older one, to see what that leaves open.
    pub known: ABI,
    /// The only port that can be connected to, where the kernel knows ports (Landlock ABI 4, Linux 6.7).
    port: Option<u16>,
    /// Files that are read again. They may be replaced or not be there yet, so all in their folders can be read.
    read: Vec<PathBuf>,
    /// The memory file, if it is opened again or has to be made.
    memory: Option<&'a Path>,
    limits: &'static [(Resource, u64)],
    filters: &'static [&'static [sock_filter]],
    /// The descriptors that stand in the filters as placeholders.
    descriptors: [(u32, Option<RawFd>); 3],
}

impl<'a> Confinement<'a> {
    /// That of a process for one check. To `memory` only a record can be written, and `log` cannot be connected elsewhere.
    pub fn of_check(port: u16, memory: Option<RawFd>, log: Option<RawFd>) -> Confinement<'a> {
        let (port, read) = (Some(port), Vec::new());
        let (limits, filters) = (&CHECK_LIMITS, CHECK_FILTERS);
        let descriptors = [(MEMORY, memory), (LOG, log), (SYSTEMD, None)];
        Confinement { known: ABI::V7, port, read, memory: None, limits, filters, descriptors }
    }

    /// That of a listener, each of whose checks opens its files. `log` and `systemd` cannot be connected elsewhere.
    pub fn of_listener(
        port: Option<u16>,
        read: Vec<PathBuf>,
        memory: Option<&'a Path>,
        log: Option<RawFd>,
        systemd: Option<RawFd>,
    ) -> Confinement<'a> {
        let (limits, filters) = (&LISTENER_LIMITS, LISTENER_FILTERS);
        let descriptors = [(MEMORY, None), (LOG, log), (SYSTEMD, systemd)];
        Confinement { known: ABI::V7, port, read, memory, limits, filters, descriptors }
    }

    /// Confines this process for good.
    ///
    /// # Errors
    ///
    /// The kernel lacks something, which the text names. The rest holds, and the check can go on.
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

    /// Installs a filter with the descriptors in place of the placeholders.
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

    /// Forbids all files but those in the folders, all TCP ports but Patroni's, abstract Unix sockets, and signals to
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

/// A bug or an intruder must not dump memory, spin (the longest --timeout is 10 s), start a process or collect descriptors.
const CHECK_LIMITS: [(Resource, u64); 4] =
    [(Resource::Core, 0), (Resource::Cpu, 11), (Resource::Nproc, 0), (Resource::Nofile, 64)];

/// The filters are installed one after the other.
const CHECK_FILTERS: &[&[sock_filter]] = &[&filters::CHECK];
const LISTENER_FILTERS: &[&[sock_filter]] = &[&filters::NO_CLONE3, &filters::LISTENING];
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

/// The folder in which a file is looked for, and the one in which it is. For a folder that is not there yet it is the one
/// above, but never the root.
fn folders(file: &Path) -> Vec<PathFd> {
    let named = std::path::absolute(file).ok();
    let real = file.canonicalize().ok();
    let folder = |file: PathBuf| {
        let folder = file.ancestors().skip(1).find(|folder| folder.is_dir())?;
        PathFd::new(folder).ok().filter(|_| folder != Path::new("/"))
    };
    named.into_iter().chain(real).filter_map(folder).collect()
}
