//! The mistakes of any pool in front of PostgreSQL, with the agent or without. Knows what HAProxy's own check must ask,
//! and what PostgreSQL's sessions need.

use super::{
    Found, Site, full, is_for_writes, named, named_for_writes, noticed, noticed_promotion,
    role_line, seconds,
};
use crate::pools::configuration::{Line, Place, Section};
use crate::pools::pool::{self, POOLER, Pool, Purpose, Server, Setting};
use std::collections::HashSet;
use std::time::Duration;

/// The maximum time for which HAProxy may keep a dead primary UP: less than Patroni needs to promote another node
/// (`ttl` - `loop_wait`).
const NOTICED: Duration = Duration::from_secs(15);
/// The maximum `timeout check` with which `fall 3` stays within that time.
const TIMEOUT_CHECK: Duration = Duration::from_secs(5);
/// Whoever writes a smaller number without a unit means seconds.
const SHORTEST: u64 = 50;
/// Sessions are often idle, or run a query, for longer than this.
const SESSION: Duration = Duration::from_secs(300);

pub(super) fn sessions_kept(site: &Site, found: &mut Found) {
    for pool in site.of_postgresql().filter(|pool| is_for_writes(pool)) {
        let checked = |server: &&Server| {
            ["check", "agent-check", "track"].iter().any(|word| server.has(word))
        };
        found.lacking(
            pool,
            pool.nodes().filter(checked),
            |server| server.get("on-marked-down") != Some("shutdown-sessions"),
            "sessions to a former primary go on, and it takes their writes if its Patroni hangs",
            "on-marked-down shutdown-sessions",
        );
    }
}

/// The addresses and ports of the nodes whose Patroni any pool asks.
fn known_nodes<'s>(site: &'s Site) -> HashSet<(&'s str, Option<u16>)> {
    let asked = |pool: &'s Pool| pool.nodes().filter(|server| pool.question(server).is_some());
    site.asking().flat_map(asked).map(|server| (server.host.as_str(), server.port)).collect()
}

pub(super) fn no_lock(site: &Site, found: &mut Found) {
    let hosts = known_nodes(site);
    let only_reads = site.of_postgresql().all(|pool| named(pool) == Some(false));
    let anybodys = hosts.is_empty() && !only_reads;
    for pool in site.pools {
        if let Some(asked) = pool.nodes().find_map(|server| pool.own_question(server)) {
            if role_line(pool).is_none() {
                no_lock_asked(site, pool, asked, found);
            }
            continue;
        }
        // The configuration does not tell what an external program asks.
        let program = pool.check.option == "external-check";
        if pool.asks_patroni() || pool.nodes().count() < 2 || program {
            continue;
        }
        let question = question_for(pool);
        let http = pool.check.option == "httpchk";
        for server in pool.nodes().filter(|server| server.has("check")) {
            let port = server.port.unwrap_or(0);
            // Nor does the configuration tell what another program on the node answers.
            if http && !pool.check.questions.is_empty() && pool.patroni_port(server) != server.port
            {
                continue;
            }
            // A PgBouncer on another machine may lead to another HAProxy, and a pool of standbys alone needs no
            // Patroni.
            let known = hosts.contains(&(&*server.host, server.port))
                || (pool::is_postgresql_port(port)
                    && hosts.iter().any(|(host, _)| *host == server.host))
                || (port != POOLER
                    && pool::is_postgresql_port(port)
                    && (anybodys || named_for_writes(pool)));
            if known && http && pool.check.questions.is_empty() {
                let happens = "its own http-check lines drop the request of its defaults, so HAProxy asks nothing and each server is DOWN";
                let happens = format!("{}: {happens}", pool.name());
                found.add(pool.section.place, &happens, &format!("write {question} here as well"));
                break;
            }
            if known && !is_web(pool) {
                let with = match &*pool.check.option {
                    "" => "a TCP check".to_owned(),
                    option => format!("option {option}"),
                };
                // A check that looks at an answer may refuse standbys.
                let who = match pool.check.expects.is_empty() {
                    true => "any node that listens is UP, a standby or a former primary as well",
                    false => "a former primary is UP as well",
                };
                let happens =
                    format!("{}: {with} does not ask Patroni, so {who}", full(pool, server));
                let right = pool.check_port(server).filter(|port| !pool::is_postgresql_port(*port));
                let port = match right {
                    Some(_) => String::new(),
                    None => format!(" and \"check port {}\"", site.patronis_port(server)),
                };
                let write = format!("write {question}{port}");
                found.add(server.place, &happens, &write);
            }
        }
    }
}

