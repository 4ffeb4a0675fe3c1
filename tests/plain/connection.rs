//! How the agent is started, and what it tells HAProxy, the journal and an operator.

use crate::common::{
    self, AGENT, FakePatroni, NotifySocket, Outcome, PRIMARY, READY, Start, check, check_with,
    connection, full_backlog, http, listen, start,
};
use patroni_agent_check::VERSION;
use patroni_agent_check::haproxy::connection::{Connection, NoQuestion};
use patroni_agent_check::options::{Options, Stop};
use patroni_agent_check::patroni::location::Patroni;
use patroni_agent_check::patroni::tls::Tls;
use patroni_agent_check::run::before_stop::Patience;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStringExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const STARTS: [Start; 3] = [Start::ListenFds, Start::Stdin, Start::Inetd];

fn replica() -> FakePatroni {
    let body = r#"{"state": "running", "role": "replica", "replication_state": "streaming"}"#;
    FakePatroni::answering(http(503, body))
}

#[test]
fn the_agent_answers_however_it_is_started_over_ipv4_and_ipv6() {
    for how in STARTS {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let patroni = FakePatroni::primary();
            let outcome = check_with(how, address, &["--url", &patroni.url()], listen);
            assert_eq!(outcome.reply, READY, "{how:?} {address}");
            assert_eq!(outcome.stderr, "", "nothing in the journal for a healthy check");
            assert_eq!(outcome.code, Some(0));
        }
    }
}

#[test]
fn patroni_is_found_on_ipv6_and_by_name() {
    let on = |address: &str| {
        FakePatroni::on(address, |mut stream, _| {
            common::read_request(&mut stream);
            let _ = stream.write_all(&http(200, PRIMARY));
        })
    };
    // nobody listens at the first address of localhost, whatever other tests do
    let nobody = common::nobody();
    let port = nobody.local_addr().expect("an address").port();
    let six = on(&format!("[::1]:{port}"));
    let four = on("127.0.0.1:0");
    for url in [
        format!("http://[::1]:{}", six.address.port()),
        format!("http://localhost:{}", six.address.port()),
        format!("http://localhost:{}", four.address.port()),
    ] {
        let outcome = common::check(&["--url", &url]);
        assert_eq!(outcome.reply, READY, "{url}");
    }
    // names of /etc/hosts: no_module_of_the_name_services_is_loaded in tests/system/surroundings.rs
    let outcome = common::check(&["--url", "http://no-such-host.invalid:8008"]);
    let told = "down ready # Patroni no-such-host.invalid:8008: not in /etc/hosts, and DNS is not used: give --connect-to ADDRESS\n";
    assert_eq!(outcome.reply, told);
    let outcome = common::check(&["--url", "http://[::1]:1"]);
    assert_eq!(outcome.reply, "down ready # Patroni [::1]:1: connection refused\n");
    // the agent takes the first program that accepts its connection for Patroni, and asks no other
    let stopping = FakePatroni::on("127.0.0.1:0", |stream, _| drop(stream));
    let port = stopping.address.port();
    let another = on(&format!("[::1]:{port}"));
    let outcome = common::check(&["--url", &format!("http://localhost:{port}")]);
    let told = "closed the connection early: is it stopping, or does it require https?";
    assert_eq!(outcome.reply, format!("down ready # Patroni localhost:{port}: {told}\n"));
    assert_eq!((stopping.connections(), another.connections()), (1, 0));
}

/// The agent asks Patroni once. It uses the second address only if nobody listens on the first.
#[test]
fn an_address_that_does_not_answer_is_not_passed_over() {
    let first = FakePatroni::raw(drop);
    let second = FakePatroni::on(&format!("[::1]:{}", first.address.port()), |_, _| ());
    let reply = check(&["--url", &format!("http://localhost:{}", first.address.port())]).reply;
    assert!(reply.contains(": closed the connection early"), "{reply}");
    assert_eq!((first.connections(), second.connections()), (1, 0));
}

#[test]
fn no_answer_is_older_than_its_question() {
    let took = Duration::from_millis(1);
    let slow = FakePatroni::raw(move |_stream| std::thread::sleep(took));
    let patroni = Patroni::new(Some(&slow.url()), None, Tls::default()).expect("a Patroni");
    let patience = Patience::until(Instant::now() + Duration::from_secs(10));
    let outcome = patroni.prepare(None).ask(&"primary".parse().expect("a check"), &patience);
    assert!(outcome.answered >= outcome.asked + took, "{outcome:?}");
}

/// Debian's own Patroni package lets the REST API listen only on that address.
#[test]
fn patroni_is_found_at_the_address_that_haproxy_asked() {
    if !common::in_network("connection::patroni_is_found_at_the_address_that_haproxy_asked") {
        return;
    }
    let nobody = common::nobody();
    let port = nobody.local_addr().expect("an address").port();
    let stopping = FakePatroni::on(&format!("10.1.0.2:{port}"), |stream, _| drop(stream));
    let local = FakePatroni::on(&format!("127.0.0.2:{port}"), |stream, _| drop(stream));
    let ask = |url: Option<&str>, asked: &str| {
        let mut patroni = Patroni::new(url, None, Tls::default()).expect("a Patroni");
        patroni.connect_to.port = port;
        let prepared = patroni.prepare(asked.parse().ok());
        let deadline = Instant::now() + Duration::from_secs(10);
        let outcome =
            prepared.ask(&"primary".parse().expect("a check"), &Patience::until(deadline));
        (prepared.describe_candidates(), outcome.answer.expect_err("none").reason)
    };
    let (here, there) = (format!("Patroni 127.0.0.1:{port}"), format!("10.1.0.2:{port}"));
    let (tried, reason) = ask(None, "10.1.0.2:5555");
    assert_eq!(tried, format!("{here} and {there}"));
    assert!(reason.starts_with(&format!("Patroni {there}: closed the connection")), "{reason}");
    let refused = format!("{here}: connection refused");
    let hint = " (see restapi.listen and --url)";
    // any user of this machine may listen on such an address
    for asked in ["127.0.0.1:5555", "127.0.0.2:5555"] {
        assert_eq!(ask(None, asked), (here.clone(), format!("{refused}{hint}")));
    }
    assert_eq!(ask(Some("http://127.0.0.1:8008"), "10.1.0.2:5555"), (here, refused));
    assert_eq!((stopping.connections(), local.connections()), (1, 0));
}

