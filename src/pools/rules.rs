//! The mistakes that are known: what finds each, the harm that was measured, and the words to write instead. Knows what a
//! good configuration of HAProxy for Patroni looks like (units/examples/haproxy.cfg); knows nothing of files and sockets.

use crate::check::Check;
use crate::pools::configuration::{Configuration, Kind, Line, Place, Section};
use crate::pools::pool::{self, POOLER, POSTGRESQL, Pool, Purpose, Server};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

/// The agent's port where nothing else is said.
const AGENT: u16 = 5555;
/// The longest line that an agent reads.
const AGENT_SEND: usize = 256;
/// HAProxy's default for `inter` and `agent-inter`.
const INTER: Duration = Duration::from_secs(2);
/// How long HAProxy may go on believing in a dead primary: less than it takes to promote another (`ttl` - `loop_wait`).
const NOTICED: Duration = Duration::from_secs(15);
/// The longest `timeout check` that fits `fall 3` into the same.
const TIMEOUT_CHECK: Duration = Duration::from_secs(5);
/// The agent's own `--timeout`.
const AGENT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Sessions that are idle, or run a query, for longer than this are usual.
const SESSION: Duration = Duration::from_secs(300);
/// The longest `agent-inter` with which the old primary is asked before the new one is promoted.
const WRITE_INTER: Duration = Duration::from_secs(1);
/// The longest `agent-inter` of other pools.
const READ_INTER: Duration = Duration::from_secs(5);
/// The longest `hard-stop-after`: Patroni's `ttl` - `loop_wait` - 2 s.
const HARD_STOP: Duration = Duration::from_secs(18);
/// The shortest wait that outlasts a switchover.
const WAIT: Duration = Duration::from_secs(5);
/// HAProxy's longest pause before it tries a server again.
const PAUSE: Duration = Duration::from_secs(1);

/// A mistake that is known.
pub struct Rule {
    /// Its name.
    pub name: &'static str,
    /// Whether it is about pools with the agent only.
    pub agent: bool,
    /// What it looks for and why.
    pub why: &'static str,
    look: fn(&Site, &mut Found),
}

/// A mistake that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where.
    pub place: Place,
    /// Which rule.
    pub rule: &'static str,
    /// What happens, and what to write.
    pub text: String,
}

/// What a rule looks at.
struct Site<'a> {
    configuration: &'a Configuration,
    /// The pools that clients of PostgreSQL reach.
    pools: &'a [Pool<'a>],
    /// Whether pools without the agent shall have it.
    agent: bool,
    /// The pool that watches the agents.
    watch: Option<&'a Pool<'a>>,
    /// The names of the pools that are used only while others have no server.
    reserves: HashSet<&'a str>,
}

/// What a rule has found.
#[derive(Default)]
struct Found(Vec<(Place, String)>);

