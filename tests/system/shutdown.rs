//! A machine that shuts down answers until Patroni has stopped, and one that boots opens the port when a check has all it
//! needs. Needs root and what tests/install installs; tests/run runs it.

use crate::common::machine::Machine;
use crate::common::{self, AGENT};
use crate::node::{DEBIAN_13, LISTEN, Node, UNITS, check, on_both};
use crate::port_stays::Errors;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A service that stops as slowly as Patroni and PostgreSQL.
const SLOW: &str = "[Service]\nExecStart=/bin/sleep 100\nExecStop=/bin/sleep 6\nExecStopPost=/bin/touch /run/stopped\n";

/// Runs this command on a machine and makes checks until the slow service has stopped, and for `more` after that. No check
/// may be lost. Returns the journal.
fn assert_answers_until_the_end(machine: &Node, command: &str, more: Duration) -> String {
    let name = &machine.name;
    machine.file("/etc/systemd/system/slow.service", SLOW);
    machine.sh("systemctl daemon-reload; systemctl start slow");
    // stays readable when the machine has ended
    let run = File::open(machine.inside("/run")).expect("its /run");
    let run = format!("/proc/{}/fd/{}", std::process::id(), run.as_raw_fd());
    let has_stopped = || Path::new(&run).join("stopped").exists();
    let (asked, lost) = machine.network(|| {
        assert!(check(5555).starts_with("up ready"), "{name}");
        let _ = machine.try_sh(command);
        let (begun, mut asked, mut lost) = (Instant::now(), 0, Vec::new());
        let mut stopped = None::<Instant>;
        while stopped.is_none_or(|stopped| stopped.elapsed() < more) {
            let reply = check(5555);
            if stopped.is_none() && has_stopped() {
                stopped = Some(Instant::now());
            }
            asked += 1;
            if !reply.starts_with("up ready") && (stopped.is_none() || !more.is_zero()) {
                lost.push(format!("{reply:?} after {:.2} s", begun.elapsed().as_secs_f32()));
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{name}: it does not stop");
            sleep(Duration::from_millis(50));
        }
        (asked, lost)
    });
    println!("{name}: {command}: {asked} checks, {} lost", lost.len());
    assert!(lost.is_empty(), "{name}: {command}: {lost:?}");
    assert!(asked > 20, "{name}: {asked} checks in six seconds");
    let mut journalctl = Command::new("journalctl");
    let journal =
        journalctl.args(["-q", "--no-pager", "-o", "cat", "-D", &format!("{run}/log/journal")]);
    let journal =
        String::from_utf8_lossy(&journal.output().expect("journalctl").stdout).into_owned();
    assert!(journal.contains("slow.service"), "{name}: {journal}");
    for wrong in ["ordering cycle", "Failed unmounting", "Failed to queue"] {
        assert!(!journal.contains(wrong), "{name}: {command}: {wrong}: {journal}");
    }
    journal
}

/// With mounts that the shutdown unmounts meanwhile, and that no process of the agent keeps busy.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_shutdown_loses_no_check_until_patroni_has_stopped() {
    std::thread::scope(|scope| {
        for (units, name, commands) in [
            (UNITS, "down", ["systemctl poweroff", "systemctl reboot"]),
            (
                LISTEN,
                "down-many",
                ["systemctl start --no-block kexec.target", "systemctl poweroff"],
            ),
        ] {
            for (debian, root, command) in [(12, "/", commands[0]), (13, DEBIAN_13, commands[1])] {
                scope.spawn(move || {
                    let machine = Node::with(units, &format!("{name}-{debian}"), root);
                    machine.sh("mkdir -p /srv/data; mount -t tmpfs data /srv/data; mount -t tmpfs home /home");
                    assert_answers_until_the_end(&machine, command, Duration::ZERO);
                    let end = Instant::now() + Duration::from_secs(20);
                    while Path::new(&format!("/proc/{}/root/run", machine.host_pid)).exists() {
                        assert!(Instant::now() < end, "{name}-{debian}: it does not end");
                        sleep(Duration::from_millis(50));
                    }
                });
            }
        }
    });
}

