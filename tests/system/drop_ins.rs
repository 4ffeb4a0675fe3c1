//! What a site adds to the units: the drop-ins of units/examples, a Patroni on another address, a second Patroni.

use crate::common::{self, AGENT, FakePatroni};
use crate::node::{LISTEN, Node, UNITS, ask, ask_at, check, on_both};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// With the drop-ins that a site may choose, checks still answer, and the exposure is what docs/performance.md says.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn each_drop_in_answers_with_its_exposure() {
    on_both("drop-ins", |name, root| {
        let machine = Node::boot(name, root);
        // the first instance starts the slice, which leaves a line
        assert!(machine.network(|| check(5555)).starts_with("up ready"));
        let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
        for (drop_in, most) in [("", 7.3), ("lean", 3.3), ("strict", 1.3)] {
            machine.sh(&format!("rm -rf {folder}; mkdir {folder}"));
            if !drop_in.is_empty() {
                let file = common::file("units/examples").join(format!("{drop_in}.conf"));
                machine.put(&file, &format!("{folder}/{drop_in}.conf"));
            }
            machine.sh("systemctl daemon-reload");
            let lines = machine.journal_lines();
            machine.assert_remembers(&format!("{name} {drop_in}"));
            assert_eq!(machine.journal_lines(), lines, "{name} {drop_in}");
            // its last line: "Overall exposure level for UNIT: 2.4 OK"
            let said =
                machine.sh("systemd-analyze security --no-pager patroni-agent-check@0.service");
            let exposure = said.rsplit_once("service: ").expect("an exposure level").1;
            let exposure: f64 =
                exposure.split(' ').next().expect("a number").parse().expect("a number");
            assert!(exposure <= most, "{name} {drop_in}: {exposure}");
            println!("{name} {drop_in}: {exposure}");
        }
    });
}

/// Debian's Patroni package lets the REST API listen on the node's address only, and the agent has to find it.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_patroni_on_the_nodes_address_is_found() {
    let node: SocketAddr = "10.99.0.1:5555".parse().expect("an address");
    on_both("address", |name, root| {
        for units in [UNITS, LISTEN] {
            let machine = Node::with_patroni(units, name, root, "10.99.0.1");
            let settings = |options: &str| {
                let text = format!("OPTIONS='{options}'\n");
                machine.file("/etc/default/patroni-agent-check", &text);
                machine.sh(&format!("systemctl try-restart {LISTEN}.service"));
            };
            machine.network(|| {
                assert_eq!(ask_at(node, "primary"), "up ready # primary, running, timeline 0\n", "{units} {name}");
                // only on the address that HAProxy asked; a check without a record, and so without a grace period
                let refused = "down ready # Patroni 127.0.0.1:8008: connection refused (see restapi.listen and --url)\n";
                assert_eq!(ask(5555, "leader"), refused, "{units} {name}");
            });
            settings("--agent-send --url http://127.0.0.1:8008");
            let refused = "down ready # Patroni 127.0.0.1:8008: connection refused\n";
            assert_eq!(
                machine.network(|| ask_at(node, "master")),
                refused,
                "with --url nothing is guessed"
            );
            settings("--agent-send --url http://10.99.0.1:8008");
            let named = "up ready # primary, running, timeline 0 (Patroni 10.99.0.1:8008)\n";
            assert_eq!(
                machine.network(|| ask(5555, "master")),
                named,
                "the reply names the Patroni that --url gives"
            );
            settings("--agent-send");
            machine.allow("10.99.0.1");
            assert!(
                machine.network(|| ask_at(node, "primary")).starts_with("up ready"),
                "{units} {name}"
            );
            for drop_in in ["lean", "strict"] {
                let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
                machine.sh(&format!("rm -rf {folder}; mkdir {folder}"));
                let file = common::file("units/examples").join(format!("{drop_in}.conf"));
                machine.put(&file, &format!("{folder}/{drop_in}.conf"));
                machine.sh("systemctl daemon-reload");
                assert!(
                    machine.network(|| ask_at(node, "primary")).starts_with("up ready"),
                    "{drop_in} {name}"
                );
            }
            // as xinetd starts it, and by hand
            machine.network(|| {
                let elsewhere = ["--memory-file", "/nonexistent/memory"];
                let (haproxy, stream) = common::connection("10.99.0.1:0");
                let mut child = common::start(common::Start::Inetd, stream, &elsewhere)
                    .spawn()
                    .expect("it starts");
                assert!(common::listen(haproxy).starts_with("up ready"));
                assert!(child.wait().expect("it ends").success());
                let mut by_hand = Command::new(AGENT);
                by_hand.args(elsewhere).stdin(Stdio::null());
                let said = by_hand.output().expect("it starts").stdout;
                assert!(said.starts_with(b"up ready"), "{}", String::from_utf8_lossy(&said));
            });
        }
    });
}