/// A large site's `/etc/hosts`, in a mount namespace.
#[test]
fn patroni_is_found_by_a_name_in_etc_hosts() {
    let patroni = FakePatroni::primary();
    let name = format!("pg1.example:{}", patroni.address.port());
    let url = format!("http://{name}");
    let folder = common::folder("hosts");
    let file = common::path_in(&folder, "hosts");
    let ask = |others: usize| {
        let hosts = "10.0.0.10 another.example\n".repeat(others) + "127.0.0.1 pg1.example\n";
        std::fs::write(&file, hosts).expect("written");
        let script = r#"mount --bind "$0" /etc/hosts; exec "$@""#;
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-ec", script])
            .arg(&file)
            .args([AGENT, "--url", &url])
            .stdin(Stdio::null())
            .output()
            .expect("unshare");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let ready = READY.trim_end();
    assert_eq!(ask(20_000), format!("{ready} (Patroni {name})\n"));
    let told = "not in /etc/hosts (longer than 1048576 bytes), and DNS is not used";
    let reply = ask(50_000);
    assert!(reply.contains(told), "{reply}");
}

#[test]
fn the_agent_uses_no_proxy_of_the_environment() {
    let (patroni, proxy) = (FakePatroni::primary(), FakePatroni::primary());
    let (client, stream) = connection("127.0.0.1:0");
    let mut command = start(Start::Stdin, stream, &["--url", &patroni.url()]);
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env(name, proxy.url());
    }
    let child = command.spawn().expect("the agent starts");
    drop(command);
    assert_eq!(listen(client), READY);
    assert!(child.wait_with_output().expect("an end").status.success());
    assert_eq!((patroni.connections(), proxy.connections()), (1, 0));
}

#[test]
fn only_the_reply_reaches_the_peer() {
    for how in STARTS {
        let outcome = check_with(how, "127.0.0.1:0", &["--url", "http://127.0.0.1:1"], listen);
        assert_eq!(outcome.reply, "down ready # Patroni 127.0.0.1:1: connection refused\n");
        assert_eq!(outcome.code, Some(0));
        let replied = "<4>replied 'down ready' to 127.0.0.1:";
        let why = format!(": primary: Patroni 127.0.0.1:1: connection refused [{VERSION}]\n");
        let said = &outcome.stderr;
        match how {
            Start::Inetd => assert_eq!(said, ""),
            _ => assert!(said.starts_with(replied) && said.ends_with(&why), "{outcome:?}"),
        }
    }
}

#[test]
fn a_wrong_command_line_is_answered() {
    for how in STARTS {
        for arguments in
            [&["--nonsense"][..], &["--help"], &["no-check"], &["--agent-send", "primary"]]
        {
            let outcome = check_with(how, "127.0.0.1:0", arguments, listen);
            assert!(outcome.reply.starts_with("fail ready # patroni-agent-check: "), "{outcome:?}");
            assert_eq!(outcome.reply.matches('\n').count(), 1);
            assert_eq!(outcome.code, Some(0));
        }
    }
}

#[test]
fn a_peer_that_is_gone_costs_no_question() {
    for how in STARTS {
        let patroni = FakePatroni::primary();
        let (client, mut stream) = connection("127.0.0.1:0");
        stream.write_all(b"x").expect("a byte");
        client.peek(&mut [0]).expect("the byte");
        // closing with an unread byte sends a reset
        drop(client);
        while stream.peer_addr().is_ok() {
            std::thread::yield_now();
        }
        let output = start(how, stream, &["--url", &patroni.url()]).output().expect("it starts");
        assert_eq!(output.status.code(), Some(0), "{how:?}");
        assert_eq!((output.stdout, output.stderr), (vec![], vec![]));
        assert_eq!(patroni.connections(), 0);
    }
}

#[test]
fn a_reset_is_not_taken_for_a_peer_that_left() {
    let (client, mut stream) = connection("127.0.0.1:0");
    stream.write_all(b"x").expect("a byte");
    client.peek(&mut [0]).expect("the byte");
    drop(client);
    let read = Connection::Socket(stream).read_line(Instant::now(), Duration::from_secs(9));
    let Err(NoQuestion::Invalid(why)) = read else { panic!("{read:?}") };
    assert!(why.starts_with("cannot read the agent-send line: Connection reset"), "{why}");
}

#[test]
fn a_peer_that_leaves_early_is_no_failure() {
    for how in STARTS {
        let patroni = FakePatroni::primary();
        let outcome = check_with(how, "127.0.0.1:0", &["--url", &patroni.url()], |client| {
            drop(client);
            String::new()
        });
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
    }
}

