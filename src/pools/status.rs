//! Compares what HAProxy does with the pools now with what its configuration means and with what each Patroni answers.
//! Knows HAProxy's states and what is wrong with them; changes nothing.

use crate::conclude::NO_GRACE;
use crate::patroni::http::FixedAddress;
use crate::pools::configuration::Configuration;
use crate::pools::haproxy;
use crate::pools::pool::{Pool, Purpose, Server};
use crate::pools::reported::{self, ASKED, FORCED, NO_ADDRESS, Shown, State, THERE};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use ureq::Agent;
use ureq::unversioned::transport::TcpConnector;

/// The time between two looks.
const PAUSE: Duration = Duration::from_millis(200);
/// How much longer to look for an answer that HAProxy hides while it asks the agent again.
const ANSWERED: Duration = Duration::from_secs(2);
/// The maximum time for one Patroni to answer.
const PATRONI: Duration = Duration::from_secs(1);
/// The maximum number of Patronis that are asked.
const NODES: usize = 50;
/// The maximum size of Patroni's answer.
const ANSWER: u64 = 64 << 10;
/// The results of agent checks whose answer HAProxy uses.
const COUNTS: [&str; 3] = ["L7OK", "L7OKC", "L7STS"];
/// The maximum width of the names' column.
const WIDTH: usize = 40;

/// The result of one look at HAProxy.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    servers: Vec<Looked>,
    /// What is wrong with a pool, or with HAProxy as a whole.
    wrong: Vec<String>,
}

/// A server as HAProxy shows it.
#[derive(Clone, Debug, Default)]
struct Looked {
    name: String,
    shown: Shown,
    state: State,
    patroni: String,
    wrong: Vec<String>,
}

/// Looks at HAProxy until nothing is wrong, or for `wait`. Then asks each Patroni if `asks_patronis` is set.
///
/// # Errors
///
/// HAProxy does not answer.
pub fn see(
    configuration: &Configuration,
    socket: Option<&Path>,
    wait: Duration,
    asks_patronis: bool,
) -> Result<Seen, String> {
    let socket = socket.map_or_else(|| haproxy::find_socket(configuration), Path::to_owned);
    let pools = Pool::all(configuration);
    let began = Instant::now();
    loop {
        let seen = look(configuration, &pools, &socket);
        let asks = seen.as_ref().is_ok_and(|seen| seen.servers.iter().any(Looked::hides_answer));
        let patience = if asks { wait + ANSWERED } else { wait };
        if began.elapsed() >= patience || seen.as_ref().is_ok_and(Seen::is_well) {
            let mut seen = seen?;
            if asks_patronis {
                ask_patronis(&mut seen, &pools);
            }
            return Ok(seen);
        }
        thread::sleep(PAUSE);
    }
}

impl Seen {
    /// Whether nothing is wrong.
    pub fn is_well(&self) -> bool {
        self.wrong.is_empty() && self.servers.iter().all(|server| server.wrong.is_empty())
    }

    /// A line for each server, with its problems below.
    pub fn lines(&self) -> Vec<String> {
        let width = |length: fn(&Looked) -> usize| {
            self.servers.iter().map(length).max().unwrap_or(0).min(WIDTH)
        };
        let name = width(|server| server.name.len());
        let status = width(|server| server.shown.get("status").len());
        let mut lines = Vec::new();
        for server in &self.servers {
            lines.push(format!(
                "{:name$}  {:status$}  {}",
                server.name,
                server.shown.get("status"),
                server.details()
            ));
            lines.extend(server.wrong.iter().map(|wrong| format!("    WRONG: {wrong}")));
        }
        lines.extend(self.wrong.iter().map(|wrong| format!("WRONG: {wrong}")));
        lines
    }

