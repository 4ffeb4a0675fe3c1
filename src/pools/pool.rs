//! Finds the pools of a configuration, with their servers and `default-server` words, and what HAProxy's own check and
//! the agent check ask. Knows HAProxy's keywords for checks; knows nothing of mistakes.

use crate::haproxy::question::HOLD;
use crate::patroni::check::{self, Check};
use crate::pools::configuration::{Configuration, Kind, Line, Place, Section};
use std::collections::HashMap;
use std::time::Duration;

/// Patroni's endpoints that do not look at PostgreSQL (Patroni's manual, "REST API").
pub const NO_ROLE: &[&str] =
    &["patroni", "liveness", "cluster", "config", "history", "metrics", "failsafe"];
/// Patroni's paths that other services have as well.
const ANYBODYS: &[&str] =
    &["", "health", "readiness", "liveness", "metrics", "config", "history", "cluster"];
/// Patroni's health checks whose names are as likely to be another service's.
const COMMON: &[&str] = &["/leader", "/master", "/sync", "/async"];
/// The usual ports of web pages.
const WEB: [u16; 4] = [80, 443, 8080, 8443];
/// The default port of PostgreSQL.
pub const POSTGRESQL: u16 = 5432;
/// The usual port of PgBouncer.
pub const POOLER: u16 = 6432;
/// The agent's default port.
pub const AGENT: u16 = 5555;
/// The default port of Patroni's REST API.
pub const PATRONI: u16 = 8008;
/// The maximum number of servers of a pool that are read.
const SERVERS: usize = 10_000;
/// The server keywords that take no value.
const FLAGS: &[&str] = &[
    "agent-check",
    "allow-0rtt",
    "backup",
    "check",
    "check-reuse-pool",
    "check-send-proxy",
    "check-sni-auto",
    "check-ssl",
    "check-via-socks4",
    "disabled",
    "enabled",
    "force-sslv3",
    "force-tlsv10",
    "force-tlsv11",
    "force-tlsv12",
    "force-tlsv13",
    "non-stick",
    "renegotiate",
    "send-proxy",
    "send-proxy-v2",
    "send-proxy-v2-ssl",
    "send-proxy-v2-ssl-cn",
    "sni-auto",
    "ssl",
    "ssl-reuse",
    "stick",
    "strict-maxconn",
    "tfo",
    "tls-tickets",
];

/// The value of a server keyword, and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The value; empty for a keyword that takes none.
    pub value: String,
    /// The line that sets the keyword.
    pub place: Place,
}

/// A server of a pool.
#[derive(Clone, Debug)]
pub struct Server {
    /// The server's name.
    pub name: String,
    /// The server's line.
    pub place: Place,
    /// The server's address, without the port.
    pub host: String,
    /// The server's port, if it is a plain number.
    pub port: Option<u16>,
    /// Whether this program cannot know the address: it has a variable, a port that is no plain number, or a DNS name
    /// that yields ports.
    pub unknown: bool,
    /// Whether a `server-template` makes the server.
    pub template: bool,
    /// All keywords of the server, with those of `default-server`. A negated keyword such as `no-check` has its own
    /// entry.
    pub settings: HashMap<String, Setting>,
}

/// One step of HAProxy's own check that sends something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The port that the step names.
    pub port: Option<u16>,
    /// The path of an HTTP request.
    pub path: Option<String>,
    /// The line that is sent, if the step is not HTTP.
    pub line: Option<String>,
}

/// How HAProxy itself checks the servers of a pool.
#[derive(Clone, Debug, Default)]
pub struct OwnCheck {
    /// The option that selects the kind of check, such as `httpchk`; empty for a plain connection.
    pub option: String,
    /// The line that defines the request.
    pub place: Option<Place>,
    /// The method of the last HTTP request.
    pub method: String,
    /// The requests of the check.
    pub questions: Vec<Question>,
    /// The ports to which the check connects; none is the port of the server's check.
    pub ports: Vec<Option<u16>>,
    /// The lines with the expected answers.
    pub expects: Vec<Line>,
}

/// The purpose of a pool, as far as its checks of Patroni tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The servers must hold the leader lock.
    Write,
    /// The servers must pass any other of Patroni's health checks that ask for a role.
    Read,
}

