//! Port 5555 opens again unless an administrator has closed it: after errors of PID 1, before the address is there, after
//! the unit was missing, and after a stranger had the port. Needs root and what tests/install installs; tests/run runs it.

use crate::node::{DEBIAN_13, LISTEN, Node, UNITS, agent, check, on_both, stranger};
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The documents say two seconds, but this machine may be busy.
const SOON: Duration = Duration::from_secs(20);

/// Makes calls of PID 1 fail until it is dropped.
pub struct Errors(Child);

impl Errors {
    pub fn inject(machine: &Node, what: &str) -> Errors {
        let mut strace = Command::new("strace");
        strace.args([
            "-qq",
            "-o",
            "/dev/null",
            "-p",
            &machine.host_pid,
            "-e",
            &format!("inject={what}"),
        ]);
        let strace = strace.spawn().expect("strace; see tests/install");
        let traced = format!("/proc/{}/status", machine.host_pid);
        while fs::read_to_string(&traced).expect("PID 1").contains("TracerPid:\t0\n") {
            sleep(Duration::from_millis(5));
        }
        Errors(strace)
    }
}

impl Drop for Errors {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

impl Node {
    fn answers(&self) -> bool {
        self.network(|| check(5555)).starts_with("up ready")
    }

    fn wait_until(&self, what: &str, is_so: impl Fn(&Node) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < SOON, "{}: {what}: {}", self.name, self.said());
            sleep(Duration::from_millis(20));
        }
        println!("{}: {what}: after {:.1} s", self.name, begun.elapsed().as_secs_f32());
    }

    /// The agent's lines in the journal.
    fn said(&self) -> String {
        self.sh("journalctl --sync; journalctl -q --no-pager -o cat -t patroni-agent-check")
    }

    fn is_active(&self, unit: &str) -> bool {
        self.sh(&format!("systemctl is-active {unit} || true")) == "active\n"
    }

    /// Lets another program of this machine take the port, so that the socket fails.
    fn stranger_takes_the_port(&self, units: &str) {
        self.sh(&format!("systemctl stop {units}.socket"));
        self.sh("systemd-run --quiet --unit=stranger --uid=nobody systemd-socket-activate -a -l 5555 /bin/true");
        self.wait_until("the stranger listens", |machine| {
            machine.network(|| TcpStream::connect(agent(5555)).is_ok())
        });
        assert!(self.try_sh(&format!("systemctl start {units}.socket")).is_err(), "{}", self.name);
    }
}

/// The error hits the call that PID 1 makes for a connection, and the calls that it makes to recover.
#[test]
#[ignore = "needs root, systemd and strace: tests/run"]
fn an_error_of_pid_1_closes_the_port_for_two_seconds_at_most() {
    on_both("errors", |name, root| {
        let machine = Node::boot(name, root);
        assert!(machine.answers(), "{name}");
        for (what, times) in [
            ("socketpair:error=ENFILE", 1),
            ("clone,clone3,vfork,?fork:error=ENOMEM", 1),
            ("clone,clone3,vfork,?fork:error=ENOMEM", 5),
            ("accept4:error=EMFILE", 1),
            ("openat:error=ENFILE", 1),
            ("mkdir,?mkdirat:error=ENOSPC", 1),
            ("pidfd_open:error=EMFILE", 1),
            ("epoll_ctl:error=ENOMEM", 1),
            ("pipe2:error=EMFILE", 1),
            ("fcntl:error=ENOMEM", 1),
        ] {
            let errors = Errors::inject(&machine, &format!("{what}:when=1..{times}"));
            let began = Instant::now();
            // PID 1 may have forked for something else first, and then this check is answered
            machine.answers();
            machine.wait_until(&format!("{what}, {times} times"), Node::answers);
            println!("{name}: {what}, {times} times: closed for {:?} at most", began.elapsed());
            drop(errors);
            machine.wait_until("the reopen service has ended", |machine| {
                !machine.is_active(&format!("{UNITS}-reopen@{UNITS}.service"))
            });
        }
        let said = machine.said();
        let told = "systemd has closed patroni-agent-check.socket (resources: no memory, ";
        assert!(said.contains(told) && said.contains("): open again after "), "{name}: {said}");
        assert_eq!(machine.sh("systemctl --failed --plain --no-legend"), "", "{name}");
    });
}

/// A timer starts the listener, and the connections wait in the socket meanwhile.
#[test]
#[ignore = "needs root, systemd and strace: tests/run"]
fn an_error_of_pid_1_never_closes_the_listening_pair() {
    on_both("errors-many", |name, root| {
        let machine = Node::with(LISTEN, name, root);
        for what in ["socketpair:error=ENFILE", "clone,clone3,vfork,?fork:error=ENOMEM"] {
            machine.sh(&format!("systemctl stop {LISTEN}.service"));
            let errors = Errors::inject(&machine, &format!("{what}:when=1..3"));
            machine.wait_until(what, |machine| {
                machine
                    .network(|| TcpStream::connect(agent(5555)))
                    .expect("the port is never closed");
                machine.answers()
            });
            drop(errors);
        }
        assert_eq!(machine.said(), "", "{name}");
    });
}

