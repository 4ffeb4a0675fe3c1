//! The hook for Patroni's `postgresql.before_stop` (3.0.3 and later). Patroni runs the hook and waits for it before it
//! stops PostgreSQL, so that HAProxy learns of the stop and short transactions end. The hook does not know why Patroni
//! stops PostgreSQL: Patroni may have lost the leader lock. On a primary, the hook waits only as long as the lock surely
//! lives.

#![deny(clippy::print_stdout, clippy::unwrap_used)]

use lexopt::{Arg, Parser, ValueExt};
use patroni_agent_check::NAME as AGENT;
use patroni_agent_check::by_hand::settings;
use patroni_agent_check::clock::now;
use patroni_agent_check::decide::{bounds, grace};
use patroni_agent_check::options::{Options, Stop, parse_duration};
use patroni_agent_check::patroni::answer::Answer;
use patroni_agent_check::patroni::check::{self, Check};
use patroni_agent_check::run::before_stop::{self, Patience};
use patroni_agent_check::run::memory::Memory;
use rustix::process::getppid;
use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const NAME: &str = "patroni-before-stop";
const HELP: &str = "\
Patroni's before_stop hook: lets HAProxy hear that PostgreSQL is about to stop, and short transactions end.

Usage, in Patroni's configuration: before_stop: /usr/lib/patroni-agent-check/before-stop [OPTIONS] [-- AGENT-OPTIONS]

  --agent-inter DURATION       HAProxy's agent-inter of the write pool (default 500ms)
  --read-agent-inter DURATION  HAProxy's agent-inter of the read pool (default 2s)
  --bound DURATION             on a primary, never wait longer than this (default 2s)
  --watchdog-margin DURATION   Patroni's watchdog.safety_margin, if it uses a watchdog (default 5s)
  --connect STRING             libpq's connection string, for a superuser or a member of pg_read_all_stats
                               (default: psql's defaults)

AGENT-OPTIONS take the place of the agent's settings file. See patroni-agent-check(8).
";
/// The time between two requests to Patroni.
const PERIOD: Duration = Duration::from_millis(100);
/// How long one agent check takes on a busy machine.
const CHECK: Duration = Duration::from_millis(200);
/// How long the hook waits for Patroni's answer. While Patroni's service stops, its port is open and nobody answers.
const ANSWER: Duration = Duration::from_millis(300);
/// The minimum time for a fast stop of PostgreSQL. The lock must outlive the stop.
const STOP: Duration = Duration::from_secs(2);

/// The arguments.
struct Hook {
    agent_inter: Duration,
    read_agent_inter: Duration,
    bound: Duration,
    watchdog_margin: Duration,
    connect: String,
    agent: Vec<OsString>,
}

fn main() -> ExitCode {
    let began = Instant::now();
    if std::env::args_os().skip(1).any(|word| word == "-h" || word == "--help") {
        let _ = std::io::stdout().write_all(HELP.as_bytes());
        return ExitCode::SUCCESS;
    }
    let waited = Hook::parse().and_then(|hook| hook.wait(began));
    let (text, status) = match waited {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(why)) => (why, ExitCode::SUCCESS),
        Err(why) => (why, ExitCode::FAILURE),
    };
    eprintln!("{NAME}: {text}, after {:.1} s", began.elapsed().as_secs_f32());
    status
}

