//! Both pairs of units on a real systemd: nothing that a peer, a broken agent or an administrator does kills the port,
//! lingers, or fills the journal. On Debian 12 (systemd 252, HAProxy 2.6) and Debian 13 (systemd 257, HAProxy 3.0).

use crate::common;
use crate::node::{INTERVAL, LISTEN, Node, UNITS, agent, check, flood, on_both, stranger};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a busy machine may take for what a quiet one does in two seconds.
const LONG: Duration = Duration::from_secs(30);

fn attack_port(units: &'static str, name: &str, root: &str) {
    let machine = Node::with(units, name, root);
    machine.start_haproxies(4);
    machine.assert_alive("start");

    // one hour of one pool leaves no line
    machine.sh("systemctl stop 'haproxy*'");
    for _ in 0..20 {
        machine.network(|| check(5555));
    }
    // without any settings, the agent ignores HAProxy's question
    machine.sh("mv /etc/default/patroni-agent-check /etc/default/away");
    machine.sh(&format!("systemctl stop {LISTEN}.service"));
    let lines = machine.journal_lines();
    machine.network(|| (0..10).for_each(|_| assert!(check(5555).starts_with("up ready"))));
    assert_eq!(machine.journal_lines(), lines, "lines without settings");
    machine.sh("mv /etc/default/away /etc/default/patroni-agent-check");
    machine.sh(&format!("systemctl stop {LISTEN}.service"));
    let (lines, memory) = (machine.journal_lines(), machine.pid_1_memory());
    let answered =
        machine.network(|| (0..1800).filter(|_| check(5555).starts_with("up ready")).count());
    assert_eq!(answered, 1800);
    assert_eq!(machine.journal_lines(), lines, "lines for 1,800 healthy checks");
    machine.start_haproxies(4);
    machine.assert_alive("1,800 checks");

    machine.network(|| flood(5000));
    machine.assert_alive("5,000 connections in two seconds");

    let silent = machine.network(|| (0..200).filter_map(|_| stranger()).collect::<Vec<_>>());
    assert_eq!(silent.len(), 200);
    machine.assert_alive("200 peers that say nothing, while they are there");
    drop(silent);
    let mut slow = machine.network(|| (0..200).filter_map(|_| stranger()).collect::<Vec<_>>());
    for _ in 0..3 {
        slow.iter_mut().for_each(|stream| drop(stream.write_all(b"p")));
        sleep(Duration::from_secs(1));
    }
    machine.assert_alive("200 peers that send one byte a second, while they are there");
    drop(slow);

    machine.network(|| {
        for number in 0..200 {
            let Some(mut stream) = stranger() else { continue };
            match number % 3 {
                // closing with the answer unread resets
                0 => drop(stream.write_all(b"primary\n")),
                1 => drop(stream.shutdown(Shutdown::Write)),
                _ => drop(stream.write_all(&[b'x'; 100_000])),
            }
        }
    });
    machine.assert_alive("200 peers that reset, half-close, never read");

    let instead = |script: &str| {
        machine.file("/usr/bin/new", &format!("#!/bin/sh\n{script}\n"));
        machine.sh("chmod 755 /usr/bin/new; mv /usr/bin/new /usr/bin/patroni-agent-check");
        machine.sh(&format!("systemctl stop {LISTEN}.service"));
    };
    let back = || {
        machine.sh("cp /root/patroni-agent-check /usr/bin/new; mv /usr/bin/new /usr/bin/patroni-agent-check")
    };
    // a hung agent that also ignores SIGTERM, with which systemd sends SIGCONT
    let deaf = "trap '' TERM; kill -STOP $$; while :; do sleep 1; done";
    for (what, script) in [("crashes", "kill -SEGV $$"), ("hangs", deaf)] {
        instead(script);
        machine.network(|| {
            (0..30).for_each(|_| {
                let stream = TcpStream::connect(agent(5555)).expect("the port lives");
                drop(stream.set_read_timeout(Some(Duration::from_millis(50))));
                let _ = (&stream).read(&mut [0]);
            })
        });
        sleep(3 * INTERVAL);
        back();
        if script == deaf {
            // RuntimeMaxSec and TimeoutStopSec end a check that hangs, and free its place; TimeoutStartSec ends a listener
            // that hangs
            sleep(Duration::from_secs(if units == LISTEN { 25 } else { 18 }));
        }
        machine.assert_alive(&format!("an agent that {what} at every check"));
    }

    if units == LISTEN {
        let half = "head -c 9999 /root/patroni-agent-check > /usr/bin/new; chmod 755 /usr/bin/new";
        for (what, new) in [("is missing", "rm -f /usr/bin/new"), ("is half a program", half)] {
            machine.sh(&format!("rm /usr/bin/patroni-agent-check; {new}; ! [ -e /usr/bin/new ] || mv /usr/bin/new /usr/bin/patroni-agent-check"));
            machine.sh(&format!("systemctl stop {LISTEN}.service"));
            let began = Instant::now();
            let count = || {
                let count = machine.sh(&format!("systemctl show -P NRestarts {LISTEN}.service"));
                count.trim().parse::<u64>().expect("a number")
            };
            while began.elapsed() < 2 * INTERVAL || count() == 0 {
                assert!(began.elapsed() < LONG, "a program that {what} was not started again");
                sleep(Duration::from_millis(100));
            }
            let tried = count();
            let took = began.elapsed();
            // twice a second, although four HAProxies ask and get no reply
            assert!(
                tried <= 2 + took.as_millis() as u64 / 500,
                "a program that {what} was started {tried} times in {took:?}"
            );
            back();
            machine.assert_alive(&format!("a program that {what}"));
        }
        // the times between the starts, because a busy machine may not manage more than ten starts anyway
        let starts = "/run/patroni-agent-check/starts";
        machine.sh(&format!("install -m 666 /dev/null {starts}"));
        instead(&format!("date +%s%N >> {starts}; exit 1"));
        let wait = format!("until [ $(wc -l < {starts}) -ge 3 ]; do sleep 0.1; done");
        machine.sh(&format!("timeout {} sh -c '{wait}'", LONG.as_secs()));
        back();
        let starts = machine.sh(&format!("cat {starts}; rm {starts}"));
        let starts: Vec<u64> =
            starts.lines().map(|time| time.parse().expect("nanoseconds")).collect();
        let apart: Vec<u64> =
            starts.windows(2).map(|times| (times[1] - times[0]) / 1_000_000).collect();
        println!("{}: milliseconds between starts: {apart:?}", machine.name);
        assert!(apart.len() > 1 && apart.iter().all(|time| *time >= 500), "{apart:?}");
        machine.assert_alive("a program that fails at once");
        // after a listener that ends with success, waiting connections start the next at once, without the timer
        instead("exec systemd-notify --ready");
        sleep(2 * INTERVAL);
        back();
        machine.assert_alive("a program that ends at once");
        for signal in ["SEGV", "KILL", "STOP"] {
            let running = format!("systemctl show -P MainPID {LISTEN}.service");
            machine.sh(&format!("kill -{signal} $({running})"));
            machine.assert_alive(&format!("SIG{signal} while it serves"));
        }
        let end = Instant::now() + INTERVAL;
        let told = || machine.sh(&format!("systemctl show -P StatusText {LISTEN}.service"));
        while !told().ends_with(" running, last said: up ready\n") {
            assert!(Instant::now() < end, "systemd is told: {}", told());
        }
    }

    let used = machine.sh("df --output=used -k /run | tail -1");
    machine.sh(&format!("mount -o remount,size={}k /run", used.trim()));
    assert!(machine.try_sh("head -c 100000 /dev/zero > /run/more").is_err(), "/run is full");
    let reply = machine.network(|| check(5555));
    assert!(reply.starts_with("up ready"), "/run is full: {reply:?}");
    machine.sh("rm -f /run/more; mount -o remount,size=100m /run");
    machine.assert_alive("a full /run");

    let replace = "for i in $(seq 100); do cp /root/patroni-agent-check /usr/bin/new; \
        mv /usr/bin/new /usr/bin/patroni-agent-check; done";
    let lost = std::thread::scope(|scope| {
        let replacing = scope.spawn(|| machine.sh(replace));
        let mut lost = 0;
        while !replacing.is_finished() {
            lost += usize::from(!machine.network(|| check(5555)).starts_with("up ready"));
        }
        lost
    });
    assert_eq!(lost, 0, "checks while the program was replaced 100 times");
    machine.assert_alive("100 replacements of the program");

    let restart = format!(
        "for i in $(seq 100); do systemctl restart {units}.socket || exit 1; \
         [ $((i % 10)) != 0 ] || systemctl daemon-reload; done"
    );
    let (asked, refused) = std::thread::scope(|scope| {
        let restarting = scope.spawn(|| machine.sh(&restart));
        let (mut asked, mut refused) = (0, 0);
        while !restarting.is_finished() {
            machine.network(|| {
                for _ in 0..20 {
                    asked += 1;
                    refused += usize::from(check(5555).is_empty());
                }
            });
        }
        (asked, refused)
    });
    let in_use = machine.sh("journalctl -q --no-pager | grep -c 'already in use' || true");
    assert_eq!(in_use.trim(), "0");
    println!("{}: 100 restarts: {refused} of {asked} connections without an answer", machine.name);
    machine.assert_alive("100 restarts of the socket with daemon-reloads");

    machine.assert_nothing_lingers();
    let grown = machine.pid_1_memory().saturating_sub(memory);
    println!("{}: PID 1 grew by {grown} kB, from {memory} kB", machine.name);
    assert!(grown < 2048, "PID 1 grew by {grown} kB");
    assert_eq!(machine.sh(&format!("systemctl is-active {units}.socket")), "active\n");
}

