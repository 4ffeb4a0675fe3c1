//! The known mistakes: how each is found, the harm that was measured, and the words to write instead. Knows what a good
//! haproxy.cfg for Patroni looks like (units/examples/haproxy.cfg); knows nothing of files and sockets.

use crate::pools::conditions::Version;
use crate::pools::configuration::{Configuration, Kind, Line, Place, Section};
use crate::pools::pool::{self, AGENT, PATRONI, Pool, Purpose, Server};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

mod agent;
mod plain;

/// HAProxy's default for `inter` and `agent-inter`.
const INTER: Duration = Duration::from_secs(2);

/// A known mistake.
pub struct Rule {
    /// The rule's name.
    pub name: &'static str,
    /// Whether the rule applies only to pools with the agent.
    pub agent: bool,
    /// What the rule looks for, and why.
    pub why: &'static str,
    look: fn(&Site, &mut Found),
}

/// A mistake in a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The place of the mistake.
    pub place: Place,
    /// The name of the rule.
    pub rule: &'static str,
    /// The consequence, and what to write instead.
    pub text: String,
}

/// What the rules look at.
struct Site<'a> {
    configuration: &'a Configuration,
    /// The pools through which clients reach PostgreSQL.
    pools: &'a [Pool<'a>],
    /// Whether pools without the agent are checked as if they should have the agent.
    agent: bool,
    /// The version of HAProxy, if it is known.
    haproxy: Option<Version>,
    /// The pools that only watch agents: one for all clusters, or one for each.
    watches: Vec<&'a Pool<'a>>,
    /// The names of the pools that are used only while others have no server UP.
    reserves: HashSet<&'a str>,
    /// The ports of Patroni's REST APIs, by the node's address and port.
    apis: HashMap<(&'a str, Option<u16>), u16>,
}

/// The mistakes that a rule has found.
#[derive(Default)]
struct Found(Vec<(Place, String)>);

impl Found {
    fn add(&mut self, place: Place, happens: &str, write: &str) {
        self.0.push((place, format!("{happens}; {write}")));
    }

    /// Reports words that servers lack. If all these servers lack them, reports them once, at the beginning of the
    /// section.
    fn lacking<'s>(
        &mut self,
        pool: &Pool,
        of: impl Iterator<Item = &'s Server>,
        lacks: impl Fn(&Server) -> bool,
        happens: &str,
        words: &str,
    ) {
        let of: Vec<_> = of.collect();
        if !of.is_empty() && of.iter().all(|server| lacks(server)) {
            let happens = format!("{}: {happens}", pool.name());
            let write = format!("write \"default-server {words}\" above its servers");
            return self.add(pool.section.place, &happens, &write);
        }
        for server in of.into_iter().filter(|server| lacks(server)) {
            let happens = format!("{}: {happens}", full(pool, server));
            self.add(server.place, &happens, &format!("add \"{words}\""));
        }
    }
}

