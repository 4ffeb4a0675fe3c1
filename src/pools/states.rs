//! Saves the states of HAProxy's servers before a reload, so that the new process begins with them. Knows what a
//! changed configuration must override, and what HAProxy's state file lacks about agents. States that this program does
//! not understand stay as HAProxy reported them, and no failure here stops a reload.

use crate::file;
use crate::pools::configuration::Configuration;
use crate::pools::haproxy;
use crate::pools::pool::{Pool, Server};
use crate::pools::reported::{self, ASKED, COLUMNS, DISABLED, FORCED};
use crate::pools::service::Service;
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// The default time that a reload waits for the end of a switchover.
pub const WAIT: Duration = Duration::from_secs(5);
/// The time between two looks while a reload waits.
const PAUSE: Duration = Duration::from_millis(200);
/// The file for the states if the configuration cannot be read.
const STATES: &str = "/run/haproxy-state/servers";
/// The maximum size of a file with states.
const LIMIT: u64 = 64 << 20;
/// The number of a server's columns that are kept.
const KEPT: usize = 20;
/// The maximum number of servers that one message names.
const NAMED: usize = 5;

/// Saves the states as soon as no client waits for a server, or after `wait`. Returns the messages for the operator.
pub fn save(service: &Service, socket: Option<&Path>, wait: Duration) -> Vec<String> {
    let mut said = Vec::new();
    let read =
        Configuration::read(&service.files, service.environment.clone(), &haproxy::ask_version);
    let configuration = read.map_err(|error| said.push(error)).ok();
    let file = match configuration.as_ref().map_or(Some(STATES.into()), state_file) {
        Some(file) => file,
        None => {
            said.push("the states of HAProxy's servers were not saved: there is no server-state-file in global; write \"server-state-file /run/haproxy-state/servers\" there".to_owned());
            return said;
        }
    };
    let pools = configuration.as_ref().map(Pool::all).unwrap_or_default();
    for pool in &pools {
        let load = pool.last(&["load-server-state-from-file"]);
        if load.is_some_and(|line| line.word(1) == "local") {
            let name = pool.name();
            said.push(format!("{name}: it loads a file of its own, which is not written; write \"load-server-state-from-file global\""));
        }
    }
    let found = configuration.as_ref().map(haproxy::find_socket);
    let socket = socket
        .map(Path::to_owned)
        .or(found)
        .unwrap_or_else(|| haproxy::find_socket(&Configuration::default()));
    let answer = wait_for_clients(&socket, &pools, wait).and_then(|()| report(&socket));
    if let Err(error) = write(answer, &file, configuration.as_ref(), &mut said) {
        said.push(format!("the states of HAProxy's servers were not saved, so the reload uses those that were saved last: {error}"));
    }
    said
}

