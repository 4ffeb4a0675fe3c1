//! The mistakes of pools with the agent. They may lose the agent's answer or the state after a start or a reload, or
//! refuse clients while no server is UP.

use super::{
    Found, INTER, Site, agents_port, full, has_node, is_for_writes, is_same_node, seconds, time,
    twin,
};
use crate::haproxy::connection::LINE_LIMIT;
use crate::haproxy::question::HOLD;
use crate::patroni::check::Check;
use crate::pools::configuration::Line;
use crate::pools::pool::{self, AGENT, POSTGRESQL, Pool, Purpose, Server, Setting};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

/// The agent's default `--timeout`.
const AGENT_TIMEOUT: Duration = Duration::from_millis(1500);
/// The maximum `agent-inter` with which HAProxy asks the old primary before Patroni promotes the new one.
const WRITE_INTER: Duration = Duration::from_secs(1);
/// The maximum `agent-inter` of other pools.
const READ_INTER: Duration = Duration::from_secs(5);
/// The maximum `hard-stop-after`: Patroni's `ttl` - `loop_wait` - 2 s.
const HARD_STOP: Duration = Duration::from_secs(18);
/// The minimum wait that outlasts a switchover.
const WAIT: Duration = Duration::from_secs(5);
/// How many clients may wait in a pool of `haproxy.cfg`.
const ROOM: u32 = 1000;
/// HAProxy's maximum pause before it tries a server again.
const PAUSE: Duration = Duration::from_secs(1);

/// The health check that the agent of a server should answer: the administrator's own, if that asks for a role.
fn wanted<'a>(pool: &'a Pool, server: &'a Server) -> Option<&'a str> {
    let own = pool.own_question(server);
    let own = own.or_else(|| pool.nodes().find_map(|server| pool.own_question(server)));
    if own.is_some() && pool.wants_the_others() {
        return Some("replica");
    }
    let no_role = |asked: &str| pool::NO_ROLE.contains(&asked.split('?').next().unwrap_or(asked));
    own.filter(|asked| pool::is_known(asked) && !no_role(asked))
        .or_else(|| is_for_writes(pool).then_some("primary"))
}

pub(super) fn agent_missing(site: &Site, found: &mut Found) {
    let (port, with): (_, HashSet<_>) = (site.port(), site.with_agent().map(Pool::name).collect());
    for pool in site.of_postgresql().chain(site.tracked()) {
        let reserve = site.reserves.contains(pool.name());
        let inter = if reserve || may_write(pool) { "500ms" } else { "2s" };
        for server in
            pool.nodes().filter(|server| !server.has("agent-check") && !server.has("track"))
        {
            let mut words =
                ["agent-send", "agent-port", "agent-inter"].iter().filter(|word| server.has(word));
            let excepted = server.has("no-agent-check");
            let happens = match words.next() {
                Some(word) if !excepted => {
                    format!("{}: {word} without agent-check asks no agent", full(pool, server))
                }
                _ if with.contains(pool.name()) && !excepted => {
                    let own = |setting: &&Setting| setting.place == server.place;
                    let first = server.settings.get("disabled").filter(own).map_or("", |_| {
                        "; the agent's first answer ends \"disabled\": remove the server, or hold its node"
                    });
                    format!(
                        "{}: HAProxy asks no agent, so a healthy node that does not match is DOWN and not MAINT{first}",
                        full(pool, server)
                    )
                }
                _ => continue,
            };
            let mut write = vec!["agent-check".to_owned()];
            write.extend((!server.has("agent-port")).then(|| format!("agent-port {port}")));
            write.extend((!server.has("agent-inter")).then(|| format!("agent-inter {inter}")));
            let asked = if reserve { Some(HOLD) } else { wanted(pool, server) };
            let asked = asked.filter(|_| !server.has("agent-send"));
            write.extend(asked.map(|asked| format!("agent-send \"{asked}\\n\"")));
            // a server of the reserve takes clients while no agent answers
            let state = if reserve { "enabled" } else { "disabled" };
            write.extend((!server.has(state)).then(|| state.to_owned()));
            if asked.is_none() && !server.has("agent-send") {
                write.push("and agent-send \"primary\\n\" (for reads: \"replica\\n\")".to_owned());
            }
            let unknown = asked.filter(|asked| *asked != HOLD);
            let unknown = unknown.and_then(|asked| asked.parse::<Check>().err());
            write.extend(unknown.map(|error| {
                format!("(but the agent does not understand this health check: {error})")
            }));
            found.add(server.place, &happens, &format!("add {}", write.join(" ")));
        }
    }
}

/// Whether clients may write through this pool, as far as the configuration tells.
fn may_write(pool: &Pool) -> bool {
    let any = |server: &Server| {
        pool.question(server).is_some_and(|asked| asked.split('?').next() == Some("health"))
    };
    match pool.purpose() {
        Some(purpose) => purpose == Purpose::Write,
        None => is_for_writes(pool) || !pool.nodes().any(any),
    }
}

/// The servers of a pool that have an agent check.
fn asking<'p>(pool: &'p Pool) -> impl Iterator<Item = &'p Server> {
    pool.nodes().filter(|server| server.has("agent-check"))
}

