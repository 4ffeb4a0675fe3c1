//! The hold file: what an operator writes, and what HAProxy is told.

use crate::common::{
    self, FakePatroni, PRIMARY, READY, Start, check, check_with, http, listen, path_in,
};
use patroni_agent_check::run::hold;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

#[test]
fn a_ready_node_gets_the_state_in_the_file() {
    let (folder, patroni) = (common::folder("words"), FakePatroni::primary());
    let file = path_in(&folder, "hold");
    let ask = || check(&["--url", &patroni.url(), "--hold-file", &file]);
    let long = format!("maint {}", "x".repeat(3000));
    let odd = |what: &str| format!("up maint # hold: {file}: {what}").chars().take(111).collect();
    let lines: [(&[u8], String); 13] = [
        (
            b"drain kernel upgrade, ticket 123\n",
            "up drain # hold: kernel upgrade, ticket 123".into(),
        ),
        (b"maint moving house\n", "up maint # hold: moving house".into()),
        (b"DRAIN  by\thand \n\n", "up drain # hold: by hand".into()),
        (b"drain one\nand two\r\n", "up drain # hold: one and two".into()),
        (b"maint no newline", "up maint # hold: no newline".into()),
        (b"maint\n", "up maint # hold: no reason given".into()),
        (b"drain a\0b\x1b[31m \xff up ready\n", "up drain # hold: a?b?[31m ? up ready".into()),
        (long.as_bytes(), format!("up maint # hold: {}", "x".repeat(94))),
        (b"", "up drain # hold: the file is empty".into()),
        (b" \n", "up drain # hold: the file is empty".into()),
        (b"ready\n", odd("'ready' is neither drain nor maint")),
        (b"down it is\n", odd("'down' is neither drain nor maint")),
        (&[b'm'; 5000], odd("longer than 4096 bytes")),
    ];
    for (text, line) in lines {
        fs::write(&file, text).expect("written");
        let outcome = ask();
        assert_eq!(outcome.reply, format!("{line}\n"));
        assert_eq!(
            (outcome.stderr.as_str(), outcome.code),
            ("", Some(0)),
            "nothing for the journal"
        );
    }
    fs::remove_file(&file).expect("removed");
    assert_eq!(ask().reply, READY);
}

/// A `chmod` of the folder on every node must not take all nodes out of their pools.
#[test]
fn a_folder_that_may_not_be_searched_is_no_hold_and_is_reported() {
    let (folder, patroni) = (common::folder("closed"), FakePatroni::primary());
    let file = path_in(&folder, "hold");
    fs::write(&file, "drain x\n").expect("written");
    // root may search every folder
    let (url, user) = (patroni.url(), "nobody");
    let ask = || check(&["--url", &url, "--user", user, "--hold-file", &file]).reply;
    assert_eq!(ask(), "up drain # hold: x\n");
    fs::set_permissions(&file, Permissions::from_mode(0o000)).expect("closed");
    assert!(ask().starts_with(&format!("up maint # hold: {file}: Permission denied")));
    fs::set_permissions(folder.path(), Permissions::from_mode(0o600)).expect("closed");
    let reply = ask();
    let said = format!(
        "up ready # primary, running, timeline 5; cannot see whether there is a hold: {file}"
    );
    assert!(reply.starts_with(&said.chars().take(110).collect::<String>()), "{reply}");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).expect("open");
}