/// All rules.
pub const RULES: &[Rule] = &[
    Rule {
        name: "sessions-kept",
        agent: false,
        why: "A write pool needs \"on-marked-down shutdown-sessions\". Without it, sessions to a former primary stay \
              open. If its Patroni hangs, they go on writing there after another node was promoted, and these writes \
              are lost.",
        look: plain::sessions_kept,
    },
    Rule {
        name: "no-lock",
        agent: false,
        why: "HAProxy must ask Patroni who holds the leader lock (\"option httpchk OPTIONS /primary\"). With a plain TCP \
              check or a check of PostgreSQL alone, every node that listens is UP: standbys get writes, and a former \
              primary keeps them.",
        look: plain::no_lock,
    },
    Rule {
        name: "role-word",
        agent: false,
        why: "The status of /primary says who holds the leader lock; the word \"role\" in the answer does not. Two nodes \
              said role=primary at the same moment, and one did so for 31 s after it had lost the lock.",
        look: plain::role_word,
    },
    Rule {
        name: "no-role",
        agent: false,
        why: "/patroni, /liveness, /cluster and their like are answered with 200 by every node, even by one whose \
              PostgreSQL is stopped.",
        look: plain::no_role,
    },
    Rule {
        name: "unchecked-server",
        agent: false,
        why: "A server without \"check\" is always UP, whatever its node does, and gets its share of the clients.",
        look: plain::unchecked_server,
    },
    Rule {
        name: "asks-postgresql",
        agent: false,
        why: "HTTP that is sent to PostgreSQL's own port gets no answer, and the server is DOWN for ever. Patroni's REST \
              API has a port of its own (8008).",
        look: plain::asks_postgresql,
    },
    Rule {
        name: "slow-check",
        agent: false,
        why: "HAProxy takes out a dead server after \"fall\" checks, \"inter\" apart. With \"inter 30s fall 3\" clients \
              are sent to it for up to 90 s. Patroni promotes another node after some 20 s. \"inter\" times \"fall\" \
              must be 15 s at most. So must \"downinter\" and \"rise\" in a write pool: with \"downinter 20s\" there were \
              no writes for 12.8 s after a promotion, and with \"inter 1s rise 20\" for 20.1 s.",
        look: plain::slow_check,
    },
    Rule {
        name: "same-node",
        agent: false,
        why: "A line that was copied still has the address of another node. The node whose address is missing gets no \
              clients, also when it is promoted.",
        look: plain::same_node,
    },
    Rule {
        name: "no-unit",
        agent: false,
        why: "HAProxy takes a time without a unit for milliseconds. With \"timeout check 5\", a node that answers after \
              20 ms is DOWN.",
        look: plain::no_unit,
    },
    Rule {
        name: "no-weight",
        agent: false,
        why: "A server with \"weight 0\" gets no clients. If it is promoted, nobody reaches the primary.",
        look: plain::no_weight,
    },
    Rule {
        name: "slow-timeout-check",
        agent: false,
        why: "A node that hangs is noticed only when \"timeout check\" has passed, \"fall\" times. More than 5s is longer \
              than Patroni takes to promote another node.",
        look: plain::slow_timeout_check,
    },
    Rule {
        name: "pooler-unchecked",
        agent: false,
        why: "Patroni knows nothing of PgBouncer. If only Patroni is asked, a server whose PgBouncer is dead or hangs \
              stays UP, and every client that it gets fails.",
        look: plain::pooler_unchecked,
    },
    Rule {
        name: "http-mode",
        agent: false,
        why: "In \"mode http\" HAProxy takes PostgreSQL's clients for bad HTTP and refuses each of them.",
        look: plain::http_mode,
    },
    Rule {
        name: "http-rules",
        agent: false,
        why: "PostgreSQL's traffic is no HTTP: HAProxy ignores these lines in \"mode tcp\", or refuses the clients in \
              \"mode http\".",
        look: plain::http_rules,
    },
    Rule {
        name: "short-timeout",
        agent: false,
        why: "\"timeout client\" and \"timeout server\" (or \"timeout tunnel\") end a session in which nothing is sent for \
              that long: an idle one of a connection pool, and a query that runs longer.",
        look: plain::short_timeout,
    },
    Rule {
        name: "agent-missing",
        agent: true,
        why: "A server without the agent beside others that have it, or words for the agent without \"agent-check\", \
              which ask nobody. With --agent, each server that asks Patroni.",
        look: agent::agent_missing,
    },
    Rule {
        name: "own-check-missing",
        agent: true,
        why: "HAProxy takes a silent agent for \"no change\". Without \"check\", nothing marks a dead machine \
              DOWN, and a dead primary stays UP.",
        look: agent::own_check_missing,
    },
    Rule {
        name: "own-check-differs",
        agent: true,
        why: "HAProxy's own check must ask Patroni the same as the agent. With a plain TCP check, a former primary whose \
              agent is silent stays UP; with another health check, the two contradict each other.",
        look: agent::own_check_differs,
    },
    Rule {
        name: "agent-send",
        agent: true,
        why: "The line for the agent is a health check of Patroni's in double quotes that ends with \\n. In single quotes, \
              \\n is no newline; without one, the agent waits for the rest of the line and HAProxy gets no good answer.",
        look: agent::agent_send,
    },
    Rule {
        name: "agent-port",
        agent: true,
        why: "An agent that is asked on a wrong port never answers: servers keep the state they have, and at the next \
              switchover there were no writes for 17.6 s. The reserve asks the agents on the port of its own backend, \
              so that port must be the same.",
        look: agent::agent_port,
    },
    Rule {
        name: "agent-inter",
        agent: true,
        why: "In a write pool the old primary must be asked before the new one is promoted. With \"agent-inter 2s\", 4 of \
              25 switchovers had two servers UP for up to 0.42 s; with 500ms none of 20 had. The median time without a \
              write fell from 3.05 s to 1.65 s.",
        look: agent::agent_inter,
    },
    Rule {
        name: "not-disabled",
        agent: true,
        why: "At a start and at a reload HAProxy has every server UP until its agent has answered: 33 of 222 connections \
              went to standbys. \"disabled\" starts a server in MAINT, and the agent's first answer ends that.",
        look: agent::not_disabled,
    },
    Rule {
        name: "state-file",
        agent: true,
        why: "A reload forgets the states of the servers: each begins in MAINT, and clients are refused until the agents \
              have answered. server-state-file and load-server-state-from-file keep them.",
        look: agent::state_file,
    },
    Rule {
        name: "old-process",
        agent: true,
        why: "After a reload, the old process keeps its sessions and checks nothing. If the primary's Patroni hangs, they \
              go on writing after another node was promoted: 107 writes were lost, and none with \"hard-stop-after 15s\". \
              It must be less than Patroni's ttl - loop_wait - 2 s (18 s by default).",
        look: agent::old_process,
    },
    Rule {
        name: "late-answer",
        agent: true,
        why: "HAProxy ignores an answer that comes later than \"timeout check\" or, without it, agent-inter. The agent's \
              own --timeout is 1500ms, so 2s is needed.",
        look: agent::late_answer,
    },
    Rule {
        name: "waiting-room",
        agent: true,
        why: "HAProxy closes a connection at once if no server is UP: of 1,500 new ones in a switchover, 558 failed. \
              None failed with a waiting room, a last server on a port where nobody can listen. HAProxy tries it again \
              every 200 ms for 10 s.",
        look: agent::waiting_room,
    },
    Rule {
        name: "crowd",
        agent: true,
        why: "Those who waited come all at once. Of 4,300 clients, PostgreSQL refused 1,800 to 2,700 without maxconn on \
              the servers. A full room must refuse, a wait must end, and a client that gives up must leave nothing.",
        look: agent::crowd,
    },
    Rule {
        name: "gone-machine",
        agent: true,
        why: "A machine that is gone without a word ends no session: a kept one hung 26.6 s beyond DOWN. \
              \"option srvtcpka\" ends it.",
        look: agent::gone_machine,
    },
    Rule {
        name: "agents-watched",
        agent: true,
        why: "HAProxy shows nobody that an agent is silent, and a standby with a silent agent stays in MAINT when it is \
              promoted. A backend that only asks the agents' ports shows it, to alerts and to the reserve.",
        look: agent::agents_watched,
    },
    Rule {
        name: "nobody-reached",
        agent: true,
        why: "If HAProxy reaches no agent and no Patroni, there is nothing to wait for. It must refuse at once, so that \
              clients with two hosts go on to the other HAProxy.",
        look: agent::nobody_reached,
    },
    Rule {
        name: "reserve",
        agent: true,
        why: "If a standby whose agent is silent is promoted, no server takes writes until somebody acts (21 s when it \
              was tried). With a backend in which HAProxy itself asks Patroni, it was 1.5 to 2.0 s.",
        look: agent::reserve,
    },
];