#[test]
fn listen_fds_that_are_no_connection() {
    let run = |script: &str| {
        let output = Command::new("sh").args(["-c", script, AGENT]).output().expect("sh");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for fd in ["3</dev/null", "3<&-"] {
        let (code, stderr) = run(&format!(r#"export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" {fd}"#));
        assert_eq!(code, Some(64), "{stderr}");
        assert!(stderr.contains("LISTEN_FDS is set, but fd 3 is not a socket"), "{stderr}");
    }
    // LISTEN_FDS is meant for another process, and an operator started this one
    let (code, _) = run(r#"LISTEN_FDS=1 LISTEN_PID=1 exec "$0" --url http://127.0.0.1:1"#);
    assert_eq!(code, Some(2));
    // LISTEN_FDS is left over from the parent of xinetd: the connection is fd 0
    let patroni = FakePatroni::primary();
    let (client, stream) = connection("127.0.0.1:0");
    let mut command = start(Start::Inetd, stream, &["--url", &patroni.url()]);
    let child = command.env("LISTEN_FDS", "1").spawn().expect("the agent starts");
    drop(command);
    assert_eq!(listen(client), READY);
    assert!(child.wait_with_output().expect("an end").status.success());
}

/// The answer of the first address counts, unless nobody listens there, so that no request was sent.
#[test]
fn the_agent_waits_for_a_patroni_whose_backlog_is_full() {
    let (address, _waiting) = full_backlog();
    let url = format!("http://localhost:{}", address.port());
    let outcome = common::check(&["--url", &url, "--timeout", "500ms"]);
    let reason = "no answer before the deadline (--timeout)";
    assert_eq!(
        outcome.reply,
        format!("down ready # Patroni localhost:{}: {reason}\n", address.port())
    );
}

/// The first try ends when the check looks for the hook's note. The kernel would repeat it only after a second.
#[test]
fn a_patroni_whose_backlog_was_full_is_tried_again() {
    let (address, (listener, waiting)) = full_backlog();
    let patroni = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        drop(waiting);
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            if stream.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {
                return stream.write_all(&http(200, PRIMARY)).expect("an answer");
            }
        }
    });
    let outcome = common::check(&["--url", &format!("http://{address}"), "--timeout", "2400ms"]);
    assert_eq!(outcome.reply, READY, "{outcome:?}");
    patroni.join().expect("one answer");
}

#[test]
fn the_agent_notifies_systemd_if_a_drop_in_wants_that() {
    let systemd = NotifySocket::new();
    let patroni = FakePatroni::primary();
    let (client, stream) = connection("127.0.0.1:0");
    let mut command = start(Start::Stdin, stream, &["--url", &patroni.url()]);
    let child = command.env("NOTIFY_SOCKET", &systemd.path).spawn().expect("the agent starts");
    drop(command);
    assert_eq!(listen(client), READY);
    assert!(child.wait_with_output().expect("an end").status.success());
    assert_eq!(systemd.said(), "READY=1");
}

/// If this machine has no descriptor left, that says nothing about Patroni.
#[test]
fn a_machine_without_descriptors_changes_nothing_in_haproxy() {
    let patroni = FakePatroni::primary();
    let mut lacking = 0;
    for limit in 3..16 {
        let (client, stream) = connection("127.0.0.1:0");
        let command = format!("exec 9<&-; ulimit -n {limit}; exec {AGENT} --url {}", patroni.url());
        let mut child = Command::new("bash")
            .args(["-c", &command])
            .stdin(std::os::fd::OwnedFd::from(stream))
            .stderr(Stdio::null())
            .spawn()
            .expect("bash");
        let reply = listen(client);
        child.wait().expect("bash");
        lacking += usize::from(reply.starts_with("!unreachable:_Patroni_"));
        let right =
            ["", "up ", "!unreachable:_Patroni_"].iter().any(|word| reply.starts_with(word));
        assert!(right && !reply.starts_with("down"), "{limit}: {reply}");
        assert!(!reply.contains("hold"), "{limit}: {reply}");
    }
    assert!(lacking > 0);
}

/// No peer is told a password.
#[test]
fn no_password_is_echoed() {
    for arguments in [
        &["--url", "http://joe:se cret@pg1:8008"][..],
        &["--url=http://joe:cret@pg1:8008"],
        &["--url", "joe:cret@pg1"],
        &["--ulr=http://joe:cret@pg1:8008"],
        &["--connect-to", "joe:cret@pg1"],
        &["--url", "http://pg1:8008", "http://joe:cret@pg1"],
        &["primary", "http://joe:cr\"et@x@pg1"],
        &["--grace", "joe:cret@pg1"],
    ] {
        let outcome = check(arguments);
        let said = format!("{}{}", outcome.reply, outcome.stderr);
        assert!(outcome.reply.starts_with("fail ready # patroni-agent-check: "), "{said}");
        assert!(!said.contains("cret") && !said.contains("et@x"), "{said}");
    }
}

// A terminal, a pipe, /dev/null

/// socat gives its program one end of a pair of Unix sockets, unless `nofork` is set.
#[test]
fn a_unix_socket_makes_a_check_by_hand() {
    let patroni = FakePatroni::primary();
    let (_socat, stdin) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let (_, reply, said) =
        text(&run(Stdio::from(std::os::fd::OwnedFd::from(stdin)), &["--url", &patroni.url()]));
    assert_eq!(reply, READY);
    assert!(said.contains("with socat, add nofork"), "{said}");
}

fn run(stdin: Stdio, arguments: &[&str]) -> Output {
    Command::new(AGENT).args(arguments).stdin(stdin).output().expect("the agent starts")
}

fn text(output: &Output) -> (Option<i32>, String, String) {
    let utf8 = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (output.status.code(), utf8(&output.stdout), utf8(&output.stderr))
}

#[test]
fn by_hand_the_exit_status_tells_the_state() {
    let (primary, replica) = (FakePatroni::primary(), replica());
    let cases: [(&[&str], i32, &str); 6] = [
        (&["--url", &primary.url()], 0, READY),
        (&["--url", &replica.url()], 1, "up maint # replica, streaming\n"),
        (&["--url", &replica.url(), "--else", "drain"], 1, "up drain # replica, streaming\n"),
        (&["--url", &replica.url(), "--else", "down"], 1, "down ready # replica, streaming\n"),
        (
            &["--url", "http://127.0.0.1:1"],
            2,
            "down ready # Patroni 127.0.0.1:1: connection refused\n",
        ),
        (
            &["--url", "http://127.0.0.1:1", "--unreachable", "keep"],
            2,
            "!unreachable:_Patroni_127.0.0.1:1:_connection_refused\n",
        ),
    ];
    for (arguments, code, line) in cases {
        for stdin in [Stdio::null(), Stdio::piped()] {
            let arguments = [arguments, &["--memory-file", "/none/memory"]].concat();
            let (got, stdout, stderr) = text(&run(stdin, &arguments));
            assert_eq!((got, stdout.as_str()), (Some(code), line), "{arguments:?}");
            let lines: Vec<_> = stderr.lines().collect();
            let [grace, reason] = lines[..] else { panic!("{stderr}") };
            assert!(
                grace.starts_with("patroni-agent-check: no grace period: /none/memory: "),
                "{grace}"
            );
            assert!(reason.starts_with("patroni-agent-check: primary: "), "{reason}");
        }
    }
}

#[test]
fn on_a_terminal_the_reply_comes_before_the_reason() {
    let patroni = FakePatroni::primary();
    let command = format!("{AGENT} --url {} --memory-file /none/memory", patroni.url());
    let output = Command::new("script").args(["-qefc", &command, "/dev/null"]).output();
    let (code, stdout, _) = text(&output.expect("script(1) of util-linux"));
    let mut lines = stdout.lines();
    let grace = "patroni-agent-check: no grace period: /none/memory: No such file or directory";
    assert!(lines.next().is_some_and(|line| line.starts_with(grace)), "{stdout}");
    let rest = [
        "up ready # primary, running, timeline 5",
        "patroni-agent-check: primary: primary, running, timeline 5",
    ];
    assert_eq!((code, lines.collect::<Vec<_>>()), (Some(0), rest.to_vec()));
}

#[test]
fn a_check_by_hand_prints_what_docs_operate_shows() {
    let shown = common::commands("docs/operate.md", "Ask by hand", "$ patroni-agent-check");
    let (command, said) = shown.split_once('\n').expect("what it says");
    let check = command.trim_start_matches("$ patroni-agent-check ").trim_matches('\'');
    let patroni = FakePatroni::answering(http(
        200,
        r#"{"state": "running", "role": "replica", "replication_state": "streaming", "timeline": 5}"#,
    ));
    let (_folder, memory) = common::memory();
    let output = run(Stdio::null(), &["--url", &patroni.url(), "--memory-file", &memory, check]);
    let (code, stdout, stderr) = text(&output);
    assert_eq!((code, stdout + &stderr), (Some(0), format!("{said}\n")));
}

#[test]
fn usage_errors_say_what_to_write() {
    let cases: [(&[&str], &str); 20] = [
        (&["--nonsense"], "--nonsense"),
        (&["primary", "replica"], "replica"),
        (&["cluster"], "all: --help"),
        (&["replica?lag=16mb"], "lag=16MB"),
        (&["--url"], "--url"),
        (&["--url", "127.0.0.1:8008"], "http://HOST:PORT"),
        (&["--url", "ftp://127.0.0.1"], "http://HOST:PORT"),
        (&["--url", "http://a@127.0.0.1:8008"], "http://HOST:PORT"),
        (&["--url", "http://127.0.0.1:8008/primary"], "http://HOST:PORT"),
        (&["--url", "http://127.0.0.1:99999"], "http://HOST:PORT"),
        (&["--url", "http://127.0.0.1:"], "http://HOST:PORT"),
        (&["--url", "https://127.0.0.1:8008"], "--cacert"),
        (&["-k"], "https"),
        (&["--url", "https://127.0.0.1", "-k", "--key", "x"], "--cert"),
        (&["--timeout", "1.5s"], "1500ms"),
        (&["--timeout", "11s"], "10s"),
        (&["--timeout", "+5s"], "10s"),
        (&["--else", "up"], "maint, drain or down"),
        (&["--unreachable", "maint"], "down or keep"),
        (&["--agent-send", "primary"], "give none here"),
    ];
    for (arguments, hint) in cases {
        let (code, stdout, stderr) = text(&run(Stdio::null(), arguments));
        assert_eq!((code, stdout.as_str()), (Some(64), ""), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("patroni-agent-check: "), "{stderr}");
        assert!(stderr.contains(hint), "{arguments:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    for port in [
        "--connect-to=[].1:8007",
        "--url=http://[]:80",
        "--connect-to=a:99999",
        "--connect-to=a b",
        "--connect-to=",
        "--connect-to=u@h",
    ] {
        assert_eq!(text(&run(Stdio::null(), &[port])).0, Some(64), "{port}");
    }
    let not_utf8 = std::ffi::OsString::from_vec(vec![0xff]);
    let output = Command::new(AGENT).arg(not_utf8).output().expect("the agent starts");
    assert_eq!(output.status.code(), Some(64));
}

/// HAProxy's checks ask no second question for what only operators read.
#[test]
fn only_a_check_by_hand_explains() {
    let body = PRIMARY.replace('}', r#", "patroni": {"name": "pg1"}}"#);
    let patroni = FakePatroni::answering(http(200, &body));
    let arguments = ["--explain", "--url", &patroni.url()];
    let outcome = check_with(Start::ListenFds, "127.0.0.1:0", &arguments, listen);
    assert_eq!((outcome.reply.as_str(), outcome.stderr.as_str()), (READY, ""));
    assert_eq!(patroni.connections(), 1);
    let (_, reply, explained) = text(&run(Stdio::null(), &arguments));
    assert_eq!(reply, READY);
    for text in ["asked: Patroni ", "answer of node pg1: ", "sandbox: complete"] {
        assert!(explained.contains(text), "{explained}");
    }
    assert!(patroni.connections() > 2);
    // with stdin and stderr closed
    let mut closed = Command::new("sh");
    closed.args(["-c", r#""$0" "$@" <&- 2>&-"#, AGENT]).args(arguments);
    let (code, reply, _) = text(&closed.output().expect("sh"));
    assert_eq!((code, reply.as_str()), (Some(0), READY));
}

#[test]
fn help_and_version() {
    let (code, stdout, stderr) = text(&run(Stdio::null(), &["--help"]));
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.contains("--unreachable down|keep"), "{stdout}");
    assert!(stdout.lines().all(|line| line.len() <= 100), "{stdout}");
    // a build that is no release names its commit
    let version = text(&run(Stdio::null(), &["-V"])).1;
    let build =
        version.trim_end().strip_prefix(concat!("patroni-agent-check ", env!("CARGO_PKG_VERSION")));
    let build = build.unwrap_or_else(|| panic!("{version}"));
    // dpkg and rpm take "~" for older than the release, and "+" for newer
    let tag = concat!("v", env!("CARGO_PKG_VERSION"));
    let released = Command::new("git").args(["merge-base", "--is-ancestor", tag, "HEAD"]).output();
    let released = released.is_ok_and(|git| git.status.success());
    let commit = build.strip_prefix(if released { "+git" } else { "~git" });
    let commit = commit.map(|commit| commit.split('.').collect::<Vec<_>>());
    match commit.as_deref() {
        None => assert_eq!(build, ""),
        Some([day, minute, hash] | [day, minute, hash, "changed"]) => {
            assert_eq!((day.len(), minute.len(), hash.len()), (8, 4, 7), "{version}");
        }
        _ => panic!("{version}"),
    }
}

// --settings

/// Tries a settings file of these bytes by hand. Returns the outcome and the file's name.
fn try_settings(bytes: &[u8], more: &[&str]) -> ((Option<i32>, String, String), String) {
    let folder = common::folder("settings");
    let file = common::path_in(&folder, "new");
    std::fs::write(&file, bytes).expect("written");
    let arguments = [&["--settings", &file], more].concat();
    (text(&run(Stdio::null(), &arguments)), file)
}

#[test]
fn settings_that_are_tried_are_used() {
    let replica = replica();
    let settings = format!("# new\nOPTIONS=--url {} \\\n  '--else' drain\n", replica.url());
    let ((code, reply, said), _) = try_settings(settings.as_bytes(), &[]);
    assert_eq!((code, reply.as_str()), (Some(1), "up drain # replica, streaming\n"), "{said}");
    // a CHECK replaces the one in the settings
    for theirs in ["--agent-send", "health"] {
        let settings = format!("OPTIONS='--url {} --else down {theirs}'\n", replica.url());
        let ((_, reply, said), file) = try_settings(settings.as_bytes(), &["async", "--explain"]);
        let told = "down ready # replica, streaming, 503 for /async\n";
        assert_eq!(reply, told, "{said}");
        assert!(said.contains(&format!("settings: {file}: --url http")), "{said}");
        assert!(said.contains("for /async\n") && said.contains("user: uid "), "{said}");
    }
    let settings = format!("OPTIONS='--url {} leader'\n", replica.url());
    let (_, reply, said) = try_settings(settings.as_bytes(), &[]).0;
    assert_eq!(reply, "up maint # replica, streaming\n");
    assert!(said.contains("patroni-agent-check: leader: replica, streaming\n"), "{said}");
}

#[test]
fn a_file_without_settings_means_the_defaults() {
    for text in ["", "\n# OPTIONS=--grase\n; x\n"] {
        let ((code, _, said), file) = try_settings(text.as_bytes(), &["--explain"]);
        let told = format!("settings: {file}: none in it, so the defaults hold: ");
        assert!(said.contains(&told) && said.contains(" for /primary\n"), "{said}");
        assert_ne!(code, Some(64), "{said}");
    }
}

#[test]
fn wrong_settings_make_no_check() {
    let patroni = FakePatroni::primary();
    let and = |more: &str| format!("OPTIONS='--url {} {more}'\n", patroni.url()).into_bytes();
    let wrong = |said: &str, file: &str, cause: &str| {
        assert!(said.starts_with(&format!("patroni-agent-check: {file}: {cause}")), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!said.contains("try a copy"), "{said}");
    };
    for (bytes, cause) in [
        (and("--grase 4s"), "invalid option '--grase'; see --help\n"),
        (and("--grace 4"), "--grace 4: write 0 to 15s"),
        (and("primry"), "unknown health check 'primry'"),
        (and("--agent-send primary"), "with --agent-send HAProxy sends the check"),
        (and("--help"), "--help and --version are for a terminal\n"),
        (and("--settings /none"), "--settings is for a check by hand, and not for the settings\n"),
        (b"export OPTIONS=--agent-send\n".to_vec(), "'export OPTIONS=--agent-send' is not OPTIONS"),
        (b"OPTIONS=--agent-send \xe4\n".to_vec(), "a setting is not UTF-8"),
        ([b'#'; 64 * 1024 + 1].to_vec(), "longer than 65536 bytes\n"),
    ] {
        let ((code, reply, said), file) = try_settings(&bytes, &["primary"]);
        assert_eq!((code, reply.as_str()), (Some(64), ""), "{said}");
        wrong(&said, &file, cause);
    }
    let folder = common::folder("no-settings");
    let [fifo, none] = ["fifo", "none"].map(|name| common::path_in(&folder, name));
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    for (file, cause) in [
        (fifo, "not a regular file\n"),
        (common::path_in(&folder, ""), "not a regular file\n"),
        (none, "No such file or directory"),
    ] {
        let (code, reply, said) = text(&run(Stdio::null(), &["--settings", &file]));
        assert_eq!((code, reply.as_str()), (Some(64), ""), "{said}");
        wrong(&said, &file, cause);
    }
    assert_eq!(patroni.connections(), 0);
}

#[test]
fn settings_are_tried_without_other_options_and_by_hand() {
    let patroni = FakePatroni::primary();
    let settings = format!("OPTIONS='--url {}'\n", patroni.url());
    let ((code, reply, said), _) =
        try_settings(settings.as_bytes(), &["--explain", "--timeout", "1s"]);
    assert_eq!((code, reply.as_str()), (Some(64), ""), "{said}");
    let cause = "--timeout does not go with --settings, whose file has the options\n";
    assert_eq!(said, format!("patroni-agent-check: {cause}"));
    let folder = common::folder("settings");
    let file = common::path_in(&folder, "new");
    std::fs::write(&file, &settings).expect("written");
    for how in STARTS {
        let outcome = check_with(how, "127.0.0.1:0", &["--syslog", "--settings", &file], listen);
        let told = "fail ready # patroni-agent-check: --settings is for a check by hand, and not for the settings";
        assert!(outcome.reply.starts_with(told), "{outcome:?}");
        assert_eq!(outcome.code, Some(0));
    }
    assert_eq!(patroni.connections(), 0);
}

#[test]
fn the_settings_take_no_option_that_is_only_for_operators() {
    for option in ["--settings", "--reopen"] {
        let Err(Stop::Usage(error)) = Options::parse_for_units([option, "x"].map(Into::into))
        else {
            panic!("{option}")
        };
        assert!(error.starts_with(option) && error.ends_with("not for the settings"), "{error}");
    }
}

/// HAProxy is told what is wrong with the settings and, if there is room, the option that tries them.
#[test]
fn the_reply_to_wrong_settings_names_the_option_that_tries_them() {
    for (arguments, told) in [
        (
            &["--agent-send", "--grase", "4s"][..],
            "invalid option '--grase'; see --help; try a copy: --settings FILE",
        ),
        (
            &["--grace", "4"],
            "--grace 4: write 0 to 15s, such as 3s or 2500ms; try a copy: --settings FILE",
        ),
        (
            &["primry"],
            "unknown health check 'primry'; try primary, replica, read-only (all: --help); t",
        ),
    ] {
        let outcome = check(arguments);
        assert_eq!(outcome.reply, format!("fail ready # patroni-agent-check: {told}\n"));
        let end = format!("; try a copy: --settings FILE [{VERSION}]\n");
        assert!(outcome.stderr.ends_with(&end), "{outcome:?}");
    }
}

/// On a node with wrong settings, in a mount namespace, a check by hand says so, and an operator can try a copy.
#[test]
fn an_operator_can_try_a_copy_of_wrong_settings() {
    let patroni = FakePatroni::primary();
    let node = |arguments: &str| {
        let script = r#"
            mount -t tmpfs none /etc/default
            [ ! -d /etc/sysconfig ] || mount -t tmpfs none /etc/sysconfig
            cd /etc/default
            echo "root:x:0:0::/:/bin/sh" > passwd
            mount --bind passwd /etc/passwd
            echo "OPTIONS='--url $1 --grase 4s'" > patroni-agent-check
            sed s/grase/grace/ patroni-agent-check > new
            exec $0 $2"#;
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-ec", script, AGENT])
            .args([&patroni.url(), arguments])
            .stdin(Stdio::null())
            .output();
        text(&output.expect("unshare"))
    };
    let (code, reply, said) = node("primary");
    let told = "patroni-agent-check: /etc/default/patroni-agent-check: invalid option '--grase'; see --help; try a copy: --settings FILE\n";
    assert_eq!((code, reply.as_str(), said.as_str()), (Some(64), "", told));
    let (code, reply, said) = node("--settings new");
    assert_eq!((code, reply.as_str()), (Some(0), READY), "{said}");
    // it warns as a check with the units' settings does
    let unlike = "patroni-agent-check: the units would answer fail to HAProxy: --user patroni-agent-check: not in /etc/passwd";
    assert!(said.starts_with(unlike), "{said}");
}

/// The access list of 0.1.0 beside a new one, in a mount namespace.
#[test]
fn a_check_by_hand_warns_of_several_access_lists() {
    let patroni = FakePatroni::primary();
    let folder = "/etc/systemd/system/patroni-agent-.socket.d";
    let said = |files: &str| {
        let script = r#"
            mount -t tmpfs none /etc/systemd
            mkdir -p $3
            for file in $2; do echo IPAddressAllow=10.0.0.1 > $3/$file.conf; done
            exec $0 --url $1"#;
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-ec", script, AGENT])
            .args([&patroni.url(), files, folder])
            .stdin(Stdio::null())
            .output();
        text(&output.expect("unshare")).2
    };
    let one = said("fence");
    assert!(!one.contains("access lists"), "{one}");
    let warning = "several access lists hold, and whoever is in any of them is let in: ";
    let both = said("fence access-list");
    let files = format!("{folder}/access-list.conf and {folder}/fence.conf\n");
    assert!(both.contains(&format!("{warning}{files}")), "{both}");
}

// agent-send

/// Sends these pieces, one a moment after another, and reads the reply.
fn agent_send(url: &str, pieces: &[&[u8]]) -> Outcome {
    let arguments = ["--agent-send", "--url", url, "--timeout", "800ms"];
    check_with(Start::ListenFds, "127.0.0.1:0", &arguments, |mut client| {
        for (number, piece) in pieces.iter().enumerate() {
            if number > 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
            client.write_all(piece).expect("the agent reads");
        }
        listen(client)
    })
}

#[test]
fn haproxy_names_the_check() {
    let (primary, replica) = (FakePatroni::primary(), replica());
    let asked = |patroni: &FakePatroni, pieces: &[&[u8]]| agent_send(&patroni.url(), pieces).reply;
    assert_eq!(asked(&primary, &[b"primary\n"]), READY);
    assert_eq!(asked(&primary, &[b"/primary\r\n"]), READY);
    assert_eq!(asked(&primary, &[b"prim", b"ary", b"\n"]), READY);
    assert_eq!(asked(&primary, &[b"primary\nand more"]), READY);
    assert_eq!(asked(&primary, &[b"primary", &[b' '; 249], b"\n"]), READY, "256 bytes");
    assert_eq!(asked(&replica, &[b"primary drain\n"]), "up drain # replica, streaming\n");
    assert_eq!(asked(&replica, &[b"primary down\n"]), "down ready # replica, streaming\n");
    let reply = asked(&replica, &[b"replica?lag=16MB\n"]);
    assert_eq!(reply, "up maint # replica, streaming, 503 for /replica?lag=16MB\n");
    assert!(replica.requests()[2].starts_with("GET /replica?lag=16MB HTTP/1.1\r\n"));
}

#[test]
fn an_invalid_line_is_answered_without_patroni() {
    let patroni = FakePatroni::primary();
    let long = [b'a'; 257];
    let exact = [&[b'a'; 256][..], b"\n"].concat();
    let flood = [b'a'; 100_000];
    let late = r#"fail ready # no agent-send line within 300 ms: end it with a newline, as in agent-send "primary\n""#;
    let cases: [(&[&[u8]], &str); 13] = [
        (&[], late),
        (&[b"primary"], late),
        (&[b"\n"], "fail ready # agent-send line: empty"),
        (
            &[b"cluster\n"],
            "fail ready # agent-send line: unknown health check 'cluster'; try primary, replica, read-only (all: --help)",
        ),
        (&[b"primary up\n"], "fail ready # agent-send line: 'up': write maint, drain or down"),
        (&[b"primary maint # up ready\n"], "fail ready # agent-send line: unexpected word '#'"),
        (&[b"PRIMARY\n"], "fail ready # agent-send line: unknown health check 'PRIMARY'"),
        (&[b"primary\0\n"], "fail ready # agent-send line: unknown health check 'primary?'"),
        (&[b"\xff\xfe\n"], "fail ready # agent-send line: unknown health check '??'"),
        (&[b"GET / HTTP/1.1\r\n\r\n"], "fail ready # agent-send line: unknown health check 'GET'"),
        (&[&long], "fail ready # agent-send line is longer than 256 bytes\n"),
        (&[&exact], "fail ready # agent-send line: unknown health check 'aaaa"),
        (&[&flood], "fail ready # agent-send line is longer than 256 bytes\n"),
    ];
    for (pieces, expected) in cases {
        let arguments = ["--agent-send", "--url", &patroni.url(), "--timeout", "800ms"];
        let outcome = check_with(Start::ListenFds, "127.0.0.1:0", &arguments, |mut client| {
            for piece in pieces {
                let _ = client.write_all(piece);
            }
            // a flood may be reset in the end; the line has come before
            let mut reply = Vec::new();
            let _ = client.read_to_end(&mut reply);
            String::from_utf8(reply).expect("ASCII")
        });
        assert!(outcome.reply.starts_with(expected), "{outcome:?}");
        assert_eq!(outcome.reply.matches('\n').count(), 1, "{outcome:?}");
        assert_eq!(outcome.code, Some(0));
        assert_eq!(outcome.stderr, "", "anybody could fill the journal");
    }
    assert_eq!(patroni.connections(), 0);
}

#[test]
fn a_peer_that_closes_its_half_is_answered() {
    let patroni = FakePatroni::primary();
    let outcome = check_with(Start::Stdin, "127.0.0.1:0", &["--agent-send"], |client| {
        client.shutdown(Shutdown::Write).expect("a socket");
        listen(client)
    });
    assert_eq!(outcome.reply, "fail ready # closed without an agent-send line\n");
    let outcome = check_with(Start::Stdin, "127.0.0.1:0", &["--agent-send"], |mut client| {
        client.write_all(b"primary").expect("a socket");
        client.shutdown(Shutdown::Write).expect("a socket");
        listen(client)
    });
    assert!(outcome.reply.starts_with("fail ready # no agent-send line before the end"));
    let outcome = check_with(Start::Stdin, "127.0.0.1:0", &["--url", &patroni.url()], |client| {
        client.shutdown(Shutdown::Write).expect("a socket");
        listen(client)
    });
    assert_eq!(outcome.reply, READY);
}

#[test]
fn one_byte_at_a_time_does_not_move_the_deadline() {
    let arguments = ["--agent-send", "--timeout", "300ms"];
    let outcome = check_with(Start::Stdin, "127.0.0.1:0", &arguments, |mut client| {
        let sender = client.try_clone().expect("a second descriptor");
        let drip = std::thread::spawn(move || {
            let mut sender = sender;
            for _ in 0..100 {
                if sender.write_all(b"a").is_err() {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            false
        });
        let mut reply = String::new();
        let _ = client.read_to_string(&mut reply);
        let _ = client.shutdown(Shutdown::Both);
        assert!(drip.join().expect("no panic"), "the agent left before the drip ended");
        reply
    });
    assert!(outcome.reply.starts_with("fail ready # no agent-send line"), "{outcome:?}");
}

#[test]
fn a_line_without_agent_send_is_read_and_ignored() {
    let patroni = FakePatroni::primary();
    let arguments = ["--url", &patroni.url()];
    let outcome = check_with(Start::Stdin, "127.0.0.1:0", &arguments, |mut client| {
        client.write_all(b"down ready\n").expect("a socket");
        // an error here is a reset, after which HAProxy may lose the line
        listen(client)
    });
    assert_eq!(outcome.reply, READY);
    // more than the agent reads at once
    let (mut client, stream) = connection("127.0.0.1:0");
    client.write_all(&[b'x'; 5000]).expect("a socket");
    while stream.peek(&mut [0; 5000]).expect("a socket") < 5000 {
        std::thread::yield_now();
    }
    let agent = Connection::Socket(stream);
    agent.send(READY);
    drop(agent);
    assert_eq!(client.take_error().expect("a socket").map(|error| error.to_string()), None);
    assert_eq!(listen(client), READY);
}

#[test]
fn agent_send_works_by_hand() {
    let patroni = FakePatroni::primary();
    let arguments = ["--agent-send", "--url", &patroni.url(), "--timeout", "10s"];
    let mut command = Command::new(AGENT);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the agent starts");
    child.stdin.take().expect("a pipe").write_all(b"read-write drain\n").expect("a pipe");
    let (code, stdout, _) = text(&child.wait_with_output().expect("an end"));
    assert_eq!((code, stdout.as_str()), (Some(0), READY));
    // a pipe that stays open and to which nobody writes
    let mut child = command.args(["--timeout", "200ms"]).spawn().expect("the agent starts");
    let stdin = child.stdin.take();
    let (code, stdout, _) = text(&child.wait_with_output().expect("an end"));
    assert_eq!(code, Some(2));
    assert!(stdout.starts_with("fail ready # no agent-send line within 200 ms: "), "{stdout}");
    drop(stdin);
}

#[test]
fn the_line_and_patroni_share_one_deadline() {
    let patroni = FakePatroni::raw(|_stream| std::thread::sleep(Duration::from_secs(30)));
    let mut command = Command::new(AGENT);
    command.args(["--agent-send", "--url", &patroni.url(), "--timeout", "4s"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the agent starts");
    std::thread::sleep(Duration::from_millis(2000));
    let sent = Instant::now();
    child.stdin.take().expect("a pipe").write_all(b"primary\n").expect("a pipe");
    let (_, stdout, _) = text(&child.wait_with_output().expect("an end"));
    assert!(stdout.ends_with("no answer before the deadline (--timeout)\n"), "{stdout}");
    // the line and the question share two seconds; with a deadline each it would be four
    assert!(sent.elapsed() < Duration::from_millis(3900));
}

/// A silent peer must not keep its place until `--timeout`.
#[test]
fn the_line_is_due_after_300_ms_whatever_the_timeout() {
    let patroni = FakePatroni::primary();
    for (timeout, due) in [("10s", "300"), ("100ms", "100")] {
        let arguments = ["--agent-send", "--url", &patroni.url(), "--timeout", timeout];
        let outcome = check_with(Start::ListenFds, "127.0.0.1:0", &arguments, listen);
        let told = format!("fail ready # no agent-send line within {due} ms: end it");
        assert!(outcome.reply.starts_with(&told), "{outcome:?}");
        assert!(outcome.took < Duration::from_secs(5), "{outcome:?}");
    }
}

#[test]
fn a_peer_that_never_closes_is_not_waited_for() {
    for how in STARTS {
        let (client, stream) = connection("127.0.0.1:0");
        let mut command = start(how, stream, &["--url", "http://127.0.0.1:1"]);
        let child = command.spawn().expect("the agent starts");
        drop(command);
        // the agent ends although the client keeps the connection open
        assert!(child.wait_with_output().expect("an end").status.success(), "{how:?}");
        assert_eq!(listen(client), "down ready # Patroni 127.0.0.1:1: connection refused\n");
    }
}

#[test]
fn a_peer_that_only_tries_the_port_is_not_logged() {
    for leave in [Shutdown::Write, Shutdown::Both] {
        let outcome = check_with(Start::ListenFds, "127.0.0.1:0", &["--agent-send"], |client| {
            client.shutdown(leave).expect("a socket");
            drop(client);
            String::new()
        });
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{leave:?}");
    }
}