pub(super) fn own_check_missing(site: &Site, found: &mut Found) {
    for pool in site.pools {
        found.lacking(
            pool,
            asking(pool),
            |server| !server.has("check"),
            "HAProxy itself checks nothing, so a server whose agent is silent keeps its state, and a dead primary stays UP",
            "check port 8008 inter 2s fall 3 rise 1",
        );
    }
}

/// The name of a health check that stands for all its aliases.
fn canonical(asked: &str) -> String {
    let (name, query) = asked.split_once('?').unwrap_or((asked, ""));
    let name = match name {
        "master" | "read-write" => "primary",
        "synchronous" => "sync",
        "asynchronous" => "async",
        "standby_leader" => "standby-leader",
        name => name,
    };
    format!("{name}?{query}")
}

pub(super) fn own_check_differs(site: &Site, found: &mut Found) {
    for pool in site.pools {
        for server in pool.nodes().filter(|server| server.has("agent-check") && server.has("check"))
        {
            let sent = server.agent_send().and_then(|sent| sent.split_whitespace().next());
            let (happens, write) = match (pool.own_question(server), sent) {
                _ if server.asks_hold() => continue,
                (None, sent) => {
                    let asked = sent
                        .map(|sent| sent.split('\\').next().unwrap_or_default())
                        .unwrap_or("primary");
                    ("HAProxy's own check does not ask Patroni, so a former primary whose agent is silent stays UP".to_owned(), asked)
                }
                (Some(own), Some(sent))
                    if sent.parse::<Check>().is_ok() && canonical(own) != canonical(sent) =>
                {
                    (format!("HAProxy's own check asks /{own} and the agent {sent}"), sent)
                }
                _ => continue,
            };
            let happens = format!("{}: {happens}", full(pool, server));
            found.add(
                server.place,
                &happens,
                &format!("let both ask the same, such as \"option httpchk OPTIONS /{write}\""),
            );
        }
    }
}

pub(super) fn agent_send(site: &Site, found: &mut Found) {
    for pool in site.pools {
        let with: Vec<_> = pool.nodes().filter(|server| server.has("agent-check")).collect();
        let asked = with.iter().filter(|server| server.agent_send().is_some()).count();
        let lacking = asked > 0 && asked < with.len();
        for server in with {
            let asked = wanted(pool, server).unwrap_or("primary");
            let write = format!("write agent-send \"{asked}\\n\"");
            let Some(sent) = server.agent_send() else {
                if lacking {
                    let happens = format!(
                        "{}: HAProxy sends this agent no question, and the others of the pool get one",
                        full(pool, server)
                    );
                    found.add(server.place, &happens, &write);
                }
                continue;
            };
            let words = sent.trim_end_matches("\\n").trim_end_matches('\n');
            let write = match words {
                words if understood(words).is_ok() => {
                    format!("write agent-send \"{words}\\n\", in double quotes")
                }
                _ => write,
            };
            let wrong = match () {
                () if sent.ends_with("\\n") => {
                    "\\n is no newline in single quotes, so the agent waits for the end of the line"
                        .to_owned()
                }
                () if !sent.ends_with('\n') => {
                    "the line has no \\n at its end, so the agent waits for the rest".to_owned()
                }
                () if words.len() > LINE_LIMIT => {
                    format!("the line has more than {LINE_LIMIT} bytes")
                }
                () => match understood(words) {
                    Ok(()) => continue,
                    Err(error) => format!("the agent does not understand it: {error}"),
                },
            };
            found.add(server.place, &format!("{}: {wrong}", full(pool, server)), &write);
        }
    }
}

/// Whether the agent understands this line: `CHECK [maint|drain|down]` or `hold`.
fn understood(words: &str) -> Result<(), String> {
    let mut words = words.split(' ');
    let check = words.next().unwrap_or_default();
    if check != HOLD {
        check.parse::<Check>()?;
    }
    match (words.next(), words.next()) {
        (None | Some("maint" | "drain" | "down"), None) => Ok(()),
        _ => Err("after the health check only maint, drain or down may stand".to_owned()),
    }
}