/// While a stranger has the port, the journal names the stranger, and each command of an administrator still applies.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn an_administrator_wins_while_the_port_is_opened_again() {
    std::thread::scope(|scope| {
        for (units, other, name, root) in
            [(UNITS, LISTEN, "wins-12", "/"), (LISTEN, UNITS, "wins-13", DEBIAN_13)]
        {
            scope.spawn(move || {
                let machine = Node::with(units, name, root);
                // where a package puts the units, so that they can be masked
                machine.sh("cp -P /etc/systemd/system/*patroni* /usr/lib/systemd/system/; rm /etc/systemd/system/*patroni*; systemctl daemon-reload");
                let reopen = format!("{UNITS}-reopen@{units}.service");
                let uid = machine.sh("id -u nobody");
                let removal = format!("rm /usr/lib/systemd/system/{units}.socket; systemctl daemon-reload");
                for (act, opens) in [
                    ("systemctl daemon-reload", units),
                    (&*format!("systemctl stop {units}.socket"), ""),
                    (&*format!("systemctl disable {units}.socket"), ""),
                    (&*format!("systemctl disable --now {units}.socket"), ""),
                    (&*format!("systemctl mask {units}.socket"), ""),
                    (&*format!("systemctl start {other}.socket || true"), other),
                    (&*removal, ""),
                ] {
                    machine.sh(&format!("systemctl unmask -q {units}.socket; systemctl enable -q {units}.socket; systemctl stop {other}.socket"));
                    // after this line, the program knows that the socket was enabled
                    let said = machine.said();
                    machine.stranger_takes_the_port(units);
                    machine.wait_until("it tries to open the port", |machine| machine.said() != said);
                    machine.sh(act);
                    if opens != units {
                        machine.wait_until(&format!("after {act}, it ends"), |machine| !machine.is_active(&reopen));
                    }
                    machine.sh("systemctl stop stranger");
                    if !opens.is_empty() {
                        machine.wait_until(&format!("after {act}, {opens} answers"), Node::answers);
                    }
                    sleep(Duration::from_millis(1500));
                    for unit in [units, other] {
                        let socket = format!("{unit}.socket");
                        assert_eq!(machine.is_active(&socket), unit == opens, "{name}: {act}: {socket}: {}", machine.said());
                    }
                }
                let said = machine.said();
                let who = "still closed after ";
                let named = format!("; [::]:5555 is listened on by uid {}, pid ", uid.trim());
                assert!(said.contains(who) && said.contains(&named) && said.contains(" (systemd-socket-"), "{name}: {said}");
            });
        }
    });
}

/// An upgrade by hand may remove the unit for a moment. systemd 252 then closes the port.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_unit_that_is_missing_for_a_moment() {
    for units in [UNITS, LISTEN] {
        on_both("away", |name, root| {
            let machine = Node::with(units, name, root);
            let unit = if units == UNITS {
                format!("{units}@.service")
            } else {
                format!("{units}.service")
            };
            machine.sh(&format!("mv /etc/systemd/system/{unit} /root; systemctl daemon-reload"));
            assert!(!machine.answers(), "{name}");
            machine.sh(&format!("mv /root/{unit} /etc/systemd/system; systemctl daemon-reload"));
            machine.wait_until("the unit is back", Node::answers);
        });
    }
}

/// As at a boot before the network is up.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn an_address_that_comes_late() {
    for units in [UNITS, LISTEN] {
        on_both("late", |name, root| {
            let machine = Node::with(units, name, root);
            let folder = format!("/etc/systemd/system/{units}.socket.d");
            machine.sh(&format!("systemctl stop {units}.socket; mkdir {folder}"));
            machine.file(&format!("{folder}/address.conf"), "[Socket]\nListenStream=\nListenStream=10.99.7.7:5555\nListenStream=[fd00:99::7]:5555\n");
            machine.sh(&format!("systemctl daemon-reload; systemctl start {units}.socket"));
            machine.sh(
                "ip address add 10.99.7.7/32 dev lo; ip address add fd00:99::7/128 dev lo nodad",
            );
            for address in ["10.99.7.7:5555", "[fd00:99::7]:5555"] {
                let address = address.parse().expect("an address");
                let reply = machine.network(|| crate::node::ask_at(address, "primary"));
                assert!(reply.starts_with("up ready"), "{units} {name}: {address}: {reply:?}");
            }
        });
    }
}

/// systemd would log each of them.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn connections_that_are_reset_before_they_are_accepted() {
    on_both("reset", |name, root| {
        let machine = Node::boot(name, root);
        assert!(machine.answers(), "{name}");
        let lines = || -> usize {
            machine
                .sh("journalctl --sync; journalctl -q --no-pager | wc -l")
                .trim()
                .parse()
                .expect("a number")
        };
        let before = lines();
        let pid_1 = Pid::from_raw(machine.host_pid.parse().expect("a pid")).expect("a pid");
        kill_process(pid_1, Signal::STOP).expect("PID 1");
        machine.network(|| {
            for _ in 0..100 {
                let stream = stranger().expect("a place in the backlog");
                set_socket_linger(&stream, Some(Duration::ZERO)).expect("a reset");
            }
        });
        kill_process(pid_1, Signal::CONT).expect("PID 1");
        assert!(machine.answers(), "{name}");
        assert_eq!(lines(), before, "{name}");
    });
}