/// Reports a pool that asks Patroni for the wrong role, or does not look at the answer.
fn no_lock_asked(site: &Site, pool: &Pool, asked: &str, found: &mut Found) {
    let (name, writes) = (pool.name(), named_for_writes(pool));
    let any_node =
        pool.has_agents() && (!asks_for_standbys(asked) || site.reserves.contains(pool.name()));
    // A standby cluster has no leader lock for writes.
    let lock = pool::asks_for(asked) == Some(Purpose::Write) || asked.starts_with("standby");
    let mut place = pool.check.place.unwrap_or(pool.section.place);
    let mut write = format!("write {}", question_for(pool));
    let happens = if !pool::is_known(asked) {
        format!("Patroni knows no /{asked} and answers 503, so no server is UP")
    } else if lock && pool.takes(200) && pool.takes(503) {
        place = pool.check.expects.first().map_or(place, |line| line.place);
        let line = match &*pool.check.option {
            "tcp-check" => "tcp-check expect rstring \"^HTTP/1.. 200\"",
            _ => "http-check expect status 200",
        };
        write = format!("write {line}");
        format!("the status of /{asked} does not count, so a standby or a former primary is UP")
    // A pool for any node may ask for any node.
    } else if writes && !lock && !any_node {
        format!("/{asked} asks for no leader lock, so a standby or a former primary is UP")
    } else {
        return;
    };
    found.add(place, &format!("{name}: {happens}"), &write);
}

/// Whether a primary never passes a health check.
fn asks_for_standbys(asked: &str) -> bool {
    pool::asks_for(asked) == Some(Purpose::Read) && !asked.starts_with("read-only")
}

/// The check that a pool should have.
fn question_for(pool: &Pool) -> &'static str {
    match named(pool).or_else(|| is_for_writes(pool).then_some(true)) {
        Some(true) => "\"option httpchk OPTIONS /primary\"",
        Some(false) => "\"option httpchk OPTIONS /replica\"",
        None => "\"option httpchk OPTIONS /primary\" (for reads: /replica)",
    }
}

/// Whether the pool serves HTTP, where any check is the administrator's own affair.
fn is_web(pool: &Pool) -> bool {
    pool.is_http() && pool.check.option == "httpchk"
}

pub(super) fn role_word(site: &Site, found: &mut Found) {
    for pool in site
        .asking()
        .filter(|pool| pool.check.option == "httpchk" || pool.check.option == "tcp-check")
    {
        if pool.nodes().any(|server| pool.own_question(server).is_some()) {
            // HAProxy's own check may look at the status line itself.
            let Some(line) = role_line(pool).filter(|line| !line.from(2).contains("HTTP/")) else {
                continue;
            };
            let happens = format!(
                "{}: the role word stays for up to 31 s after the leader lock is lost, and two nodes had it at once",
                pool.name()
            );
            let write =
                format!("write {} and \"http-check expect status 200\"", question_for(pool));
            found.add(line.place, &happens, &write);
        }
    }
}

