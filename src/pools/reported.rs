//! Parses what HAProxy reports of its servers on the stats socket. Knows the two formats and their bits; knows nothing
//! of what a pool is meant to do.

use std::collections::{BTreeMap, HashMap};

/// The number of columns for a server in "show servers state" (HAProxy's management guide).
pub const COLUMNS: usize = 25;
/// Bits of `srv_admin_state`: MAINT by an agent or an operator, which HAProxy does not tell apart; MAINT by "disabled";
/// MAINT for want of an address.
pub const FORCED: u32 = 0x01;
/// See [`FORCED`].
pub const DISABLED: u32 = 0x04;
/// See [`FORCED`].
pub const NO_ADDRESS: u32 = 0x20;
/// Bits of `srv_check_state` and `srv_agent_state`: the check is configured, and the check is enabled.
pub const THERE: u32 = 0x02;
/// See [`THERE`].
pub const ASKED: u32 = 0x04;

/// The name of a pool, and the name of one of its servers or `BACKEND`.
pub type Name = (String, String);

/// A server or a backend in "show stat".
#[derive(Clone, Debug, Default)]
pub struct Shown(HashMap<String, String>);

/// A server in "show servers state".
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The server's address.
    pub address: String,
    /// `srv_admin_state`.
    pub administrative: u32,
    /// The server's weight.
    pub weight: Option<u32>,
    /// `srv_check_state`.
    pub check: u32,
    /// `srv_agent_state`.
    pub agent: u32,
    /// The server's port.
    pub port: u16,
    /// The port of HAProxy's own check.
    pub check_port: u16,
    /// The port of the agent.
    pub agent_port: u16,
}

impl Shown {
    /// The value of a field; empty if the field is missing.
    pub fn get(&self, field: &str) -> &str {
        self.0.get(field).map_or("", String::as_str)
    }

    /// The result of the last agent check. HAProxy marks a check that is in progress.
    pub fn agent(&self) -> &str {
        self.get("agent_status").trim_start_matches("* ")
    }

    /// The result of HAProxy's own last check.
    pub fn check(&self) -> &str {
        self.get("check_status").trim_start_matches("* ")
    }

    /// The agent's last health word and reason. HAProxy does not keep the agent's other word.
    pub fn last(&self) -> &str {
        self.get("last_agt").trim_start_matches("via agent : ")
    }

    /// Whether the agent's last answer has these words; `None` while HAProxy asks the agent and shows no answer.
    /// If an answer changes nothing, HAProxy shows it as one word, with `_` for each space.
    pub fn says(&self, words: &str) -> Option<bool> {
        let last = self.last();
        (!last.is_empty()).then(|| last.replace('_', " ").contains(words))
    }

    /// Whether the server takes clients.
    pub fn is_up(&self) -> bool {
        self.get("status").starts_with("UP") || self.get("status") == "no check"
    }

    /// The clients on the server and those in its queue.
    pub fn sessions(&self) -> u64 {
        self.get("scur").parse().unwrap_or(0)
    }
}

/// Reads the answer of "show stat ... typed" in HAProxy's order. Each line is
/// `S.<proxy>.<server>.<field>.<name>.<process>:<tags>:<type>:<value>`.
pub fn parse_stat(answer: &str) -> Vec<(Name, Shown)> {
    let mut rows: BTreeMap<(u64, u64), HashMap<String, String>> = BTreeMap::new();
    for line in answer.lines() {
        let mut parts = line.splitn(4, ':');
        let (Some(key), Some(value)) = (parts.next(), parts.nth(2)) else { continue };
        let key: Vec<_> = key.split('.').collect();
        // F is a frontend, B a backend, S a server.
        let ["B" | "S", proxy, server, _, field, _] = key[..] else { continue };
        let (Ok(proxy), Ok(server)) = (proxy.parse(), server.parse()) else { continue };
        rows.entry((proxy, server)).or_default().insert(field.to_owned(), value.to_owned());
    }
    let named = rows.into_values().map(Shown);
    named
        .map(|shown| ((shown.get("pxname").to_owned(), shown.get("svname").to_owned()), shown))
        .collect()
}

/// Reads the answer of "show servers state".
pub fn parse_states(answer: &str) -> HashMap<Name, State> {
    let mut states = HashMap::new();
    for line in answer.lines().filter(|line| !line.starts_with('#')) {
        let columns: Vec<_> = line.split(' ').collect();
        if columns.len() < COLUMNS {
            continue;
        }
        let number = |at: usize| columns[at].parse().unwrap_or(0);
        let port = |at: usize| columns[at].parse().unwrap_or(0);
        let state = State {
            address: columns[4].to_owned(),
            administrative: number(6),
            weight: columns[7].parse().ok(),
            check: number(13),
            agent: number(14),
            port: port(18),
            check_port: port(21),
            agent_port: port(24),
        };
        states.insert((columns[1].to_owned(), columns[3].to_owned()), state);
    }
    states
}