impl Hook {
    fn parse() -> Result<Hook, String> {
        let mut hook = Hook {
            agent_inter: Duration::from_millis(500),
            read_agent_inter: Duration::from_secs(2),
            bound: Duration::from_secs(2),
            watchdog_margin: Duration::from_secs(5),
            connect: String::new(),
            agent: Vec::new(),
        };
        let mut words = std::env::args_os().skip(1);
        let own: Vec<_> = words.by_ref().take_while(|word| word != "--").collect();
        hook.agent = words.collect();
        let mut parser = Parser::from_args(own);
        let wrong = |error: lexopt::Error| format!("{error}; see {NAME} --help");
        while let Some(argument) = parser.next().map_err(wrong)? {
            let place = match argument {
                Arg::Long("agent-inter") => &mut hook.agent_inter,
                Arg::Long("read-agent-inter") => &mut hook.read_agent_inter,
                Arg::Long("bound") => &mut hook.bound,
                Arg::Long("watchdog-margin") => &mut hook.watchdog_margin,
                Arg::Long("connect") => {
                    hook.connect = parser.value().and_then(|text| text.string()).map_err(wrong)?;
                    continue;
                }
                other => return Err(wrong(other.unexpected())),
            };
            let value = parser.value().map_err(wrong)?;
            let error = format!("'{}': write 0ms to 60s, such as 500ms", value.to_string_lossy());
            *place = parse_duration(&value, 0..=60_000).ok_or(error)?;
        }
        Ok(hook)
    }

    /// Waits. Returns a reason if transactions outlasted the time. Fails with a reason if the hook had to give up.
    fn wait(&self, began: Instant) -> Result<Option<String>, String> {
        let options =
            settings::read_command_line(self.agent.clone()).map_err(|stop| match stop {
                Stop::Usage(text) | Stop::Print(text) => format!("{AGENT}: {text}"),
            })?;
        let file = &options.files.before_stop;
        let locked_note = match before_stop::leave_note(file) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err("another hook is running".to_owned());
            }
            left => left.map_err(|error| {
                format!(
                    "{}: {error}; the file must be there and belong to Patroni's user",
                    file.display()
                )
            }),
        };
        let prepared = options.patroni.prepare(None);
        if let Some(no_answer) = prepared.failure() {
            return Err(no_answer.reason.clone());
        }
        let check = Check::default();
        let told = |inter: Duration| began + inter + CHECK;
        let mut end = began + self.bound;
        let ask = |end| prepared.ask(&check, &Patience::until(end)).answer;
        match ask(end.min(began + ANSWER)) {
            Ok(answer) if answer.status == 200 => {
                let lock_time = prepared.lock_settings(end).and_then(bounds::shortest_lock_time);
                let lock_time = lock_time.ok_or("Patroni does not tell its ttl (GET /config)")?;
                let patroni = getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
                let lock_time = lock_time.saturating_sub(STOP + self.watchdog_time(patroni));
                let lock_left = |answer: &Answer| lock_time.saturating_sub(dcs_age(answer));
                end = end.min(Instant::now() + lock_left(&answer));
                let check_lock = |end| match ask(end) {
                    Ok(answer) if answer.status == 200 => Ok(Instant::now() + lock_left(&answer)),
                    Ok(answer) => Err(format!("Patroni answers {} to /primary", answer.status)),
                    Err(no_answer) => Err(no_answer.reason),
                };
                self.wait_for_transactions(told(self.agent_inter), end, check_lock)
            }
            Ok(answer) if matches!(answer.role.as_str(), "replica" | "standby_leader") => {
                sleep_until(told(self.read_agent_inter));
                Ok(None)
            }
            Ok(answer) => Err(format!("Patroni answers {} to /primary", answer.status)),
            // Patroni's own service stops and has closed its REST API first. The agent sees the note and tells HAProxy.
            Err(_) => {
                let _locked_note = locked_note?;
                match remembered_lock_time(&options)? {
                    Some(left) => {
                        let silence = before_stop::timeout_with_note(options.timeout);
                        let told = told(self.agent_inter + silence);
                        self.wait_for_transactions(told, end.min(Instant::now() + left), Ok)
                    }
                    None => {
                        sleep_until(told(self.read_agent_inter));
                        Ok(None)
                    }
                }
            }
        }
    }

    /// Waits until HAProxy was `told`, and then for transactions, but not beyond `end`. `check_lock` may return an
    /// earlier end.
    fn wait_for_transactions(
        &self,
        told: Instant,
        mut end: Instant,
        check_lock: impl Fn(Instant) -> Result<Instant, String>,
    ) -> Result<Option<String>, String> {
        let mut psql = None;
        let waited = loop {
            let now = Instant::now();
            if now >= end {
                break Ok(Some("the time is over".to_owned()));
            }
            if now >= told && psql.is_none() {
                let started = self.start_psql(end - now);
                psql = Some(started.map_err(|error| format!("psql: {error}"))?);
            }
            match psql.as_mut().map(Child::try_wait) {
                Some(Ok(Some(status))) if status.success() => break Ok(None),
                Some(Ok(Some(status))) => break Err(format!("psql: {status}")),
                Some(Err(error)) => break Err(format!("psql: {error}")),
                Some(Ok(None)) | None => {}
            }
            match check_lock(end) {
                Ok(sooner) => end = end.min(sooner),
                Err(_) if Instant::now() >= end => continue,
                Err(why) => break Err(why),
            }
            let next = if now < told { told.min(end) } else { end };
            sleep_until(next.min(Instant::now() + PERIOD));
        };
        if let Some(mut psql) = psql {
            let _ = psql.kill();
        }
        waited
    }

    /// Starts a psql that ends as soon as no client has a transaction open. Transactions that have been open for longer
    /// than the bound do not count, because they will not end in time. One session that waits in the server costs less
    /// than repeated queries.
    fn start_psql(&self, left: Duration) -> std::io::Result<Child> {
        let bound = self.bound.as_millis();
        let wait = format!(
            "do $$ begin while exists (select from pg_stat_activity where backend_type = 'client backend' \
             and pid <> pg_backend_pid() and xact_start > now() - interval '{bound} ms') \
             loop perform pg_sleep(0.02), pg_stat_clear_snapshot(); end loop; end $$"
        );
        Command::new("psql")
            .args(["-X", "-w", "-q", "-d", &self.connect, "-c", &wait])
            .env("PGOPTIONS", format!("-c statement_timeout={}", left.as_millis().max(1)))
            .env("PGAPPNAME", NAME)
            .env("PGCONNECT_TIMEOUT", "2")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
    }

    /// The part of the lock's time that the watchdog takes, if Patroni has a watchdog open.
    fn watchdog_time(&self, patroni: i32) -> Duration {
        let open = fs::read_dir(format!("/proc/{patroni}/fd")).into_iter().flatten().flatten();
        let mut files = open.filter_map(|file| fs::read_link(file.path()).ok());
        let uses = files.any(|file| file.to_string_lossy().starts_with("/dev/watchdog"));
        if uses { self.watchdog_margin } else { Duration::ZERO }
    }
}

