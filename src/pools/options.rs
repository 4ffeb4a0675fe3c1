//! The command line of `patroni-pools`, as one table. The help, the manual and the completions are made from this
//! table. Knows nothing of what the commands do.

use crate::VERSION;
use crate::options::{Stop, wrap};
use lexopt::{Arg, Parser, ValueExt};
use std::ffi::OsString;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

/// This program's name.
pub const NAME: &str = "patroni-pools";

/// The maximum of `--wait`.
const WAIT: u64 = 3600;

/// The command to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Command {
    /// Find the mistakes in haproxy.cfg.
    #[default]
    Check,
    /// Show what HAProxy does.
    Status,
    /// Save the states of the servers.
    SaveStates,
}

/// The commands: name, value and description.
pub const COMMANDS: &[(&str, Command, &str)] = &[
    (
        "check",
        Command::Check,
        "find the mistakes in HAProxy's configuration; haproxy -c is asked as well",
    ),
    (
        "status",
        Command::Status,
        "show what HAProxy does with each server that asks Patroni, and what is wrong with it",
    ),
    (
        "save-states",
        Command::SaveStates,
        "save the states of HAProxy's servers to the server-state-file, before a reload",
    ),
];

/// The exit statuses: command, status and meaning.
pub const EXIT_STATUSES: &[(&str, u8, &str)] = &[
    ("check", 0, "no mistake"),
    ("check", 1, "mistakes"),
    (
        "check",
        2,
        "HAProxy refuses or does not judge the configuration, or patroni-pools cannot read all of it",
    ),
    ("status", 0, "nothing is wrong, or the metrics are written"),
    ("status", 1, "something is wrong, or the metrics cannot be written"),
    ("status", 2, "HAProxy does not answer"),
    ("save-states", 0, "whatever happens, so that HAProxy can reload"),
    ("any command", 64, "the command line is wrong"),
];

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    /// The option's letter, if it has one.
    pub short: Option<char>,
    /// The option's name, without the dashes.
    pub long: &'static str,
    /// The placeholder of the option's value, such as `FILE`; empty if the option takes no value.
    pub value: &'static str,
    /// The commands that accept the option; empty means all.
    pub commands: &'static [Command],
    /// The option's description.
    pub meaning: &'static str,
}

/// All options.
pub const OPTIONS: &[Described] = &[
    Described {
        short: Some('f'),
        long: "file",
        value: "FILE",
        commands: &[],
        meaning: "read this file, or the .cfg files of this folder, as haproxy -f does; may be given several times (default: what haproxy.service names)",
    },
    Described {
        short: None,
        long: "agent",
        value: "",
        commands: &[Command::Check],
        meaning: "also say what the pools without the agent lack for it",
    },
    Described {
        short: None,
        long: "list",
        value: "",
        commands: &[Command::Check],
        meaning: "print a line for each server that asks Patroni, FILE:LINE POOL/SERVER CHECK, and nothing else",
    },
    Described {
        short: None,
        long: "rules",
        value: "",
        commands: &[Command::Check],
        meaning: "explain the rules, and read no file",
    },
    Described {
        short: None,
        long: "socket",
        value: "FILE",
        commands: &[Command::Status, Command::SaveStates],
        meaning: "HAProxy's stats socket (default: the one of the configuration, or else /run/haproxy/admin.sock)",
    },
    Described {
        short: None,
        long: "wait",
        value: "SECONDS",
        commands: &[Command::Status, Command::SaveStates],
        meaning: "keep looking for at most this long, until all is well (status; default 0) or until no client waits for a server in a switchover (save-states; default 5)",
    },
    Described {
        short: None,
        long: "quiet",
        value: "",
        commands: &[Command::Status],
        meaning: "print one line, for monitoring",
    },
    Described {
        short: None,
        long: "metrics",
        value: "FILE",
        commands: &[Command::Status],
        meaning: "print nothing, and write to this file what HAProxy's exporter does not tell Prometheus, for node_exporter's textfile collector",
    },
    Described {
        short: Some('h'),
        long: "help",
        value: "",
        commands: &[],
        meaning: "print this help and exit",
    },
    Described {
        short: Some('V'),
        long: "version",
        value: "",
        commands: &[],
        meaning: "print the version and exit",
    },
];