/// All mistakes in a configuration, in the order of the files. With `agent`, also what pools lack to have the agent.
/// Without HAProxy's version, no finding asks for what only some versions need.
pub fn find(configuration: &Configuration, agent: bool, haproxy: Option<Version>) -> Vec<Finding> {
    let all = Pool::all(configuration);
    let tracked: HashSet<_> =
        all.iter().flat_map(|pool| &pool.servers).filter_map(Server::follows).collect();
    let watches = all.iter().filter(|pool| pool.watches_agents()).collect();
    let reserves = all.iter().flat_map(|pool| pool.reserves(configuration)).collect();
    let pools: Vec<_> = all
        .iter()
        .filter(|pool| !pool.watches_agents() && !pool.foreign)
        .filter(|pool| !pool.is_rest_api() || tracked.contains(pool.name()))
        .cloned()
        .collect();
    let mut apis = HashMap::new();
    for pool in &pools {
        for server in pool.nodes().filter(|server| pool.own_question(server).is_some()) {
            if let Some(port) =
                pool.patroni_port(server).filter(|port| !pool::is_postgresql_port(*port))
            {
                apis.entry((&*server.host, server.port)).or_insert(port);
            }
        }
    }
    let site = Site { configuration, pools: &pools, agent, haproxy, watches, reserves, apis };
    let mut findings = Vec::new();
    for rule in RULES {
        let mut found = Found::default();
        (rule.look)(&site, &mut found);
        let found = found.0.into_iter();
        findings.extend(found.map(|(place, text)| Finding { place, rule: rule.name, text }));
    }
    findings.sort_by(|one, other| {
        (one.place, one.rule, &one.text).cmp(&(other.place, other.rule, &other.text))
    });
    // A line of `defaults` is reported once, for the first pool that uses it.
    findings.dedup_by(|one, other| {
        (one.place, one.rule) == (other.place, other.rule) && !same_section(configuration, one)
    });
    findings.dedup();
    findings
}