/// Both pairs of units on both Debians at the same time.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn nothing_kills_the_port() {
    std::thread::scope(|scope| {
        for (units, name) in [(UNITS, "each"), (LISTEN, "many")] {
            scope.spawn(move || on_both(name, |name, root| attack_port(units, name, root)));
        }
    });
}

/// Without each of these settings, something breaks.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn each_setting_of_the_units_is_needed() {
    let machine = Node::boot("without", "/");
    assert!(machine.network(|| check(5555)).starts_with("up ready"));
    // this unit would open the port again
    machine
        .sh("rm /etc/systemd/system/patroni-agent-check-reopen@.service; systemctl daemon-reload");
    let units = "/etc/systemd/system/patroni-agent-check";
    let remove = |key: &str| {
        machine.sh(&format!(
            "sed -i '/^{key}/d' {units}.socket {units}@.service; systemctl daemon-reload"
        ));
    };
    let restore = || {
        for unit in ["patroni-agent-check.socket", "patroni-agent-check@.service"] {
            machine.put(&common::file("units").join(unit), &format!("/etc/systemd/system/{unit}"));
        }
        machine.sh("systemctl daemon-reload; systemctl reset-failed; systemctl restart patroni-agent-check.socket");
        assert!(machine.network(|| check(5555)).starts_with("up ready"));
    };

    remove("TriggerLimitIntervalSec");
    // the limit is 200 in two seconds, which a busy machine may not reach at once
    let failed =
        || machine.sh("systemctl is-failed patroni-agent-check.socket || true") == "failed\n";
    let tries = (1..=10).find(|_| {
        machine.network(|| flood(1000));
        failed()
    });
    assert!(tries.is_some(), "no flood has made the trigger limit close the port");
    restore();

    remove("StartLimitIntervalSec");
    let restarts =
        "for i in $(seq 20); do systemctl restart patroni-agent-check.socket || exit 1; done";
    assert!(machine.try_sh(restarts).is_err(), "the start limit of sockets");
    restore();

    let program = "/usr/bin/patroni-agent-check";
    machine.sh(&format!("printf '#!/bin/sh\\nkill -SEGV $$\\n' > /run/new; chmod 755 /run/new; cp /run/new /usr/bin/new; mv /usr/bin/new {program}"));
    let failed =
        "systemctl list-units --failed --plain --no-legend 'patroni-agent-check@*' | wc -l";
    machine.network(|| (0..5).for_each(|_| drop(check(5555))));
    assert_eq!(machine.sh(failed).trim(), "0");
    remove("CollectMode");
    machine.network(|| (0..5).for_each(|_| drop(check(5555))));
    assert_eq!(machine.sh(failed).trim(), "5", "failed units linger");
    machine.sh(&format!("cp /root/patroni-agent-check /usr/bin/new; mv /usr/bin/new {program}"));
    restore();

    remove("LogLevelMax=notice");
    let lines = machine.journal_lines();
    machine.network(|| (0..10).for_each(|_| drop(check(5555))));
    assert!(machine.journal_lines() >= lines + 20, "two lines for each healthy check");
}
