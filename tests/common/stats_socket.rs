//! Asks HAProxy's stats socket: "show servers state" and "show stat" of HAProxy's management guide.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The answer to one command.
pub fn command(socket: &Path, command: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{command}")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A server in "show servers state".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// srv_op_state
    pub operating: u32,
    /// srv_admin_state
    pub administrative: u32,
}

/// All servers by pool and name. An answer that HAProxy cuts off is an error.
pub fn states(socket: &Path) -> io::Result<BTreeMap<(String, String), State>> {
    let answer = command(socket, "show servers state")?;
    let mut states = BTreeMap::new();
    // a version, and a heading
    for line in answer.lines().skip(2).filter(|line| !line.is_empty()) {
        let column: Vec<_> = line.split(' ').collect();
        let number = |at: usize| {
            let number = column.get(at).and_then(|column| column.parse().ok());
            number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, line))
        };
        let state = State { operating: number(5)?, administrative: number(6)? };
        states.insert((column[1].to_owned(), column[3].to_owned()), state);
    }
    Ok(states)
}

/// A field of "show stat" by its name, for a server or for BACKEND.
pub fn stat(socket: &Path, pool: &str, server: &str, field: &str) -> io::Result<String> {
    let answer = command(socket, "show stat")?;
    let mut lines = answer.lines();
    let heading = fields(lines.next().expect("a heading"));
    let at = heading.iter().position(|name| name == field).expect("a field of HAProxy's");
    let line = lines.find(|line| line.starts_with(&format!("{pool},{server},")));
    Ok(fields(line.expect("a server")).swap_remove(at))
}

/// The fields of a line of CSV; a quote inside a quoted field is doubled.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        let field = fields.last_mut().expect("a field");
        match c {
            '"' if quoted && rest.next_if_eq(&'"').is_some() => field.push('"'),
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => field.push(c),
        }
    }
    fields
}
