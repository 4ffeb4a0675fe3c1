//! The two steps in which processes differ: confine and ask. A process for one check reads its files, confines itself and
//! asks. A listener confines itself before it accepts, and its checks share questions. Knows nothing of what an answer
//! means.

use crate::by_hand::explain;
use crate::haproxy::connection::Connection;
use crate::journal::{self, syslog};
use crate::listen::{questions::Questions, serve::Place};
use crate::options::Options;
use crate::patroni::ask::{Outcome, Prepared};
use crate::patroni::check::Check;
use crate::run::{Files, before_stop::Patience, hold::Hold};
use crate::sandbox::Confinement;
use std::net::SocketAddr;
use std::os::fd::RawFd;

/// The process in which a check runs.
pub enum Process<'a> {
    /// A process for this check alone, which is confined.
    OneCheck(Prepared<'a>),
    /// A thread of a listener.
    Listener(&'a Questions, &'a Place<'a>),
}

impl<'a> Process<'a> {
    /// Reads the files that the question to Patroni needs, and then confines this process.
    pub fn confine(options: &'a Options, connection: &Connection, files: &Files) -> Process<'a> {
        if let Ok(Some(Hold { state, reason })) = &files.hold {
            connection.tell_operator(&format!("a hold is active: {state}, {reason}"));
        }
        let prepared = options.patroni.prepare(agent_address(options, connection));
        // only tests/bench/check builds without_sandbox, to measure what the sandbox costs
        if !cfg!(without_sandbox) {
            let port = options.patroni.connect_to.port;
            let memory = files.memory.descriptor();
            match Confinement::of_check(port, memory, syslog::descriptor()).enter() {
                Err(missing) => connection.tell_operator(&missing),
                Ok(()) if options.explain => connection.tell_operator("sandbox: complete"),
                Ok(()) => {}
            }
        }
        Process::OneCheck(prepared)
    }

    /// Asks Patroni. A check by hand also explains the answer.
    pub fn ask(
        &self,
        options: &Options,
        connection: &Connection,
        check: &Check,
        patience: &Patience,
    ) -> Outcome {
        match self {
            Process::OneCheck(prepared) => {
                let outcome = prepared.ask(check, patience);
                if connection.is_by_hand() {
                    explain::explain_answer(options, prepared, check, &outcome, patience.deadline);
                }
                outcome
            }
            Process::Listener(questions, place) => {
                place.keep();
                let address = agent_address(options, connection);
                questions.ask(&options.patroni, address, connection.source(), check, patience)
            }
        }
    }
}

/// Confines a listener before it accepts a connection. If the command line is wrong, the checks need no file and no port.
pub fn confine_listener(options: Option<&Options>, systemd: Option<RawFd>) {
    let (mut port, mut read, mut memory) = (None, Vec::new(), None);
    if let Some(Options { patroni, files, .. }) = options {
        patroni.open_sockets();
        (port, memory) = (Some(patroni.connect_to.port), Some(files.memory.as_path()));
        read = patroni.files_to_read();
        read.extend([files.hold.clone(), files.before_stop.clone()]);
    }
    let log = syslog::descriptor();
    if let Err(missing) = Confinement::of_listener(port, read, memory, log, systemd).enter() {
        journal::log(journal::WARNING, &missing);
    }
}

/// The address of this machine on which HAProxy asked, if Patroni may listen there.
fn agent_address(options: &Options, connection: &Connection) -> Option<SocketAddr> {
    if options.patroni.discover { connection.agent_address() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn patroni_may_be_where_haproxy_asked_unless_its_url_is_given() {
        let listener = TcpListener::bind("127.0.0.2:0").expect("a free port");
        let asked = listener.local_addr().expect("an address");
        let _haproxy = TcpStream::connect(asked).expect("a connection");
        let connection = Connection::Socket(listener.accept().expect("a connection").0);
        let agent_address = |arguments: &[&str]| {
            let options = Options::parse(arguments.iter().map(Into::into));
            agent_address(&options.expect("options"), &connection)
        };
        assert_eq!(agent_address(&[]), Some(asked));
        assert_eq!(agent_address(&["--url", "http://127.0.0.1:8008"]), None);
    }
}