/// With each drop-in, and with an administrator's own.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn no_drop_in_loses_a_check_in_a_shutdown() {
    std::thread::scope(|scope| {
        for (units, drop_ins) in
            [(UNITS, ["lean", "strict"]), (LISTEN, ["container", "access-list"])]
        {
            for (drop_in, root) in drop_ins.into_iter().zip(["/", DEBIAN_13]) {
                scope.spawn(move || {
                    let machine = Node::with(units, drop_in, root);
                    let service = if units == UNITS { "patroni-agent-check@.service" } else { "patroni-agent-check-listen.service" };
                    let unit = if drop_in == "access-list" { format!("{units}.socket") } else { service.to_owned() };
                    let text = fs::read_to_string(common::file(&format!("units/examples/{drop_in}.conf"))).expect("units");
                    machine.sh(&format!("mkdir -p /etc/systemd/system/{unit}.d /etc/systemd/system/{units}.socket.d /etc/systemd/system/{service}.d"));
                    machine.file(&format!("/etc/systemd/system/{unit}.d/{drop_in}.conf"), &text);
                    for unit in [&format!("{units}.socket"), service] {
                        machine.file(&format!("/etc/systemd/system/{unit}.d/own.conf"), "[Unit]\nAfter=network-online.target\n");
                    }
                    assert_answers_until_the_end(&machine, "systemctl poweroff", Duration::ZERO);
                });
            }
        }
    });
}

/// Rescue and emergency mode stop Patroni, and the agent must tell HAProxy.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn rescue_and_emergency_mode_answer_before_and_after() {
    std::thread::scope(|scope| {
        for (units, name, root, mode) in [
            (UNITS, "rescue-13", DEBIAN_13, "rescue"),
            (LISTEN, "rescue-12", "/", "rescue"),
            (UNITS, "emergency-12", "/", "emergency"),
            (LISTEN, "emergency-13", DEBIAN_13, "emergency"),
        ] {
            scope.spawn(move || {
                let machine = Node::with(units, name, root);
                let isolate = format!("systemctl isolate --no-block {mode}.target");
                assert_answers_until_the_end(&machine, &isolate, Duration::from_secs(1));
            });
        }
    });
}

/// Copies a file, and makes its folder.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
    fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
}