/// units/examples/container.conf, on a machine where systemd may make no namespace, or may do nothing in one.
#[test]
#[ignore = "needs root, systemd and strace: tests/run"]
fn the_listener_starts_in_a_container_without_namespaces() {
    on_both("container", |name, root| {
        let machine = Node::with(LISTEN, name, root);
        let service = format!("{LISTEN}.service");
        let folder = format!("/etc/systemd/system/{service}.d");
        // usually a container may make no namespace, and systemd goes on without one; here systemd may mount nothing in one
        for (calls, status) in [("mount,mount_setattr,move_mount,fsmount", "226")] {
            machine
                .sh(&format!("rm -rf {folder}; systemctl stop {service}; systemctl daemon-reload"));
            let mut strace = Command::new("strace");
            strace.args(["-f", "-qq", "-o", "/dev/null", "-p", &machine.host_pid]);
            strace.args(["-e", &format!("inject={calls}:error=EPERM")]);
            let mut strace = strace.spawn().expect("strace; see tests/install");
            let traced = format!("/proc/{}/status", machine.host_pid);
            while fs::read_to_string(&traced).expect("PID 1").contains("TracerPid:\t0\n") {
                sleep(Duration::from_millis(5));
            }
            assert!(
                machine.try_sh(&format!("systemctl start {service}")).is_err(),
                "{calls} {name}"
            );
            let ended = machine.sh(&format!("systemctl show -P ExecMainStatus {service}"));
            assert_eq!(ended.trim(), status, "{calls} {name}");
            machine.sh(&format!("mkdir {folder}"));
            let file = common::file("units/examples/container.conf");
            machine.put(&file, &format!("{folder}/container.conf"));
            machine.sh("systemctl daemon-reload");
            let said = machine.network(|| check(5555));
            assert!(said.starts_with("up ready"), "{calls} {name}: {said}");
            let pid = Pid::from_child(&strace);
            kill_process(pid, Signal::TERM).expect("it is there");
            strace.wait().expect("it ends");
        }
    });
}

/// With the commands of docs/install.md.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_second_patroni_has_its_own_agent() {
    let machine = Node::boot("second", "/");
    machine.network(|| {
        FakePatroni::on("127.0.0.1:8009", move |mut stream, _| {
            let request = common::read_request(&mut stream);
            let status = if request.starts_with("GET /health ") { 200 } else { 503 };
            let body = r#"{"state": "running", "role": "replica"}"#;
            let _ = stream.write_all(&common::http(status, body));
        })
    });
    let heading = "Several Patronis on one machine";
    let commands = common::commands("docs/install.md", heading, "cd /etc/systemd/system");
    machine.sh(&format!("set -e\n{commands}"));
    let both = || machine.network(|| [5555, 5556].map(|port| ask(port, "primary")));
    let ready = "up ready # primary, running, timeline 0\n";
    assert_eq!(both(), [ready, "up maint # replica, running\n"]);
    machine.sh("echo drain second > /run/patroni-agent-check/hold-2");
    assert_eq!(machine.network(|| ask(5555, "primary")), ready);
    assert_eq!(machine.network(|| ask(5556, "health")), "up drain # hold: second\n");
    machine
        .sh("[ -s /run/patroni-agent-check/memory ] && [ -s /run/patroni-agent-check/memory-2 ]");
}