pub(super) fn agent_port(site: &Site, found: &mut Found) {
    two_nodes_with_one_agent(site, found);
    // A node is its address and Patroni's port: several Patronis on one machine each have their own agent.
    type Asked<'a> = Vec<(&'a Pool<'a>, &'a Server, u16)>;
    let mut nodes: BTreeMap<(&str, Option<u16>), Asked> = BTreeMap::new();
    for pool in site.pools {
        for server in pool.nodes().filter(|server| !server.has("agent-addr")) {
            if let Some(port) = agents_port(server) {
                let node = (server.agent_host(), pool.patroni_port(server));
                nodes.entry(node).or_default().push((pool, server, port));
            }
        }
    }
    for ((host, _), asked) in &nodes {
        let watched =
            site.watches.iter().flat_map(|watch| watch.servers.iter().map(move |s| (watch, s)));
        let watched: Vec<_> = watched.filter(|(_, server)| server.host == *host).collect();
        let is_watched = |port: u16| {
            watched.iter().any(|(watch, server)| watch.check_port(server) == Some(port))
        };
        let ports: BTreeSet<_> =
            watched.iter().map(|(watch, server)| watch.check_port(server)).collect();
        // All servers of a template have the same address.
        let alone =
            ports.len() == 1 && nodes.keys().filter(|(other, _)| other == host).count() == 1;
        let times = |port: u16| asked.iter().filter(|(_, _, asked)| *asked == port).count();
        let right = if times(AGENT) > 0 || (alone && is_watched(AGENT)) {
            AGENT
        } else {
            let ports = asked.iter().map(|(_, _, port)| *port);
            ports.max_by_key(|port| (is_watched(*port), times(*port))).unwrap_or(AGENT)
        };
        for (pool, server, port) in asked.iter().filter(|(_, _, port)| *port != right) {
            let who = if times(right) > 0 {
                "other pools ask"
            } else {
                "the backend that watches the agents asks"
            };
            let happens = format!(
                "{}: agent-port is {port}, but {who} it on {right}; an agent that is asked in vain changes nothing",
                full(pool, server)
            );
            let write = format!("write \"agent-port {right}\", or the same port everywhere");
            found.add(server.place, &happens, &write);
        }
        for (watch, server) in watched.iter().filter(|_| alone && !is_watched(right)) {
            let happens = format!(
                "{}: the pools ask this agent on port {right}, and this backend watches another port",
                full(watch, server)
            );
            let right = match server.get("port") {
                Some(_) => format!("\"port {right}\""),
                None => format!("{}:{right}", server.host),
            };
            let write = format!("write {right}, or the same port everywhere");
            found.add(server.place, &happens, &write);
        }
    }
}

/// An agent asks one Patroni, and a machine may have several.
fn two_nodes_with_one_agent(site: &Site, found: &mut Found) {
    let mut patronis = HashMap::new();
    for pool in site.pools {
        for server in pool.nodes().filter(|server| pool.own_question(server).is_some()) {
            let patroni = pool.patroni_port(server);
            let patroni = patroni.filter(|port| *port != 0 && !pool::is_postgresql_port(*port));
            let (Some(port), Some(patroni)) = (agents_port(server), patroni) else { continue };
            let agent = (server.agent_host(), port);
            let (first, asked) = *patronis.entry(agent).or_insert((pool.name(), patroni));
            if asked != patroni {
                let happens = format!(
                    "{}: HAProxy asks Patroni on port {patroni} here and on {asked} in {first}, but one agent answers for both",
                    full(pool, server)
                );
                let write = "write the same port or, if these are two nodes, give each an agent with a port of its own";
                found.add(server.place, &happens, write);
            }
        }
    }
}

pub(super) fn agent_inter(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
        let writes = may_write(pool);
        let (longest, write) = if writes { (WRITE_INTER, "500ms") } else { (READ_INTER, "2s") };
        let harm = if writes { ", so after a switchover two servers may be UP" } else { "" };
        let words = format!("agent-inter {write}");
        if longest < INTER {
            let happens = format!("HAProxy asks the agents only every {}{harm}", seconds(INTER));
            let lacks = |server: &Server| !server.has("agent-inter");
            found.lacking(pool, asking(pool), lacks, &happens, &words);
        }
        for server in asking(pool) {
            let Some(inter) = time(server, "agent-inter").filter(|inter| *inter > longest) else {
                continue;
            };
            let happens = format!("HAProxy asks the agent only every {}{harm}", seconds(inter));
            let happens = format!("{}: {happens}", full(pool, server));
            found.add(server.place, &happens, &format!("write \"{words}\""));
        }
    }
}

pub(super) fn not_disabled(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
        found.lacking(
            pool,
            asking(pool),
            |server| !server.has("disabled"),
            "at a start a server is UP and gets clients until its agent has answered",
            "disabled",
        );
    }
}

pub(super) fn state_file(site: &Site, found: &mut Found) {
    let Some(place) = site.global_place() else { return };
    let asks = site.with_agent().next().is_some();
    let has = |words: &[&str]| site.configuration.global().any(|line| line.begins(words));
    let loads = |pool: &Pool| {
        let load = pool.last(&["load-server-state-from-file"]);
        load.is_some_and(|line| line.word(1) == "global")
    };
    if (asks || site.asking().any(loads)) && !has(&["server-state-file"]) {
        let happens = match asks {
            true => {
                "a reload forgets the states of the servers, and clients are refused until the agents have answered"
            }
            false => {
                "a reload forgets the states of the servers, and standbys take clients until a check has failed"
            }
        };
        found.add(place, happens, "write \"server-state-file /run/haproxy-state/servers\" in global and let a drop-in save them");
    }
    let is_file = |socket: &str| socket.starts_with('/') || socket.contains("${");
    if asks && !site.configuration.stats_sockets().any(is_file) {
        let happens = "HAProxy cannot be asked for the states of its servers, neither by status nor before a reload";
        found.add(
            place,
            happens,
            "write \"stats socket /run/haproxy/admin.sock mode 660 level admin\" in global",
        );
    }
    for pool in site.with_agent() {
        let load = pool.last(&["load-server-state-from-file"]);
        if !load.is_some_and(|line| matches!(line.word(1), "global" | "local")) {
            let happens = format!(
                "{}: after a reload it does not take over the states that were saved",
                pool.name()
            );
            found.add(
                load.map_or(pool.section.place, |line| line.place),
                &happens,
                "write \"load-server-state-from-file global\" in defaults",
            );
        }
    }
}