impl Found {
    fn add(&mut self, place: Place, happens: &str, write: &str) {
        self.0.push((place, format!("{happens}; {write}")));
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
        look: sessions_kept,
    },
    Rule {
        name: "no-lock",
        agent: false,
        why: "HAProxy must ask Patroni who holds the leader lock (\"option httpchk OPTIONS /primary\"). With a plain TCP \
              check or a check of PostgreSQL alone, every node that listens is UP: standbys get writes, and a former \
              primary keeps them.",
        look: no_lock,
    },
    Rule {
        name: "role-word",
        agent: false,
        why: "The status of /primary says who holds the leader lock; the word \"role\" in the answer does not. Two nodes \
              said role=primary at the same moment, and one did so for 31 s after it had lost the lock.",
        look: role_word,
    },
    Rule {
        name: "no-role",
        agent: false,
        why: "/patroni, /liveness, /cluster and their like are answered with 200 by every node, even by one whose \
              PostgreSQL is stopped.",
        look: no_role,
    },
    Rule {
        name: "unchecked-server",
        agent: false,
        why: "A server without \"check\" is always UP, whatever its node does, and gets its share of the clients.",
        look: unchecked_server,
    },
    Rule {
        name: "asks-postgresql",
        agent: false,
        why: "HTTP that is sent to PostgreSQL's own port gets no answer, and the server is DOWN for ever. Patroni's REST \
              API has a port of its own (8008).",
        look: asks_postgresql,
    },
    Rule {
        name: "slow-check",
        agent: false,
        why: "HAProxy takes out a dead server after \"fall\" checks, \"inter\" apart. With \"inter 30s fall 3\" clients \
              are sent to it for up to 90 s. Patroni promotes another node after some 20 s, so it must be less than \
              that (15 s).",
        look: slow_check,
    },
    Rule {
        name: "slow-timeout-check",
        agent: false,
        why: "A node that hangs is noticed only when \"timeout check\" has passed, \"fall\" times. More than 5s is longer \
              than Patroni takes to promote another node.",
        look: slow_timeout_check,
    },
    Rule {
        name: "pooler-unchecked",
        agent: false,
        why: "Patroni knows nothing of PgBouncer. If only Patroni is asked, a server whose PgBouncer is dead or hangs \
              stays UP, and every client that it gets fails.",
        look: pooler_unchecked,
    },
    Rule {
        name: "http-mode",
        agent: false,
        why: "In \"mode http\" HAProxy takes PostgreSQL's clients for bad HTTP and refuses each of them.",
        look: http_mode,
    },
    Rule {
        name: "http-rules",
        agent: false,
        why: "PostgreSQL's traffic is no HTTP: HAProxy ignores these lines in \"mode tcp\", or refuses the clients in \
              \"mode http\".",
        look: http_rules,
    },
    Rule {
        name: "short-timeout",
        agent: false,
        why: "\"timeout client\" and \"timeout server\" (or \"timeout tunnel\") end a session in which nothing is sent for \
              that long: an idle one of a connection pool, and a query that runs longer.",
        look: short_timeout,
    },
    Rule {
        name: "agent-missing",
        agent: true,
        why: "A server without the agent beside others that have it, or words for the agent without \"agent-check\", \
              which ask nobody. With --agent, each server that asks Patroni.",
        look: agent_missing,
    },
    Rule {
        name: "own-check-missing",
        agent: true,
        why: "HAProxy takes a silent agent for \"no change\". Without \"check\", nothing notices that a machine or its \
              agent is gone, and a dead primary stays UP.",
        look: own_check_missing,
    },
    Rule {
        name: "own-check-differs",
        agent: true,
        why: "HAProxy's own check must ask Patroni the same as the agent. With a plain TCP check, a former primary whose \
              agent is silent stays UP; with another health check, the two contradict each other.",
        look: own_check_differs,
    },
    Rule {
        name: "agent-send",
        agent: true,
        why: "The line for the agent is a health check of Patroni's in double quotes that ends with \\n. In single quotes, \
              \\n is no newline; without one, the agent waits for the rest of the line and HAProxy gets no good answer.",
        look: agent_send,
    },
    Rule {
        name: "agent-port",
        agent: true,
        why: "An agent that is asked on a wrong port never answers: servers keep the state they have, and at the next \
              switchover there were no writes for 17.6 s. The reserve asks the agents on the port of its own backend, \
              so that port must be the same.",
        look: agent_port,
    },
    Rule {
        name: "agent-inter",
        agent: true,
        why: "In a write pool the old primary must be asked before the new one is promoted. With \"agent-inter 2s\", 4 of \
              25 switchovers had two servers UP for up to 0.42 s; with 500ms none of 20, and the median time without a \
              write fell from 3.05 s to 1.65 s.",
        look: agent_inter,
    },
    Rule {
        name: "not-disabled",
        agent: true,
        why: "At a start and at a reload HAProxy has every server UP until its agent has answered: 33 of 222 connections \
              went to standbys. \"disabled\" starts a server in MAINT, and the agent's first answer ends that.",
        look: not_disabled,
    },
    Rule {
        name: "state-file",
        agent: true,
        why: "A reload forgets the states of the servers: each begins in MAINT, and clients are refused until the agents \
              have answered. server-state-file and load-server-state-from-file keep them.",
        look: state_file,
    },
    Rule {
        name: "old-process",
        agent: true,
        why: "After a reload, the old process keeps its sessions and checks nothing. If the primary's Patroni hangs, they \
              go on writing after another node was promoted: 107 writes were lost, and none with \"hard-stop-after 15s\". \
              It must be less than Patroni's ttl - loop_wait - 2 s (18 s by default).",
        look: old_process,
    },
    Rule {
        name: "late-answer",
        agent: true,
        why: "HAProxy ignores an answer that comes later than \"timeout check\" or, without it, agent-inter. The agent's \
              own --timeout is 1500ms, so 2s is needed.",
        look: late_answer,
    },
    Rule {
        name: "waiting-room",
        agent: true,
        why: "HAProxy closes a connection at once if no server is UP: of 1,500 new ones in a switchover, 558 failed, and \
              none with a waiting room, a last server on a port where nobody can listen, which is tried again every \
              200 ms for 10 s.",
        look: waiting_room,
    },
    Rule {
        name: "crowd",
        agent: true,
        why: "Those who waited come all at once. Of 4,300 clients, PostgreSQL refused 1,800 to 2,700 without maxconn on \
              the servers. A full room must refuse, a wait must end, and a client that gives up must leave nothing.",
        look: crowd,
    },
    Rule {
        name: "gone-machine",
        agent: true,
        why: "A machine that is gone without a word ends no session: a kept one hung 26.6 s beyond DOWN. \"tcp-ut 10s\" and \
              \"option srvtcpka\" end it.",
        look: gone_machine,
    },
    Rule {
        name: "agents-watched",
        agent: true,
        why: "HAProxy shows nobody that an agent is silent, and a standby with a silent agent stays in MAINT when it is \
              promoted. A backend that only asks the agents' ports shows it, to alerts and to the reserve.",
        look: agents_watched,
    },
    Rule {
        name: "nobody-reached",
        agent: true,
        why: "If HAProxy reaches no agent and no Patroni, there is nothing to wait for. It must refuse at once, so that \
              clients with two hosts go on to the other HAProxy.",
        look: nobody_reached,
    },
    Rule {
        name: "reserve",
        agent: true,
        why: "If a standby whose agent is silent is promoted, no server takes writes until somebody acts (21 s when it \
              was tried). With a backend in which HAProxy itself asks Patroni, it was 1.5 to 2.0 s.",
        look: reserve,
    },
];

/// All mistakes in a configuration, as they stand. With `agent`, also what pools without the agent lack for it.
pub fn find(configuration: &Configuration, agent: bool) -> Vec<Finding> {
    let all = Pool::all(configuration);
    let watch = all.iter().find(|pool| pool.watches_agents());
    let mut reserves = HashSet::new();
    for pool in &all {
        let holds = |server: &Server| server.agent_send().is_some_and(|sent| sent.trim() == "hold");
        if pool.servers.iter().any(holds) || reserve_line(configuration, &all, pool).is_some() {
            reserves.insert(pool.name());
        }
    }
    let pools: Vec<_> =
        all.iter().filter(|pool| !pool.watches_agents() && !pool.is_rest_api()).cloned().collect();
    let site = Site { configuration, pools: &pools, agent, watch, reserves };
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
    // a line of `defaults` is found once, for the first pool that has it
    findings.dedup_by(|one, other| {
        (one.place, one.rule) == (other.place, other.rule) && !same_section(configuration, one)
    });
    findings.dedup();
    findings
}

