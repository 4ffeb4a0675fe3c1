//! Runs on HAProxy's machine: reports mistakes in HAProxy's configuration for Patroni, compares HAProxy's states with
//! the configuration, and keeps the servers' states over a reload. Reads the command line and prints; `pools` does the
//! work.

#![deny(clippy::unwrap_used)]

use patroni_agent_check::haproxy::reply::to_printable;
use patroni_agent_check::options::Stop;
use patroni_agent_check::pools::configuration::Configuration;
use patroni_agent_check::pools::options::{Command, NAME, Options};
use patroni_agent_check::pools::pool::Pool;
use patroni_agent_check::pools::rules::{self, RULES};
use patroni_agent_check::pools::service::{self, Service};
use patroni_agent_check::pools::{haproxy, states, status};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;

/// The maximum length of a printed line.
const LINE: usize = 20_000;
/// The maximum number of HAProxy's messages that are shown, and of notes on what this program did not understand.
const LINES: usize = 40;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args_os().skip(1)) {
        Ok(options) => options,
        Err(Stop::Print(text)) => {
            text.lines().for_each(say);
            return ExitCode::SUCCESS;
        }
        Err(Stop::Usage(error)) => {
            complain(&error);
            return ExitCode::from(64);
        }
    };
    if options.rules {
        return explain_rules();
    }
    let service = service(&options);
    match options.command {
        Command::Check => check(&options, &service),
        Command::Status => see_status(&options, &service),
        Command::SaveStates => {
            let wait = options.wait.unwrap_or(states::WAIT);
            let said = states::save(&service, options.socket.as_deref(), wait);
            said.iter().for_each(|line| complain(line));
            ExitCode::SUCCESS
        }
    }
}

/// The files and variables of haproxy.service. Files on the command line replace the service's files.
fn service(options: &Options) -> Service {
    let service = service::read_service(Path::new("/"));
    let own = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    // For the service's own files, the service's variables take precedence over those of the shell.
    if options.files.is_empty() {
        let environment = own.chain(service.environment).collect();
        return Service { files: service.files, environment };
    }
    let environment = service.environment.into_iter().chain(own).collect();
    Service { files: options.files.clone(), environment }
}

fn explain_rules() -> ExitCode {
    for rule in RULES {
        let only = if rule.agent { " (with the agent)" } else { "" };
        say(&format!("{}{only}: {}", rule.name, rule.why));
    }
    ExitCode::SUCCESS
}

fn read(service: &Service) -> Result<Configuration, String> {
    Configuration::read(&service.files, service.environment.clone(), &haproxy::ask_version)
}

fn check(options: &Options, service: &Service) -> ExitCode {
    let configuration = match read(service) {
        Ok(configuration) => configuration,
        Err(error) => {
            complain(&error);
            return ExitCode::from(2);
        }
    };
    if options.list {
        return list(&configuration);
    }
    // HAProxy checks the files in parallel.
    let (judged, findings) = thread::scope(|scope| {
        let judge = scope.spawn(|| haproxy::judge(&service.files, &service.environment));
        let findings = rules::find(&configuration, options.agent, haproxy::ask_version());
        (judge.join(), findings)
    });
    let judged = judged.unwrap_or_else(|_| Err("bug in asking HAProxy".to_owned()));
    let refused = show_judgement(judged);
    say_what_is_unknown(&configuration);
    for finding in &findings {
        let place = configuration.say(finding.place);
        say(&format!("{place}: {}: {}", finding.rule, finding.text));
    }
    match (refused || configuration.is_partial, findings.is_empty()) {
        (true, _) => ExitCode::from(2),
        (false, true) => ExitCode::SUCCESS,
        (false, false) => ExitCode::FAILURE,
    }
}

