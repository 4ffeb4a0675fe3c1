//! A machine of tests/lab: a real systemd in namespaces of its own, which ends when it is dropped.

use super::lab;
use std::fs;
use std::path::{Path, PathBuf};

pub struct Machine {
    pub name: String,
    /// The host's PID of its systemd.
    pub host_pid: String,
}

impl Machine {
    /// Boots a machine over this root.
    pub fn boot(name: &str, root: &str) -> Machine {
        Machine::boot_with(name, root, "")
    }

    /// Boots a machine with the files of this folder copied over its root.
    pub fn boot_with(name: &str, root: &str, folder: &str) -> Machine {
        let name = format!("{name}-{}", std::process::id());
        let mut machine = Machine { name, host_pid: String::new() };
        let start = ["start", &machine.name, "--root", root, "--with", folder];
        lab("machine", &start).expect("it boots");
        machine.host_pid = lab("machine", &["pid", &machine.name]).expect("pid").trim().to_owned();
        machine
    }

    pub fn try_sh(&self, line: &str) -> Result<String, String> {
        lab("machine", &["run", &self.name, "sh", "-c", line])
    }

    pub fn sh(&self, line: &str) -> String {
        self.try_sh(line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    /// The host's path of one of its files.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.host_pid))
    }

    pub fn put(&self, from: &Path, to: &str) {
        fs::copy(from, self.inside(to)).unwrap_or_else(|error| panic!("{to}: {error}"));
    }

    pub fn file(&self, path: &str, text: &str) {
        fs::write(self.inside(path), text).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.try_sh("journalctl -q --no-pager -n 40").unwrap_or_default());
        }
        let _ = lab("machine", &["stop", &self.name]);
    }
}