/// A `listen` or `backend` section.
#[derive(Clone, Debug)]
pub struct Pool<'a> {
    /// The section of the pool.
    pub section: &'a Section,
    /// All lines that apply to the pool.
    pub lines: Vec<&'a Line>,
    /// The servers of the pool.
    pub servers: Vec<Server>,
    /// HAProxy's own check.
    pub check: OwnCheck,
    /// The frontends that send clients to the pool.
    pub frontends: Vec<&'a Section>,
    /// Whether the pool is another service's, whose agents do not ask Patroni.
    pub foreign: bool,
    /// The purpose of the pool whose servers this pool's servers `track`: HAProxy marks both alike.
    pub follows: Option<Purpose>,
}

impl Server {
    /// The value of a keyword.
    pub fn get(&self, word: &str) -> Option<&str> {
        self.settings.get(word).map(|setting| setting.value.as_str())
    }

    /// Whether the server has a keyword.
    pub fn has(&self, word: &str) -> bool {
        self.settings.contains_key(word)
    }

    /// Whether the server only makes clients wait: it is a local backup server without any check, and not PostgreSQL.
    pub fn is_waiting_room(&self) -> bool {
        let local = self.host.starts_with("127.") || matches!(&*self.host, "localhost" | "::1");
        let postgresql = self.port.is_some_and(is_postgresql_port);
        local && !postgresql && self.has("backup") && !self.has("check") && !self.has("agent-check")
    }

    /// The name of the pool whose server this server tracks.
    pub fn follows(&self) -> Option<&str> {
        Some(self.get("track")?.split_once('/')?.0)
    }

    /// The line that HAProxy sends to the server's agent.
    pub fn agent_send(&self) -> Option<&str> {
        self.get("agent-send").filter(|_| self.has("agent-check"))
    }

    /// Whether HAProxy asks the server's agent only for an operator's hold.
    pub fn asks_hold(&self) -> bool {
        // In single quotes \n is no newline, but the administrator meant one.
        self.agent_send().is_some_and(|sent| sent.trim().trim_end_matches("\\n") == HOLD)
    }

    /// The address at which HAProxy asks the server's agent.
    pub fn agent_host(&self) -> &str {
        self.get("agent-addr").or(self.get("addr")).unwrap_or(&self.host)
    }

    /// The port of the server's agent.
    pub fn agent_port(&self) -> Option<u16> {
        self.get("agent-port").or(self.get("port"))?.parse().ok()
    }
}

impl<'a> Pool<'a> {
    /// All pools, in the order of the files.
    pub fn all(configuration: &'a Configuration) -> Vec<Pool<'a>> {
        let sections = &configuration.sections;
        let mut pools = HashMap::<&str, Vec<&Section>>::new();
        for front in sections.iter().filter(|s| matches!(s.kind, Kind::Frontend | Kind::Listen)) {
            let lines = configuration.lines(front);
            let names = lines.iter().filter(|line| leads(line)).map(|line| line.word(1));
            for name in names {
                pools.entry(name).or_default().push(front);
            }
        }
        let pool = |section| Pool::new(configuration, section, &pools);
        let pool =
            sections.iter().filter(|s| matches!(s.kind, Kind::Backend | Kind::Listen)).map(pool);
        let mut pools: Vec<_> = pool.collect();
        // A pool may track a second one that tracks a third.
        for _ in 0..3 {
            let known = pools.iter().filter_map(|pool| Some((pool.name(), pool.purpose()?)));
            let known: HashMap<_, _> = known.collect();
            for pool in &mut pools {
                pool.follows =
                    pool.servers.iter().find_map(|server| known.get(server.follows()?).copied());
            }
        }
        pools
    }

    fn new(
        configuration: &'a Configuration,
        section: &'a Section,
        fronts: &HashMap<&str, Vec<&'a Section>>,
    ) -> Pool<'a> {
        let lines = configuration.lines(section);
        let mut frontends = fronts.get(&*section.name).cloned().unwrap_or_default();
        frontends.dedup_by_key(|front| front.place);
        let (servers, check) = (servers(&lines), own_check(&lines, section));
        let mut pool =
            Pool { section, lines, servers, check, frontends, foreign: false, follows: None };
        pool.foreign = pool.is_foreign();
        pool
    }

