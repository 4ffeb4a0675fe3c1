//! The commands of the documents that no other test runs, on a machine without a package.

use crate::common::{self, AGENT, commands};
use crate::node::{Node, ask, stranger};
use std::path::Path;
use std::process::Command;

const HOOK: &str = env!("CARGO_BIN_EXE_patroni-before-stop");
const INSTALL: &str = "docs/install.md";
const OPERATE: &str = "docs/operate.md";
const SOURCES: &str = "/root/sources";
const DOCUMENTS: &str = "/usr/share/doc/patroni-agent-check";

#[test]
#[ignore = "needs root and systemd: tests/run"]
fn the_commands_of_the_documents_work_without_a_package() {
    let machine = Node::boot("documents", "/");
    machine.sh("systemctl stop patroni-agent-check.socket; userdel patroni-agent-check; set -e
        rm -r /usr/bin/patroni-agent-check /usr/lib/patroni-agent-check /etc/default/patroni-agent-check /run/patroni-agent-check
        rm /etc/systemd/system/*patroni* /etc/sysusers.d/patroni-* /etc/tmpfiles.d/patroni-*; systemctl daemon-reload");
    let release = format!("{SOURCES}/target/x86_64-unknown-linux-gnu/release");
    machine.sh(&format!("mkdir -p {release} {DOCUMENTS}"));
    for program in [AGENT, HOOK].map(Path::new) {
        let name = program.file_name().expect("a name").display();
        machine.put(program, &format!("{release}/{name}"));
    }
    for (folder, to) in [("units", SOURCES), ("units/examples", DOCUMENTS)] {
        let files = [common::file(folder), machine.inside(to)];
        let copied = Command::new("cp").arg("-r").args(files).status().expect("cp");
        assert!(copied.success(), "{folder}");
    }
    let run = |editor: &str, commands: String| {
        machine.sh(&format!("set -e; cd {SOURCES}; editor() {{ {editor} \"$1\"; }}\n{commands}"))
    };
    let asked = |check| machine.network(|| ask(5555, check));
    let only_haproxy = "sed -i s/localhost/127.0.0.1/";
    let ready = "up ready # primary, running, timeline 0\n";

    run(only_haproxy, commands(INSTALL, "Install by hand", "install -m 755"));
    assert_eq!(asked("primary"), ready);
    assert!(machine.network(stranger).is_none(), "the access list lets in a stranger");

    let without_a_list = || {
        machine.sh("rm -r /etc/systemd/system/patroni-agent-.socket.d; systemctl daemon-reload");
        assert!(machine.network(stranger).is_some(), "there is no access list");
    };
    without_a_list();
    run(only_haproxy, commands("docs/security.md", "Who may ask", "mkdir"));
    assert!(machine.network(stranger).is_none(), "the access list lets in a stranger");
    without_a_list();
    let install = commands("README.md", "Install", "mkdir").replace("10.0.0.1", "127.0.0.1");
    let install = install.replace("apt-get install", "systemctl daemon-reload #");
    run("", install);
    assert!(machine.network(stranger).is_none(), "the access list lets in a stranger");

    let change = || commands(OPERATE, "Change the settings", "cd /etc/default");
    run("echo OPTIONS=--agent-send --else drain >", change());
    assert_eq!(asked("replica"), "up drain # primary, running\n");
    run("echo OPTIONS=--agent-sent >", change());
    assert_eq!(asked("replica"), "up drain # primary, running\n");

    let hold = |begins| run("", commands(OPERATE, "Take a node out of every pool", begins));
    hold("echo");
    assert_eq!(asked("primary"), "up drain # hold: kernel upgrade, ticket 123\n");
    hold("rm");
    assert_eq!(asked("primary"), ready);

    let explain = "patroni-agent-check --explain";
    let said = run("", commands("docs/troubleshoot.md", "When something is wrong", explain));
    assert!(said.starts_with(ready), "{said}");

    machine.sh("rm -r /run/patroni-agent-check");
    run("", commands(INSTALL, "xinetd", "install -d"));
    assert_eq!(asked("primary"), ready);
    machine.assert_remembers("the memory file that an administrator made");
}