pub(super) fn old_process(site: &Site, found: &mut Found) {
    let Some(place) = site.global_place().filter(|_| site.with_agent().next().is_some()) else {
        return;
    };
    let line = site.configuration.global().rfind(|line| line.word(0) == "hard-stop-after");
    let time = line.and_then(|line| pool::duration(line.word(1)));
    let happens = "after a reload, the sessions of the old process go on, unchecked, and may write to a former primary";
    match (line, time) {
        (Some(line), Some(Duration::ZERO)) => {
            found.add(line.place, happens, "write \"hard-stop-after 15s\"");
        }
        (Some(line), Some(time)) if time < Duration::from_secs(1) => {
            let happens = format!("each reload cuts all sessions after {}", seconds(time));
            found.add(line.place, &happens, "write \"hard-stop-after 15s\"");
        }
        (Some(line), Some(time)) if time > HARD_STOP => {
            found.add(
                line.place,
                &format!("{happens} for {}", seconds(time)),
                "write \"hard-stop-after 15s\"",
            );
        }
        (Some(_), _) => {}
        (None, _) => found.add(place, happens, "write \"hard-stop-after 15s\" in global"),
    }
}

pub(super) fn late_answer(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
        let limit = pool.timeout("check");
        let inter = pool.nodes().map(|server| time(server, "agent-inter").unwrap_or(INTER)).min();
        let (time, place) = match limit {
            Some((time, line)) => (Some(time), line.place),
            None if pool.has_agents() => (inter, pool.section.place),
            // Another rule tells the administrator to write this agent-inter.
            None => (may_write(pool).then_some(Duration::from_millis(500)), pool.section.place),
        };
        if let Some(time) = time.filter(|time| *time <= AGENT_TIMEOUT) {
            let happens = format!(
                "{}: HAProxy ignores an answer that takes longer than {}, and the agent may take 1.5 s",
                pool.name(),
                seconds(time)
            );
            found.add(place, &happens, "write \"timeout check 2s\"");
        }
    }
}

pub(super) fn waiting_room(site: &Site, found: &mut Found) {
    let lines = site.configuration.sections.iter().flat_map(|section| &section.lines);
    let counts = |line: &&Line| line.words.iter().any(|word| word.starts_with("nbsrv("));
    let counting: Vec<_> = lines.filter(counts).collect();
    for pool in site.with_rooms() {
        let (name, place) = (pool.name(), pool.section.place);
        if pool.waiting_rooms() == 0 {
            let happens = format!(
                "{name}: clients are refused at once while no server is UP, as in each switchover"
            );
            found.add(place, &happens, "write \"tcp-request content set-dst-port int(0)\" and \"server waiting-room 127.0.0.1 backup no-check no-agent-check enabled maxconn 0\" behind its servers, with \"retries 50\", \"timeout connect 200ms\" and \"option redispatch 1\"");
            continue;
        }
        let rooms = pool.servers.iter().filter(|server| server.is_waiting_room());
        for server in rooms.filter(|server| server.has("disabled")) {
            let happens =
                format!("{}: it is in MAINT, so no client waits there", full(pool, server));
            found.add(server.place, &happens, "add \"enabled\"");
        }
        let none = [format!("nbsrv({name}) eq 0 "), format!("nbsrv({name}) lt 1 ")];
        for line in &counting {
            let words = line.from(0) + " ";
            if none.iter().any(|none| words.contains(none)) {
                let happens = format!("{name}: its waiting room is always UP, so this never holds");
                let write = "ask srv_is_up of each of its servers, or leave the waiting room out";
                found.add(line.place, &happens, write);
            }
        }
        if pool.purpose() == Some(Purpose::Write) && pool.option("allbackups").is_some() {
            for server in pool.nodes().filter(|server| server.has("backup")) {
                let happens = "while it is the primary, clients share it with the waiting rooms";
                let happens = format!("{}: {happens}", full(pool, server));
                found.add(server.place, &happens, "remove \"backup\"");
            }
        }
        let no_port =
            pool.servers.iter().any(|server| server.is_waiting_room() && server.port.is_none());
        let port = site
            .entrance_lines(pool)
            .into_iter()
            .chain(pool.lines.iter().copied())
            .any(|line| line.from(0).contains("set-dst-port int(0)"));
        if no_port && !port {
            let happens = format!(
                "{name}: its waiting room has the port on which clients come in, so they are sent to HAProxy itself"
            );
            found.add(place, &happens, "write \"tcp-request content set-dst-port int(0)\"");
        }
        let connect = pool.timeout("connect");
        let retries = pool.last(&["retries"]);
        let tries: u32 = retries.and_then(|line| line.word(1).parse().ok()).unwrap_or(3);
        let pause = connect.map_or(PAUSE, |(time, _)| time.min(PAUSE));
        if pause.saturating_mul(tries) < WAIT {
            let happens = format!(
                "{name}: clients wait only {} for a server, less than a switchover takes",
                seconds(pause.saturating_mul(tries))
            );
            found.add(
                retries.map_or(place, |line| line.place),
                &happens,
                "write \"retries 50\" and \"timeout connect 200ms\"",
            );
        }
        if let Some((time, line)) = connect.filter(|(time, _)| *time > PAUSE) {
            let happens = format!(
                "{name}: a server that does not answer holds a client for {}, and those who wait try again only once a second",
                seconds(time)
            );
            found.add(line.place, &happens, "write \"timeout connect 200ms\" and \"retries 50\"");
        }
        let redispatch = pool.option("redispatch");
        if redispatch.is_none_or(|line| line.word(2) != "1") {
            let happens =
                format!("{name}: a client that waits is not given the server that is UP by then");
            found.add(
                redispatch.map_or(place, |line| line.place),
                &happens,
                "write \"option redispatch 1\"",
            );
        }
    }
}