    /// Whether the pool serves HTTP, or has agents of another kind, and none of its checks asks Patroni. If the pool
    /// has PostgreSQL's port or a health check of Patroni's, the wrong mode is a mistake of the administrator.
    fn is_foreign(&self) -> bool {
        let patronis = |server: &Server| {
            let sent = server.agent_send().and_then(|sent| sent.split_whitespace().next());
            let sent = sent.is_some_and(|sent| sent.parse::<Check>().is_ok());
            let port = server.port.is_some_and(is_postgresql_port);
            sent || port || self.own_question(server).is_some()
        };
        let ours = |server: &Server| {
            patronis(server) || self.is_postgresql(server) || server.agent_port() == Some(AGENT)
        };
        let all = &self.servers;
        (self.is_http() && !all.iter().any(patronis))
            || (self.has_agents() && !all.iter().any(ours))
    }

    /// Whether HAProxy takes the pool's traffic for HTTP.
    pub fn is_http(&self) -> bool {
        self.last(&["mode"]).is_some_and(|line| line.word(1) == "http")
    }

    /// The pool's name.
    pub fn name(&self) -> &'a str {
        &self.section.name
    }

    /// The last line that begins with these words, which overrides the others.
    pub fn last(&self, words: &[&str]) -> Option<&'a Line> {
        last(&self.lines, words)
    }

    /// A time limit and its line. HAProxy 2.1 removed the older names such as `timeout clitimeout`.
    pub fn timeout(&self, name: &str) -> Option<(Duration, &'a Line)> {
        timeout(&self.lines, name)
    }

    /// The line that turns an option on, if the option is on.
    pub fn option(&self, name: &str) -> Option<&'a Line> {
        let mut on = None;
        for line in &self.lines {
            if line.begins(&["option", name]) {
                on = Some(*line);
            } else if line.begins(&["no", "option", name]) {
                on = None;
            }
        }
        on
    }

    /// The health check of Patroni's that HAProxy's own check asks for, without the `/`. None if the check asks no
    /// endpoint of Patroni's.
    pub fn own_question(&self, server: &Server) -> Option<&str> {
        self.meant_question(server).filter(|_| server.has("check"))
    }

    /// The health check that HAProxy's own check would ask for if the server had `check`.
    pub fn meant_question(&self, server: &Server) -> Option<&str> {
        let postgresql = self.is_postgresql(server);
        let at_its_port = server.port.is_some_and(is_postgresql_port);
        let asks = |question: &'_ &Question| {
            let port = question.port.or(self.check_port(server));
            let elsewhere = postgresql && port != server.port;
            // A web server may itself use Patroni's port.
            let likely = (port == Some(PATRONI) && port != server.port) || elsewhere;
            // Other services have a leader, too.
            let common = question.path.as_deref().is_some_and(|path| COMMON.contains(&path));
            if common && !postgresql && port != Some(PATRONI) && server.agent_send().is_none() {
                return false;
            }
            // Any path on Patroni's port asks Patroni.
            let certain = port == Some(PATRONI) && elsewhere;
            // Where only the pool's name tells that it is PostgreSQL's, another service may answer to such paths. HAProxy
            // asks / if the configuration names no path.
            let by_port = at_its_port || port == Some(PATRONI);
            let may_be = |path: &str| likely && (by_port || path == "/");
            question.path.as_deref().is_some_and(|path| certain || is_patronis(path, may_be(path)))
        };
        let question = self.check.questions.iter().find(asks)?;
        question.path.as_deref().map(endpoint)
    }

    /// Whether the server is PostgreSQL, or a PgBouncer in front of it, judging by the pool's name or the server's
    /// port.
    pub fn is_postgresql(&self, server: &Server) -> bool {
        let name = self.name().to_lowercase();
        let named = ["pg", "postgres", "patroni"].iter().any(|word| name.contains(word));
        // Web pages for PostgreSQL have such names, too.
        let web = self.is_http() || server.port.is_some_and(|port| WEB.contains(&port));
        (named && !web) || server.port.is_some_and(is_postgresql_port)
    }

    /// The port of HAProxy's own check.
    pub fn check_port(&self, server: &Server) -> Option<u16> {
        match server.get("port") {
            Some(port) => port.parse().ok(),
            None => server.port,
        }
    }

    /// The port on which HAProxy's own check asks Patroni.
    pub fn patroni_port(&self, server: &Server) -> Option<u16> {
        let asked = self.check.questions.iter().find(|question| question.path.is_some());
        asked.and_then(|question| question.port).or(self.check_port(server))
    }

    /// The health check that is asked for this server, by HAProxy or by the agent. None if neither asks Patroni.
    pub fn question(&self, server: &Server) -> Option<String> {
        let own = self.own_question(server).map(str::to_owned);
        own.or_else(|| {
            if self.foreign {
                return None;
            }
            let sent = server.agent_send().unwrap_or("agent-check");
            server
                .has("agent-check")
                .then(|| sent.split_whitespace().next().unwrap_or("").to_owned())
        })
    }

    /// Whether clients of this pool reach Patroni's REST API instead of PostgreSQL.
    pub fn is_rest_api(&self) -> bool {
        let rest = |server: &Server| {
            let asked = self.patroni_port(server).filter(|_| self.own_question(server).is_some());
            asked.is_some() && asked == server.port && !asked.is_some_and(is_postgresql_port)
        };
        self.nodes().count() > 0 && self.nodes().all(rest)
    }

    /// Whether any server has an agent check.
    pub fn has_agents(&self) -> bool {
        self.servers.iter().any(|server| server.has("agent-check"))
    }

    /// Whether any check of any server asks Patroni.
    pub fn asks_patroni(&self) -> bool {
        self.servers.iter().any(|server| self.question(server).is_some())
    }

    /// The purpose of the pool. None if its checks ask Patroni for no role.
    pub fn purpose(&self) -> Option<Purpose> {
        let mut purpose = None;
        for server in &self.servers {
            let agent = server.agent_send().and_then(|sent| sent.split_whitespace().next());
            for asked in self.own_question(server).into_iter().chain(agent) {
                match asks_for(asked) {
                    Some(Purpose::Write) if !self.wants_the_others() => {
                        return Some(Purpose::Write);
                    }
                    other => purpose = purpose.or(other.map(|_| Purpose::Read)),
                }
            }
        }
        purpose.or(self.follows)
    }

    /// Whether an answer with this status makes a server UP, as far as the pool's rules look at the status.
    pub fn takes(&self, status: u16) -> bool {
        if self.check.option == "httpchk" && self.check.expects.is_empty() {
            return status < 400;
        }
        self.check.expects.iter().filter_map(|line| takes(line, status)).all(|takes| takes)
    }

    /// Whether a server is UP if Patroni refuses the health check.
    pub fn wants_the_others(&self) -> bool {
        self.takes(503) && !self.takes(200)
    }

    /// Whether the pool only lets HAProxy check the agents' ports, as `agents` of the shipped haproxy.cfg does.
    pub fn watches_agents(&self) -> bool {
        let line = |question: &Question| {
            let line = question.line.as_deref().unwrap_or_default();
            // In single quotes \n is no newline, but the administrator meant one.
            let word = line.trim_end_matches("\\n").split_whitespace().next();
            word.is_some_and(|word| word.parse::<Check>().is_ok())
        };
        self.check.option == "tcp-check" && self.check.questions.iter().any(line)
    }

    /// The servers that clients are meant to reach.
    pub fn nodes(&self) -> impl Iterator<Item = &Server> {
        self.servers.iter().filter(|server| !server.is_waiting_room())
    }

    /// The number of servers that only make clients wait.
    pub fn waiting_rooms(&self) -> usize {
        self.servers.iter().filter(|server| server.is_waiting_room()).count()
    }

    /// The sections where the pool's clients arrive.
    pub fn entrances(&self) -> Vec<&'a Section> {
        let mut all = self.frontends.clone();
        if self.section.kind == Kind::Listen {
            all.push(self.section);
        }
        all
    }

    /// The reserves that the pool reveals: the pool that gets its clients while it has no server UP, and the pool itself
    /// if it asks agents only for an operator's hold.
    pub fn reserves(&self, configuration: &'a Configuration) -> Vec<&'a str> {
        let mut reserves = Vec::new();
        if self.servers.iter().any(Server::asks_hold) {
            reserves.push(self.name());
        }
        let here = format!("nbsrv({})", self.name());
        for section in self.entrances() {
            let lines = configuration.lines(section);
            // Few pools have a reserve, and a frontend may lead to hundreds of pools.
            if !lines.iter().any(|line| line.words.contains(&here)) {
                continue;
            }
            for line in lines.iter().filter(|line| line.word(0) == "use_backend") {
                let condition = condition(&lines, line);
                let there = format!("nbsrv({})", line.word(1));
                if line.word(1) != self.name()
                    && condition.contains(&here)
                    && condition.contains(&there)
                {
                    reserves.push(line.word(1));
                }
            }
        }
        reserves
    }
}