/// Whether a finding's line is in a pool of its own, where several findings of a rule may be different ones.
fn same_section(configuration: &Configuration, finding: &Finding) -> bool {
    let sections = configuration.sections.iter();
    let section =
        sections.rev().find(|s| s.place <= finding.place && s.place.file == finding.place.file);
    section.is_some_and(|section| section.kind != Kind::Defaults && section.kind != Kind::Global)
}

/// The line of a pool's clients that sends them to that reserve.
fn reserve_line<'a>(
    configuration: &'a Configuration,
    pools: &[Pool<'a>],
    reserve: &Pool,
) -> Option<&'a Line> {
    for pool in pools.iter().filter(|pool| pool.name() != reserve.name()) {
        let room = format!("nbsrv({})", pool.name());
        let own = format!("nbsrv({})", reserve.name());
        let sections = pool.entrances();
        for line in sections.iter().flat_map(|section| configuration.lines(section)) {
            let words = line.from(2);
            if line.begins(&["use_backend", reserve.name()])
                && words.contains(&room)
                && words.contains(&own)
            {
                return Some(line);
            }
        }
    }
    None
}

impl<'a> Site<'a> {
    /// The pools of which Patroni is asked.
    fn asking(&self) -> impl Iterator<Item = &Pool<'a>> {
        self.pools.iter().filter(|pool| pool.asks_patroni())
    }

    /// The pools whose clients talk to PostgreSQL, as far as that can be known.
    fn of_postgresql(&self) -> impl Iterator<Item = &Pool<'a>> {
        let port = |server: &Server| server.port.is_some_and(|port| POSTGRESQL.contains(&port));
        self.pools.iter().filter(move |pool| pool.asks_patroni() || pool.nodes().any(port))
    }

    /// The pools that have the agent, or shall have it; no reserve.
    fn with_agent(&self) -> impl Iterator<Item = &Pool<'a>> {
        self.asking().filter(|pool| {
            (self.agent || pool.has_agents()) && !self.reserves.contains(pool.name())
        })
    }

    /// The lines of all sections in which a pool's clients come in.
    fn entrance_lines(&self, pool: &Pool<'a>) -> Vec<&'a Line> {
        pool.entrances().iter().flat_map(|section| self.configuration.lines(section)).collect()
    }

    /// The agent's port: the usual one, or that of most servers.
    fn port(&self) -> u16 {
        let mut count = BTreeMap::new();
        for port in self.pools.iter().flat_map(|pool| &pool.servers).filter_map(agents_port) {
            *count.entry(port).or_insert(0) += 1;
        }
        let most = count.iter().max_by_key(|(_, count)| **count).map(|(port, _)| *port);
        if count.contains_key(&AGENT) { AGENT } else { most.unwrap_or(AGENT) }
    }

    /// The first line of `global` or, without it, of the first pool.
    fn global_place(&self) -> Option<Place> {
        let sections = &self.configuration.sections;
        let global = sections.iter().find(|section| section.kind == Kind::Global);
        global.or(self.pools.first().map(|pool| pool.section)).map(|section| section.place)
    }

    /// Where the pools with the agent begin, if there is one.
    fn first_with_agent(&self) -> Option<&Pool<'a>> {
        self.with_agent().next()
    }
}

/// The port of an agent that is asked.
fn agents_port(server: &Server) -> Option<u16> {
    server.agent_port().filter(|_| server.has("agent-check"))
}

/// A time of a server, or its default.
fn time(server: &Server, word: &str) -> Option<Duration> {
    server.get(word).and_then(pool::duration)
}

/// How long HAProxy goes on believing in a server that is dead.
fn noticed(server: &Server) -> Duration {
    let inter = time(server, "inter").unwrap_or(INTER);
    let fall = server.get("fall").and_then(|fall| fall.parse::<u32>().ok()).unwrap_or(3).max(1);
    let fast = time(server, "fastinter").unwrap_or(inter);
    inter.saturating_add(fast.saturating_mul(fall - 1))
}

/// A name in full.
fn full(pool: &Pool, server: &Server) -> String {
    format!("{}/{}", pool.name(), server.name)
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f32())
}

/// A pool's server for writes goes by such a name where its check does not tell.
fn named_for_writes(pool: &Pool) -> bool {
    let name = pool.name().to_lowercase();
    let words: Vec<_> = name.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let reads = ["read", "ro", "replica", "replicas", "slave", "slaves", "standby", "standbys"];
    let writes = ["write", "writes", "rw", "primary", "master", "leader", "readwrite", "writer"];
    words.iter().any(|word| writes.contains(word)) && !words.iter().any(|word| reads.contains(word))
}

fn sessions_kept(site: &Site, found: &mut Found) {
    for pool in site.of_postgresql().filter(|pool| is_for_writes(pool)) {
        let checked =
            |server: &&Server| ["check", "agent-check"].iter().any(|word| server.has(word));
        let checked: Vec<_> = pool.nodes().filter(checked).collect();
        let kept = |server: &&&Server| server.get("on-marked-down") != Some("shutdown-sessions");
        let kept: Vec<_> = checked.iter().filter(kept).collect();
        let happens =
            "sessions to a former primary go on, and it takes their writes if its Patroni hangs";
        if kept.len() == checked.len() && !kept.is_empty() {
            let write =
                "write \"default-server on-marked-down shutdown-sessions\" above its servers";
            found.add(pool.section.place, &format!("{}: {happens}", pool.name()), write);
        } else {
            for server in kept {
                let happens = format!("{}: {happens}", full(pool, server));
                found.add(server.place, &happens, "add \"on-marked-down shutdown-sessions\"");
            }
        }
    }
}