pub(super) fn crowd(site: &Site, found: &mut Found) {
    let mut most = 0;
    for pool in site.with_rooms() {
        let (name, place) = (pool.name(), pool.section.place);
        let entrance = site.entrance_lines(pool);
        found.lacking(
            pool,
            pool.nodes(),
            |server| server.get("maxconn").is_none_or(|limit| limit == "0"),
            "those who waited come all at once, and PostgreSQL refuses what is above its max_connections (write those, less what does not come through HAProxy, divided by the number of HAProxies)",
            "maxconn 90",
        );
        let mut lacks = |is: bool, place, happens: &str, write: &str| {
            if !is {
                found.add(place, &format!("{name}: {happens}"), write);
            }
        };
        let limits: Vec<_> =
            entrance.iter().filter_map(|line| clients_let_in(&entrance, line)).collect();
        lacks(
            !limits.is_empty() || entrance.is_empty(),
            site.entrance(pool).place,
            "a waiting room without a limit takes the connections of all other pools",
            "write \"tcp-request connection reject if { fe_conn gt 1000 }\"",
        );
        lacks(
            pool.timeout("queue").is_some(),
            place,
            "without \"timeout queue\" those who wait for a session wait only as long as \"timeout connect\" says",
            "write \"timeout queue 10s\"",
        );
        lacks(
            pool.option("abortonclose").is_some(),
            place,
            "a client that gave up while it waited still takes a session",
            "write \"option abortonclose\"",
        );
        most = limits.into_iter().min().unwrap_or(ROOM).max(most);
    }
    let notices = |line: &Line| line.begins(&["tune.pt.zero-copy-forwarding", "off"]);
    let waits = site.with_rooms().next().is_some() && site.haproxy >= Some(vec![2, 9]);
    let lacks = waits && !site.configuration.global().any(notices);
    if let Some(place) = site.global_place().filter(|_| lacks) {
        found.add(
            place,
            "since 2.9, HAProxy does not notice that a client that has sent something gave up while it waited",
            "write \"tune.pt.zero-copy-forwarding off\"",
        );
    }
    let all = site.configuration.global().rfind(|line| line.begins(&["maxconn"]));
    let all = all.and_then(|line| Some((line.place, line.word(1).parse::<u32>().ok()?)));
    if let Some((place, all)) = all.filter(|(_, all)| *all <= most) {
        let happens = format!("{most} clients that wait take all {all} connections");
        let write = format!(
            "write \"maxconn {}\" here, or a smaller fe_conn where they wait",
            most.saturating_mul(3)
        );
        found.add(place, &happens, &write);
    }
}

/// How many clients a line of a frontend lets in, if it limits them; [`ROOM`] if the number is not in the line.
fn clients_let_in(lines: &[&Line], line: &Line) -> Option<u32> {
    let number = |text: &str| text.split(' ').find_map(|word| word.parse().ok()).unwrap_or(ROOM);
    match (line.word(0), line.word(2)) {
        ("maxconn", _) => Some(number(line.word(1))),
        ("tcp-request", "reject") => {
            Some(number(pool::condition(lines, line).split_once("fe_conn")?.1))
        }
        _ => None,
    }
}

pub(super) fn gone_machine(site: &Site, found: &mut Found) {
    for pool in site.serving() {
        let option = ["srvtcpka", "tcpka"].iter().any(|option| pool.option(option).is_some());
        if !option {
            let happens =
                format!("{}: sessions to a machine that is gone without a word hang", pool.name());
            found.add(
                pool.section.place,
                &happens,
                "write \"option srvtcpka\", \"srvtcpka-idle 5s\" and \"srvtcpka-intvl 1s\"",
            );
        }
    }
}