/// The condition of a line, followed by the text of each acl that it names.
pub fn condition(lines: &[&Line], line: &Line) -> String {
    let mut condition = line.from(2);
    for word in &line.words {
        let name = word.trim_start_matches('!');
        for acl in lines.iter().filter(|other| other.begins(&["acl", name])) {
            condition += " ";
            condition += &acl.from(2);
        }
    }
    condition
}

/// Whether a line accepts an answer with this status. None if the line does not look at the status.
fn takes(line: &Line, status: u16) -> Option<bool> {
    let kinds = ["status", "rstatus", "string", "rstring", "binary", "rbinary"];
    let at = line.words.iter().position(|word| kinds.contains(&word.as_str()))?;
    let value = line.word(at + 1);
    let code = status.to_string();
    let first_line = ["HTTP/", "200", "503", "OK"].iter().any(|part| value.contains(part));
    let is = match (line.word(0), line.word(at)) {
        (_, "status") => value.split(',').any(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            first <= &*code && &*code <= last
        }),
        (_, "rstatus") => value.split(['|', '(']).any(|pattern| may_begin(pattern, &code[..1])),
        ("tcp-check", "binary" | "rbinary") => status == 200,
        ("tcp-check", _) if first_line => (status == 503) == value.contains("503"),
        _ => return None,
    };
    Some(is != line.words[..at].iter().any(|word| word == "!"))
}

