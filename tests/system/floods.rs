//! The access list, and floods with it and without it.

use crate::common::{self, FakePatroni};
use crate::node::{DEBIAN_13, LISTEN, Node, STRANGER, UNITS, check, connect_from, flood, on_both};
use std::io::{Read, Write};
use std::net::Ipv4Addr;

/// An access list that is copied while the socket listens. It has one client, and lacks the other.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn only_addresses_on_the_access_list_may_ask() {
    on_both("access-list", |name, root| {
        let machine = Node::boot(name, root);
        machine.allow_itself();
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        let accepted = "systemctl show -P NAccepted patroni-agent-check.socket";
        assert_eq!(machine.sh(accepted).trim(), "1", "{name}");
        // the packets of the flood are dropped, so no connection gets through
        machine.network(|| flood(500));
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        assert_eq!(machine.sh(accepted).trim(), "2", "{name}");
    });
}

/// 3,000 connections a second from 128 addresses of both families, and 2,000 peers that say nothing.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_flood_from_outside_the_access_list() {
    for units in [UNITS, LISTEN] {
        for (name, root) in [("flood-12", "/"), ("flood-13", DEBIAN_13)] {
            let machine = Node::with(units, name, root);
            machine.sh("ip route add local fd00:66::/64 dev lo");
            machine.allow_itself();
            let half = "--count 64 --rate 1500 --silent 1000 --seconds 3";
            let floods = [
                machine.start_flood(&format!("127.0.0.1 5555 --from 127.0.0.0/8 {half}")),
                machine.start_flood(&format!("::1 5555 --from fd00:66::/64 {half}")),
            ];
            let (asked, missed, _) = machine.check_during(floods.into());
            assert!(asked >= 10 && missed == 0, "{units} {name}: {missed} of {asked} missed");
        }
    }
}

/// Without an access list, two addresses keep as many silent connections open as they can: 43 a second would take 64 places
/// if each kept its place for all of `--timeout`.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn two_silent_strangers_cost_haproxy_no_check() {
    for (name, root) in [("silent-12", "/"), ("silent-13", DEBIAN_13)] {
        let machine = Node::boot(name, root);
        machine.put(&common::shipped(), "/usr/bin/patroni-agent-check");
        let silent = "127.0.0.1 5555 --from 127.0.0.0/8 --count 2 --rate 0 --silent 200 --pace 43 --seconds 5";
        let (asked, missed, _) = machine.check_during(vec![machine.start_flood(silent)]);
        assert!(asked >= 10 && missed == 0, "{name}: {missed} of {asked} missed");
    }
}

/// Four HAProxies with 18 pools each, and a stranger with as many connections as it can get, ask a Patroni that hangs. There
/// is still a place for another check, and no refused connection is logged.
#[test]
#[ignore = "needs root and systemd: tests/run"]
fn a_stranger_leaves_places_while_patroni_hangs() {
    on_both("hangs", |name, root| {
        let machine = Node::boot(name, root);
        let settings = "OPTIONS='--agent-send --timeout 10s --url http://127.0.0.1:8010'\n";
        machine.file("/etc/default/patroni-agent-check", settings);
        machine.network(|| {
            FakePatroni::on("127.0.0.1:8010", move |mut stream, _| {
                let _ = match common::read_request(&mut stream).starts_with("GET /primary ") {
                    true => stream.write_all(&common::http(200, common::PRIMARY)),
                    false => stream.read_exact(&mut [0]), // until the agent gives up
                };
            })
        });
        assert!(machine.network(|| check(5555)).starts_with("up ready"), "{name}");
        let lines = machine.journal_lines();
        let ask_from = |address| {
            let mut stream = connect_from(address)?;
            stream.write_all(b"replica\n").ok()?;
            Some(stream)
        };
        let reply = machine.network(|| {
            let haproxies = (1..=4).map(|number| Ipv4Addr::new(127, 0, 1, number));
            let asked: Vec<_> = haproxies.flat_map(|address| [address; 18]).map(ask_from).collect();
            let stranger: Vec<_> = (0..300).map(|_| ask_from(STRANGER)).collect();
            let reply = check(5555);
            drop((asked, stranger));
            reply
        });
        let places = machine.sh("systemctl show -P NConnections patroni-agent-check.socket");
        assert!(reply.starts_with("up ready"), "{name}: {reply:?}, {places}");
        assert_eq!(places.trim(), "104", "{name}: 4 times 18, and 32");
        assert_eq!(machine.journal_lines(), lines, "{name}");
    });
}