pub(super) fn agents_watched(site: &Site, found: &mut Found) {
    let Some(first) = site.with_agent().next() else { return };
    let port = site.port();
    if site.watches.is_empty() {
        let defaults = first.section.defaults.map(|at| &site.configuration.sections[at]);
        let defaults = defaults.map(|section| site.configuration.lines(section));
        let usual = pool::usual_settings(&defaults.unwrap_or_default());
        let own = if usual.contains_key("port") { format!(" port {port}") } else { String::new() };
        let tls = if usual.contains_key("check-ssl") { " no-check-ssl" } else { "" };
        let write = format!(
            "write a backend \"agents\" with these lines: option tcp-check / tcp-check send \"primary\\n\" / tcp-check expect rstring \"^(up|down|fail|stopped|!)\" / default-server check{own}{tls} fall 2 rise 1 no-agent-check enabled / {}",
            watched_nodes(site).0.join(" / ")
        );
        let happens =
            "nothing shows that an agent is silent, and neither an alert nor a reserve can tell";
        return found.add(first.section.place, happens, &write);
    }
    for watch in &site.watches {
        if watch.check.expects.is_empty() {
            let happens = "any program that listens there is taken for an agent that answers";
            let happens = format!("{}: {happens}", watch.name());
            let write = "write tcp-check expect rstring \"^(up|down|fail|stopped|!)\"";
            found.add(watch.section.place, &happens, write);
        }
        found.lacking(
            watch,
            watch.servers.iter(),
            |server| !server.has("check"),
            "it is not checked, so a silent agent is not noticed",
            "check",
        );
        for server in &watch.servers {
            if server.has("disabled") {
                let happens = "it stays in MAINT, so its agent counts as silent for ever";
                let happens = format!("{}: {happens}", full(watch, server));
                found.add(server.place, &happens, "add \"enabled\"");
            }
            if server.has("agent-check") {
                let happens = "the agent's answer, and not whether there is one, makes it UP";
                let happens = format!("{}: {happens}", full(watch, server));
                found.add(server.place, &happens, "add \"no-agent-check\"");
            }
        }
        let cut = |question: &&pool::Question| {
            question.line.as_deref().is_some_and(|line| !line.ends_with('\n'))
        };
        if let Some(question) = watch.check.questions.iter().find(cut) {
            let sent = question.line.as_deref().unwrap_or_default().trim_end_matches("\\n");
            let happens = "the line has no newline at its end, so the agents wait for the rest";
            let place = watch.check.place.unwrap_or(watch.section.place);
            let write = format!("write tcp-check send \"{sent}\\n\", in double quotes");
            found.add(place, &format!("{}: {happens}", watch.name()), &write);
        }
    }
    let mut said = HashSet::new();
    for pool in site.with_agent() {
        for server in pool.nodes().filter(|server| server.has("agent-check")) {
            let watched = site.watches.iter().any(|watch| has_node(watch, server));
            if !watched && said.insert(&server.host) {
                let watch = site.watch(pool).map_or("agents", |watch| watch.name());
                let line = asked_there(pool, server, port, &server.name);
                let write = format!("write \"{line}\" in {watch}");
                let happens = "nothing shows that its agent is silent";
                found.add(server.place, &format!("{}: {happens}", full(pool, server)), &write);
            }
        }
    }
}

/// The lines for all nodes in a pool that watches their agents, and the number of servers that these lines make.
fn watched_nodes(site: &Site) -> (Vec<String>, usize) {
    let (mut lines, mut count, usual) = (Vec::new(), 0, site.port());
    let (mut agents, mut turns) = (HashSet::new(), HashMap::new());
    let mut names = HashMap::<_, Vec<&Server>>::new();
    for pool in site.with_agent() {
        for server in pool.nodes() {
            // All servers of a template have one line and one address.
            let turn = turns.entry(server.place).and_modify(|turn| *turn += 1).or_insert(0);
            let port = agents_port(server).unwrap_or(usual);
            let same = names.entry(&*server.name).or_default();
            let known = same.iter().any(|other| !server.template && is_same_node(other, server));
            if !agents.insert((server.agent_host(), port, *turn)) || known {
                continue;
            }
            let name = match same.is_empty() {
                true => server.name.clone(),
                false => format!("{}-{}", pool.name(), server.name),
            };
            same.push(server);
            count += 1;
            let line = asked_there(pool, server, port, &name);
            if lines.last() != Some(&line) {
                lines.push(line);
            }
        }
    }
    (lines, count)
}

/// The line for a server in the pool that watches the agents.
fn asked_there(pool: &Pool, server: &Server, port: u16, name: &str) -> String {
    let line = pool.lines.iter().find(|line| line.place == server.place);
    let name = match line.filter(|_| server.template) {
        Some(line) => format!("server-template {} {}", line.word(1), line.word(2)),
        None => format!("server {name}"),
    };
    // Such a DNS name yields the ports of the pool's servers, not the agents' ports.
    let sign = if server.host.starts_with('_') { " port " } else { ":" };
    let words = ["resolvers", "resolve-prefer", "init-addr"].into_iter();
    let words = words.filter_map(|word| Some(format!(" {word} {}", server.get(word)?)));
    let host = server.agent_host();
    format!("{name} {host}{sign}{port}{}", words.collect::<String>())
}