/// Whether a finding's line belongs to a single pool or to `global`, where several findings of one rule may differ.
fn same_section(configuration: &Configuration, finding: &Finding) -> bool {
    let sections = configuration.sections.iter();
    let section =
        sections.rev().find(|s| s.place <= finding.place && s.place.file == finding.place.file);
    section.is_some_and(|section| section.kind != Kind::Defaults)
}

impl<'a> Site<'a> {
    /// The pools with a check that asks Patroni.
    fn asking(&self) -> impl Iterator<Item = &Pool<'a>> {
        self.pools.iter().filter(|pool| pool.asks_patroni())
    }

    /// The pools whose clients use PostgreSQL, as far as the configuration tells.
    fn of_postgresql(&self) -> impl Iterator<Item = &Pool<'a>> {
        let port = |server: &Server| server.port.is_some_and(pool::is_postgresql_port);
        self.pools.iter().filter(|pool| !pool.is_rest_api()).filter(move |pool| {
            pool.asks_patroni() || pool.follows.is_some() || pool.nodes().any(port)
        })
    }

    /// The pools whose servers others `track`, and which no client reaches.
    fn tracked(&self) -> impl Iterator<Item = &Pool<'a>> {
        self.pools.iter().filter(|pool| pool.is_rest_api())
    }

    /// The pools that have the agent or should have it, without the reserves.
    fn with_agent(&self) -> impl Iterator<Item = &Pool<'a>> {
        self.asking().filter(|pool| {
            (self.agent || pool.has_agents()) && !self.reserves.contains(pool.name())
        })
    }

    /// The pools with the agent that clients reach, and not only other pools' `track`.
    fn serving(&self) -> impl Iterator<Item = &Pool<'a>> {
        self.with_agent().filter(|pool| !pool.is_rest_api())
    }

    /// The pools with the agent in which clients wait for a server, or should: they need not if another pool takes them.
    fn with_rooms(&self) -> impl Iterator<Item = &Pool<'a>> {
        self.serving().filter(|pool| {
            let here = format!("nbsrv({})", pool.name());
            let lines = self.entrance_lines(pool);
            let leads = |line: &&Line| {
                line.word(0) == "use_backend" && pool::condition(&lines, line).contains(&here)
            };
            pool.waiting_rooms() > 0
                || pool.purpose() == Some(Purpose::Write)
                || !lines.iter().any(leads)
        })
    }

    /// The lines of all sections where a pool's clients arrive.
    fn entrance_lines(&self, pool: &Pool<'a>) -> Vec<&'a Line> {
        pool.entrances().iter().flat_map(|section| self.configuration.lines(section)).collect()
    }

    /// The first section where a pool's clients arrive, or the pool's own section if that is not known.
    fn entrance(&self, pool: &Pool<'a>) -> &'a Section {
        match pool.section.kind {
            Kind::Listen => pool.section,
            _ => pool.entrances().first().copied().unwrap_or(pool.section),
        }
    }

    /// The agent's port: the default if any server uses it, otherwise the most frequent port.
    fn port(&self) -> u16 {
        let mut count = BTreeMap::new();
        for port in self.pools.iter().flat_map(|pool| &pool.servers).filter_map(agents_port) {
            *count.entry(port).or_insert(0) += 1;
        }
        let most = count.iter().max_by_key(|(_, count)| **count).map(|(port, _)| *port);
        if count.contains_key(&AGENT) { AGENT } else { most.unwrap_or(AGENT) }
    }

    /// The port of a node's REST API: the port on which other checks ask it.
    fn patronis_port(&self, server: &Server) -> u16 {
        self.apis.get(&(&*server.host, server.port)).copied().unwrap_or(PATRONI)
    }

    /// The first line of `global` or, without a `global`, of the first pool.
    fn global_place(&self) -> Option<Place> {
        let sections = &self.configuration.sections;
        let global = sections.iter().find(|section| section.kind == Kind::Global);
        global.or(self.pools.first().map(|pool| pool.section)).map(|section| section.place)
    }

    /// The pool that watches the agents of this pool.
    fn watch(&self, pool: &Pool) -> Option<&'a Pool<'a>> {
        // Two clusters may use the same names.
        let asks = |watch: &&&Pool| {
            let there = |node: &Server| watch.servers.iter().any(|s| s.host == node.agent_host());
            pool.nodes().any(there)
        };
        let has = |watch: &&&Pool| pool.nodes().any(|server| has_node(watch, server));
        let found = self.watches.iter().find(asks).or_else(|| self.watches.iter().find(has));
        found.or(self.watches.first()).copied()
    }
}

/// Whether a pool has that node.
fn has_node(pool: &Pool, node: &Server) -> bool {
    twin(pool, node).is_some()
}

/// The server of a pool that is the same node.
fn twin<'p>(pool: &'p Pool, node: &Server) -> Option<&'p Server> {
    // A machine may have several nodes.
    let same = || pool.servers.iter().filter(|server| is_same_node(server, node));
    let named = same().find(|server| server.name == node.name);
    named.or_else(|| same().find(|server| server.port == node.port)).or_else(|| same().next())
}