    /// One line for monitoring.
    pub fn summary(&self) -> String {
        let of_servers = self.servers.iter().flat_map(|server| {
            server.wrong.iter().map(|wrong| format!("{}: {wrong}", server.name))
        });
        let wrong: Vec<_> = self.wrong.iter().cloned().chain(of_servers).collect();
        match wrong.len() {
            0 => format!("OK: {} servers that ask Patroni", self.servers.len()),
            count => format!("WRONG ({count}): {}", wrong.join("; ")),
        }
    }

    /// The metrics for Prometheus that HAProxy's own exporter lacks.
    pub fn metrics(&self) -> String {
        let asked: Vec<_> =
            self.servers.iter().filter(|server| server.state.agent & THERE != 0).collect();
        let mut text = String::new();
        let mut gauge = |name: &str, help: &str, is: fn(&Looked) -> Option<bool>| {
            text += &format!("# HELP {name} {help}\n# TYPE {name} gauge\n");
            for server in &asked {
                let (proxy, short) = server.name.split_once('/').unwrap_or_default();
                let Some(value) = is(server).map(u8::from) else { continue };
                text += &format!("{name}{{proxy=\"{proxy}\",server=\"{short}\"}} {value}\n");
            }
        };
        let help = "Whether the last answer of the agent counts: 1, or 0 for silence and for what changes nothing.";
        gauge("patroni_pools_agent_answers", help, |looked| Some(looked.agent_answers()));
        let help =
            "Whether the agent says that it has no grace period; no value while HAProxy asks it.";
        gauge("patroni_pools_grace_lost", help, |looked| looked.shown.says(NO_GRACE));
        let help = "Whether the agent says that an operator holds the node; no value while HAProxy asks it.";
        gauge("patroni_pools_held", help, |looked| looked.shown.says("(hold: "));
        let (name, now) = ("patroni_pools_timestamp_seconds", SystemTime::now());
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        text + &format!(
            "# HELP {name} When HAProxy was asked.\n# TYPE {name} gauge\n{name} {now}\n"
        )
    }
}

impl Looked {
    fn agent_answers(&self) -> bool {
        self.state.agent & ASKED != 0 && COUNTS.contains(&self.shown.agent())
    }

    /// While HAProxy asks the agent again, it does not show the text of an answer that changed nothing.
    fn hides_answer(&self) -> bool {
        self.shown.agent() == "CHECKED" && self.shown.last().is_empty()
    }

    fn details(&self) -> String {
        let mut details = Vec::new();
        let (agent, check) = (self.shown.agent(), self.shown.check());
        if self.state.agent & THERE != 0 {
            let off = if self.state.agent & ASKED == 0 { "off" } else { agent };
            // While HAProxy asks the agent, there is no text.
            let colon = if self.shown.last().is_empty() { "" } else { ": " };
            details.push(format!("agent {off}{colon}{}", self.shown.last()));
        }
        details.push(match check {
            "" if self.state.check & ASKED == 0 => "check off".to_owned(),
            "" => "check paused".to_owned(),
            check => format!("check {check}"),
        });
        details.push(format!("weight {}", self.shown.get("weight")));
        details.push(format!("sessions {}", self.shown.get("scur")));
        if !self.patroni.is_empty() {
            details.push(format!("Patroni: {}", self.patroni));
        }
        details.join(", ")
    }
}