/// Whether a text that matches this regular expression may begin with a digit. Only the expression's first character is
/// looked at.
fn may_begin(pattern: &str, digit: &str) -> bool {
    let pattern = pattern.trim_start_matches('^');
    let Some(set) = pattern.strip_prefix('[') else {
        return pattern.starts_with(digit) || pattern.starts_with('.');
    };
    let set = set.split(']').next().unwrap_or_default();
    match set.split_once('-') {
        Some((first, last)) => first <= digit && digit <= last,
        None => set.contains(digit),
    }
}

/// The last line that begins with these words, which overrides the others.
pub fn last<'a>(lines: &[&'a Line], words: &[&str]) -> Option<&'a Line> {
    lines.iter().rev().find(|line| line.begins(words)).copied()
}

/// A time limit of a section.
pub fn timeout<'a>(lines: &[&'a Line], name: &str) -> Option<(Duration, &'a Line)> {
    let line = last(lines, &["timeout", name])?;
    Some((duration(line.word(2))?, line))
}

/// Parses a time as HAProxy does: milliseconds, or a number with a unit.
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let microseconds = match unit {
        "us" => 1,
        "" | "ms" => 1_000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return None,
    };
    Some(Duration::from_micros(number.checked_mul(microseconds)?))
}

/// The purpose of a health check. None if it asks for no role.
pub fn asks_for(asked: &str) -> Option<Purpose> {
    let name = asked.split('?').next().unwrap_or_default();
    let check = name.parse::<Check>().ok().filter(|_| name != "health")?;
    Some(if check.needs_lock() { Purpose::Write } else { Purpose::Read })
}