/// A valid command line.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The command to run.
    pub command: Command,
    /// The files that HAProxy reads; empty means those of HAProxy's service.
    pub files: Vec<PathBuf>,
    /// Whether pools without the agent are checked as if they should have the agent.
    pub agent: bool,
    /// Whether the command only lists the servers.
    pub list: bool,
    /// Whether the command only explains the rules.
    pub rules: bool,
    /// The stats socket.
    pub socket: Option<PathBuf>,
    /// How long to look again; none means the command's default.
    pub wait: Option<Duration>,
    /// Whether to print one line only.
    pub quiet: bool,
    /// The file for metrics, which replace all other output.
    pub metrics: Option<PathBuf>,
}

impl Described {
    /// The option with its value, such as `-f, --file FILE`.
    pub fn usage(&self) -> String {
        let short = self.short.map(|short| format!("-{short}, ")).unwrap_or_default();
        let space = if self.value.is_empty() { "" } else { " " };
        format!("{short}--{}{space}{}", self.long, self.value)
    }

    /// The description, with the commands that accept the option.
    pub fn meaning(&self) -> String {
        let named = COMMANDS.iter().filter(|(_, command, _)| self.commands.contains(command));
        let named: Vec<_> = named.map(|(name, _, _)| *name).collect();
        let colon = if named.is_empty() { "" } else { ": " };
        format!("{}{colon}{}", named.join(", "), self.meaning)
    }
}

impl Options {
    /// Reads the arguments, without the program's name.
    ///
    /// # Errors
    ///
    /// See [`Stop`].
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, Stop> {
        let mut options = Options::default();
        let (mut command, mut given) = (None, Vec::new());
        let mut parser = Parser::from_args(arguments);
        while let Some(argument) = parser.next().map_err(usage)? {
            let option = OPTIONS.iter().find(|option| match &argument {
                Arg::Long(long) => *long == option.long,
                Arg::Short(short) => Some(*short) == option.short,
                Arg::Value(_) => false,
            });
            let Some(option) = option else {
                match argument {
                    Arg::Value(value) if command.is_none() => {
                        let known = COMMANDS.iter().find(|(name, _, _)| value == *name);
                        let unknown =
                            || Stop::Usage(format!("{value:?} is no command; see {NAME} --help"));
                        command = Some(known.ok_or_else(unknown)?);
                    }
                    other => return Err(usage(other.unexpected())),
                }
                continue;
            };
            given.push(option);
            match option.long {
                "file" => options.files.push(parser.value().map_err(usage)?.into()),
                "socket" => options.socket = Some(parser.value().map_err(usage)?.into()),
                "wait" => {
                    let value = parser.value().and_then(|value| value.string()).map_err(usage)?;
                    let seconds = value.parse().ok().filter(|seconds| *seconds <= WAIT);
                    let wrong =
                        || Stop::Usage(format!("--wait {value}: write 0 to {WAIT} seconds"));
                    options.wait = Some(Duration::from_secs(seconds.ok_or_else(wrong)?));
                }
                "agent" => options.agent = true,
                "list" => options.list = true,
                "rules" => options.rules = true,
                "quiet" => options.quiet = true,
                "metrics" => options.metrics = Some(parser.value().map_err(usage)?.into()),
                "help" => return Err(Stop::Print(help())),
                _ => return Err(Stop::Print(format!("{NAME} {VERSION}\n"))),
            }
        }
        let Some((name, command, _)) = command else {
            return Err(Stop::Usage(format!("no command is given; see {NAME} --help")));
        };
        let strange = |option: &&&Described| {
            !option.commands.is_empty() && !option.commands.contains(command)
        };
        if let Some(option) = given.iter().find(strange) {
            return Err(Stop::Usage(format!(
                "{name} takes no --{}; see {NAME} --help",
                option.long
            )));
        }
        options.command = *command;
        Ok(options)
    }
}

fn usage(error: lexopt::Error) -> Stop {
    Stop::Usage(format!("{error}; see {NAME} --help"))
}

/// What `--help` prints.
pub fn help() -> String {
    let mut text = format!(
        "Looks after the Patroni pools of a HAProxy, on its machine.\n\nUsage: {NAME} COMMAND [OPTIONS]\n\n"
    );
    for (name, _, does) in COMMANDS {
        wrap(&mut text, &format!("  {name:26}"), 50, does.split(' '));
    }
    text += "\n";
    for option in OPTIONS {
        let meaning = option.meaning();
        wrap(&mut text, &format!("  {:26}", option.usage()), 50, meaning.split(' '));
    }
    text += "\nExit status:\n";
    for (command, status, meaning) in EXIT_STATUSES {
        wrap(&mut text, &format!("  {command:12}{status:<4}"), 60, meaning.split(' '));
    }
    let _ = write!(text, "\nSee {NAME}(8).\n");
    text
}
