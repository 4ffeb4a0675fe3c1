//! A check by hand on a machine with the units says what HAProxy is told, and why.

use crate::node::{LISTEN, Node, agent, ask, on_both};
use std::net::TcpListener;

/// The settings of the units also apply to a check by hand, and `--explain` says so.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_check_by_hand_says_what_haproxy_is_told() {
    let settings = "/etc/default/patroni-agent-check";
    let machine = Node::boot("by-hand", "/");
    let by_hand = |arguments| machine.sh(&format!("patroni-agent-check {arguments} 2>&1 || true"));
    machine.file(settings, "OPTIONS=\"--agent-send --else drain\"\n");
    let told = machine.network(|| ask(5555, "replica"));
    assert_eq!(told, "up drain # primary, running\n");
    let explained = by_hand("--explain replica");
    for line in [
        told.trim(),
        "settings: /etc/default/patroni-agent-check: --agent-send --else drain",
        "asked: Patroni 127.0.0.1:8008 for /replica",
        "status 200, state 'running', role 'primary', replication_state none, timeline 0",
        "memory: the last answer to this check came ",
        "sandbox: complete",
    ] {
        assert!(explained.contains(line), "{line}: {explained}");
    }
    for nothing in ["nobody listens", "another program", "drop-ins", "not here"] {
        assert!(!explained.contains(nothing), "{nothing}: {explained}");
    }
    // root's check reads files as the units' user: like HAProxy's checks, it cannot see into a folder of root's
    machine.sh("mkdir -m 700 /run/locked; echo drain > /run/locked/hold");
    machine.file(settings, "OPTIONS='--agent-send --hold-file /run/locked/hold'\n");
    let told = machine.network(|| ask(5555, "primary"));
    assert!(told.contains("; cannot see whether there is a hold: /run/locked/hold"), "{told}");
    assert!(by_hand("").starts_with(told.trim()), "{told}: {}", by_hand(""));
    // but it reads the settings as root, as systemd does
    machine.sh(&format!("chmod 600 {settings}"));
    assert!(by_hand("").starts_with(told.trim()), "{told}: {}", by_hand(""));
    // and a copy that is tried and that only root can read
    machine.sh(&format!("cp {settings} /root/settings; chmod 600 /root/settings"));
    let tried = by_hand("--settings /root/settings");
    assert!(tried.starts_with(told.trim()), "{told}: {tried}");
    let joe = machine.sh("setpriv --reuid 65534 --clear-groups patroni-agent-check 2>&1");
    let unread = "settings: /etc/default/patroni-agent-check: Permission denied (os error 13), so the defaults hold here";
    assert!(joe.contains(unread) && joe.contains("up ready # primary, running"), "{joe}");
    machine.sh(&format!("chmod 644 {settings}"));
    // the user that the check has become
    assert!(
        by_hand("--user nobody --explain")
            .contains("user: uid 65534; the units run each check as ")
    );
    // without its user, the check still answers
    let unlike = "user: uid 0; the units run each check as patroni-agent-check; not here: not in /etc/passwd";
    machine.sh("cp -p /etc/passwd /root/passwd; sed -i /^patroni-agent-check:/d /etc/passwd");
    let explained = by_hand("--explain");
    assert!(explained.contains(unlike) && explained.contains("up drain # hold: "), "{explained}");
    machine.sh("cp -p /root/passwd /etc/passwd");
    // with options on the command line, the file does not count
    assert!(by_hand("--grace 0 replica").starts_with("up maint"));
    assert!(by_hand("").starts_with("up ready"));
    machine.file(settings, "export OPTIONS=\"--agent-send\"\n");
    assert!(by_hand("").contains("is not OPTIONS=..., so the units ignore it"));
    machine.file(settings, "OPTIONS=--agent-sent\n");
    let wrong = "/etc/default/patroni-agent-check: invalid option '--agent-sent'";
    assert!(by_hand("").contains(wrong), "{}", by_hand(""));
    machine.file(settings, "OPTIONS=--help\n");
    let wrong = "/etc/default/patroni-agent-check: --help and --version are for a terminal";
    assert!(by_hand("").contains(wrong), "{}", by_hand(""));
    machine.file(settings, "OPTIONS=--agent-send\n");
    let folder = "/etc/systemd/system/patroni-agent-check@.service.d";
    machine.sh(&format!("mkdir {folder}"));
    machine.file(&format!("{folder}/none.conf"), "[Service]\nIPAddressDeny=any\n");
    machine.sh("systemctl daemon-reload");
    let told = machine.network(|| ask(5555, "leader"));
    assert_eq!(
        told,
        "down ready # Patroni 127.0.0.1:8008: no answer before the deadline (--timeout)\n"
    );
    let explained = by_hand("--explain leader");
    assert!(explained.contains("up ready"), "{explained}");
    let drop_in = "drop-ins, which hold for HAProxy's checks and not for this one: ";
    assert!(explained.contains(&format!("{drop_in}{folder}/none.conf\n")), "{explained}");
    machine.sh("systemctl stop patroni-agent-check.socket");
    assert!(by_hand("--explain").contains("nobody listens on port 5555"));
    let other = machine.network(|| TcpListener::bind(agent(5555)).expect("the port is free"));
    let foreign = "not systemd, but xinetd or another program listens on port 5555";
    assert!(by_hand("--explain").contains(foreign), "{}", by_hand("--explain"));
    drop(other);
    machine.sh(&format!("systemctl start {LISTEN}.socket"));
    assert!(machine.network(|| ask(5555, "primary")).starts_with("up ready"));
    let explained = by_hand("--explain");
    assert!(!explained.contains("listens on port 5555"), "{explained}");
}