/// Whether this path is one of Patroni's. Other services have some of these paths, too; those count only on Patroni's
/// port.
fn is_patronis(path: &str, port: bool) -> bool {
    let name = path.split('?').next().unwrap_or_default();
    let Some(name) = name.strip_prefix('/') else { return false };
    if ANYBODYS.contains(&name) {
        return port;
    }
    check::names().any(|known| known == name) || NO_ROLE.contains(&name)
}

/// Whether Patroni has this endpoint. Patroni answers 503 on any other.
pub fn is_known(asked: &str) -> bool {
    let name = asked.split('?').next().unwrap_or_default();
    check::names().any(|known| known == name) || NO_ROLE.contains(&name) || name == "readiness"
}

/// The endpoint that Patroni takes a path for. If Patroni has no such endpoint, it looks for these words anywhere in
/// the path.
fn endpoint(path: &str) -> &str {
    let words = [
        "standby_leader",
        "standby-leader",
        "leader",
        "master",
        "primary",
        "read-write",
        "replica",
        "read-only",
        "health",
    ];
    let asked = path.trim_start_matches('/');
    if asked.is_empty() {
        return "primary";
    }
    if is_known(asked) {
        return asked;
    }
    let path = asked.split('?').next().unwrap_or_default();
    let found = words.iter().find_map(|word| Some((path.find(word)?, word.len())));
    found.map_or(asked, |(at, length)| &asked[at..at + length])
}

/// Whether a line sends clients to another pool.
fn leads(line: &Line) -> bool {
    matches!(line.word(0), "default_backend" | "use_backend")
}

/// Whether this is a usual port of PostgreSQL or of PgBouncer. Debian's second cluster gets port 5433, and so on; EDB's
/// servers have 5444.
pub fn is_postgresql_port(port: u16) -> bool {
    matches!(port, 5430..=5439 | 5444 | POOLER)
}

/// The keywords that `default-server` lines give to every server below them.
pub fn usual_settings(lines: &[&Line]) -> HashMap<String, Setting> {
    let mut usual = HashMap::new();
    for line in lines.iter().filter(|line| line.word(0) == "default-server") {
        set(&mut usual, line, 1);
    }
    usual
}

/// The servers, each with the `default-server` lines before it.
fn servers(lines: &[&Line]) -> Vec<Server> {
    let (mut usual, mut servers) = (HashMap::new(), Vec::new());
    for line in lines {
        // No real pool has as many servers, but a template may name billions.
        if servers.len() > SERVERS {
            break;
        }
        match line.word(0) {
            "default-server" => set(&mut usual, line, 1),
            "server" if line.words.len() > 2 => {
                let mut settings = usual.clone();
                set(&mut settings, line, 3);
                servers.push(server(line, line.word(1).to_owned(), line.word(2), false, settings));
            }
            "server-template" if line.words.len() > 3 => {
                let mut settings = usual.clone();
                set(&mut settings, line, 4);
                for number in range(line.word(2)) {
                    let name = format!("{}{number}", line.word(1));
                    servers.push(server(line, name, line.word(3), true, settings.clone()));
                }
            }
            _ => {}
        }
    }
    servers
}

fn server(
    line: &Line,
    name: String,
    address: &str,
    template: bool,
    settings: HashMap<String, Setting>,
) -> Server {
    let (host, port, rest) = address_of(address);
    let unknown = !rest.is_empty() || host.contains("${") || host.starts_with('_');
    Server { name, place: line.place, host, port, unknown, template, settings }
}

/// The numbers of a `server-template`: `3` means 1 to 3.
fn range(text: &str) -> std::ops::RangeInclusive<u32> {
    let (first, last) = text.split_once('-').unwrap_or(("1", text));
    let first = first.parse().unwrap_or(1);
    first..=last.parse().unwrap_or(0).min(first.saturating_add(SERVERS as u32))
}

/// Splits an address, without its family, into host, port, and text in place of a port that is no number.
fn address_of(address: &str) -> (String, Option<u16>, &str) {
    let families = ["ipv4@", "ipv6@", "tcp@", "tcp4@", "tcp6@"];
    let bare = families.iter().find_map(|family| address.strip_prefix(family));
    let address = bare.unwrap_or(address);
    let (host, port) = match address.rsplit_once(':') {
        // An IPv6 address has several colons. In brackets, it may have a port after them.
        Some((host, port)) if !address.ends_with(']') => (host, port),
        _ => (address, ""),
    };
    let number = port.parse().ok().filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()));
    let rest = if number.is_some() { "" } else { port };
    (host.trim_matches(['[', ']']).to_owned(), number, rest)
}