/// A boot with a slow firewall, and units that wait for the network: no ordering cycle, and the port opens
/// after the firewall and the memory file.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_boot_has_its_memory_file_and_its_firewall_before_the_first_check() {
    on_both("boot", |name, root| {
        for units in [UNITS, LISTEN] {
            let folder = tempfile::tempdir().expect("a folder");
            let place = |path: &str| folder.path().join(path);
            let system = |unit: &str| place("etc/systemd/system").join(unit);
            copy(Path::new(AGENT), &place("usr/bin/patroni-agent-check"));
            for end in
                [".socket", "@.service", "-listen.socket", "-listen.service", "-reopen@.service"]
            {
                let unit = format!("{UNITS}{end}");
                copy(&common::file("units").join(&unit), &system(&unit));
            }
            copy(
                &common::file("units/patroni-agent-check.slice"),
                &system(r"system-patroni\x2dagent\x2dcheck.slice"),
            );
            copy(
                &common::file("units/patroni-agent-check.sysusers"),
                &place("etc/sysusers.d/agent.conf"),
            );
            copy(
                &common::file("units/patroni-agent-check.tmpfiles"),
                &place("etc/tmpfiles.d/agent.conf"),
            );
            let write = |unit: &str, text: &str| {
                let file = system(unit);
                fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
                fs::write(file, text).expect("written");
            };
            // like systemd's own units, which tests/lab masks; some are slow
            let early = |what: &str| {
                format!(
                    "[Unit]\nDefaultDependencies=no\nConflicts=shutdown.target\nBefore=sysinit.target shutdown.target\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={what}\n"
                )
            };
            write(
                "systemd-sysusers.service",
                &early("/bin/systemd-sysusers /etc/sysusers.d/agent.conf"),
            );
            write(
                "systemd-tmpfiles-setup.service",
                &early(
                    "/bin/sh -c 'sleep 1; systemd-tmpfiles --create /etc/tmpfiles.d/agent.conf'",
                )
                .replace("[Service]", "After=systemd-sysusers.service\n[Service]"),
            );
            let late = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sleep 1\n";
            write(
                "firewall.service",
                &format!("[Unit]\nWants=network-pre.target\nBefore=network-pre.target\n{late}"),
            );
            write(
                "network.service",
                &format!(
                    "[Unit]\nAfter=network-pre.target\nBefore=network-online.target network.target\nWants=network.target\n{late}"
                ),
            );
            write(
                "slow.service",
                &format!(
                    "[Unit]\nAfter=network-online.target\nWants=network-online.target\n{late}"
                ),
            );
            write(
                "test.target.d/more.conf",
                "[Unit]\nWants=firewall.service network.service slow.service sockets.target systemd-sysusers.service\n",
            );
            fs::create_dir_all(system("sysinit.target.wants")).expect("a folder");
            fs::create_dir_all(system("sockets.target.wants")).expect("a folder");
            for early in ["systemd-sysusers.service", "systemd-tmpfiles-setup.service"] {
                symlink(
                    format!("/etc/systemd/system/{early}"),
                    system("sysinit.target.wants").join(early),
                )
                .expect("a link");
            }
            symlink(
                format!("/etc/systemd/system/{units}.socket"),
                system(&format!("sockets.target.wants/{units}.socket")),
            )
            .expect("a link");
            if root == DEBIAN_13 {
                // an administrator's own ordering, which used to be a cycle
                write(
                    &format!("{units}.socket.d/own.conf"),
                    "[Unit]\nAfter=network-online.target\n",
                );
            }
            let machine = Machine::boot_with(
                &format!("{name}-{}", &units[19..]),
                root,
                folder.path().to_str().expect("UTF-8"),
            );
            let journal = machine.sh("journalctl --sync; journalctl -q --no-pager -o cat");
            assert!(!journal.contains("ordering cycle"), "{journal}");
            let active = |unit: &str| -> u64 {
                let time = machine
                    .sh(&format!("systemctl show -P ActiveEnterTimestampMonotonic '{unit}'"));
                time.trim().parse().expect("a number")
            };
            let opened = active(&format!("{units}.socket"));
            for before in
                ["systemd-sysusers.service", "systemd-tmpfiles-setup.service", "firewall.service"]
            {
                assert!(
                    active(before) > 0 && active(before) <= opened,
                    "{name} {units}: {before}: {journal}"
                );
            }
            machine.sh("[ -e /run/patroni-agent-check/memory ]");
        }
    });
}

/// Two faults at once: PID 1 cannot start a check in the middle of a shutdown.
#[test]
#[ignore = "needs root, systemd and strace: tests/run"]
fn a_socket_that_fails_in_a_shutdown_is_opened_again() {
    on_both("down-fails", |name, root| {
        let machine = Node::boot(name, root);
        machine.file("/etc/systemd/system/slow.service", &SLOW.replace("sleep 6", "sleep 10"));
        machine.sh("systemctl daemon-reload; systemctl start slow");
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        machine.sh("systemctl poweroff 2> /dev/null");
        let errors = Errors::inject(&machine, "socketpair:error=ENFILE:when=1");
        assert!(machine.network(|| check(5555)).is_empty(), "{name}");
        drop(errors);
        let end = Instant::now() + Duration::from_secs(8);
        while !machine.network(|| check(5555)).starts_with("up ready") {
            assert!(Instant::now() < end, "{name}: the port stays closed");
            sleep(Duration::from_millis(20));
        }
    });
}
