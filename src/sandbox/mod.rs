//! The sandbox, which a process enters before it reads a byte from a peer. In go a port, files and descriptors that it may
//! still use, out comes what the kernel lacks. Knows nothing of HAProxy, Patroni and the command line.

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

/// The seccomp filters, which build.rs compiles.
mod filters {
    use seccompiler::sock_filter;
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// What a process may still use: its open descriptors, memory, the time, TCP to Patroni's port, and the records of the
/// memory file. A listener may also use threads and the folders of the files that its checks read.
#[derive(Clone, Debug)]
pub struct Confinement<'a> {
    /// The version of Landlock. Only tests set an older one, to see what that leaves open.
    pub abi: ABI,
    /// The only port to which the process can connect, if the kernel can restrict ports (Landlock ABI 4, Linux 6.7).
    port: Option<u16>,
    /// The files that each check reads again. They may be replaced or be missing, so their folders stay readable.
    read: Vec<PathBuf>,
    /// The memory file, if each check opens or creates it.
    memory: Option<&'a Path>,
    limits: &'static [(Resource, u64)],
    filters: &'static [&'static [sock_filter]],
    /// The placeholders in the filters, and the descriptors that replace them.
    descriptors: [(u32, Option<RawFd>); 3],
}

impl<'a> Confinement<'a> {
    /// The confinement of a process for one check. It can write only records to `memory`, and cannot reconnect `log`.
    pub fn of_check(port: u16, memory: Option<RawFd>, log: Option<RawFd>) -> Confinement<'a> {
        let (port, read) = (Some(port), Vec::new());
        let (limits, filters) = (&CHECK_LIMITS, CHECK_FILTERS);
        let descriptors = [(MEMORY, memory), (LOG, log), (SYSTEMD, None)];
        Confinement { abi: ABI::V7, port, read, memory: None, limits, filters, descriptors }
    }

    /// The confinement of a listener, whose checks open their files. It cannot reconnect `log` and `systemd`.
    pub fn of_listener(
        port: Option<u16>,
        read: Vec<PathBuf>,
        memory: Option<&'a Path>,
        log: Option<RawFd>,
        systemd: Option<RawFd>,
    ) -> Confinement<'a> {
        let (limits, filters) = (&LISTENER_LIMITS, LISTENER_FILTERS);
        let descriptors = [(MEMORY, None), (LOG, log), (SYSTEMD, systemd)];
        Confinement { abi: ABI::V7, port, read, memory, limits, filters, descriptors }
    }

    /// Confines this process for good. An error names what the kernel lacks; the rest is in force, and the check can go on.
    pub fn enter(&self) -> Result<(), String> {
        let limits = set_limits(self.limits).err();
        let landlock = self.restrict_files_and_ports().err();
        // last, since it forbids the calls of the others
        let seccomp = self.filters.iter().find_map(|filter| self.filter_calls(filter).err());
        let parts = [("rlimits", limits), ("Landlock", landlock), ("seccomp", seccomp)];
        let missing = parts.into_iter().filter_map(|(what, why)| Some(format!("{what}: {}", why?)));
        let missing: Vec<_> = missing.collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(format!("sandbox incomplete: {}", missing.join("; "))),
        }
    }

    /// Replaces the placeholders in a filter by the descriptors, and installs the filter.
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
        // this sets no_new_privs as well
        Ok(seccompiler::apply_filter(&filter)?)
    }

    /// Forbids all files except those in the folders, all TCP ports except Patroni's, abstract Unix sockets, and signals.
    fn restrict_files_and_ports(&self) -> Result<(), Box<dyn Error>> {
        let abi = self.abi;
        if abi == ABI::Unsupported {
            return Err("not supported by this kernel".into());
        }
        let mut rules = Ruleset::default().handle_access(AccessFs::from_all(abi))?;
        if abi >= ABI::V4 {
            rules = rules.handle_access(AccessNet::from_all(abi))?;
        }
        if abi >= ABI::V6 {
            rules = rules.scope(Scope::from_all(abi))?;
        }
        let mut rules = rules.create()?;
        if let Some(port) = self.port.filter(|_| abi >= ABI::V4) {
            rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
        }
        for folder in self.read.iter().flat_map(|file| open_folders(file)) {
            rules = rules.add_rule(PathBeneath::new(folder, AccessFs::ReadFile))?;
        }
        let memory = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeReg;
        for folder in self.memory.iter().flat_map(|file| open_folders(file)) {
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

/// A bug or an intruder must not dump memory, spin (`--timeout` is 10 s at most), start a process or collect descriptors.
const CHECK_LIMITS: [(Resource, u64); 4] =
    [(Resource::Core, 0), (Resource::Cpu, 11), (Resource::Nproc, 0), (Resource::Nofile, 64)];

const CHECK_FILTERS: &[&[sock_filter]] = &[&filters::CHECK];
const LISTENER_FILTERS: &[&[sock_filter]] = &[&filters::NO_CLONE3, &filters::LISTENER];
/// A listener cannot write beyond the size of the memory file.
const LISTENER_LIMITS: [(Resource, u64); 1] = [(Resource::Fsize, SIZE as u64)];

/// Sets the limits for good; a stricter limit stays.
fn set_limits(limits: &[(Resource, u64)]) -> Result<(), Box<dyn Error>> {
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

/// Opens the folder of a path and that of the file to which it leads, or the nearest one above that exists, but never the
/// root.
fn open_folders(file: &Path) -> Vec<PathFd> {
    let named = std::path::absolute(file).ok();
    let real = file.canonicalize().ok();
    let folder = |file: PathBuf| {
        let folder = file.ancestors().skip(1).find(|folder| folder.is_dir())?;
        PathFd::new(folder).ok().filter(|_| folder != Path::new("/"))
    };
    named.into_iter().chain(real).filter_map(folder).collect()
}