/// Adds the keywords of a line to the settings.
fn set(settings: &mut HashMap<String, Setting>, line: &Line, from: usize) {
    let mut words = line.words.iter().skip(from);
    while let Some(word) = words.next() {
        let opposite = match word.as_str() {
            "disabled" => "enabled".to_owned(),
            "enabled" => "disabled".to_owned(),
            word => word.strip_prefix("no-").map_or_else(|| format!("no-{word}"), str::to_owned),
        };
        settings.remove(&opposite);
        let flag = FLAGS.contains(&word.as_str()) || word.starts_with("no-");
        // `source` may have more words, but each of those takes a value itself.
        let value = if flag { None } else { words.next() };
        let value = value.cloned().unwrap_or_default();
        settings.insert(word.clone(), Setting { value, place: line.place });
    }
}

/// HAProxy's own check: the last option that selects a kind of check, and the lines that belong to the check.
fn own_check(lines: &[&Line], section: &Section) -> OwnCheck {
    let kinds = [
        "httpchk",
        "tcp-check",
        "pgsql-check",
        "ssl-hello-chk",
        "mysql-check",
        "redis-check",
        "smtpchk",
        "ldap-check",
        "spop-check",
        "external-check",
    ];
    let mut check = OwnCheck::default();
    let says_how = |line: &&&Line| line.word(0) == "option" && kinds.contains(&line.word(1));
    let option = lines.iter().rev().find(says_how);
    let Some(option) = option else { return check };
    check.option = option.word(1).to_owned();
    check.place = Some(option.place);
    let rules = match option.word(1) {
        "httpchk" => "http-check",
        "tcp-check" => "tcp-check",
        _ => return check,
    };
    // The rules of a section replace those of its defaults. So does its own "option httpchk", and the request of the
    // defaults' option goes with their rules.
    let own: Vec<_> = section.lines.iter().filter(|line| line.word(0) == rules).collect();
    let inherited = lines.iter().copied().filter(|line| line.word(0) == rules);
    let http = check.option == "httpchk";
    let own_option = section.lines.iter().any(|line| line.begins(&["option", "httpchk"]));
    let requests = !http || own_option || own.is_empty();
    let rules = if own.is_empty() && !(http && own_option) { inherited.collect() } else { own };
    let (method, usual) = match option.words.len() {
        3 if requests => ("OPTIONS", option.word(2)),
        4.. if requests => (option.word(2), option.word(3)),
        _ => ("OPTIONS", "/"),
    };
    check.method = method.to_owned();
    let mut port = None;
    for line in &rules {
        let value = |word: &str| {
            let at = line.words.iter().position(|other| other == word)?;
            line.words.get(at + 1).map(String::as_str)
        };
        match line.word(1) {
            "connect" => {
                // 0 stands for a port that this program cannot know, such as a variable.
                port = value("port").map(|port| port.parse().unwrap_or(0));
                check.ports.push(port);
            }
            "expect" => check.expects.push((*line).clone()),
            "send" | "send-lf" | "send-binary" | "send-binary-lf" if http => {
                let path = value("uri").or(value("uri-lf"));
                // The option's own path applies only to the first request.
                let path = path.unwrap_or(if check.questions.is_empty() { usual } else { "/" });
                check.questions.push(Question { port, path: Some(path_of(path)), line: None });
                check.place = Some(line.place);
                if let Some(method) = value("meth") {
                    check.method = method.to_owned();
                }
            }
            "send" | "send-lf" => {
                check.questions.push(asked(port, line.word(2)));
                check.place = Some(line.place);
            }
            "send-binary" | "send-binary-lf" => {
                check.questions.push(asked(port, &binary(line.word(2))));
                check.place = Some(line.place);
            }
            _ => {}
        }
    }
    if http && requests && check.questions.is_empty() {
        check.questions.push(Question { port, path: Some(path_of(usual)), line: None });
    }
    check
}