/// Looks at HAProxy once.
fn look<'a>(
    configuration: &'a Configuration,
    pools: &[Pool<'a>],
    socket: &Path,
) -> Result<Seen, String> {
    let shown = reported::parse_stat(&haproxy::ask(socket, "show stat -1 4 -1 typed")?);
    let states = reported::parse_states(&haproxy::ask(socket, "show servers state")?);
    let info = haproxy::ask(socket, "show info")?;
    if states.is_empty() && shown.is_empty() {
        let socket = socket.display();
        return Err(format!(
            "{socket}: HAProxy shows no server there; is it its \"stats socket\" with \"level admin\"?"
        ));
    }
    let mut seen = Seen::default();
    if info.lines().any(|line| line.trim() == "Stopping: 1") {
        seen.wrong.push(
            "the process that answers has been replaced by a reload; ask the new one".to_owned(),
        );
    } else if let Some(file) = newer_than(started(&info), configuration) {
        seen.wrong.push(format!(
            "{file} has been changed since the process that answers was started; has HAProxy been reloaded?"
        ));
    }
    let counts = |pool: &&Pool| pool.watches_agents() || pool.asks_patroni() && !pool.is_rest_api();
    let asking: Vec<_> = pools.iter().filter(counts).collect();
    for ((pool, server), shown) in shown {
        let state = states.get(&(pool.clone(), server.clone())).cloned().unwrap_or_default();
        let meant = asking.iter().find(|asking| asking.name() == pool);
        let server_meant =
            meant.and_then(|meant| meant.servers.iter().find(|meant| meant.name == server));
        if server_meant.is_some_and(Server::is_waiting_room)
            && shown.get("status").starts_with("MAINT")
        {
            seen.wrong.push(format!("{pool}/{server}: it is in MAINT, so no client waits there"));
        }
        // Without a configuration, all servers with an agent are shown.
        let counts = match meant {
            Some(_) => !server_meant.is_some_and(Server::is_waiting_room),
            None => pools.is_empty() && state.agent & THERE != 0,
        };
        if counts {
            let wrong = find_problems(&shown, &state, meant.copied(), server_meant);
            seen.servers.push(Looked {
                name: format!("{pool}/{server}"),
                shown,
                state,
                wrong,
                patroni: String::new(),
            });
        }
    }
    for pool in &asking {
        seen.wrong.extend(find_problems_of_pool(configuration, pool, &seen.servers));
    }
    if seen.servers.is_empty() {
        seen.wrong.push("HAProxy has no server that asks Patroni".to_owned());
    }
    Ok(seen)
}