pub(super) fn no_role(site: &Site, found: &mut Found) {
    for pool in site.asking().filter(|pool| role_line(pool).is_none()) {
        let Some(asked) = pool.nodes().find_map(|server| pool.own_question(server)) else {
            continue;
        };
        let name = asked.split('?').next().unwrap_or_default();
        let said_already = named_for_writes(pool) && !pool.has_agents();
        let (place, happens, write) = if pool.wants_the_others() {
            (
                pool.check.expects.first().map(|line| line.place),
                format!("every node to which /{asked} does not apply is UP, a stopped one as well"),
                "write \"option httpchk OPTIONS /replica\" and \"http-check expect status 200\"",
            )
        } else if pool::NO_ROLE.contains(&name) && !said_already {
            (
                pool.check.place,
                format!("/{name} says nothing of PostgreSQL, so a node that is stopped is UP"),
                "ask /primary, /replica or, for any node that runs, /health",
            )
        } else {
            continue;
        };
        let place = place.unwrap_or(pool.section.place);
        found.add(place, &format!("{}: {happens}", pool.name()), write);
    }
}

pub(super) fn unchecked_server(site: &Site, found: &mut Found) {
    let nodes = known_nodes(site);
    for pool in site.pools {
        // A disabled server gets no clients.
        let words = ["check", "agent-check", "track", "disabled"];
        let unchecked = |server: &&Server| !words.iter().any(|word| server.has(word));
        let meant = pool.nodes().any(|server| pool.meant_question(server).is_some());
        let asks = pool.asks_patroni() || meant;
        let several = pool.nodes().count() > 1;
        let for_writes = |server: &Server| {
            let port = server.port.filter(|port| *port != POOLER);
            named_for_writes(pool) && port.is_some_and(pool::is_postgresql_port)
        };
        let known = |server: &Server| {
            several && (for_writes(server) || nodes.contains(&(&*server.host, server.port)))
        };
        for server in pool.nodes().filter(unchecked).filter(|server| asks || known(server)) {
            let happens = format!(
                "{}: nobody checks it, so it is always UP and gets clients whatever it is",
                full(pool, server)
            );
            let write = match server.get("port") {
                _ if !asks => {
                    let (question, port) = (question_for(pool), site.patronis_port(server));
                    format!("write {question} and \"check port {port}\"")
                }
                Some(_) => "add \"check\"".to_owned(),
                None => format!("add \"check port {}\"", site.patronis_port(server)),
            };
            found.add(server.place, &happens, &write);
        }
    }
}

pub(super) fn asks_postgresql(site: &Site, found: &mut Found) {
    for pool in site.asking() {
        for server in pool.nodes().filter(|server| pool.own_question(server).is_some()) {
            let port = pool.patroni_port(server);
            if let Some(port) = port.filter(|port| pool::is_postgresql_port(*port)) {
                let happens = format!(
                    "{}: its check sends HTTP to port {port}, where PostgreSQL does not answer it, so it is DOWN",
                    full(pool, server)
                );
                let port = site.patronis_port(server);
                let write = format!("write \"check port {port}\", the port of Patroni's REST API");
                found.add(server.place, &happens, &write);
            }
        }
    }
}

pub(super) fn slow_check(site: &Site, found: &mut Found) {
    for pool in site.asking() {
        for server in pool.nodes().filter(|server| pool.own_question(server).is_some()) {
            let noticed = noticed(server);
            if noticed > NOTICED {
                let happens = format!(
                    "{}: HAProxy sends clients to it for up to {} after it died",
                    full(pool, server),
                    seconds(noticed)
                );
                found.add(server.place, &happens, "write \"inter 2s fall 3\"");
            }
            // With an agent, a server leaves MAINT as UP.
            let waits = !server.has("agent-check") && is_for_writes(pool);
            let promoted = noticed_promotion(server);
            if waits && promoted > NOTICED {
                let happens = format!(
                    "{}: HAProxy sends it no clients for up to {} after it was promoted",
                    full(pool, server),
                    seconds(promoted)
                );
                found.add(server.place, &happens, "write \"inter 2s rise 1\" and no downinter");
            }
        }
    }
}