/// The path of a URI, which may be a whole URL.
fn path_of(uri: &str) -> String {
    match uri.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]).to_owned(),
        None => uri.to_owned(),
    }
}

/// What a TCP check sends: an HTTP request, or another line.
fn asked(port: Option<u16>, sent: &str) -> Question {
    let mut words = sent.split_whitespace();
    let method = words.next().unwrap_or_default();
    let path = words.next().filter(|_| matches!(method, "GET" | "HEAD" | "OPTIONS"));
    let path = path.map(path_of);
    let line = path.is_none().then(|| sent.to_owned());
    Question { port, path, line }
}

/// The bytes that pairs of hexadecimal digits stand for.
fn binary(hex: &str) -> String {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    hex.as_bytes().chunks(2).filter_map(byte).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pools::words::Environment;

    fn of(text: &str) -> Configuration {
        Configuration::of("x", text, Environment::new())
    }

    #[test]
    fn what_a_server_has() {
        let configuration = of(
            "defaults a\n default-server inter 1s check\ndefaults b from a\n default-server disabled\n\
             listen w from b\n server one [::1]:5432 no-check\n default-server enabled agent-send \"x y\\n\"\n\
             server-template t 2-3 ipv4@h:5433 inter 2s\nlisten v from a\n server s 10.0.0.1\n",
        );
        let pools = Pool::all(&configuration);
        let [one, two, three] = &pools[0].servers[..] else { panic!() };
        assert_eq!((&*one.host, one.port, one.place.line), ("::1", Some(5432), 6));
        assert!(!one.has("check") && one.has("disabled") && one.has("no-check"));
        assert_eq!((&*two.name, &*three.name, &*two.host, two.port), ("t2", "t3", "h", Some(5433)));
        assert!(two.has("check") && !two.has("disabled"));
        assert_eq!((two.get("inter"), two.get("agent-send")), (Some("2s"), Some("x y\n")));
        assert_eq!((&*pools[1].servers[0].host, pools[1].servers[0].port), ("10.0.0.1", None));
    }

    #[test]
    fn what_patroni_is_asked() {
        for (lines, wanted) in [
            ("option httpchk", Some("primary")),
            ("option httpchk OPTIONS /replica?lag=1MB", Some("replica?lag=1MB")),
            ("option httpchk /master", Some("master")),
            ("option httpchk\n http-check send meth GET uri /leader", Some("leader")),
            (
                "option httpchk OPTIONS /sync\n http-check send-state\n http-check send hdr a b",
                Some("sync"),
            ),
            ("option httpchk GET /primary\n http-check send hdr a b", Some("primary")),
            (
                "option tcp-check\n tcp-check connect port 8008\n tcp-check send \"GET /sync HTTP/1.0\\r\\n\"",
                Some("sync"),
            ),
            (
                "option tcp-check\n tcp-check send-binary 474554202f7072696d61727920",
                Some("primary"),
            ),
            ("option httpchk GET /primary\n option tcp-check", None),
            ("option httpchk GET /ready", Some("ready")),
            ("option httpchk OPTIONS/master", Some("master")),
            ("option httpchk GET /v1/replica/?lag=1MB", Some("replica")),
            ("option pgsql-check user x", None),
            ("", None),
        ] {
            let configuration =
                of(&format!("listen a\n {lines}\n server b c:5432 check port 8008\n"));
            let pool = &Pool::all(&configuration)[0];
            assert_eq!(pool.own_question(&pool.servers[0]), wanted, "{lines}");
        }
        for web in ["GET /health\n server b c:80 check", "GET /\n server b c:443 check port 80"] {
            let web = of(&format!("listen a\n option httpchk {web}\n"));
            assert!(!Pool::all(&web)[0].asks_patroni());
        }
    }

    #[test]
    fn haproxys_times() {
        assert_eq!(duration("5000"), Some(Duration::from_secs(5)));
        assert_eq!(duration("30m"), Some(Duration::from_secs(1800)));
        for text in ["", "s", "5x", "99999999999999999999", "9999999999999999d"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }
}
