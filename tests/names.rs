//! The machine's name services (nsswitch.conf): the shipped program asks none of them, so they can neither crash
//! it nor keep it waiting. Needs root and what tests/install installs; tests/run runs it.

mod common;

use common::{lab, shipped};
use std::fs;

const DEBIAN_13: &str = "/var/cache/patroni-agent-check/trixie";

/// A machine with the shipped program and units, gone when the test ends.
struct Machine(String);

impl Machine {
    fn boot(name: &str, root: &str) -> Machine {
        let machine = Machine(format!("{name}-{}", std::process::id()));
        lab("machine", &["start", &machine.0, "--root", root]).expect("it boots");
        let handler = shipped();
        lab("machine", &["agent", &machine.0, handler.to_str().expect("UTF-8")])
            .expect("installed");
        machine
    }

    fn sh(&self, line: &str) -> String {
        lab("machine", &["run", &self.0, "sh", "-c", line])
            .unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    fn file(&self, path: &str, text: &str) {
        let leader = lab("machine", &["pid", &self.0]).expect("its pid");
        fs::write(format!("/proc/{}/root{path}", leader.trim()), text).expect(path);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = lab("machine", &["stop", &self.0]);
    }
}

/// glibc in a static program loads the modules that nsswitch.conf names, of another version than its own: SIGFPE.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn no_module_is_loaded() {
    let machine = Machine::boot("names", DEBIAN_13);
    machine.file("/etc/hosts", "127.0.0.1 localhost\n127.0.0.2 pg1.example # here\n");
    for services in ["files compat dns", "files myhostname resolve [!UNAVAIL=return] dns"] {
        machine.file("/etc/nsswitch.conf", &format!("passwd: files\nhosts: {services}\n"));
        for (url, arguments, told) in [
            ("http://pg1.example:1", "", "Patroni pg1.example:1: connection refused"),
            (
                "http://nowhere.example:1",
                "--connect-to 127.0.0.2",
                "Patroni 127.0.0.2:1: connection refused",
            ),
            (
                "http://nowhere.example:1",
                "",
                "Patroni nowhere.example:1: not in /etc/hosts, and DNS is not asked: --connect-to ADDRESS",
            ),
        ] {
            let line = format!("patroni-agent-check --url {url} {arguments} 2> /dev/null; echo $?");
            assert_eq!(machine.sh(&line), format!("down ready # {told}\n2\n"), "{services}");
        }
    }
    for (made, why) in [
        ("true", "No such file or directory (os error 2)"),
        ("mkfifo /etc/hosts", "it is no plain file"),
    ] {
        let line = format!(
            "rm -f /etc/hosts; {made}; timeout 5 patroni-agent-check --url http://pg1:1 2>&1 > /dev/null; echo $?"
        );
        let told = format!(
            "patroni-agent-check: primary: Patroni pg1:1: not in /etc/hosts ({why}), and DNS is not asked: \
             --connect-to ADDRESS\n2\n"
        );
        assert_eq!(machine.sh(&line), told);
    }
}