/// Reports a node that is twice in a pool, so that another node is missing.
pub(super) fn same_node(site: &Site, found: &mut Found) {
    for pool in site.asking() {
        let asked = |server: &Server| {
            let host = server.get("addr").unwrap_or(&server.host).to_owned();
            (host, pool.patroni_port(server))
        };
        let known = |server: &&Server| !server.template && !server.unknown;
        let nodes: Vec<_> = pool.nodes().filter(known).collect();
        for (at, server) in nodes.iter().enumerate() {
            let before = &nodes[..at];
            let same = |other: &&&Server| (&other.host, other.port) == (&server.host, server.port);
            if let Some(first) = before.iter().find(same) {
                let happens = format!(
                    "{}: it is the same node as {}, so another node is missing",
                    full(pool, server),
                    first.name
                );
                found.add(server.place, &happens, "write its own address");
            } else if server.has("addr") && pool.own_question(server).is_some() {
                let others = nodes.iter().filter(|other| other.host != server.host);
                if let Some(other) = others.clone().find(|other| asked(other) == asked(server)) {
                    let happens = format!(
                        "{}: its check asks the Patroni of {}, so it is UP when that node is",
                        full(pool, server),
                        other.name
                    );
                    found.add(server.place, &happens, "write its own address behind \"addr\"");
                }
            }
        }
    }
}

/// Reports times of a few milliseconds whose unit was forgotten.
pub(super) fn no_unit(site: &Site, found: &mut Found) {
    for pool in site.asking() {
        for name in ["check", "connect", "queue"] {
            if let Some((_, line)) = pool.timeout(name) {
                let name = format!("timeout {name}");
                look_for_unit(pool.name(), &name, line.word(2), line.place, found);
            }
        }
        for server in pool.nodes() {
            for name in ["inter", "fastinter", "downinter", "agent-inter"] {
                if let Some(Setting { value, place }) = server.settings.get(name) {
                    look_for_unit(&full(pool, server), name, value, *place, found);
                }
            }
        }
    }
}

fn look_for_unit(of: &str, name: &str, value: &str, place: Place, found: &mut Found) {
    // Milliseconds without a unit are usual, but not so few.
    if value.parse().is_ok_and(|number: u64| (1..SHORTEST).contains(&number)) {
        let happens = format!("{of}: HAProxy takes \"{name} {value}\" for {value} ms");
        found.add(place, &happens, &format!("write \"{name} {value}s\""));
    }
}

/// Reports a server of a write pool that never gets clients.
pub(super) fn no_weight(site: &Site, found: &mut Found) {
    for pool in site.of_postgresql().filter(|pool| is_for_writes(pool)) {
        for server in pool.nodes() {
            let Some(weight) = server.settings.get("weight").filter(|weight| weight.value == "0")
            else {
                continue;
            };
            let happens =
                "its weight is 0, so nobody reaches the primary once this node is promoted";
            let happens = format!("{}: {happens}", full(pool, server));
            found.add(weight.place, &happens, "remove \"weight 0\"");
        }
    }
}

pub(super) fn slow_timeout_check(site: &Site, found: &mut Found) {
    for pool in site.asking() {
        if let Some((time, line)) = pool.timeout("check").filter(|(time, _)| *time > TIMEOUT_CHECK)
        {
            let happens = format!(
                "{}: a node that hangs is noticed after {} for each check",
                pool.name(),
                seconds(time)
            );
            found.add(line.place, &happens, "write \"timeout check 2s\"");
        }
    }
}

pub(super) fn pooler_unchecked(site: &Site, found: &mut Found) {
    for pool in site.pools.iter().filter(|pool| !site.reserves.contains(pool.name())) {
        let pooler = |server: &&Server| {
            let named = pool.name().contains("bouncer") || server.name.contains("bouncer");
            server.port == Some(POOLER) || named
        };
        for server in pool.nodes().filter(pooler) {
            let checks = match server.follows() {
                Some(name) => site.asking().find(|other| other.name() == name),
                None => Some(pool).filter(|pool| pool.own_question(server).is_some()),
            };
            let reached = |port: &Option<u16>| port.or(pool.check_port(server)) == server.port;
            if checks.is_some_and(|checks| !checks.check.ports.iter().any(reached)) {
                let happens = format!(
                    "{}: only Patroni is asked, so it stays UP when its PgBouncer is dead or hangs",
                    full(pool, server)
                );
                found.add(
                    server.place,
                    &happens,
                    "let a tcp-check ask both, as haproxy-pgbouncer.cfg of the examples does",
                );
            }
        }
    }
}

