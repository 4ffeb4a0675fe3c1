//! `patroni-pools` with a real HAProxy: what HAProxy refuses and does, and what a reload begins with. Needs HAProxy, no root.

use crate::common::{FakePatroni, file, http, stats_socket};
use crate::haproxy::free_port;
use patroni_agent_check::pools::configuration::Configuration;
use patroni_agent_check::pools::pool::Pool;
use patroni_agent_check::pools::words::Environment;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const POOLS: &str = env!("CARGO_BIN_EXE_patroni-pools");

/// HAProxy, in a folder of its own.
struct HaProxy {
    folder: TempDir,
    process: Option<Child>,
}

impl HaProxy {
    fn new(configuration: &str) -> HaProxy {
        let haproxy = HaProxy { folder: tempfile::tempdir().expect("a folder"), process: None };
        fs::write(haproxy.path("servers"), "").expect("a file");
        haproxy.write(configuration);
        haproxy
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, configuration: &str) {
        let folder = self.folder.path().display();
        let global = format!(
            "global\n stats socket {folder}/admin.sock mode 600 level admin\n server-state-file {folder}/servers\n hard-stop-after 1s\n"
        );
        fs::write(self.path("haproxy.cfg"), global + configuration).expect("a file");
    }

    fn start(&mut self) {
        let start = Command::new("haproxy")
            .args(["-W", "-db", "-f"])
            .arg(self.path("haproxy.cfg"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.process = Some(start.expect("haproxy"));
    }

    /// Saves the states and sends the signal, as haproxy.service does.
    fn reload(&self) {
        let (_, _, said) = self.run(&["save-states"]);
        assert_eq!(said, "");
        let process = self.process.as_ref().expect("a process").id().to_string();
        let signal = Command::new("kill").args(["-USR2", &process]).status();
        assert!(signal.expect("kill").success());
        thread::sleep(Duration::from_secs(2));
    }

    /// Exit status, stdout and stderr.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let command = Command::new(POOLS)
            .args(arguments)
            .arg("-f")
            .arg(self.path("haproxy.cfg"))
            .output()
            .expect("the program");
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (command.status.code(), text(&command.stdout), text(&command.stderr))
    }
}

impl Drop for HaProxy {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // the master also ends its workers
            let _ = Command::new("kill").arg(process.id().to_string()).status();
            let _ = process.wait();
        }
    }
}

/// An agent that always sends this reply.
fn agent(answer: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = BufReader::new(&stream).read_line(&mut String::new());
            let _ = writeln!(stream, "{answer}");
        }
    });
    port
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn haproxy_judges_its_own_language() {
    let haproxy = HaProxy::new("listen a\n bind 127.0.0.1:1\n nonsense\n");
    let (status, found, said) = haproxy.run(&["check"]);
    assert!(status == Some(2) && found.is_empty(), "{found}");
    assert!(said.contains("unknown keyword 'nonsense'") && said.contains("HAProxy refuses"));
    // unknown host names are no mistake in the language
    let example = fs::read_to_string(file("units/examples/haproxy.cfg")).expect("an example");
    let example = example.split_once("\ndefaults").expect("defaults").1;
    let example = format!("defaults{example}");
    let example = example.replace("pg1:", "pg1.invalid:").replace("${AGENT_PORT}", "5555");
    haproxy.write(&example);
    let (status, found, said) = haproxy.run(&["check"]);
    assert_eq!((status, &*found), (Some(0), ""), "{said}");
    assert!(said.contains("does not know the names"), "{said}");
}

