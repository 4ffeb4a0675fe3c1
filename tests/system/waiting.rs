//! Clients wait while their pool has no server (units/examples/haproxy.cfg). Needs HAProxy (tests/install); tests/run runs
//! it.

use crate::played_nodes::{LONG, MOMENT, SHORT, Session, Site, Truth, answers};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Asserts that all sessions are with this node.
fn all_reach(node: char, clients: Vec<JoinHandle<Session>>) -> Vec<Session> {
    let sessions = answers(clients);
    assert!(sessions.iter().all(|session| session.answer == Some(node)), "{sessions:?}");
    sessions
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn clients_wait_for_the_first_server_and_reach_it_at_once() {
    let site = Site::new("waits", &[]);
    site.no_primary();
    let mut clients = Vec::new();
    // the clients come over more than a second, and so do their tries
    for _ in 0..80 {
        clients.extend(site.clients(1, SHORT));
        std::thread::sleep(Duration::from_millis(20));
    }
    site.waiting(80);
    site.turn(1, true);
    site.until("postgres-write", "pg2", "status", |status| status.starts_with("UP"));
    let up = Instant::now();
    let sessions = all_reach('2', clients);
    let mut late: Vec<_> =
        sessions.iter().map(|session| session.at.saturating_duration_since(up)).collect();
    late.sort();
    println!("half of them {:?} after the server was UP, the last {:?}", late[40], late[79]);
    assert!(late[40] < Duration::from_millis(300) && late[79] < Duration::from_secs(1));

    println!("reads, too");
    let replica = |number: usize, status: &'static str| {
        site.until("postgres-read", &format!("pg{}", number + 1), "status", |shown| {
            shown.starts_with(status)
        });
    };
    for node in 0..3 {
        Truth::set(&site.nodes[node].is.held, true);
    }
    (0..3).for_each(|node| replica(node, if node == 1 { "MAINT" } else { "DRAIN" }));
    let reads = site.reads;
    let client = std::thread::spawn(move || Site::client(reads, LONG));
    site.until("postgres-read", "BACKEND", "scur", |waiting| waiting == "1");
    std::thread::sleep(MOMENT);
    assert!(!client.is_finished());
    Truth::set(&site.nodes[2].is.held, false);
    assert_eq!(client.join().expect("a session").answer, Some('3'));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_that_postgresql_refuses_waits() {
    // HAProxy's own check notices that, too
    let site = Site::new("refused", &[]);
    Truth::set(&site.nodes[0].is.stopped, true);
    std::thread::sleep(Duration::from_millis(50));
    let clients = site.clients(20, SHORT);
    site.waiting(20);
    std::thread::sleep(MOMENT);
    assert!(site.stat("postgres-write", "pg1", "status").starts_with("UP"));
    println!("now HAProxy hears of it, and then of another primary");
    site.no_primary();
    std::thread::sleep(MOMENT);
    site.turn(1, true);
    all_reach('2', clients);
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_that_gives_up_leaves_nothing() {
    let site = Site::new("gives-up", &[]);
    site.no_primary();
    let sessions: Vec<_> =
        (0..50).map(|_| Site::client(site.writes, Duration::from_millis(1))).collect();
    site.waiting(50);
    drop(sessions);
    let gone = Instant::now();
    site.waiting(0);
    println!("forgotten after {:?}", gone.elapsed());
    assert!(gone.elapsed() < Duration::from_secs(3), "ten seconds is how long they might wait");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_full_room_refuses_and_blocks_nobody_else() {
    let site = Site::new("full", &[("gt 1000", "gt 80"), ("maxconn 3000", "maxconn 200")]);
    let others_work = || {
        let read = Site::client(site.reads, LONG).answer;
        assert!(matches!(read, Some('2' | '3')), "{read:?}");
        let mut page = TcpStream::connect(("127.0.0.1", site.page)).expect("HAProxy");
        page.set_read_timeout(Some(LONG)).expect("a socket");
        page.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("a request");
        let mut shown = String::new();
        page.read_to_string(&mut shown).expect("the statistics page");
        assert!(shown.contains("postgres-write"));
    };
    let connect = |_| TcpStream::connect(("127.0.0.1", site.writes));
    let refused = || {
        let began = Instant::now();
        for _ in 0..20 {
            // closed or reset, now or then
            let read = connect(0).and_then(|mut stream| {
                stream.set_read_timeout(Some(LONG))?;
                stream.read(&mut [0])
            });
            assert!(!matches!(read, Ok(1..)), "served");
        }
        assert!(began.elapsed() < Duration::from_secs(5), "at once");
    };
    println!("too many for the pool");
    let filled: Vec<_> = (0..250).flat_map(connect).collect();
    site.waiting(80);
    others_work();
    refused();
    drop(filled);
    site.waiting(0);

    println!("too many who wait");
    site.no_primary();
    let clients = site.clients(80, SHORT);
    site.waiting(80);
    refused();
    others_work();
    site.turn(0, true);
    assert!(answers(clients).iter().all(|session| session.answer == Some('1')));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn nobody_waits_where_neither_agents_nor_patroni_can_be_reached() {
    let site = Site::new("alone", &[]);
    let gone = |gone| site.nodes.iter().for_each(|node| Truth::set(&node.is.gone, gone));
    site.nodes.iter().for_each(|node| Truth::set(&node.is.silent, true));
    gone(true);
    for node in ["pg1", "pg2", "pg3"] {
        site.until("agents", node, "status", |status| status == "DOWN");
        site.until("reserve", node, "status", |status| status == "DOWN");
    }
    for port in [site.writes, site.reads] {
        let began = Instant::now();
        assert_eq!(Site::client(port, LONG).answer, None);
        assert!(began.elapsed() < 2 * MOMENT, "at once");
    }
    println!("Patroni is back, and then it has a primary");
    site.turn(0, false);
    gone(false);
    for node in ["pg1", "pg2", "pg3"] {
        site.until("reserve", node, "status", |status| status == "NOLB");
    }
    let clients = site.clients(5, SHORT);
    site.turn(1, true);
    assert!(answers(clients).iter().all(|session| session.answer == Some('2')));
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn those_who_waited_are_not_too_many_clients() {
    let site = Site::new("many", &[]);
    site.no_primary();
    // longer than a try takes, so that clients in HAProxy's queue wait for longer
    let clients = site.clients(300, MOMENT / 2);
    site.waiting(300);
    site.turn(1, true);
    let sessions = answers(clients);
    let refused = sessions.iter().filter(|session| session.answer != Some('2')).count();
    assert_eq!(refused, 0, "of 300");
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_client_waits_in_the_reserve_for_a_node_whose_agent_is_silent() {
    let site = Site::new("silent", &[]);
    Truth::set(&site.nodes[1].is.silent, true);
    site.until("agents", "pg2", "status", |status| status == "DOWN");
    site.no_primary();
    site.until("reserve", "pg1", "status", |status| status == "NOLB");
    let clients = site.clients(20, SHORT);
    site.until("reserve", "BACKEND", "scur", |waiting| waiting == "20");
    std::thread::sleep(MOMENT);
    site.turn(1, true);
    all_reach('2', clients);
}

#[test]
#[ignore = "needs HAProxy: tests/run"]
fn a_node_that_is_held_gets_nothing_new_until_the_hold_ends() {
    let site = Site::new("held", &[]);
    let mut old = Site::client(site.writes, LONG).stream;
    let is = &site.nodes[0].is;
    Truth::set(&is.held, true);
    site.until("postgres-write", "pg1", "status", |status| status.starts_with("DRAIN"));
    let sessions = || is.sessions.load(Ordering::SeqCst);
    let clients = site.clients(20, SHORT);
    site.waiting(21);
    let end = Instant::now() + 2 * MOMENT;
    while Instant::now() < end {
        assert_eq!(sessions(), 1, "the one from before");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(old.write_all(b"I am still here").is_ok());
    Truth::set(&is.held, false);
    assert!(answers(clients).iter().all(|session| session.answer == Some('1')));
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
        assert_eq!(session.answer, Some('1'));
        Truth::set(&site.nodes[0].is.held, true);
        site.until("postgres-write", "pg1", "status", |status| status.starts_with("DRAIN"));
        Truth::set(&site.nodes[0].is.silent, true);
        std::thread::sleep(MOMENT);
        Truth::set(&site.nodes[0].is.lock_lost, true);
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