pub(super) fn nobody_reached(site: &Site, found: &mut Found) {
    // Without a pool for writes, no reserve tells whether HAProxy reaches a node whose agent is silent.
    if !site.with_rooms().any(may_write) {
        return;
    }
    for pool in site.with_rooms() {
        let watch = site.watch(pool).map_or("agents", |watch| watch.name());
        let (name, asked) = (pool.name(), format!("nbsrv({watch})"));
        let lines = site.entrance_lines(pool);
        let reject = lines
            .iter()
            .filter(|line| line.begins(&["tcp-request", "connection", "reject"]))
            .map(|line| (line, pool::condition(&lines, line)))
            .find(|(_, said)| said.contains(&asked));
        let reached = "with an acl \"reached\" of srv_is_up for each server of the reserve";
        match reject {
            None => {
                let happens = "if HAProxy reaches no agent and no Patroni, clients wait for nothing and do not go on to the other HAProxy";
                let write = format!(
                    "write \"tcp-request connection reject if {{ {asked} eq 0 }} !reached\", {reached}"
                );
                found.add(site.entrance(pool).place, &format!("{name}: {happens}"), &write);
            }
            Some((line, _)) if !line.words.iter().any(|word| word.starts_with('!')) => {
                let happens = "if only the agents are silent, clients are refused although the reserve has the primary";
                let write = format!("add \"!reached\", {reached}");
                found.add(line.place, &format!("{name}: {happens}"), &write);
            }
            Some((line, said)) => {
                let asks = |node: &str| said.contains(&format!("srv_is_up({node})"));
                let names =
                    |pool: &Pool| pool.nodes().map(|node| full(pool, node)).collect::<Vec<_>>();
                let nodes =
                    site.pools.iter().map(names).find(|names| names.iter().any(|name| asks(name)));
                for node in nodes.iter().flatten().filter(|node| !asks(node)) {
                    let happens = format!("if HAProxy reaches only {node}, it refuses clients");
                    let write = format!("ask \"srv_is_up({node})\" in the same acl, too");
                    found.add(line.place, &format!("{name}: {happens}"), &write);
                }
            }
        }
    }
}

pub(super) fn reserve(site: &Site, found: &mut Found) {
    let nodes = if site.watches.is_empty() { watched_nodes(site).1 } else { 0 };
    let pools = || site.serving().filter(|pool| may_write(pool));
    let several = pools().count() > 1;
    for pool in pools() {
        let name = pool.name();
        let lines = site.entrance_lines(pool);
        let leads = |line: &&&Line| {
            let other = line.word(1);
            line.word(0) == "use_backend" && other != name && site.reserves.contains(other)
        };
        let line = lines.iter().find(leads);
        let reserve =
            line.and_then(|line| site.pools.iter().find(|pool| pool.name() == line.word(1)));
        let (Some(line), Some(reserve)) = (line, reserve) else {
            reserve_missing(site, pool, several, nodes, found);
            continue;
        };
        conditions_of_reserve(site, pool, reserve, line, found);
        let strange = reserve.nodes().find(|server| !has_node(pool, server));
        if let Some(server) = strange {
            let happens = format!(
                "{name}: it has no {}, so its clients may reach the primary of another cluster there",
                full(reserve, server)
            );
            found.add(line.place, &happens, &format!("write a reserve with the nodes of {name}"));
        }
        for (server, there) in pool.nodes().filter_map(|one| Some((one, twin(reserve, one)?))) {
            compare_with_reserve((pool, server), (reserve, there), found);
        }
        for server in reserve.nodes() {
            if server.has("disabled") {
                let happens = "while its agent is silent, it stays in MAINT, and nobody reaches it";
                let happens = format!("{}: {happens}", full(reserve, server));
                found.add(server.place, &happens, "write \"enabled\"");
            }
            if !server.asks_hold() {
                let happens = "a node that an operator has taken out gets writes here";
                let write = "add agent-check agent-send \"hold\\n\"";
                found.add(server.place, &format!("{}: {happens}", full(reserve, server)), write);
            }
        }
        check_of_reserve(reserve, found);
        if pool.waiting_rooms() > 0 && reserve.waiting_rooms() == 0 {
            let happens = "a client that is sent here is refused when the primary is not there yet";
            let happens = format!("{}: {happens}", reserve.name());
            found.add(reserve.section.place, &happens, "write the waiting room here as well");
        }
        let missing = pool.nodes().filter(|server| !has_node(reserve, server));
        for server in missing.filter(|_| strange.is_none()) {
            let happens = format!("{}: it is not in {}", full(pool, server), reserve.name());
            let port = server.port.unwrap_or(POSTGRESQL);
            let write = format!("write \"server {} {}:{port}\" there", server.name, server.host);
            found.add(server.place, &happens, &write);
        }
    }
}

/// Reports a check of the reserve that no node passes.
fn check_of_reserve(reserve: &Pool, found: &mut Found) {
    let body = |line: &&Line| line.words.iter().any(|word| matches!(&**word, "string" | "rstring"));
    let Some(expect) = reserve.check.expects.iter().find(body) else { return };
    let name = reserve.name();
    if reserve.check.option == "httpchk" && reserve.check.method != "GET" {
        let happens = format!(
            "{name}: Patroni's answer to anything but GET has no body, so each server is DOWN"
        );
        let place = reserve.check.place.unwrap_or(expect.place);
        found.add(place, &happens, "write \"http-check send meth GET uri /primary\"");
    }
    let broken = |line: &&Line| {
        line.from(0).contains("crashed") && !line.words.iter().any(|word| word == "!")
    };
    if let Some(line) = reserve.check.expects.iter().find(broken) {
        let happens =
            format!("{name}: only a node that has crashed passes, so every other node is DOWN");
        found.add(line.place, &happens, "write \"!\" before rstring");
    }
}

