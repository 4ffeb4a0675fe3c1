//! Starts a socket unit that systemd has given up (patroni-agent-check-reopen@.service), once a second, until it listens or
//! an administrator has closed it. In goes a unit's name, out come log lines. Knows nothing of HAProxy.

use crate::journal;
use crate::patroni::ports;
use sd_notify::NotifyState;
use std::collections::BTreeSet;
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The time between two starts of the socket.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// Starts this socket unit again until it listens.
pub fn reopen(socket: &str) -> ExitCode {
    let begun = Instant::now();
    let (mut first, mut told) = (None, None::<(bool, Instant)>);
    loop {
        let now = Instant::now();
        let [unit, shutdown] = show_units([socket, "shutdown.target"]);
        match unit.get("ActiveState") {
            "failed" | "inactive" => {
                let file = first.get_or_insert_with(|| unit.get("UnitFileState").to_owned());
                if let Some(reason) = unit.explain_closed(file) {
                    journal::log(journal::WARNING, &format!("{socket} stays closed: {reason}"));
                    return ExitCode::SUCCESS;
                }
                start_socket(socket, shutdown.has_job());
                let open = show_units([socket])[0].get("ActiveState") == "active";
                if told.is_none_or(|(was_open, when)| {
                    (open && !was_open) || when.elapsed() >= journal::REPEAT
                }) {
                    told = Some((open, now));
                    journal::log(journal::ERROR, &unit.describe(socket, open, begun.elapsed()));
                }
            }
            "active" => {
                // from now on, systemd starts this unit again if the socket fails, and does so before it answers the next
                // systemctl
                let _ = sd_notify::notify(&[NotifyState::Stopping]);
                if show_units([socket])[0].get("ActiveState") == "failed" {
                    systemctl(&["reset-failed", socket]);
                    start_socket(socket, shutdown.has_job());
                }
                return ExitCode::SUCCESS;
            }
            // the unit is changing its state, or systemctl could not be run
            _ => {}
        }
        sleep(RETRY_EVERY.saturating_sub(now.elapsed()));
    }
}

/// Starts the socket, but never against an administrator who stops it or starts the other pair at this moment: such a job
/// also stops this process. In a shutdown, the socket must not wait for the jobs of other units.
fn start_socket(socket: &str, shutdown: bool) {
    let mode = if shutdown { "ignore-dependencies" } else { "fail" };
    systemctl(&["start", "--quiet", "--job-mode", mode, socket]);
}

/// Returns what systemctl prints; nothing if it cannot be started.
pub(crate) fn systemctl(arguments: &[&str]) -> String {
    let mut command = Command::new("systemctl");
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    // systemctl would report its own errors there
    command.env_remove("NOTIFY_SOCKET");
    command.output().map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).into())
}

/// Asks systemd for the state of these units.
fn show_units<const COUNT: usize>(units: [&str; COUNT]) -> [Unit; COUNT] {
    let names = "ActiveState,LoadState,UnitFileState,Result,Job,Listen";
    let text = systemctl(&[&["show", "-p", names], units.as_slice()].concat());
    let mut units = text.split("\n\n").map(Unit::parse);
    std::array::from_fn(|_| units.next().unwrap_or_default())
}

/// What systemd says of a unit: names and values.
#[derive(Debug, Default)]
struct Unit(Vec<(String, String)>);

impl Unit {
    fn parse(text: &str) -> Unit {
        let properties = text.lines().filter_map(|line| line.split_once('='));
        Unit(properties.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// The value of a property; empty if systemd does not tell it.
    fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    /// Whether a job is queued for it.
    fn has_job(&self) -> bool {
        !matches!(self.get("Job"), "" | "0")
    }

    /// How an administrator has closed the unit. `file` is its UnitFileState when it was found failed.
    fn explain_closed(&self, file: &str) -> Option<String> {
        match (self.get("LoadState"), self.get("UnitFileState")) {
            (load @ ("masked" | "not-found"), _) => Some(format!("it is {load}")),
            (_, "disabled") if file.starts_with("enabled") => {
                Some("it was disabled meanwhile".to_owned())
            }
            _ => None,
        }
    }

    /// Why systemd closed the socket, and whether it is open again.
    fn describe(&self, socket: &str, open: bool, after: Duration) -> String {
        let why = match self.get("Result") {
            // "success", if somebody reset the failure before this process was started
            "resources" | "success" => {
                "resources: no memory, no process, too many open files, no unit for the service, or the port was taken"
            }
            result => result,
        };
        let after = after.as_secs_f32();
        let now = match open {
            true => format!("open again after {after:.1} s"),
            false => {
                let holders = self.name_holders();
                format!("still closed after {after:.1} s, and tried every second{holders}")
            }
        };
        format!("systemd has closed {socket} ({why}): {now}")
    }

    /// Who listens on the port.
    fn name_holders(&self) -> String {
        let holders: BTreeSet<_> = self.ports().into_iter().flat_map(ports::name_holders).collect();
        holders.iter().map(|holder| format!("; {holder}")).collect()
    }

    fn ports(&self) -> Vec<u16> {
        // ListenStream, with systemd 247
        let listens = self.0.iter().filter(|(name, _)| name.starts_with("Listen"));
        let port = |value: &str| value.split(' ').next()?.rsplit(':').next()?.parse().ok();
        listens.filter_map(|(_, value)| port(value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_systemd_shows_the_port_and_the_job() {
        for listens in ["Listen=[::]:5555 (Stream)", "ListenStream=[::]:5555"] {
            let text = format!(
                "{listens}\nResult=resources\n\
                 LoadState=loaded\nActiveState=failed\nUnitFileState=enabled\nJob=0\n"
            );
            let unit = Unit::parse(&text);
            assert_eq!(unit.ports(), [5555]);
            assert!(!unit.has_job() && Unit::parse("Job=7").has_job());
        }
    }
}