/// A check by hand reads a settings file as systemd does, however it is written.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_check_by_hand_reads_the_settings_as_systemd_does() {
    on_both("settings", |name, root| {
        let machine = Node::boot(name, root);
        for text in [
            "OPTIONS=replica",
            "OPTIONS = replica\n",
            "  OPTIONS\t=\treplica  \n",
            "# a comment that goes on \\\nOPTIONS=replica\n",
            "; and so does this \\\nOPTIONS=health\nOPTIONS=replica\n",
            "OPTIONS='replica'\n",
            "OPTIONS=\"replica\" # no comment\n",
            "OPTIONS=replica # no comment\n",
            "OPTIONS=--else \\\n drain replica\n",
            "OPTIONS=\"--else \\\ndrain replica\"\n",
            "OPTIONS='--else \\\ndrain replica'\n",
            "OPTIONS=\"--else\n down\n replica\"\n",
            "OPTIONS='--else' ' drain' replica\n",
            "OPTIONS=\"--else\" \"down\"\n",
            "OPTIONS=repl\\ica\n",
            "OPTIONS=\"repl\\ica\"\n",
            "OPTIONS='\"replica\"'\n",
            "OPTIONS=\"\\\"replica\\\"\"\n",
            "OPTIONS=\"\\$replica\"\n",
            "OPTIONS=$replica\n",
            "OPTIONS=--else \"drain\" replica\n",
            "OPTIONS=--else 'dra'in replica\n",
            "OPTIONS=replica\\\n",
            "OPTIONS=replica\\",
            "OPTIONS='replica",
            "OPTIONS=\"replica\n",
            "OPTIONS=replica\r\n",
            "OPTIONS=health\rOPTIONS=replica\n",
            "OPTIONS=replica\nOPTIONS=\n",
            "OPTIONS=replica\nOPTIONS\n",
            "export OPTIONS=replica\n",
            "OPTION=replica\n",
            "replica\n",
            "X=\"\nOPTIONS=replica\n\"\n",
            "OPTIONS=replica\nX='\u{e4}'\n",
            "=x\nOPTIONS=replica\n",
            "OPTIONS=\u{a0}replica\n",
            "OPTIONS=--else\u{a0}drain replica\n",
        ] {
            machine.file("/etc/default/patroni-agent-check", text);
            let told = machine.network(|| ask(5555, ""));
            let by_hand = machine.sh("patroni-agent-check 2>&1 || true");
            // only a terminal is told what is wrong with the settings
            let wrong = told.strip_prefix("fail ready # patroni-agent-check: ");
            let same = match wrong {
                Some(wrong) => {
                    by_hand.contains(&wrong.trim_end().chars().take(40).collect::<String>())
                }
                None => by_hand.lines().any(|line| line == told.trim_end()),
            };
            assert!(same, "{name}: {text:?}: {told}{by_hand}");
        }
    });
}