#[test]
fn a_file_that_cannot_be_read_is_maint() {
    let (folder, patroni) = (common::folder("unreadable"), FakePatroni::primary());
    let file = path_in(&folder, "hold");
    fs::write(&file, "drain x\n").expect("written");
    let beneath = format!("{file}/hold");
    let fifo = path_in(&folder, "fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.expect("mkfifo").success());
    let link = path_in(&folder, "link");
    std::os::unix::fs::symlink("/nowhere", &link).expect("a link");
    let folder = folder.path().to_str().expect("UTF-8");
    for (hold, why) in [
        (link.as_str(), "No such file"),
        (beneath.as_str(), "Not a directory"),
        (fifo.as_str(), "not a regular file"),
        (folder, "not a regular file"),
        ("/dev/zero", "not a regular file"),
    ] {
        let outcome = check(&["--url", &patroni.url(), "--hold-file", hold]);
        assert!(
            outcome.reply.starts_with(&format!("up maint # hold: {hold}: {why}")),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_hold_makes_no_node_better() {
    let folder = common::folder("better");
    let file = path_in(&folder, "hold");
    fs::write(&file, "drain x\n").expect("written");
    let ask = |patroni: &FakePatroni, arguments: &[&str]| {
        let url = patroni.url();
        check(&[&["--url", &url, "--hold-file", &file], arguments].concat()).reply
    };
    let stopped = r#"{"state": "stopped", "role": "primary"}"#;
    let replica = r#"{"state": "running", "role": "replica", "replication_state": "streaming"}"#;
    let answering = |status, body| FakePatroni::answering(http(status, body));
    for (patroni, arguments, line) in [
        (
            answering(503, stopped),
            &["primary"][..],
            "stopped ready # primary, PostgreSQL is stopped",
        ),
        (answering(503, PRIMARY), &["primary"], "fail ready # primary without the leader lock"),
        (answering(503, replica), &["primary"], "up maint # replica, streaming"),
        (answering(503, replica), &["--else", "down"], "down ready # replica, streaming"),
        (answering(200, replica), &["replica"], "up drain # hold: x"),
        (answering(200, replica), &["health"], "up drain # hold: x"),
    ] {
        assert_eq!(ask(&patroni, arguments), format!("{line}\n"));
    }
    let hung = FakePatroni::raw(|_| std::thread::sleep(std::time::Duration::from_secs(1)));
    let reply = ask(&hung, &["--timeout", "100ms"]);
    assert!(reply.starts_with("down ready # Patroni "), "{reply}");
    let reply = ask(&hung, &["--timeout", "100ms", "--unreachable", "keep"]);
    assert!(reply.starts_with("!unreachable:_Patroni"), "{reply}");
}

/// For a server of the reserve, which a hold drains: HAProxy checks no server in MAINT.
#[test]
fn haproxy_asks_only_for_the_hold() {
    let (folder, patroni) = (common::folder("alone"), FakePatroni::primary());
    let file = path_in(&folder, "hold");
    let arguments = ["--agent-send", "--url", &patroni.url(), "--hold-file", &file];
    let ask = || {
        let outcome = check_with(Start::ListenFds, "127.0.0.1:0", &arguments, |mut client| {
            client.write_all(b"hold\n").expect("the agent reads");
            listen(client)
        });
        assert_eq!(outcome.stderr, "", "nothing for the journal");
        outcome.reply
    };
    assert_eq!(ask(), "up ready # no hold\n");
    for (text, line) in [
        ("drain by hand\n", "up drain # hold: by hand\n"),
        ("maint by hand\n", "up drain # hold: by hand\n"),
        ("", "up drain # hold: the file is empty\n"),
    ] {
        fs::write(&file, text).expect("written");
        assert_eq!(ask(), line);
    }
    assert_eq!(patroni.connections(), 0);
}

/// `echo` empties the file before it writes, and on a busy machine much time may pass between the two. Meanwhile a
/// drain must not become a maint, which ends sessions.
#[test]
fn a_half_written_file_drains() {
    let (folder, patroni) = (common::folder("half"), FakePatroni::primary());
    let file = path_in(&folder, "hold");
    let ask = || check(&["--url", &patroni.url(), "--hold-file", &file, "--timeout", "10s"]).reply;
    let mut written = fs::File::create(&file).expect("emptied");
    assert_eq!(ask(), "up drain # hold: the file is empty\n");
    written.write_all(b"drain kernel up").expect("written in part");
    assert_eq!(ask(), "up drain # hold: kernel up\n");
    written.write_all(b"grade\n").expect("written");
    assert_eq!(ask(), "up drain # hold: kernel upgrade\n");
}

/// A check by hand reports a hold even if the hold changes nothing.
#[test]
fn a_check_by_hand_says_that_there_is_a_hold() {
    let folder = common::folder("human");
    let file = path_in(&folder, "hold");
    fs::write(&file, "drain x\n").expect("written");
    let patroni = FakePatroni::primary();
    for (check, reply, code) in
        [("primary", "up drain # hold: x\n", 1), ("replica", "up maint # primary, running\n", 1)]
    {
        let output = std::process::Command::new(common::AGENT)
            .args(["--url", &patroni.url(), "--hold-file", &file, check])
            .output()
            .expect("it starts");
        assert_eq!(String::from_utf8_lossy(&output.stdout), reply);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.starts_with("patroni-agent-check: a hold is active: drain, x\n"), "{said}");
        assert_eq!(output.status.code(), Some(code));
    }
}

const HOLD: &str = "PATRONI_AGENT_CHECK_HOLD";

/// Not a test: reads the hold file while this process may open no file.
#[test]
#[ignore = "started by the other test"]
fn without_descriptors() {
    let Ok(file) = std::env::var(HOLD) else { return };
    let mut open = Vec::new();
    while let Ok(other) = File::open("/dev/null") {
        open.push(other);
    }
    let hold = hold::read(Path::new(&file));
    drop(open);
    println!("read: {hold:?}");
}

/// What the file says cannot be known. The gentler state keeps the sessions.
#[test]
fn a_file_drains_while_there_is_no_descriptor() {
    let folder = common::folder("descriptors");
    let file = path_in(&folder, "hold");
    let read = || {
        let mut reader = Command::new("prlimit");
        reader.arg("--nofile=64").arg(std::env::current_exe().expect("this program"));
        reader.args(["--ignored", "--exact", "hold::without_descriptors", "--nocapture"]);
        let output = reader.env(HOLD, &file).output().expect("prlimit");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let said = read();
    assert!(said.contains("read: Ok(None)"), "{said}");
    fs::write(&file, "maint x\n").expect("written");
    let said = read();
    let reason = format!("{file}: Too many open files (os error 24)");
    assert!(said.contains(&format!("Hold {{ state: Drain, reason: {reason:?} }}")), "{said}");
}