/// Prints what this program did not understand, and what the files do not tell.
fn say_what_is_unknown(configuration: &Configuration) {
    for (place, note) in configuration.notes.iter().take(LINES) {
        complain(&format!("{}: {note}", configuration.say(*place)));
    }
    if configuration.notes.len() > LINES {
        complain(&format!("... and {} more", configuration.notes.len() - LINES));
    }
    for line in configuration.sections.iter().flat_map(|section| &section.lines) {
        let leads = ["use_backend", "default_backend"].contains(&line.word(0));
        if leads && line.word(1).contains("%[") {
            let (place, name) = (configuration.say(line.place), line.word(1));
            complain(&format!("{place}: {name}: which pool this leads to is not known here"));
        }
    }
    let pools = Pool::all(configuration);
    for pool in pools.iter().filter(|pool| pool.check.option == "external-check") {
        let (name, place) = (pool.name(), configuration.say(pool.section.place));
        complain(&format!("{place}: {name}: what its external-check asks is not known here"));
    }
    if !pools.iter().any(Pool::asks_patroni) {
        complain("no server in these files asks Patroni");
    }
}

/// Prints HAProxy's messages about the files. Returns whether HAProxy refuses the files.
fn show_judgement(judged: Result<Option<(bool, String)>, String>) -> bool {
    let (taken, said) = match judged {
        Ok(Some(judged)) => judged,
        Ok(None) => {
            complain(
                "haproxy is not on this machine, so nobody has said whether these files are valid",
            );
            return false;
        }
        Err(error) => {
            complain(&format!("{error}; HAProxy has not judged these files"));
            return true;
        }
    };
    // HAProxy prints its name and version before its messages.
    let said: Vec<_> = said.lines().filter(|line| !line.starts_with("[NOTICE]")).collect();
    said.iter().take(LINES).for_each(|line| complain(&format!("haproxy: {line}")));
    // A machine where an administrator only checks a file may not resolve its names.
    let name = |line: &&str| {
        line.contains("could not resolve address") || line.contains("initialize server(s) addr")
    };
    let alerts: Vec<_> = said.iter().filter(|line| line.starts_with("[ALERT]")).collect();
    match taken {
        true => {}
        false if !alerts.is_empty() && alerts.iter().all(|line| name(line)) => {
            complain(
                "HAProxy can read these files, but will not start here: this machine does not know the names above",
            );
            return false;
        }
        false => complain("HAProxy refuses these files"),
    }
    !taken
}

fn list(configuration: &Configuration) -> ExitCode {
    say_what_is_unknown(configuration);
    for pool in Pool::all(configuration) {
        for server in &pool.servers {
            if let Some(check) = pool.question(server) {
                let place = configuration.say(server.place);
                say(&format!("{place} {}/{} {check}", pool.name(), server.name));
            }
        }
    }
    ExitCode::SUCCESS
}

fn see_status(options: &Options, service: &Service) -> ExitCode {
    let configuration = read(service);
    if let Err(error) = &configuration {
        complain(&format!("{error}; only the servers with an agent are shown"));
    }
    let wait = options.wait.unwrap_or_default();
    let asks_patronis = !options.quiet && options.metrics.is_none();
    let configuration = configuration.unwrap_or_default();
    let seen = status::see(&configuration, options.socket.as_deref(), wait, asks_patronis);
    let seen = match seen {
        Ok(seen) => seen,
        Err(error) => {
            if options.quiet {
                say(&format!("UNKNOWN: {error}"));
            } else {
                complain(&error);
            }
            return ExitCode::from(2);
        }
    };
    if let Some(file) = &options.metrics {
        return match states::replace(file, &seen.metrics()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&format!("{}: {error}", file.display()));
                ExitCode::FAILURE
            }
        };
    }
    if options.quiet {
        say(&seen.summary());
    } else {
        seen.lines().iter().for_each(|line| say(line));
    }
    if seen.is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints a line on stdout. Ignores errors, because the reader may have closed the pipe.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{}", to_printable(line, LINE));
}

/// Prints a line on stderr.
fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{NAME}: {}", to_printable(line, LINE));
}