pub(super) fn http_mode(site: &Site, found: &mut Found) {
    for pool in site.of_postgresql() {
        let mut sections = pool.frontends.clone();
        sections.push(pool.section);
        for section in sections {
            let lines = site.configuration.lines(section);
            let Some(mode) = pool::last(&lines, &["mode"]).filter(|line| line.word(1) == "http")
            else {
                continue;
            };
            let own = section.lines.iter().any(|line| line.place == mode.place);
            let place = if own { mode.place } else { section.place };
            let happens = format!("{}: mode http refuses every client of PostgreSQL", section.name);
            found.add(place, &happens, "write \"mode tcp\"");
        }
    }
}

pub(super) fn http_rules(site: &Site, found: &mut Found) {
    let starts = [
        "http-request",
        "http-response",
        "http-after-response",
        "http-reuse",
        "http-send-name-header",
        "monitor-uri",
        "capture",
        "cookie",
        "compression",
        "redirect",
    ];
    let options =
        ["forwardfor", "http-server-close", "httpclose", "http-keep-alive", "http-buffer-request"];
    for pool in site.of_postgresql() {
        let mut sections: Vec<&Section> = pool.frontends.clone();
        sections.push(pool.section);
        for section in sections {
            for line in &section.lines {
                if let Some(word) = http_condition(line) {
                    let happens = format!(
                        "{}: \"{word}\" looks at HTTP, and PostgreSQL's traffic is none, so this never holds",
                        section.name
                    );
                    found.add(line.place, &happens, "give each pool a port of its own");
                }
                let option = line.word(0) == "option" && options.contains(&line.word(1));
                if starts.contains(&line.word(0)) || option {
                    let words = if option { line.from(0) } else { line.word(0).to_owned() };
                    let happens = format!(
                        "{}: \"{words}\" is for HTTP, and PostgreSQL's traffic is none",
                        section.name
                    );
                    found.add(line.place, &happens, "remove this line");
                }
            }
        }
    }
}

/// The word in a condition that looks at HTTP.
fn http_condition(line: &Line) -> Option<&str> {
    let starts = ["path", "hdr", "url", "base", "cook", "query", "http_auth"];
    let http = |word: &str| {
        let word = word.strip_prefix("req.").unwrap_or(word);
        word == "method" || starts.iter().any(|start| word.starts_with(start))
    };
    let mut before = "";
    for (at, word) in line.words.iter().enumerate() {
        let found = match line.word(0) {
            "acl" => at == 2 && http(word),
            "use_backend" | "use-server" => {
                (before == "{" && http(word)) || word.trim_start_matches('!').starts_with("METH_")
            }
            _ => false,
        };
        if found {
            return Some(word);
        }
        before = word;
    }
    None
}

pub(super) fn short_timeout(site: &Site, found: &mut Found) {
    for pool in site.of_postgresql() {
        let mut times = vec![(pool.name(), "server", pool.timeout("server"))];
        for section in pool.entrances() {
            let lines = site.configuration.lines(section);
            times.push((&section.name, "client", pool::timeout(&lines, "client")));
        }
        if let Some(tunnel) = pool.timeout("tunnel") {
            times = vec![(pool.name(), "tunnel", Some(tunnel))];
        }
        for (of, name, time) in times {
            let Some((time, line)) = time.filter(|(time, _)| *time < SESSION && !time.is_zero())
            else {
                continue;
            };
            let happens = format!(
                "{of}: a session that is idle for {}, or a query that takes longer, is cut",
                seconds(time)
            );
            found.add(line.place, &happens, &format!("write \"timeout {name} 30m\""));
        }
    }
}