/// Reports a pool without a reserve. `several` pools need reserves of different names; `nodes` is the number of all agents if
/// no pool watches them yet.
fn reserve_missing(site: &Site, pool: &Pool, several: bool, nodes: usize, found: &mut Found) {
    let (name, front) = (pool.name(), site.entrance(pool));
    let watch = site.watch(pool).map_or("agents", |watch| watch.name());
    let agents = site.watch(pool).map_or(nodes, |watch| watch.servers.len());
    let fits = |other: &&Pool| {
        site.reserves.contains(other.name())
            && other.nodes().all(|server| has_node(pool, server))
            && pool.nodes().all(|server| has_node(other, server))
    };
    let taken = several || site.reserves.contains("reserve");
    let example = "write the backend \"reserve\" of the example haproxy.cfg";
    let (reserve, backend) = match site.pools.iter().find(fits) {
        Some(other) => (other.name().to_owned(), "write".to_owned()),
        None if !taken => ("reserve".to_owned(), format!("{example} with these servers,")),
        None => (
            format!("reserve-{name}"),
            format!("{example} as \"reserve-{name}\" with these servers,"),
        ),
    };
    let there = match front.name == name {
        true => ", \"option allbackups\" and".to_owned(),
        false => format!(" and \"option allbackups\", and in {}", front.name),
    };
    let write = format!(
        "{backend} in {name} two waiting rooms{there} \"use_backend {reserve} if {{ nbsrv({name}) eq 2 }} {{ nbsrv({watch}) lt {agents} }} {{ nbsrv({reserve}) eq 1 }}\""
    );
    let happens = "if a standby whose agent is silent is promoted, no server takes writes until somebody acts";
    found.add(pool.section.place, &format!("{name}: {happens}"), &write);
}

/// Compares a server with the same node in the reserve: clients and the check must reach the same PostgreSQL and Patroni.
fn compare_with_reserve(
    (pool, server): (&Pool, &Server),
    (reserve, there): (&Pool, &Server),
    found: &mut Found,
) {
    let asks = reserve.meant_question(there);
    // A rule "connect" says itself whether it uses TLS.
    let plain = pool.check.ports.is_empty() && reserve.check.ports.is_empty();
    let tls = plain && server.has("check-ssl") != there.has("check-ssl");
    let ports = server.port.zip(there.port).filter(|(one, other)| one != other);
    let (happens, write) = match ports {
        Some((one, other)) => (
            format!("clients reach port {other} here and {one} in {}", pool.name()),
            "write the same port, or a reserve for this pool alone",
        ),
        None if !asks.is_some_and(|asked| pool::asks_for(asked) == Some(Purpose::Write)) => (
            "HAProxy does not ask Patroni here who holds the leader lock".to_owned(),
            "let its check ask /primary",
        ),
        None if pool.own_question(server).is_some()
            && (tls || pool.patroni_port(server) != reserve.patroni_port(there)) =>
        {
            (
                format!("HAProxy asks another Patroni here than in {}", pool.name()),
                "let both have the same port and check-ssl",
            )
        }
        None => return,
    };
    found.add(there.place, &format!("{}: {happens}", full(reserve, there)), write);
}

/// Checks the conditions of the reserve: no server takes clients, an agent is silent, and there is exactly one primary.
fn conditions_of_reserve(site: &Site, pool: &Pool, reserve: &Pool, line: &Line, found: &mut Found) {
    let (name, rooms) = (pool.name(), pool.waiting_rooms());
    // nbsrv counts waiting rooms only while no server is UP, and without allbackups only the first waiting room.
    let all = pool.option("allbackups").is_some();
    let count = if rooms == 0 { 0 } else { rooms.max(2) };
    let mut wanted = vec![
        (
            format!("nbsrv({name}) eq {count}"),
            "it is not known that no server takes clients, so the reserve takes them too early or never",
        ),
        (
            format!("nbsrv({}) eq 1", reserve.name()),
            "the reserve is used although it has no primary, or two",
        ),
    ];
    if let Some(watch) = site.watch(pool) {
        wanted.push((
            format!("nbsrv({}) lt {}", watch.name(), watch.servers.len()),
            "the reserve is used although all agents answer, or not although one is silent",
        ));
    }
    let said = pool::condition(&site.entrance_lines(pool), line);
    let opposite =
        |word: &String| matches!(word.as_str(), "unless" | "or" | "||") || word.starts_with('!');
    if line.words.iter().any(opposite) {
        let happens = "its condition holds at other times than when all three parts hold";
        let write = "write the three parts behind \"if\", and nothing else";
        found.add(line.place, &format!("{name}: {happens}"), write);
    }
    for (wanted, happens) in wanted {
        // "lt 3" must not match "lt 30".
        if !format!("{said} ").contains(&format!("{wanted} ")) {
            let write = format!("write the condition {{ {wanted} }}");
            found.add(line.place, &format!("{name}: {happens}"), &write);
        }
    }
    if rooms == 1 || (rooms > 1 && !all) {
        let (happens, write) = if rooms < 2 {
            ("one waiting room counts", "write a second waiting room and \"option allbackups\"")
        } else {
            ("only the first waiting room counts", "write \"option allbackups\"")
        };
        let happens = format!(
            "{name}: {happens} as much as one server that is UP, so the reserve takes clients from a healthy primary"
        );
        found.add(pool.section.place, &happens, write);
    }
}
