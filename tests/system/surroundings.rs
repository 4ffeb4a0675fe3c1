//! The surroundings of the agent on a machine: an old kernel, name services, the journal, the system log, mounts, a umask.

use crate::common;
use crate::node::{DEBIAN_13, LISTEN, Node, UNITS, ask, check, on_both, stranger};
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The agent can read a hold that root has made with any umask, and write its memory file.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_hold_is_readable_and_the_memory_is_written() {
    for units in [UNITS, LISTEN] {
        on_both("hold", |name, root| {
            let machine = Node::with(units, name, root);
            machine.assert_remembers(&format!("{units} {name}"));
            machine.sh("umask 077; echo 'drain by hand' > /run/patroni-agent-check/hold");
            let reply = machine.network(|| check(5555));
            assert_eq!(reply, "up drain # hold: by hand\n", "{units} {name}");
        });
    }
}

/// A machine with many containers has many mounts.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn many_mounts_delay_no_check() {
    on_both("mounts", |name, root| {
        for units in [UNITS, LISTEN] {
            let machine = Node::with(units, name, root);
            machine.sh(
                "mkdir /run/many; cd /run/many
                for i in $(seq 1600); do mkdir $i; echo \"/run/many/$i /run/many/$i none bind\"; done > /run/fstab
                mount -a -T /run/fstab",
            );
            let said = machine.network(|| check(5555));
            assert!(said.starts_with("up ready"), "{units} {name}: {said}");
        }
    });
}

/// On a kernel without Landlock or seccomp, a check answers, and a check by hand says what is missing.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn an_old_kernel_costs_no_check() {
    let machine = Node::boot("old-kernel", "/");
    let run = |missing: &str| {
        machine.sh(&format!(
            "systemd-run --quiet --wait --pipe -p SystemCallArchitectures=native -p SystemCallFilter='~{missing}' \
             -p SystemCallErrorNumber=ENOSYS /usr/bin/patroni-agent-check 2>&1"
        ))
    };
    let said = run("landlock_create_ruleset");
    let note = "patroni-agent-check: sandbox incomplete: Landlock: not supported by this kernel\n";
    assert!(said.starts_with(note) && said.contains("up ready # primary"), "{said}");
    let said = run("seccomp landlock_create_ruleset");
    assert!(
        said.contains("not supported by this kernel; seccomp: ")
            && said.contains("up ready # primary"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 3, "{said}");
}

/// glibc in a static program would load the modules that nsswitch.conf names, which are of another version: SIGFPE.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn no_module_of_the_name_services_is_loaded() {
    let machine = Node::boot("names", DEBIAN_13);
    machine.put(&common::shipped(), "/usr/bin/patroni-agent-check");
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
                "Patroni nowhere.example:1: not in /etc/hosts, and DNS is not used: give --connect-to ADDRESS",
            ),
        ] {
            let line = format!("patroni-agent-check --url {url} {arguments} 2> /dev/null; echo $?");
            assert_eq!(machine.sh(&line), format!("down ready # {told}\n2\n"), "{services}");
        }
    }
    for (made, why) in [
        ("true", "No such file or directory (os error 2)"),
        ("mkfifo /etc/hosts", "not a regular file"),
    ] {
        let line = format!(
            "rm -f /etc/hosts; {made}; timeout 5 patroni-agent-check --url http://pg1:1 2>&1 > /dev/null; echo $?"
        );
        let told = format!(
            "patroni-agent-check: primary: Patroni pg1:1: not in /etc/hosts ({why}), and DNS is not used: give \
             --connect-to ADDRESS\n2\n"
        );
        assert_eq!(machine.sh(&line), told);
    }
}

/// A check whose stderr is a stream to the journal would wait for journald as soon as thousands are in its queue.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_journal_that_hangs_delays_no_check() {
    on_both("journal", |name, root| {
        let machine = Node::boot(name, root);
        let queue = || {
            let streams = ["-xlH", "src", "/run/systemd/journal/stdout"];
            let streams = machine.network(|| Command::new("ss").args(streams).output());
            let streams = String::from_utf8(streams.expect("ss").stdout).expect("UTF-8");
            streams.split_whitespace().nth(2).expect("a queue").parse::<u32>().expect("a number")
        };
        machine.sh("systemctl kill -s STOP --kill-whom=main systemd-journald");
        let before = queue();
        for _ in 0..20 {
            assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        }
        assert_eq!(queue(), before, "{name}: streams that wait for journald");
        assert!(machine.network(|| ask(5555, "junk")).starts_with("fail ready # "), "{name}");
        machine.sh("systemctl kill -s CONT --kill-whom=main systemd-journald");
        let heard =
            "journalctl --sync; journalctl -q --no-pager -o cat -p warning -t patroni-agent-check";
        let end = Instant::now() + Duration::from_secs(10);
        while !machine.sh(heard).contains("agent-send line not understood") {
            assert!(Instant::now() < end, "{name}: {}", machine.sh(heard));
        }
        // the line has the PID of the process, which the sandbox hides
        let pids = "journalctl -q --no-pager -o json -t patroni-agent-check | grep -o '\"_\\?\\(SYSLOG_\\)\\?PID\":\"[0-9]*\"' | sort -u";
        let pids = machine.sh(pids);
        let number = |key: &str| {
            let mut lines = pids.lines().filter_map(|line| line.strip_prefix(key));
            lines.next().map(str::to_owned)
        };
        assert!(number("\"_PID\":").is_some(), "{name}: {pids}");
        assert_eq!(number("\"_PID\":"), number("\"SYSLOG_PID\":"), "{name}: {pids}");
    });
}

