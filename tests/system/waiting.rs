//! Clients wait while their pool has no server (units/examples/haproxy.cfg). Needs HAProxy (tests/install); tests/run runs
//! it.

use crate::fake_nodes::{LONG, MOMENT, NodeState, SHORT, Session, Site, join_clients};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Asserts that all sessions are with this node.
fn all_reach(node: char, clients: Vec<JoinHandle<Session>>) -> Vec<Session> {
    let sessions = join_clients(clients);
    assert!(sessions.iter().all(|session| session.answer == Some(node)), "{sessions:?}");
    sessions
}

/// Whether a client is served. HAProxy closes or resets a connection that it refuses, perhaps while the client connects.
fn is_served(pool: SocketAddr) -> bool {
    let read = TcpStream::connect(pool).and_then(|mut stream| {
        stream.set_read_timeout(Some(LONG))?;
        stream.read(&mut [0])
    });
    matches!(read, Ok(1..))
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn clients_wait_for_the_first_server_and_reach_it_at_once() {
    let site = Site::new("waits", &[]);
    site.lose_primary();
    let mut clients = Vec::new();
    // the clients come over more than a second, and so do their attempts to connect
    for _ in 0..80 {
        clients.extend(site.clients(1, SHORT));
        std::thread::sleep(Duration::from_millis(20));
    }
    site.wait_for_clients(80);
    site.set_primary(1, true);
    site.wait_until("postgres-write", "pg2", "status", |status| status.starts_with("UP"));
    let up = Instant::now();
    let sessions = all_reach('2', clients);
    let mut late: Vec<_> =
        sessions.iter().map(|session| session.at.saturating_duration_since(up)).collect();
    late.sort();
    println!("half of them {:?} after the server was UP, the last {:?}", late[40], late[79]);
    assert!(late[40] < Duration::from_millis(300) && late[79] < Duration::from_secs(1));

    println!("reads wait as well");
    let replica = |number: usize, status: &'static str| {
        site.wait_until("postgres-read", &format!("pg{}", number + 1), "status", |shown| {
            shown.starts_with(status)
        });
    };
    for node in 0..3 {
        NodeState::set(&site.nodes[node].state.held_drain, true);
    }
    (0..3).for_each(|node| replica(node, if node == 1 { "MAINT" } else { "DRAIN" }));
    let reads = site.reads;
    let client = std::thread::spawn(move || Site::client(reads, LONG));
    site.wait_until("postgres-read", "BACKEND", "scur", |waiting| waiting == "1");
    std::thread::sleep(MOMENT);
    assert!(!client.is_finished());
    NodeState::set(&site.nodes[2].state.held_drain, false);
    assert_eq!(client.join().expect("a session").answer, Some('3'));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_that_postgresql_refuses_waits() {
    // HAProxy's own check notices that as well
    let site = Site::new("refused", &[]);
    NodeState::set(&site.nodes[0].state.stopped, true);
    std::thread::sleep(Duration::from_millis(50));
    let clients = site.clients(20, SHORT);
    site.wait_for_clients(20);
    std::thread::sleep(MOMENT);
    assert!(site.stat("postgres-write", "pg1", "status").starts_with("UP"));
    println!("no primary, and then another");
    site.lose_primary();
    std::thread::sleep(MOMENT);
    site.set_primary(1, true);
    all_reach('2', clients);
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_that_gives_up_leaves_no_session() {
    let site = Site::new("gives-up", &[]);
    site.lose_primary();
    let sessions: Vec<_> =
        (0..50).map(|_| Site::client(site.writes, Duration::from_millis(1))).collect();
    site.wait_for_clients(50);
    drop(sessions);
    let gone = Instant::now();
    site.wait_for_clients(0);
    println!("HAProxy has closed the sessions after {:?}", gone.elapsed());
    assert!(gone.elapsed() < Duration::from_secs(3), "clients might wait for ten seconds");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_full_room_refuses_and_blocks_nobody_else() {
    // one thread: while two of HAProxy's accept, fe_conn counts one client too many, and HAProxy may refuse the last one
    let limits = [("gt 1000", "gt 80"), ("maxconn 3000", "maxconn 200\n    nbthread 1")];
    let site = Site::new("full", &limits);
    let others_work = || {
        let read = Site::client(site.reads, LONG).answer;
        assert!(matches!(read, Some('2' | '3')), "{read:?}");
        let mut page = TcpStream::connect(site.page).expect("HAProxy");
        page.set_read_timeout(Some(LONG)).expect("a socket");
        page.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("a request");
        let mut shown = String::new();
        page.read_to_string(&mut shown).expect("the statistics page");
        assert!(shown.contains("postgres-write"));
    };
    let refused = || {
        let began = Instant::now();
        for _ in 0..20 {
            assert!(!is_served(site.writes));
        }
        assert!(began.elapsed() < Duration::from_secs(5), "at once");
    };
    println!("too many connections to the pool");
    let filled: Vec<_> = (0..250).flat_map(|_| TcpStream::connect(site.writes)).collect();
    site.wait_for_clients(80);
    others_work();
    refused();
    drop(filled);
    site.wait_for_clients(0);

    println!("too many waiting clients");
    site.lose_primary();
    let clients = site.clients(80, SHORT);
    site.wait_for_clients(80);
    refused();
    others_work();
    site.set_primary(0, true);
    all_reach('1', clients);
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn nobody_waits_where_neither_agents_nor_patroni_can_be_reached() {
    let site = Site::new("alone", &[]);
    let gone = |gone| site.nodes.iter().for_each(|node| NodeState::set(&node.state.gone, gone));
    site.nodes.iter().for_each(|node| NodeState::set(&node.state.silent, true));
    gone(true);
    for node in ["pg1", "pg2", "pg3"] {
        site.wait_until("agents", node, "status", |status| status == "DOWN");
        site.wait_until("reserve", node, "status", |status| status == "DOWN");
    }
    for pool in [site.writes, site.reads] {
        let began = Instant::now();
        assert!(!is_served(pool));
        assert!(began.elapsed() < 2 * MOMENT, "at once");
    }
    println!("Patroni answers again, and then there is a primary");
    site.set_primary(0, false);
    gone(false);
    for node in ["pg1", "pg2", "pg3"] {
        site.wait_until("reserve", node, "status", |status| status == "NOLB");
    }
    let clients = site.clients(5, SHORT);
    site.set_primary(1, true);
    all_reach('2', clients);
    assert!(is_served(site.writes));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn those_who_waited_are_not_too_many_clients() {
    let site = Site::new("many", &[]);
    site.lose_primary();
    // longer than an attempt takes, so that clients stay in HAProxy's queue for longer
    let clients = site.clients(300, MOMENT / 2);
    site.wait_for_clients(300);
    site.set_primary(1, true);
    let sessions = join_clients(clients);
    let refused = sessions.iter().filter(|session| session.answer != Some('2')).count();
    assert_eq!(refused, 0, "of 300");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_waits_in_the_reserve_for_a_node_whose_agent_is_silent() {
    let site = Site::new("silent", &[]);
    NodeState::set(&site.nodes[1].state.silent, true);
    site.wait_until("agents", "pg2", "status", |status| status == "DOWN");
    site.lose_primary();
    site.wait_until("reserve", "pg1", "status", |status| status == "NOLB");
    let clients = site.clients(20, SHORT);
    site.wait_until("reserve", "BACKEND", "scur", |waiting| waiting == "20");
    std::thread::sleep(MOMENT);
    site.set_primary(1, true);
    all_reach('2', clients);
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_node_that_is_held_gets_nothing_new_until_the_hold_ends() {
    let site = Site::new("held", &[]);
    let mut old = Site::client(site.writes, LONG).stream;
    let state = &site.nodes[0].state;
    NodeState::set(&state.held_drain, true);
    site.wait_until("postgres-write", "pg1", "status", |status| status.starts_with("DRAIN"));
    let sessions = || state.sessions.load(Ordering::SeqCst);
    let clients = site.clients(20, SHORT);
    site.wait_for_clients(21);
    let end = Instant::now() + 2 * MOMENT;
    while Instant::now() < end {
        assert_eq!(sessions(), 1, "the session from before the hold");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(old.write_all(b"I am still here").is_ok());
    NodeState::set(&state.held_drain, false);
    all_reach('1', clients);
    old.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket");
    let open = old.read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(open, Err(ErrorKind::WouldBlock)), "{open:?}");
}

/// HAProxy keeps a silent agent's last reply. HAProxy's own check ends the sessions that drain, if it asks Patroni.
#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_drain_whose_agent_falls_silent_ends_with_a_check_that_asks_patroni_and_only_with_that() {
    let check = "option httpchk OPTIONS /primary";
    for (replaced, ends) in [(&[][..], true), (&[(check, "# a TCP check")][..], false)] {
        let site = Site::new("drain", replaced);
        let mut session = Site::client(site.writes, LONG);
        assert_eq!(session.answer, Some('1'), "{}", site.command("show stat"));
        NodeState::set(&site.nodes[0].state.held_drain, true);
        site.wait_until("postgres-write", "pg1", "status", |status| status.starts_with("DRAIN"));
        NodeState::set(&site.nodes[0].state.silent, true);
        std::thread::sleep(MOMENT);
        NodeState::set(&site.nodes[0].state.lock_lost, true);
        session
            .stream
            .set_read_timeout(Some(if ends { LONG } else { 6 * MOMENT }))
            .expect("a socket");
        let read = session.stream.read(&mut [0]).map_err(|error| error.kind());
        let status = site.stat("postgres-write", "pg1", "status");
        match read {
            Err(ErrorKind::WouldBlock) if !ends => assert!(status.starts_with("DRAIN"), "{status}"),
            Ok(0) | Err(ErrorKind::ConnectionReset) if ends => assert_eq!(status, "DOWN"),
            read => panic!("{read:?}, {status}"),
        }
    }
}