/// The time at which HAProxy's process was started, in whole seconds. A new process answers only after its reload is
/// complete.
fn started(info: &str) -> Option<u64> {
    let seconds = |name: &str| {
        let value = info.lines().find_map(|line| line.trim().strip_prefix(name));
        value.and_then(|value| value.trim().parse::<u64>().ok())
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
    // HAProxy 2.5 and later
    seconds("Start_time_sec:").or_else(|| Some(now.saturating_sub(seconds("Uptime_sec:")?)))
}

/// A file of the configuration that has changed since HAProxy was started.
fn newer_than(started: Option<u64>, configuration: &Configuration) -> Option<&str> {
    let newer = |file: &&String| {
        let changed = fs::metadata(file).and_then(|file| file.modified()).ok();
        let changed = changed.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        changed.map(|time| time.as_secs()) > started
    };
    started?;
    configuration.files.iter().find(newer).map(String::as_str)
}

/// The problems of a server. `pool` and `meant` are its pool and the server itself in the configuration.
fn find_problems(
    shown: &Shown,
    state: &State,
    pool: Option<&Pool>,
    meant: Option<&Server>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let reload = "has HAProxy been reloaded since the file was changed?";
    let agent_there = state.agent & THERE != 0;
    match meant {
        None if pool.is_some() => {
            wrong.push("it is not in the configuration, so the next reload forgets it".to_owned())
        }
        Some(meant) if meant.has("agent-check") && !agent_there => {
            wrong.push(format!("HAProxy has no agent check for it; {reload}"))
        }
        Some(meant) if !meant.has("agent-check") && agent_there => wrong
            .push(format!("HAProxy asks an agent that the configuration does not name; {reload}")),
        Some(meant)
            if agent_there && meant.agent_port().is_some_and(|port| port != state.agent_port) =>
        {
            wrong.push(format!(
                "HAProxy asks its agent on port {}, and the configuration says another; {reload}",
                state.agent_port
            ));
        }
        _ => {}
    }
    if let Some(port) = meant.and_then(|meant| meant.port).filter(|port| *port != state.port) {
        let now = state.port;
        wrong.push(format!(
            "HAProxy sends clients to port {now}, and the configuration says {port}; {reload}"
        ));
    }
    if meant.is_some_and(|meant| meant.has("check")) {
        if state.check & THERE == 0 {
            wrong.push(format!("HAProxy has no check of its own for it; {reload}"));
        } else if state.check & ASKED == 0 {
            wrong.push("somebody has turned off HAProxy's own check (enable health)".to_owned());
        }
    }
    let (last, status) = (shown.last(), shown.get("status"));
    if agent_there && state.agent & ASKED == 0 {
        wrong.push("somebody has turned off its agent check (enable agent)".to_owned());
    } else if agent_there {
        match shown.agent() {
            how if COUNTS.contains(&how) => {}
            // An answer that changes nothing: the agent got no whole line, or the grace period covers a failure.
            "CHECKED" => {
                let said = last.trim_start_matches("agent reports an error : ").replace('_', " ");
                wrong.push(format!("its agent leaves it as it is: {said}"));
            }
            "INI" | "" => wrong.push("its agent has not been asked yet".to_owned()),
            how => wrong.push(format!("its agent does not answer ({how}) on port {}, so it stays as it is; is the socket open, and open to this machine?", state.agent_port)),
        }
    }
    let check = shown.check();
    let by_role =
        || pool.zip(meant).is_some_and(|(pool, meant)| pool.own_question(meant).is_some());
    match status {
        "DOWN (agent)" => wrong.push(format!("it is DOWN, as its agent says: {last}")),
        // Without an agent, a healthy node is DOWN if its role does not match.
        _ if status.starts_with("DOWN") && !agent_there && check == "L7STS" => {}
        _ if status.starts_with("DOWN") && !agent_there && check == "L7RSP" && by_role() => {}
        _ if status.starts_with("DOWN") && check.ends_with("OK") => wrong.push(format!(
            "it is {status}: HAProxy's own check passes, but not often enough yet (rise)"
        )),
        _ if status.starts_with("DOWN") => wrong.push(format!(
            "it is DOWN, as HAProxy's own check says ({check}): {}",
            shown.get("last_chk")
        )),
        _ if status.starts_with("UP ") => match check {
            "INI" => wrong.push("HAProxy's own check has not asked yet".to_owned()),
            check if check.ends_with("OK") => {
                wrong.push(format!("HAProxy's own check has not asked again yet ({check})"))
            }
            _ => wrong
                .push(format!("HAProxy's own check fails ({check}): {}", shown.get("last_chk"))),
        },
        // A template may have more servers than its name has addresses.
        _ if state.administrative & NO_ADDRESS != 0
            && meant.is_some_and(|meant| meant.template) => {}
        _ if status.starts_with("MAINT") => {
            if state.administrative & NO_ADDRESS != 0 {
                wrong.push("its name has no address".to_owned());
            } else if !agent_there
                && state.administrative & FORCED != 0
                && !meant.is_some_and(|meant| meant.has("disabled"))
            {
                wrong
                    .push("somebody has put it into MAINT (set server ... state ready)".to_owned());
            }
        }
        _ => {}
    }
    if shown.says(NO_GRACE) == Some(true) {
        wrong.push(
            "its agent has no grace period (ask it by hand why: patroni-agent-check)".to_owned(),
        );
    }
    if state.weight == Some(0) && meant.and_then(|meant| meant.get("weight")) != Some("0") {
        wrong
            .push("its weight is 0, so it gets no clients (set server ... weight 100%)".to_owned());
    }
    wrong
}

/// The problems of a pool: servers that HAProxy does not have, no server UP, or two servers UP for writes.
fn find_problems_of_pool<'a>(
    configuration: &'a Configuration,
    pool: &Pool<'a>,
    servers: &[Looked],
) -> Vec<String> {
    let name = pool.name();
    let find = |server: &Server| {
        servers.iter().find(|looked| looked.name == format!("{name}/{}", server.name))
    };
    let mut wrong = Vec::new();
    let missing: Vec<_> = pool
        .nodes()
        .filter(|server| find(server).is_none())
        .map(|server| server.name.as_str())
        .collect();
    if !missing.is_empty() {
        wrong.push(format!(
            "{name}: HAProxy has no {}; has it been reloaded since the file was changed?",
            missing.join(", ")
        ));
    }
    let up = pool.nodes().filter_map(find).filter(|looked| looked.shown.is_up()).count();
    if up == 0 && missing.len() < pool.nodes().count() {
        // In a reserve, HAProxy shows nodes that do not match as NOLB. A reserve with two servers UP gets no clients.
        let reserves = pool.reserves(configuration);
        let of_reserve = |looked: &&Looked| {
            let (other, _) = looked.name.split_once('/').unwrap_or_default();
            looked.shown.is_up() && other != name && reserves.contains(&other)
        };
        let mut there = servers.iter().filter(of_reserve);
        wrong.push(match (there.next(), there.next()) {
            (Some(one), None) => {
                let one = &one.name;
                format!("{name}: no server is UP; if an agent is silent, clients go to {one}")
            }
            _ => format!("{name}: no server is UP"),
        });
    }
    if up > 1 && pool.purpose() == Some(Purpose::Write) {
        wrong.push(format!("{name}: {up} servers are UP, and only one can take writes"));
    }
    wrong
}