/// How long ago Patroni last read the DCS, in whole seconds. A Patroni that does not tell this (before 2.1.2) runs no
/// hook.
fn dcs_age(answer: &Answer) -> Duration {
    let seen = answer.dcs_last_seen.unwrap_or(0);
    Duration::from_secs(answer.date.saturating_sub(seen).into())
}

/// How long the lock of this node certainly lives, by the records of the last checks: until their grace period ends.
/// None on a node that is no primary. Fails if no check of a write pool has left a record.
fn remembered_lock_time(options: &Options) -> Result<Option<Duration>, String> {
    let (now, patronis) = (now(), options.patroni.all_endpoints());
    let checks = check::names().filter_map(|name| name.parse().ok()).filter(Check::needs_lock);
    let record = |check| {
        let memory = Memory::open(&options.files.memory, true);
        memory.recall(&patronis, Some(&check), None).last.clone()
    };
    let records = checks.map(record).filter(|record| !record.at.is_zero());
    let newest = records.max_by_key(|record| record.at).ok_or(
        "the memory file has no check of a write pool: does HAProxy ask this node's agent?",
    )?;
    let end = grace::grace_end(&newest, options.policy.grace);
    Ok(grace::was_ready(&newest).then(|| end.saturating_sub(now)))
}

fn sleep_until(time: Instant) {
    thread::sleep(time.saturating_duration_since(Instant::now()));
}