/// HAProxy has the servers, ports, checks, agents and `disabled` that patroni-pools reads.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn patroni_pools_reads_a_configuration_as_haproxy_does() {
    let layout = |clients: u16| {
        format!(
            r#" setenv AGENT 5559
 presetenv PORT 5433
 .if version_atleast(2.4) && !defined(NOTHING)
 setenv PORT 5434
 .else
 setenv PORT 1
 .endif
defaults pg
 mode tcp
 timeout client 1m
 timeout server 1m
 timeout connect 1s
 default-server check port 8008 inter 1m
defaults agent from pg
 default-server agent-check agent-port "${{AGENT}}" agent-inter 1m disabled # enabled
defaults web
 mode http
 timeout client 1m
 timeout server 1m
 timeout connect 1s
listen front from pg
	bind 127.0.0.1:{clients}
	server a 127.0.0.1:5432	maxconn 9
	server 'b' "127.0.0.1:${{PORT}}" no-check
	default-server disabled
	server c 127.0.0.1:"${{NONE-5435}}" port 9
	server e ipv6@[::1]:5436 enabled # disabled
	server f 127.0.0.1 backup no-check
backend later
	server g 127.0.0.1:80
	default-server agent-check agent-port 7
	server h 127.0.0.1:81 agent-send 'x' check addr 127.0.0.2 source 0.0.0.0 usesrc clientip port 10
backend agents from agent
	server-template t 2-3 127.0.0.1:5437 init-addr none
	server i 127.0.0.1:5438 no-agent-check enabled
"#
        )
    };
    let clients = free_port();
    let layout = layout(clients);
    let mut haproxy = HaProxy::new(&layout);
    let (_, _, said) = haproxy.run(&["check"]);
    assert!(!said.contains("refuses"), "{said}");
    haproxy.start();
    let socket = haproxy.path("admin.sock");
    let end = Instant::now() + Duration::from_secs(10);
    let states = loop {
        match stats_socket::command(&socket, "show servers state") {
            Ok(states) => break states,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        thread::sleep(Duration::from_millis(50));
    };
    let version = || Some(vec![2, 6]);
    let files = [haproxy.path("haproxy.cfg")];
    let read = Configuration::read(&files, Environment::new(), &version).expect("a configuration");
    assert_eq!(read.notes, []);
    let mut ours = Vec::new();
    for pool in Pool::all(&read) {
        for server in &pool.servers {
            let (agent, check) = (server.has("agent-check"), server.has("check"));
            ours.push(format!(
                "{}/{} {} disabled {} check {check} {} agent {agent} {}",
                pool.name(),
                server.name,
                server.port.unwrap_or(0),
                server.has("disabled"),
                if check { pool.check_port(server).unwrap_or(0) } else { 0 },
                if agent { server.agent_port().unwrap_or(0) } else { 0 },
            ));
        }
    }
    let mut theirs = Vec::new();
    for line in states.lines().filter(|line| line.split(' ').count() == 25) {
        let column: Vec<_> = line.split(' ').collect();
        let bit = |at: usize, bit: u32| column[at].parse::<u32>().expect("a number") & bit != 0;
        let (check, agent) = (bit(13, 2), bit(14, 2));
        theirs.push(format!(
            "{}/{} {} disabled {} check {check} {} agent {agent} {}",
            column[1],
            column[3],
            column[18],
            bit(6, 4),
            if check { column[21] } else { "0" },
            if agent { column[24] } else { "0" },
        ));
    }
    theirs.sort();
    ours.sort();
    assert!(ours.len() == 10);
    assert_eq!(ours, theirs);
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn status_shows_what_haproxy_does_and_a_reload_keeps_it() {
    let (ready, maint) = (agent("up ready # primary"), agent("up maint # replica"));
    let primary = FakePatroni::new(|stream| {
        let _ = stream.write_all(&http(200, "{\"role\": \"primary\", \"state\": \"running\"}"));
    });
    let patroni = primary.address.port();
    let clients = free_port();
    let pool = |ready: u16| {
        format!(
            "defaults\n mode tcp\n timeout client 1m\n timeout server 1m\n timeout connect 200ms\n load-server-state-from-file global\n\
             listen rw\n bind 127.0.0.1:{clients}\n option httpchk OPTIONS /primary\n\
             \tdefault-server check port {patroni} inter 200ms agent-check agent-inter 200ms agent-send \"primary\\n\" disabled\n\
             \tserver a 127.0.0.1:5432 agent-port {ready}\n server b 127.0.0.1:5432 agent-port {maint}\n\
             \tserver-template t 1 localhost:5432 agent-port {maint} init-addr last,libc\n\
             \tserver waiting-room 127.0.0.1 backup no-check no-agent-check enabled maxconn 0\n"
        )
    };
    let mut haproxy = HaProxy::new(&pool(ready));
    let began = Instant::now();
    haproxy.start();
    let (status, shown, _) = haproxy.run(&["status", "--wait", "15"]);
    assert_eq!(status, Some(0), "{shown}");
    assert!(began.elapsed() < Duration::from_secs(10));
    let lines: Vec<_> = shown.lines().collect();
    assert_eq!(lines.len(), 3, "{shown}");
    assert!(lines[0].starts_with("rw/a   UP") && lines[0].contains("agent L7OK: "), "{shown}");
    assert!(lines[0].ends_with("Patroni: primary, running"), "{shown}");
    assert!(lines[1].starts_with("rw/b   MAINT") && lines[1].contains("agent L7OK: "));

    println!("a wrong port for the agent: the states stay, and status reports the port");
    haproxy.write(&pool(free_port()));
    let (status, shown, _) = haproxy.run(&["status"]);
    assert!(status == Some(1) && shown.contains("has HAProxy been reloaded"), "{shown}");
    haproxy.reload();
    let (status, shown, _) = haproxy.run(&["status"]);
    assert!(status == Some(1) && shown.starts_with("rw/a   UP"), "{shown}");
    assert!(shown.contains("its agent does not answer (L4CON)"), "{shown}");

    println!("the right port again");
    haproxy.write(&pool(ready));
    haproxy.reload();
    let (status, shown, _) = haproxy.run(&["status", "--wait", "5", "--quiet"]);
    assert_eq!((status, &*shown), (Some(0), "OK: 3 servers that ask Patroni\n"));

    let mut stopped = haproxy.process.take().expect("a process");
    let _ = Command::new("kill").arg(stopped.id().to_string()).status();
    let _ = stopped.wait();
    let (status, _, said) = haproxy.run(&["status"]);
    assert!(status == Some(2) && said.contains("HAProxy does not answer"), "{said}");
    let (status, _, said) = haproxy.run(&["save-states"]);
    assert!(status == Some(0) && said.contains("were not saved"), "{said}");
}

/// The old process asks no agent any more, so it would refuse waiting clients.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn the_states_are_saved_once_no_client_waits() {
    let clients = free_port();
    let mut haproxy = HaProxy::new(&format!(
        "defaults\n mode tcp\n timeout client 1m\n timeout server 1m\n timeout connect 200ms\n retries 1000\n\
         option redispatch 1\n option abortonclose\n\
         listen rw\n bind 127.0.0.1:{clients}\n\
         \tserver a 127.0.0.1:5432 agent-check agent-inter 200ms agent-send \"primary\\n\" agent-port {} disabled\n\
         \ttcp-request content set-dst-port int(0)\n\
         \tserver waiting-room 127.0.0.1 backup no-check no-agent-check enabled maxconn 0\n",
        agent("up maint # replica")
    ));
    haproxy.start();
    let end = Instant::now() + Duration::from_secs(20);
    let client = loop {
        match TcpStream::connect(("127.0.0.1", clients)) {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    };
    let save = |wait: u64| {
        let began = Instant::now();
        let (status, _, said) = haproxy.run(&["save-states", "--wait", &wait.to_string()]);
        assert_eq!((status, &*said), (Some(0), ""));
        began.elapsed()
    };
    thread::sleep(Duration::from_secs(1));
    assert!(save(2) >= Duration::from_secs(2));
    drop(client);
    assert!(save(60) < Duration::from_secs(60));
}

/// Which rules and which request a section inherits from its defaults. HAProxy's manual does not say.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn haproxy_asks_what_patroni_pools_reads() {
    let send = "http-check send meth GET uri /leader";
    let any = "http-check expect status 200,503";
    for (defaults, own) in [
        (["option httpchk OPTIONS /primary", any], vec![]),
        (["option httpchk OPTIONS /primary", any], vec!["option httpchk OPTIONS /replica"]),
        (["option httpchk OPTIONS /primary", any], vec!["http-check expect status 503"]),
        (["option httpchk OPTIONS /primary", send], vec!["option httpchk OPTIONS /health"]),
        (["option httpchk OPTIONS /primary", send], vec![any]),
        (["option httpchk OPTIONS /primary", send], vec!["http-check send uri /sync", any]),
        (["option httpchk", send], vec![]),
    ] {
        let patroni = FakePatroni::new(|stream| {
            let _ = stream.write_all(&http(503, ""));
        });
        let text = format!(
            "defaults\n mode tcp\n timeout client 1m\n timeout server 1m\n timeout connect 1s\n timeout check 500ms\n {}\n\
             listen pg\n bind 127.0.0.1:{}\n {}\n server a 127.0.0.1:5432 check port {} inter 100ms fall 1 rise 1\n",
            defaults.join("\n "),
            free_port(),
            own.join("\n "),
            patroni.address.port()
        );
        let mut haproxy = HaProxy::new(&text);
        haproxy.start();
        let socket = haproxy.path("admin.sock");
        let end = Instant::now() + Duration::from_secs(10);
        let checked = |status: &str| ["L4", "L5", "L7"].iter().any(|how| status.contains(how));
        while !stats_socket::stat(&socket, "pg", "a", "check_status")
            .is_ok_and(|status| checked(&status))
        {
            assert!(Instant::now() < end, "{text}");
            thread::sleep(Duration::from_millis(50));
        }
        let status = stats_socket::stat(&socket, "pg", "a", "status").expect("a status");
        let requests = patroni.requests();
        let asked = requests.first().and_then(|request| request.split(' ').nth(1));
        let read = Configuration::of("x", &text, Environment::new());
        let pool = &Pool::all(&read)[0];
        let ours = pool.check.questions.first().and_then(|question| question.path.as_deref());
        assert_eq!(asked, ours, "{text}");
        assert_eq!(status == "UP", ours.is_some() && pool.takes(503), "{status}: {text}");
    }
}