/// Asks each node's Patroni once, if HAProxy's own check asks that Patroni without TLS.
fn ask_patronis(seen: &mut Seen, pools: &[Pool]) {
    let mut nodes: HashMap<SocketAddr, Vec<usize>> = HashMap::new();
    for (at, looked) in seen.servers.iter().enumerate() {
        let Some((pool, server)) = looked.name.split_once('/') else { continue };
        let Some(pool) = pools.iter().find(|other| other.name() == pool) else { continue };
        let Some(server) = pool.servers.iter().find(|other| other.name == server) else { continue };
        let http = pool.own_question(server).is_some() && !server.has("check-ssl");
        let asked = pool.check.questions.iter().find(|question| question.path.is_some());
        let port = asked.and_then(|question| question.port).unwrap_or(looked.state.check_port);
        let address = server.get("addr").unwrap_or(&looked.state.address);
        let address = address.parse().ok().filter(|_| http && port != 0);
        if let Some(address) = address {
            nodes.entry(SocketAddr::new(address, port)).or_default().push(at);
        }
    }
    let (said, hear) = mpsc::channel();
    let asked = nodes.len().min(NODES);
    for (address, servers) in nodes.into_iter().take(NODES) {
        let said = said.clone();
        thread::spawn(move || said.send((servers, ask_patroni(address))));
    }
    let end = Instant::now() + PATRONI + PATRONI;
    for _ in 0..asked {
        let left = end.saturating_duration_since(Instant::now());
        let Ok((servers, answer)) = hear.recv_timeout(left) else { break };
        for at in servers {
            seen.servers[at].patroni = answer.clone();
        }
    }
}

/// The role and the state in Patroni's answer. GET /patroni needs no DCS and changes nothing.
fn ask_patroni(address: SocketAddr) -> String {
    let config = Agent::config_builder()
        .timeout_global(Some(PATRONI))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build();
    // The address comes from HAProxy, because the static program has no resolver.
    let agent = Agent::with_parts(config, TcpConnector::default(), FixedAddress(address));
    let asked = agent.get(format!("http://{address}/patroni")).header("Connection", "close").call();
    let body = asked.and_then(|mut answer| {
        let body = answer.body_mut().with_config().limit(ANSWER);
        body.read_to_vec()
    });
    let body: Option<Value> = body.ok().and_then(|body| serde_json::from_slice(&body).ok());
    let Some(body) = body else { return format!("no answer from {address}") };
    let word = |key: &str| body.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    format!("{}, {}", word("role"), word("state"))
}