/// Whether two servers are the same node. It may be listed by its name in one pool and by its address in another, or with
/// and without its domain. The nodes of two clusters may have the same names, and then their addresses differ; they are not
/// told apart if one cluster has names and the other has addresses.
fn is_same_node(one: &Server, other: &Server) -> bool {
    let is_address = |server: &Server| server.host.parse::<IpAddr>().is_ok();
    let names = |long: &Server, short: &Server| {
        let first = long.host.split_once('.').map(|(first, _)| first);
        first == Some(&*short.host) && !is_address(long)
    };
    let agents = one.agent_host() == other.host || one.host == other.agent_host();
    let by_name = is_address(one) != is_address(other) || names(one, other) || names(other, one);
    one.host == other.host || agents || (one.name == other.name && by_name)
}

/// The port of a server's agent, if the server has an agent check.
fn agents_port(server: &Server) -> Option<u16> {
    server.agent_port().filter(|_| server.has("agent-check"))
}

/// The value of a server's time keyword.
fn time(server: &Server, word: &str) -> Option<Duration> {
    server.get(word).and_then(pool::duration)
}

/// How long HAProxy keeps a dead server UP.
fn noticed(server: &Server) -> Duration {
    time_of_checks(server, "inter", "fall", 3)
}

/// How long HAProxy keeps a server DOWN that has been promoted.
fn noticed_promotion(server: &Server) -> Duration {
    time_of_checks(server, "downinter", "rise", 2)
}