/// Whether clients write here: by what is asked, or by its name where nothing tells.
fn is_for_writes(pool: &Pool) -> bool {
    let word = |line: &Line| ["primary", "master"].iter().any(|word| line.from(2).contains(word));
    match pool.purpose() {
        Some(purpose) => purpose == Purpose::Write,
        None => role_line(pool).is_some_and(word) || named_for_writes(pool),
    }
}

fn no_lock(site: &Site, found: &mut Found) {
    let hosts: HashSet<_> = site
        .asking()
        .flat_map(|pool| pool.nodes().filter(|server| pool.question(server).is_some()))
        .map(|server| (server.host.as_str(), server.port))
        .collect();
    for pool in site.pools {
        let own = pool.nodes().find_map(|server| pool.own_question(server));
        if let Some(asked) = own.filter(|asked| pool::asks_for(asked).is_none()) {
            // whoever wants any node may ask for any
            if named_for_writes(pool) && !asks_for_a_role_word(pool) && !pool.has_agents() {
                let happens = format!(
                    "{}: /{asked} asks for no leader lock, so a standby or a former primary is UP",
                    pool.name()
                );
                let place = pool.check.place.unwrap_or(pool.section.place);
                found.add(place, &happens, "write \"option httpchk OPTIONS /primary\"");
            }
            continue;
        }
        // nobody knows what a program asks
        let program = pool.check.option == "external-check";
        if pool.asks_patroni() || pool.nodes().count() < 2 || program {
            continue;
        }
        for server in pool.nodes().filter(|server| server.has("check")) {
            let port = server.port.unwrap_or(0);
            let known = if hosts.is_empty() || named_for_writes(pool) {
                port == POSTGRESQL[0]
            } else {
                hosts.contains(&(&*server.host, server.port))
                    || (POSTGRESQL.contains(&port)
                        && hosts.iter().any(|(host, _)| *host == server.host))
            };
            if known && !is_web(pool) {
                let with = match &*pool.check.option {
                    "" => "a TCP check".to_owned(),
                    option => format!("option {option}"),
                };
                let happens = format!(
                    "{}: {with} does not ask Patroni, so any node that listens is UP, a standby or a former primary as well",
                    full(pool, server)
                );
                let reads = if named_for_writes(pool) { "" } else { " (for reads: /replica)" };
                found.add(
                    server.place,
                    &happens,
                    &format!(
                        "write \"option httpchk OPTIONS /primary\"{reads} and \"check port 8008\""
                    ),
                );
            }
        }
    }
}

/// Whether it is HTTP, whose checks are its own affair.
fn is_web(pool: &Pool) -> bool {
    pool.last(&["mode"]).is_some_and(|line| line.word(1) == "http")
        && pool.check.option == "httpchk"
}

/// The line with which a pool expects a word for the role, where the status of the answer does not count.
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
    let status = pool
        .check
        .expects
        .iter()
        .any(|line| line.words.iter().any(|word| matches!(&**word, "status" | "rstatus")));
    let no_role = pool
        .nodes()
        .find_map(|server| pool.own_question(server))
        .is_some_and(|asked| pool::asks_for(asked).is_none());
    pool.check.expects.iter().find(role).filter(|_| no_role || !status)
}

fn asks_for_a_role_word(pool: &Pool) -> bool {
    role_line(pool).is_some()
}

fn role_word(site: &Site, found: &mut Found) {
    for pool in site
        .asking()
        .filter(|pool| pool.check.option == "httpchk" || pool.check.option == "tcp-check")
    {
        if pool.nodes().any(|server| pool.own_question(server).is_some()) {
            // HAProxy's own check may look at the status line by itself
            let Some(line) = role_line(pool).filter(|line| !line.from(2).contains("HTTP/")) else {
                continue;
            };
            let happens = format!(
                "{}: the role word stays for up to 31 s after the leader lock is lost, and two nodes had it at once",
                pool.name()
            );
            found.add(line.place, &happens, "write \"option httpchk OPTIONS /primary\" (for reads: /replica) and \"http-check expect status 200\"");
        }
    }
}

fn no_role(site: &Site, found: &mut Found) {
    for pool in site.asking().filter(|pool| !asks_for_a_role_word(pool)) {
        let Some(asked) = pool.nodes().find_map(|server| pool.own_question(server)) else {
            continue;
        };
        let name = asked.split('?').next().unwrap_or_default();
        let said_already = named_for_writes(pool) && !pool.has_agents();
        if pool::NO_ROLE.contains(&name) && !said_already {
            let happens = format!(
                "{}: /{name} says nothing of PostgreSQL, so a node that is stopped is UP",
                pool.name()
            );
            let place = pool.check.place.unwrap_or(pool.section.place);
            found.add(
                place,
                &happens,
                "ask /primary, /replica or, for any node that runs, /health",
            );
        }
    }
}