/// A restart of rsyslog makes a new socket. The sandbox keeps a running process from opening it, so another process must.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_new_system_log_gets_the_next_lines() {
    on_both("log", |name, root| {
        let machine = Node::with(LISTEN, name, root);
        // where /dev/log points to
        let dev_log = "/run/systemd/journal/dev-log";
        let log = || {
            machine.sh(&format!("rm -f {dev_log}"));
            let log = UnixDatagram::bind(machine.inside(dev_log)).expect("a log");
            machine.sh(&format!("chmod 666 {dev_log}"));
            log.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
            log
        };
        let junk = || {
            // the line would come once a minute
            machine.sh(": > /run/patroni-agent-check/memory");
            assert!(machine.network(|| ask(5555, "junk")).starts_with("fail ready # "), "{name}");
        };
        let hears = |log: &UnixDatagram| log.recv(&mut [0; 1024]).is_ok();
        let old = log();
        junk();
        assert!(hears(&old), "{name}");
        drop(old);
        let new = log();
        // this line is lost, but the next is not
        junk();
        junk();
        assert!(hears(&new), "{name}");
    });
}

/// A module of the name services that takes three seconds to notice that its directory service is gone.
const SLOW: &str = "#include <nss.h>\n#include <unistd.h>\nenum nss_status _nss_slow_initgroups_dyn(void) { sleep(3); return NSS_STATUS_UNAVAIL; }\n";

/// A check becomes its user without that module, which systemd's `User=` asks at each check.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_slow_directory_service_delays_no_check() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let [source, module] = ["slow.c", "libnss_slow.so.2"].map(|name| folder.join(name));
    fs::write(&source, SLOW).expect("written");
    let cc = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&module, &source]).status();
    assert!(cc.expect("cc").success());
    on_both("slow", |name, root| {
        let machine = Node::boot(name, root);
        machine.put(&module, "/usr/lib/x86_64-linux-gnu/libnss_slow.so.2");
        machine.file("/etc/nsswitch.conf", "passwd: files\ngroup: files slow\nhosts: files\n");
        let took = |wanted: &str| {
            let started = Instant::now();
            let reply = machine.network(|| check(5555));
            assert!(reply.starts_with(wanted), "{name}: {reply:?}");
            started.elapsed()
        };
        took("up ready");
        let own = took("up ready");
        // a process that waits for HAProxy's line has none of root's rights any more
        let status = machine.network(|| {
            let _silent = stranger().expect("a connection");
            let pid = "until pgrep -x patroni-agent-c; do sleep 0.02; done";
            let pid = machine.sh(&format!("timeout 5 sh -c '{pid}'"));
            let becoming = format!("until grep -q 'Seccomp:.2' /proc/{0}/status; do sleep 0.02; done; cat /proc/{0}/status", pid.trim());
            machine.sh(&format!("timeout 5 sh -c '{becoming}'"))
        });
        let line = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("a line");
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let id = |which| machine.sh(&format!("id -{which} patroni-agent-check")).trim().to_owned();
        assert_eq!(line("Uid:"), vec![id("u"); 4], "{name}");
        assert_eq!(line("Gid:"), vec![id("g"); 4], "{name}");
        assert_eq!(line("Groups:"), [id("g")], "{name}");
        for key in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(line(key), ["0000000000000000"], "{name}: {key}");
        }
        assert_eq!(line("NoNewPrivs:"), ["1"], "{name}");

        // with `User=` in a drop-in
        let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
        machine.sh(&format!("mkdir {folder}"));
        machine.file(&format!("{folder}/user.conf"), "[Service]\nUser=patroni-agent-check\n");
        machine.sh("systemctl daemon-reload");
        let systemds = took("up ready");
        println!("{name}: {own:?}, with User= {systemds:?}");
        assert!(
            own < Duration::from_secs(1) && systemds > Duration::from_secs(3),
            "{name}: {own:?} {systemds:?}"
        );
        machine.sh(&format!("rm -r {folder}; systemctl daemon-reload"));

        // a check that cannot become its user does not run as root
        for (line, why) in [
            (
                "d",
                "not in /etc/passwd: systemd-sysusers adds it, or, if another name service has it,",
            ),
            (
                "s/^\\(patroni-agent-check:[^:]*\\):[0-9]*:/\\1:0:/",
                "its line in /etc/passwd is root's, or invalid",
            ),
        ] {
            let edit = if line == "d" { "/^patroni-agent-check:/d" } else { line };
            machine.sh(&format!("cp -p /etc/passwd /root/passwd; sed -i '{edit}' /etc/passwd; : > /run/patroni-agent-check/memory"));
            let reply = machine.network(|| check(5555));
            let wanted =
                format!("fail ready # patroni-agent-check: --user patroni-agent-check: {why}");
            assert_eq!(reply.trim_end(), wanted.chars().take(113).collect::<String>(), "{name}");
            let left = fs::metadata(machine.inside("/run/patroni-agent-check/memory"))
                .expect("a memory")
                .len();
            assert_eq!(left, 0, "{name}: nothing is done as root");
            machine.sh("cp -p /root/passwd /etc/passwd");
        }

        // the listener becomes its user once, when it starts
        machine.sh(&format!("systemctl stop {UNITS}.socket; systemctl start {LISTEN}.socket"));
        let first = took("up ready");
        let next = took("up ready");
        assert!(next < Duration::from_secs(1), "{name}: {first:?} {next:?}");
    });
}