/// Waits for the end of a switchover: after a reload the old process no longer checks its servers, so it would refuse
/// the clients that wait in it for a server.
fn wait_for_clients(socket: &Path, pools: &[Pool], wait: Duration) -> Result<(), String> {
    let end = Instant::now() + wait;
    while Instant::now() < end {
        if !clients_wait(pools, &haproxy::ask(socket, "show stat -1 6 -1 typed")?) {
            break;
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Whether a pool with a waiting room has no server UP, and clients that are on no server.
fn clients_wait(pools: &[Pool], answer: &str) -> bool {
    let rows = reported::parse_stat(answer);
    pools.iter().filter(|pool| pool.waiting_rooms() > 0).any(|pool| {
        let find =
            |name: &str| rows.iter().find(|((of, named), _)| of == pool.name() && named == name);
        let shown: Vec<_> = pool.nodes().filter_map(|server| find(&server.name)).collect();
        let served: u64 = shown.iter().map(|(_, shown)| shown.sessions()).sum();
        let all = find("BACKEND").map_or(0, |(_, shown)| shown.sessions());
        all > served && !shown.iter().any(|(_, shown)| shown.is_up())
    })
}

/// The file from which HAProxy loads the states.
fn state_file(configuration: &Configuration) -> Option<PathBuf> {
    let last =
        |word| configuration.global().rfind(|line| line.word(0) == word).map(|line| line.word(1));
    let file = last("server-state-file").filter(|file| !file.is_empty())?;
    Some(Path::new(last("server-state-base").unwrap_or("/")).join(file))
}

/// HAProxy's own report of its servers.
fn report(socket: &Path) -> Result<String, String> {
    let answer = haproxy::ask(socket, "show servers state")?;
    // A complete answer begins with the format's version.
    if answer.starts_with("1\n") {
        Ok(answer)
    } else {
        Err(format!("{}: HAProxy's answer is in a format that is not known", socket.display()))
    }
}

/// Writes the file for the new process, from HAProxy's answer or from the last answer that was saved.
fn write(
    answer: Result<String, String>,
    file: &Path,
    configuration: Option<&Configuration>,
    said: &mut Vec<String>,
) -> Result<(), String> {
    let reported = with_suffix(file, ".said");
    let failed = |error: io::Error| {
        format!(
            "{}: {error}; does its folder exist, and may this user write there?",
            file.display()
        )
    };
    let (answer, error) = match answer {
        Ok(answer) => {
            replace(&reported, &answer).map_err(failed)?;
            (answer, None)
        }
        // The saved answer is adapted again, because the configuration may have changed since.
        Err(error) => match file::read(&reported, LIMIT) {
            Ok(last) => (String::from_utf8_lossy(&last).into_owned(), Some(error)),
            Err(_) => return Err(error),
        },
    };
    replace(file, &adapt_states(&answer, configuration, said)).map_err(failed)?;
    error.map_or(Ok(()), Err)
}

fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Writes a file completely, or not at all.
///
/// # Errors
///
/// The file cannot be written.
pub fn replace(file: &Path, text: &str) -> io::Result<()> {
    // root would replace /dev/stdout
    if fs::metadata(file).is_ok_and(|file| !file.is_file()) {
        return Err(io::Error::other("not a regular file"));
    }
    let new = with_suffix(file, ".new");
    let _ = fs::remove_file(&new);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&new)?
        .write_all(text.as_bytes())?;
    fs::rename(new, file)
}

/// Adapts the reported states to what the new process needs.
pub fn adapt_states(
    reported: &str,
    configuration: Option<&Configuration>,
    said: &mut Vec<String>,
) -> String {
    let pools = configuration.map(Pool::all).unwrap_or_default();
    let servers = pools
        .iter()
        .flat_map(|pool| pool.servers.iter().map(|server| ((pool.name(), &*server.name), server)));
    let servers: HashMap<_, _> = servers.collect();
    let (mut states, mut strange, mut unknown) = (String::new(), Vec::new(), Vec::new());
    for line in reported.lines() {
        let columns: Vec<_> = line.split(' ').collect();
        if columns.len() != COLUMNS || line.starts_with('#') {
            states += line;
            states.push('\n');
            continue;
        }
        let name = format!("{}/{}", columns[1], columns[3]);
        let server = servers.get(&(columns[1], columns[3])).copied();
        match server {
            None => strange.push(name),
            Some(server) if server.unknown => unknown.push(name),
            Some(_) => {}
        }
        if let Some(row) = adapt_row(&columns, server) {
            states += &row;
            states.push('\n');
        }
    }
    let mut say = |names: &[String], what: &str| {
        if !names.is_empty() {
            let more = if names.len() > NAMED { ", ..." } else { "" };
            let named = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
            said.push(format!("{named}{more}: {what}"));
        }
    };
    say(&strange, "not found in the configuration, so the state stays as HAProxy reported it");
    say(
        &unknown,
        "the address is not a name or number with a port, so it stays as HAProxy reported it",
    );
    states
}

/// A server's row. None if its configuration has no port, so that the server starts without a state.
fn adapt_row(columns: &[&str], server: Option<&Server>) -> Option<String> {
    let number = |at: usize| columns[at].parse::<u32>().unwrap_or(0);
    let (down, mut administrative, asked) = (columns[5] == "0", number(6), number(14) & ASKED != 0);
    let agent = server.map_or(asked, |server| server.has("agent-check"));
    if agent {
        // HAProxy's state does not hold the agent's answer. A server that its agent marked DOWN would be UP after the
        // reload until the agent answers again or, with "disabled", until HAProxy's own check has failed. The reserve
        // is exempt: its agents only report an operator's hold, and may be silent.
        if down && !server.is_some_and(Server::asks_hold) {
            administrative |= FORCED;
        }
        // HAProxy drops a server's state if "disabled" was added to the server or removed from it. In a pool with the
        // agent, "disabled" is no order to stop the server.
        if let Some(server) = server {
            administrative &= !DISABLED;
            administrative |= if server.has("disabled") { DISABLED } else { 0 };
        }
    } else if asked {
        // Without an agent nothing would end a MAINT. So the server starts DOWN, and HAProxy's own check decides.
        administrative = 0;
    }
    let administrative = administrative.to_string();
    let mut row = columns.to_vec();
    row[6] = &administrative;
    let Some(server) = server.filter(|server| !server.unknown) else { return Some(row.join(" ")) };
    // A changed configuration takes precedence, so the row must not override address, DNS name and ports. The address
    // stays only if the server may begin with its last address and has the same DNS name.
    let last = server.get("init-addr").is_some_and(|ways| ways.split(',').any(|way| way == "last"));
    if !(columns[17] == server.host && (last || server.has("resolvers"))) {
        (row[4], row[17]) = ("-", "-");
    }
    let port = server.port?.to_string();
    row[18] = &port;
    row.truncate(KEPT);
    Some(row.join(" "))
}