fn unchecked_server(site: &Site, found: &mut Found) {
    for pool in site.pools {
        let words = ["check", "agent-check", "track"];
        let unchecked = |server: &&Server| !words.iter().any(|word| server.has(word));
        // whether its check would ask Patroni if there were any
        let asks = pool.asks_patroni()
            || pool.nodes().any(|server| {
                let mut checked = server.clone();
                checked.settings.insert(
                    "check".to_owned(),
                    pool::Setting { value: String::new(), place: server.place },
                );
                pool.own_question(&checked).is_some()
            });
        for server in pool.nodes().filter(unchecked).filter(|_| asks) {
            let happens = format!(
                "{}: nobody checks it, so it is always UP and gets clients whatever it is",
                full(pool, server)
            );
            found.add(server.place, &happens, "add \"check port 8008\"");
        }
    }
}

fn asks_postgresql(site: &Site, found: &mut Found) {
    for pool in site.asking() {
        for server in pool.nodes().filter(|server| pool.own_question(server).is_some()) {
            let port = pool.check.questions.iter().find(|question| question.path.is_some());
            let port = port.and_then(|question| question.port).or(pool.check_port(server));
            if let Some(port) = port.filter(|port| POSTGRESQL.contains(port)) {
                let happens = format!(
                    "{}: its check sends HTTP to port {port}, where PostgreSQL does not answer it, so it is DOWN",
                    full(pool, server)
                );
                found.add(
                    server.place,
                    &happens,
                    "write \"check port 8008\", the port of Patroni's REST API",
                );
            }
        }
    }
}

fn slow_check(site: &Site, found: &mut Found) {
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
        }
    }
}