/// How long HAProxy's own checks take to change a server's state. The first check comes after the time of the keyword
/// `first`; `count` names the keyword for the number of checks, which is `usual` by default.
fn time_of_checks(server: &Server, first: &str, count: &str, usual: u32) -> Duration {
    let inter = time(server, "inter").unwrap_or(INTER);
    let fast = time(server, "fastinter").unwrap_or(inter);
    let count = server.get(count).and_then(|count| count.parse::<u32>().ok()).unwrap_or(usual);
    let more = fast.saturating_mul(count.max(1) - 1);
    time(server, first).unwrap_or(inter).saturating_add(more)
}

/// The full name of a server.
fn full(pool: &Pool, server: &Server) -> String {
    format!("{}/{}", pool.name(), server.name)
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f32())
}

/// Whether the pool's name says that clients write (true) or read (false). If the name says neither, the names of the
/// pool's frontends count.
fn named(pool: &Pool) -> Option<bool> {
    let fronts: Vec<_> = pool.frontends.iter().filter_map(|f| says_writes(&f.name)).collect();
    let all = |said: bool| fronts.iter().all(|other| *other == said);
    says_writes(pool.name()).or(fronts.first().copied().filter(|said| all(*said)))
}

fn named_for_writes(pool: &Pool) -> bool {
    named(pool) == Some(true)
}

/// Whether a name says that clients write (true) or read (false). None if it says neither.
fn says_writes(name: &str) -> Option<bool> {
    let name = name.to_lowercase();
    let name =
        ["read-write", "read_write", "readwrite"].iter().fold(name, |n, w| n.replace(w, "-rw-"));
    let says = |parts: &[&str], word: &str| {
        let mut words = name.split(|c: char| !c.is_ascii_alphanumeric());
        parts.iter().any(|part| name.contains(part)) || words.any(|other| other == word)
    };
    let reads = says(&["read", "replica", "slave", "standby", "secondary"], "ro");
    let writes = says(&["write", "primary", "master"], "rw") || says(&[], "leader");
    (reads || writes).then_some(writes && !reads)
}

/// Whether clients write here, judging by the pool's checks or, if those do not tell, by its name.
fn is_for_writes(pool: &Pool) -> bool {
    let word = |line: &Line| {
        let words = line.from(2);
        ["primary", "master"].iter().any(|word| words.contains(word)) && !words.contains("! ")
    };
    match pool.purpose() {
        Some(purpose) => purpose == Purpose::Write,
        None => role_line(pool).is_some_and(word) || named_for_writes(pool),
    }
}

/// The line with which a pool expects a word for the role, if the pool does not check the status of the answer.
fn role_line<'a>(pool: &'a Pool) -> Option<&'a Line> {
    let role = |line: &&Line| {
        let words = line.from(2).to_lowercase();
        let body =
            line.words.iter().any(|word| matches!(&**word, "string" | "rstring" | "string-lf"));
        let role = ["role", "primary", "master", "leader", "replica", "standby"]
            .iter()
            .any(|role| words.contains(role));
        body && role
    };
    let no_role = pool
        .nodes()
        .find_map(|server| pool.own_question(server))
        .is_some_and(|asked| pool::asks_for(asked).is_none());
    pool.check.expects.iter().find(role).filter(|_| no_role || pool.takes(503))
}