fn slow_timeout_check(site: &Site, found: &mut Found) {
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

fn pooler_unchecked(site: &Site, found: &mut Found) {
    for pool in site.asking() {
        let pooler = |server: &&Server| {
            let named = pool.name().contains("bouncer") || server.name.contains("bouncer");
            server.port == Some(POOLER) || named
        };
        for server in pool.nodes().filter(pooler) {
            let reached = |port: Option<u16>| port.or(pool.check_port(server)) == server.port;
            let asks = pool.own_question(server).is_some();
            if server.has("check")
                && asks
                && !pool.check.ports.iter().any(|port| reached(*port))
                && !site.reserves.contains(pool.name())
            {
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

fn http_mode(site: &Site, found: &mut Found) {
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

fn http_rules(site: &Site, found: &mut Found) {
    let starts = ["http-request", "http-response", "http-after-response", "cookie"];
    let options =
        ["forwardfor", "http-server-close", "httpclose", "http-keep-alive", "http-buffer-request"];
    for pool in site.of_postgresql() {
        let mut sections: Vec<&Section> = pool.frontends.clone();
        sections.push(pool.section);
        for section in sections {
            for line in &section.lines {
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

fn short_timeout(site: &Site, found: &mut Found) {
    for pool in site.of_postgresql() {
        let entrance = site.entrance_lines(pool);
        let tunnel = pool.timeout("tunnel");
        let times = match tunnel {
            Some(tunnel) => vec![("tunnel", Some(tunnel))],
            None => vec![
                ("client", pool::timeout(&entrance, "client")),
                ("server", pool.timeout("server")),
            ],
        };
        for (name, time) in times {
            let Some((time, line)) = time.filter(|(time, _)| *time < SESSION && !time.is_zero())
            else {
                continue;
            };
            let happens = format!(
                "{}: a session that is idle for {}, or a query that takes longer, is cut",
                pool.name(),
                seconds(time)
            );
            found.add(line.place, &happens, &format!("write \"timeout {name} 30m\""));
        }
    }
}

/// The health check that a server's agent shall be asked: the site's own, if it asks for a role.
fn wanted<'a>(pool: &'a Pool, server: &'a Server) -> Option<&'a str> {
    let own = pool.own_question(server);
    let own = own.or_else(|| pool.nodes().find_map(|server| pool.own_question(server)));
    let no_role = |asked: &str| pool::NO_ROLE.contains(&asked.split('?').next().unwrap_or(asked));
    own.filter(|asked| !no_role(asked)).or(is_for_writes(pool).then_some("primary"))
}

fn agent_missing(site: &Site, found: &mut Found) {
    let (port, with): (_, HashSet<_>) = (site.port(), site.with_agent().map(Pool::name).collect());
    for pool in site.pools {
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
                    format!(
                        "{}: HAProxy asks no agent, so a healthy node that is not meant is DOWN and not MAINT",
                        full(pool, server)
                    )
                }
                _ => continue,
            };
            let inter = if pool.purpose() == Some(Purpose::Read) { "2s" } else { "500ms" };
            let mut write = vec!["agent-check".to_owned()];
            write.extend((!server.has("agent-port")).then(|| format!("agent-port {port}")));
            write.extend((!server.has("agent-inter")).then(|| format!("agent-inter {inter}")));
            let asked = wanted(pool, server).filter(|_| !server.has("agent-send"));
            write.extend(asked.map(|asked| format!("agent-send \"{asked}\\n\"")));
            write.extend((!server.has("disabled")).then(|| "disabled".to_owned()));
            let unknown = asked.and_then(|asked| asked.parse::<Check>().err());
            write.extend(unknown.map(|error| {
                format!("(but the agent does not understand this health check: {error})")
            }));
            found.add(server.place, &happens, &format!("add {}", write.join(" ")));
        }
    }
}

fn own_check_missing(site: &Site, found: &mut Found) {
    for pool in site.pools {
        for server in
            pool.nodes().filter(|server| server.has("agent-check") && !server.has("check"))
        {
            let happens = format!(
                "{}: without a check of HAProxy's own it stays as it is when its agent is silent, a dead primary stays UP",
                full(pool, server)
            );
            found.add(server.place, &happens, "add \"check port 8008 inter 2s fall 3 rise 1\"");
        }
    }
}

/// A health check by one of its names.
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

fn own_check_differs(site: &Site, found: &mut Found) {
    for pool in site.pools {
        for server in pool.nodes().filter(|server| server.has("agent-check") && server.has("check"))
        {
            let sent = server.agent_send().and_then(|sent| sent.split_whitespace().next());
            let (happens, write) = match (pool.own_question(server), sent) {
                (_, Some("hold")) => continue,
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

fn agent_send(site: &Site, found: &mut Found) {
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
                        "{}: HAProxy sends this agent no question, other than to those beside it",
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
                () if sent.len() > AGENT_SEND => {
                    format!("the line has more than {AGENT_SEND} bytes")
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

/// Whether the agent understands what it is sent: `CHECK [maint|drain|down]` or `hold`.
fn understood(words: &str) -> Result<(), String> {
    let mut words = words.split(' ');
    let check = words.next().unwrap_or_default();
    if check != "hold" {
        check.parse::<Check>()?;
    }
    match (words.next(), words.next()) {
        (None | Some("maint" | "drain" | "down"), None) => Ok(()),
        _ => Err("after the health check only maint, drain or down may stand".to_owned()),
    }
}

fn agent_port(site: &Site, found: &mut Found) {
    // who is asked where: a node is its address and Patroni's port
    type Asked<'a> = Vec<(&'a Pool<'a>, &'a Server, u16)>;
    let mut nodes: HashMap<&str, Asked> = HashMap::new();
    let watched = site.watch.map(|pool| {
        pool.servers.iter().filter_map(|server| Some((server.host.as_str(), server.port?)))
    });
    let watched: HashMap<&str, u16> = watched.into_iter().flatten().collect();
    for pool in site.pools {
        for server in pool.nodes() {
            if let Some(port) = agents_port(server) {
                nodes.entry(&server.host).or_default().push((pool, server, port));
            }
        }
    }
    let mut wrong_watch = HashSet::new();
    for (host, asked) in &nodes {
        // several Patronis on one machine have an agent each, and may be told apart by Patroni's port
        let patronis: HashSet<_> =
            asked.iter().map(|(pool, server, _)| pool.check_port(server)).collect();
        for patroni in patronis {
            let asked: Vec<_> = asked
                .iter()
                .filter(|(pool, server, _)| pool.check_port(server) == patroni)
                .collect();
            let ports: HashSet<_> = asked.iter().map(|(_, _, port)| *port).collect();
            let watch = watched.get(host).copied();
            let count = |port: u16| {
                asked.iter().filter(|(_, _, asked)| *asked == port).count()
                    + usize::from(watch == Some(port))
            };
            let all = ports.iter().copied().chain(watch);
            // of the same number, the one that is watched
            let right = if ports.contains(&AGENT) || watch == Some(AGENT) {
                Some(AGENT)
            } else {
                all.max_by_key(|port| (count(*port), watch == Some(*port)))
            };
            for (pool, server, port) in asked.iter().filter(|(_, _, port)| Some(*port) != right) {
                let right = right.unwrap_or(AGENT);
                let who = if watch == Some(right) && !ports.contains(&right) {
                    "its agent is watched"
                } else {
                    "the same agent is asked elsewhere"
                };
                let happens = format!(
                    "{}: agent-port is {port}, and {who} on port {right}; one that does not answer changes nothing",
                    full(pool, server)
                );
                found.add(
                    server.place,
                    &happens,
                    &format!("write \"agent-port {right}\", or the same port everywhere"),
                );
            }
            if watch.is_some() && watch != right && patroni_count(&nodes, host) == 1 {
                wrong_watch.insert(*host);
            }
        }
    }
    let Some(watch) = site.watch else { return };
    for server in watch.servers.iter().filter(|server| wrong_watch.contains(server.host.as_str())) {
        let happens = format!(
            "{}: the pools ask this agent on another port than {}, so it is not theirs that is watched",
            full(watch, server),
            server.port.unwrap_or(0)
        );
        found.add(
            server.place,
            &happens,
            &format!("write {}:{}, or the same port everywhere", server.host, site.port()),
        );
    }
}

/// How many Patronis there are on a machine.
fn patroni_count(nodes: &HashMap<&str, Vec<(&Pool, &Server, u16)>>, host: &str) -> usize {
    let asked = nodes.get(host).into_iter().flatten();
    asked.map(|(pool, server, _)| pool.check_port(server)).collect::<HashSet<_>>().len()
}

fn agent_inter(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
        let writes = pool.purpose() != Some(Purpose::Read);
        let (longest, write) = if writes { (WRITE_INTER, "500ms") } else { (READ_INTER, "2s") };
        for server in pool.nodes().filter(|server| server.has("agent-check")) {
            let inter = time(server, "agent-inter").unwrap_or(INTER);
            if inter > longest {
                let happens = format!(
                    "{}: HAProxy asks the agent only every {}",
                    full(pool, server),
                    seconds(inter)
                );
                let happens = if writes {
                    format!("{happens}, so after a switchover two servers may be UP")
                } else {
                    happens
                };
                found.add(server.place, &happens, &format!("write \"agent-inter {write}\""));
            }
        }
    }
}

fn not_disabled(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
        for server in
            pool.nodes().filter(|server| server.has("agent-check") && !server.has("disabled"))
        {
            let happens = format!(
                "{}: at a start it is UP and gets clients until its agent has answered",
                full(pool, server)
            );
            found.add(server.place, &happens, "add \"disabled\"");
        }
    }
}

fn state_file(site: &Site, found: &mut Found) {
    let Some(place) = site.global_place() else { return };
    if site.first_with_agent().is_some()
        && !site.configuration.global().any(|line| line.word(0) == "server-state-file")
    {
        let happens = "a reload forgets the states of the servers, and clients are refused until the agents have answered";
        found.add(place, happens, "write \"server-state-file /run/haproxy-state/servers\" in global and let a drop-in save them");
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

fn old_process(site: &Site, found: &mut Found) {
    let Some(place) = site.global_place().filter(|_| site.first_with_agent().is_some()) else {
        return;
    };
    let line = site.configuration.global().rfind(|line| line.word(0) == "hard-stop-after");
    let time = line.and_then(|line| pool::duration(line.word(1)));
    let happens = "after a reload, the sessions of the old process go on, unchecked, and may write to a former primary";
    match (line, time) {
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

fn late_answer(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
        let limit = pool.timeout("check");
        let inter = pool.nodes().map(|server| time(server, "agent-inter").unwrap_or(INTER)).min();
        let (time, place) = match limit {
            Some((time, line)) => (Some(time), line.place),
            None => (inter.filter(|_| pool.has_agents()), pool.section.place),
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

fn waiting_room(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
        let (name, place) = (pool.name(), pool.section.place);
        let elsewhere = site.entrance_lines(pool).iter().any(|line| {
            line.word(0) == "use_backend" && line.from(2).contains(&format!("nbsrv({name})"))
        });
        if pool.waiting_rooms() == 0 {
            if pool.purpose() == Some(Purpose::Write) || !elsewhere {
                let happens = format!(
                    "{name}: clients are refused at once while no server is UP, as in each switchover"
                );
                found.add(place, &happens, "write \"tcp-request content set-dst-port int(0)\" and \"server waiting-room 127.0.0.1 backup no-check no-agent-check enabled maxconn 0\" behind its servers, with \"retries 50\", \"timeout connect 200ms\" and \"option redispatch 1\"");
            }
            continue;
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

fn crowd(site: &Site, found: &mut Found) {
    for pool in site.with_agent().filter(|pool| pool.waiting_rooms() > 0) {
        let (name, place) = (pool.name(), pool.section.place);
        let entrance = site.entrance_lines(pool);
        for server in
            pool.nodes().filter(|server| server.get("maxconn").is_none_or(|limit| limit == "0"))
        {
            let happens = format!(
                "{}: those who waited come all at once, and PostgreSQL refuses what is above its max_connections",
                full(pool, server)
            );
            found.add(server.place, &happens, "add \"maxconn\" with max_connections, less what does not come through HAProxy, divided by the number of HAProxies");
        }
        let mut lacks = |is: bool, happens: &str, write: &str| {
            if !is {
                found.add(place, &format!("{name}: {happens}"), write);
            }
        };
        let limited = entrance.iter().any(|line| {
            (line.word(0) == "tcp-request"
                && line.word(2) == "reject"
                && line.from(3).contains("fe_conn"))
                || line.word(0) == "maxconn"
        });
        lacks(
            limited || entrance.is_empty(),
            "a waiting room without a limit takes the connections of all other pools",
            "write \"tcp-request connection reject if { fe_conn gt 1000 }\"",
        );
        lacks(
            pool.timeout("queue").is_some(),
            "without \"timeout queue\" those who wait for a session wait only as long as \"timeout connect\" says",
            "write \"timeout queue 10s\"",
        );
        lacks(
            pool.option("abortonclose").is_some(),
            "a client that gave up while it waited still takes a session",
            "write \"option abortonclose\"",
        );
    }
}

fn gone_machine(site: &Site, found: &mut Found) {
    for pool in site.with_agent() {
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
        let lacking: Vec<_> = pool.nodes().filter(|server| !server.has("tcp-ut")).collect();
        let happens =
            "what was sent to a machine that is gone without a word is waited for, for minutes";
        if lacking.len() == pool.nodes().count() {
            found.add(
                pool.section.place,
                &format!("{}: {happens}", pool.name()),
                "write \"default-server tcp-ut 10s\" above its servers",
            );
        } else {
            for server in lacking {
                found.add(
                    server.place,
                    &format!("{}: {happens}", full(pool, server)),
                    "add \"tcp-ut 10s\"",
                );
            }
        }
    }
}

fn agents_watched(site: &Site, found: &mut Found) {
    let Some(first) = site.first_with_agent() else { return };
    let port = site.port();
    let Some(watch) = site.watch else {
        let nodes = first.nodes().take(20);
        let nodes = nodes.map(|server| format!(" / server {} {}:{port}", server.name, server.host));
        let write = format!(
            "write a backend \"agents\" with these lines: option tcp-check / tcp-check send \"primary\\n\" / tcp-check expect rstring \"^(up|down|fail|stopped|!)\" / default-server check fall 2 no-agent-check enabled{}",
            nodes.collect::<String>()
        );
        return found.add(
            first.section.place,
            "nothing shows that an agent is silent, and neither an alert nor a reserve can tell",
            &write,
        );
    };
    if watch.check.expects.is_empty() {
        let happens = format!(
            "{}: any program that listens on the port is taken for an agent that answers",
            watch.name()
        );
        found.add(
            watch.section.place,
            &happens,
            "write tcp-check expect rstring \"^(up|down|fail|stopped|!)\"",
        );
    }
    let mut said = HashSet::new();
    for pool in site.with_agent() {
        for server in pool.nodes().filter(|server| server.has("agent-check")) {
            if watch.servers.iter().all(|watched| watched.host != server.host)
                && said.insert(&server.host)
            {
                let happens =
                    format!("{}: nothing shows that its agent is silent", full(pool, server));
                found.add(
                    server.place,
                    &happens,
                    &format!(
                        "write \"server {} {}:{port}\" in {}",
                        server.name,
                        server.host,
                        watch.name()
                    ),
                );
            }
        }
    }
    for server in watch.servers.iter().filter(|server| !server.has("check")) {
        let happens =
            format!("{}: it is not checked, so a silent agent is not noticed", full(watch, server));
        found.add(server.place, &happens, "add \"check\"");
    }
}

fn nobody_reached(site: &Site, found: &mut Found) {
    let Some(watch) = site.watch else { return };
    let asked = format!("nbsrv({})", watch.name());
    for pool in site.with_agent().filter(|pool| pool.waiting_rooms() > 0) {
        let reject = site.entrance_lines(pool).into_iter().find(|line| {
            line.word(0) == "tcp-request"
                && line.word(2) == "reject"
                && line.from(3).contains(&asked)
        });
        let name = pool.name();
        match reject {
            None => {
                let happens = format!(
                    "{name}: if HAProxy reaches no agent and no Patroni, clients wait for nothing and do not go on to the other HAProxy"
                );
                found.add(pool.section.place, &happens, &format!("write \"tcp-request connection reject if {{ {asked} eq 0 }} !reached\", with an acl \"reached\" of srv_is_up for each server of the reserve"));
            }
            Some(line) if !line.words.iter().any(|word| word.starts_with('!')) => {
                let happens = format!(
                    "{name}: if only the agents are silent, clients are refused although the reserve has the primary"
                );
                found.add(line.place, &happens, "add \"!reached\", with an acl \"reached\" of srv_is_up for each server of the reserve");
            }
            Some(_) => {}
        }
    }
}

fn reserve(site: &Site, found: &mut Found) {
    for pool in site.with_agent().filter(|pool| pool.purpose() != Some(Purpose::Read)) {
        let (name, rooms) = (pool.name(), pool.waiting_rooms());
        let lines = site.entrance_lines(pool);
        let line = lines.iter().find(|line| {
            line.word(0) == "use_backend"
                && site.reserves.contains(line.word(1))
                && line.word(1) != name
        });
        let Some(line) = line else {
            let agents = pool.nodes().count();
            let write = format!(
                "write the backend \"reserve\" of the example haproxy.cfg with these servers, and here two waiting rooms, \"option allbackups\" and \"use_backend reserve if {{ nbsrv({name}) eq 2 }} {{ nbsrv(agents) lt {agents} }} {{ nbsrv(reserve) eq 1 }}\""
            );
            let happens = format!(
                "{name}: if a standby whose agent is silent is promoted, no server takes writes until somebody acts"
            );
            found.add(pool.section.place, &happens, &write);
            continue;
        };
        let Some(reserve) = site.pools.iter().find(|pool| pool.name() == line.word(1)) else {
            continue;
        };
        let words = line.from(2);
        let mut lacks = |condition: String, happens: &str| {
            if !words.contains(&condition) {
                found.add(
                    line.place,
                    &format!("{name}: {happens}"),
                    &format!("write the condition {{ {condition} }}"),
                );
            }
        };
        // nbsrv counts the waiting rooms only where no server is UP
        let count = if pool.option("allbackups").is_some() { rooms } else { rooms.min(1) };
        lacks(
            format!("nbsrv({name}) eq {count}"),
            "it is not known that no server takes clients, so the reserve takes them too early or never",
        );
        if let Some(watch) = site.watch {
            let agents = watch.servers.len();
            lacks(
                format!("nbsrv({}) lt {agents}", watch.name()),
                "the reserve is used although all agents answer, or not although one is silent",
            );
        }
        lacks(
            format!("nbsrv({}) eq 1", reserve.name()),
            "the reserve is used although it has no primary, or two",
        );
        if rooms > 0 && count < 2 {
            let (happens, write) = if rooms < 2 {
                (
                    "one waiting room counts as much as one server that is UP, so the reserve takes clients from a healthy primary",
                    "write a second waiting room",
                )
            } else {
                (
                    "only the first waiting room counts, as much as one server that is UP",
                    "write \"option allbackups\"",
                )
            };
            found.add(pool.section.place, &format!("{name}: {happens}"), write);
        }
        for server in reserve.nodes() {
            if server.agent_send().is_none_or(|sent| sent.trim().trim_end_matches("\\n") != "hold")
            {
                let happens = format!(
                    "{}: a node that an operator has taken out gets writes here",
                    full(reserve, server)
                );
                found.add(server.place, &happens, "add agent-check agent-send \"hold\\n\"");
            }
        }
        if rooms > 0 && reserve.waiting_rooms() == 0 {
            let happens = format!(
                "{}: a client that waits and is sent here is refused when the primary is not there yet",
                reserve.name()
            );
            found.add(reserve.section.place, &happens, "write the waiting room here as well");
        }
        for server in
            pool.nodes().filter(|server| reserve.nodes().all(|other| other.host != server.host))
        {
            let happens =
                format!("{}: it is not in the reserve {}", full(pool, server), reserve.name());
            found.add(
                server.place,
                &happens,
                &format!(
                    "write it there as well: \"server {} {}:{} agent-send \\\"hold\\\\n\\\"\"",
                    server.name,
                    server.host,
                    server.port.unwrap_or(POSTGRESQL[0])
                ),
            );
        }
    }
}
