//! `patroni-pools`: each mistake is found at its line, whatever the layout, and a good configuration has none.

use crate::common::file;
use patroni_agent_check::pools::configuration::Configuration;
use patroni_agent_check::pools::pool::Pool;
use patroni_agent_check::pools::rules::{self, RULES};
use patroni_agent_check::pools::words::Environment;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

const POOLS: &str = env!("CARGO_BIN_EXE_patroni-pools");
const GOOD: [&str; 2] = ["units/examples/haproxy.cfg", "units/examples/haproxy-pgbouncer.cfg"];

/// A site as many have it.
const SITE: &str = "\
global
    maxconn 100

defaults
    log global
    mode tcp
    retries 2
    timeout client 30m
    timeout connect 4s
    timeout server 30m
    timeout check 5s

listen pgcluster_rw
    bind *:5000
    option httpchk OPTIONS /primary
    http-check expect status 200
    default-server inter 3s fall 3 rise 2 on-marked-down shutdown-sessions
    server db-a 10.0.0.1:5432 maxconn 100 check port 8008
    server db-b 10.0.0.2:5432 maxconn 100 check port 8008
    server db-c 10.0.0.3:5432 maxconn 100 check port 8008

listen pgcluster_ro
    bind *:5001
    option httpchk OPTIONS /replica
    http-check expect status 200
    default-server inter 3s fall 3 rise 2 on-marked-down shutdown-sessions
    server db-a 10.0.0.1:5432 maxconn 100 check port 8008
    server db-b 10.0.0.2:5432 maxconn 100 check port 8008
    server db-c 10.0.0.3:5432 maxconn 100 check port 8008
";

fn of(text: &str) -> Configuration {
    Configuration::of("x", text, Environment::new())
}

/// What is found: line and rule.
fn found(text: &str, agent: bool) -> BTreeSet<(usize, &'static str)> {
    let findings = rules::find(&of(text), agent);
    findings.iter().map(|finding| (finding.place.line, finding.rule)).collect()
}

fn text(name: &str) -> String {
    fs::read_to_string(file(name)).expect(name)
}

/// What is listed, without the file.
fn list(configuration: &Configuration) -> Vec<String> {
    let mut list = Vec::new();
    for pool in &Pool::all(configuration) {
        for server in &pool.servers {
            if let Some(check) = pool.question(server) {
                list.push(format!("{} {}/{} {check}", server.place.line, pool.name(), server.name));
            }
        }
    }
    list
}

#[test]
fn a_good_configuration_has_no_mistake() {
    for name in GOOD {
        for agent in [false, true] {
            assert_eq!(found(&text(name), agent), BTreeSet::new(), "{name} {agent}");
        }
    }
    assert_eq!(found(SITE, false), BTreeSet::new());
    assert_eq!(found(&text("tests/moves/before.cfg"), false), BTreeSet::new());
    // what README says of a pool without the agent
    let reserve = "listen x\n option httpchk\n http-check connect port 8008\n http-check send meth GET uri /primary\n \
        http-check expect error-status L7STS status 200,503\n \
        http-check expect error-status L7OKC on-error \"not primary\" rstring \"\\\"role\\\": \\\"(primary|master)\\\"\"\n \
        http-check expect error-status L7STS on-error \"lock lost\" status 200\n \
        default-server inter 500ms on-marked-down shutdown-sessions\n server a b:5432 check port 8008\n";
    assert_eq!(found(reserve, false), BTreeSet::new());
}

/// A change of the site, what it makes wrong, and where.
#[test]
fn each_mistake_is_found_at_its_line() {
    let on = " on-marked-down shutdown-sessions";
    let one = "server db-b 10.0.0.2:5432 maxconn 100 check port 8008";
    let rw = "option httpchk OPTIONS /primary";
    let expect = "http-check expect status 200";
    for (old, new, at, rule) in [
        (on, "", &[13][..], "sessions-kept"),
        (rw, "option tcp-check", &[18, 19, 20], "no-lock"),
        (rw, "option pgsql-check user x", &[18, 19, 20], "no-lock"),
        (rw, "", &[18, 19, 20], "no-lock"),
        (rw, "option httpchk GET /health", &[15], "no-lock"),
        (expect, "http-check expect rstring \"role\": \"primary\"", &[16], "role-word"),
        (rw, "option httpchk GET /patroni", &[15], "no-lock"),
        ("OPTIONS /replica", "GET /liveness", &[24], "no-role"),
        ("inter 3s fall 3 rise 2", "inter 30s fall 3", &[18, 19, 20], "slow-check"),
        (one, "server db-b 10.0.0.2:5432 check port 8008 inter 30s", &[19], "slow-check"),
        ("timeout check 5s", "timeout check 15s", &[11], "slow-timeout-check"),
        (one, "server db-b 10.0.0.2:6432 check port 8008", &[19], "pooler-unchecked"),
        ("mode tcp", "mode http", &[13, 22], "http-mode"),
        ("bind *:5000", "mode http", &[14], "http-mode"),
        ("bind *:5000", "http-request set-header a b", &[14], "http-rules"),
        ("bind *:5000", "option forwardfor", &[14], "http-rules"),
        ("timeout client 30m", "timeout client 5000", &[8], "short-timeout"),
        ("timeout server 30m", "timeout server 50s", &[10], "short-timeout"),
        ("timeout server 30m", "timeout server 30m\n timeout tunnel 1m", &[11], "short-timeout"),
        (one, "server db-b 10.0.0.2:5432", &[19], "unchecked-server"),
        (one, "server db-b 10.0.0.2:5432 check", &[19], "asks-postgresql"),
    ] {
        let changed = SITE.replacen(old, new, 1);
        assert_ne!(changed, SITE, "{old}");
        let wanted = at.iter().map(|line| (*line, rule)).collect();
        assert_eq!(found(&changed, false), wanted, "{old} -> {new}");
    }
    // a server of its own
    let only = SITE.replacen(on, "", 1).replacen("10.0.0.2:5432", &format!("10.0.0.2:5432{on}"), 1);
    assert_eq!(found(&only, false), [18, 20].map(|line| (line, "sessions-kept")).into());
    // a longer time limit for the time after the start
    let tunnel = SITE.replace("timeout client 30m", "timeout client 5s\n timeout tunnel 30m");
    assert_eq!(found(&tunnel, false), BTreeSet::new());
}

/// With the agent: each setting of the shipped file that tests/settings takes out.
#[test]
fn each_setting_that_is_taken_out_is_missed() {
    let table = text("tests/settings");
    let rows: Vec<_> =
        table.lines().filter(|row| row.starts_with("examples/haproxy.cfg | ")).collect();
    assert!(rows.len() > 30);
    let good = text(GOOD[0]);
    for row in rows {
        let [_, change, _] = row.split(" | ").collect::<Vec<_>>()[..] else { panic!("{row}") };
        let changed = sed(change, &good);
        assert_ne!(changed, good, "{row}");
        assert_ne!(found(&changed, false), BTreeSet::new(), "{row}");
    }
}

/// Other mistakes with the agent, and where.
#[test]
fn each_mistake_with_the_agent_is_found_at_its_line() {
    let good = text(GOOD[0]);
    let line = |words: &str| good.lines().position(|line| line.contains(words)).expect("there") + 1;
    let (write, read, watch) = (
        line("server pg1 pg1:5432 agent-send \"primary"),
        line("server pg1 pg1:5432 agent-send \"replica"),
        line("server pg1 pg1:5555"),
    );
    for (change, at, rule) in [
        (r#"s/(pg1:5432 agent-send) "primary\\n"/\1 "primary"/"#, vec![write], "agent-send"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/\1 'primary\\n'/"#, vec![write], "agent-send"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/\1 "primery\\n"/"#, vec![write], "agent-send"),
        (r#"s/(pg1:5432) agent-send "primary\\n"/\1/"#, vec![write], "agent-send"),
        (
            r#"s/(pg1:5432 agent-send) "replica.lag=16MB\\n"/\1 "replica\\n"/"#,
            vec![read],
            "own-check-differs",
        ),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& agent-port 5554/"#, vec![write], "agent-port"),
        ("s/pg1:5555/pg1:5554/", vec![watch], "agent-port"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& no-check/"#, vec![write], "own-check-missing"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& enabled/"#, vec![write], "not-disabled"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& maxconn 0/"#, vec![write], "crowd"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& agent-inter 3s/"#, vec![write], "agent-inter"),
        (
            "s/hard-stop-after 15s/hard-stop-after 1h/",
            vec![line("hard-stop-after 15s")],
            "old-process",
        ),
        ("s/timeout check 2s/timeout check 1s/", vec![line("timeout check 2s")], "late-answer"),
        ("s/lt 3/lt 2/", vec![line("lt 3 }")], "reserve"),
        (
            "/server pg1 pg1:5555/d",
            vec![line("use_backend reserve if"), write],
            "agents-watched reserve",
        ),
    ] {
        let changed = sed(change, &good);
        assert_ne!(changed, good, "{change}");
        let found = found(&changed, false);
        let lines: BTreeSet<_> = found.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, at.into_iter().collect(), "{change}: {found:?}");
        assert!(found.iter().all(|(_, found)| rule.contains(found)), "{change}: {found:?}");
    }
}

/// With `--agent`, all that is missing is found, and each server keeps the site's own health check.
#[test]
fn what_the_agent_needs() {
    let findings = rules::find(&of(SITE), true);
    let missing = |line| {
        let found = findings.iter().find(|f| f.place.line == line && f.rule == "agent-missing");
        found.expect("a finding").text.clone()
    };
    assert!(missing(18).ends_with(
        "add agent-check agent-port 5555 agent-inter 500ms agent-send \"primary\\n\" disabled"
    ));
    assert!(missing(27).ends_with("agent-send \"replica\\n\" disabled"), "{}", missing(27));
    let rules: BTreeSet<_> = findings.iter().map(|finding| finding.rule).collect();
    for rule in
        ["state-file", "old-process", "waiting-room", "agents-watched", "reserve", "gone-machine"]
    {
        assert!(rules.contains(rule), "{rule}: {rules:?}");
    }
}

/// The same site in other layouts: the same is understood, and the same mistake found.
#[test]
fn every_layout_is_understood() {
    let wanted: Vec<_> = list(&of(SITE))
        .iter()
        .map(|line| line.split_once(' ').expect("a line").1.to_owned())
        .collect();
    assert_eq!(wanted.len(), 6);
    assert_eq!(wanted[3], "pgcluster_ro/db-a replica");
    let split = SITE
        .replace("listen pgcluster_rw\n    bind *:5000", "frontend in_rw\n    bind *:5000\n    default_backend pgcluster_rw\nbackend pgcluster_rw")
        .replace("listen pgcluster_ro\n    bind *:5001", "frontend in_ro\n    bind *:5001\n    default_backend pgcluster_ro\nbackend pgcluster_ro");
    let tabs = SITE.replace("    ", "\t").replace(" check port", "\tcheck  port");
    let comments = SITE
        .replace("port 8008", "port 8008 # disabled enabled no-check")
        .replace("\n\n", "\n# server x y:1 check\n");
    let quotes =
        SITE.replace("/primary", "\"/primary\"").replace("db-b 10.0.0.2", "'db-b' \"10.0.0.2\"");
    let defaults = SITE
        .replace("defaults\n", "defaults base\n")
        .replace("listen pgcluster_ro", "defaults web\n    mode http\n    default-server inter 99s no-check disabled\nlisten pgcluster_ro from base");
    let variables =
        format!("global\n setenv PG1 10.0.0.1\n{}", SITE.replace("10.0.0.1:", "\"${PG1}\":"));
    let conditions = SITE.replace(
        "listen pgcluster_ro",
        ".if defined(NOTHING)\nlisten nothing\n server a b:5432 check\n.else\nlisten pgcluster_ro",
    ) + ".endif\n";
    let crlf = SITE.replace('\n', "\r\n");
    for layout in [&split, &tabs, &comments, &quotes, &defaults, &variables, &conditions, &crlf] {
        let configuration = of(layout);
        assert_eq!(configuration.notes, []);
        let listed = list(&configuration);
        let names: Vec<_> =
            listed.iter().map(|line| line.split_once(' ').expect("a line").1).collect();
        assert_eq!(names, wanted, "{layout}");
        assert_eq!(found(layout, false), BTreeSet::new(), "{layout}");
        let changed = layout.replacen(" on-marked-down shutdown-sessions", "", 1);
        let at = layout
            .lines()
            .position(|line| line.ends_with("pgcluster_rw") && !line.contains("default_"))
            .expect("a pool")
            + 1;
        assert_eq!(found(&changed, false), [(at, "sessions-kept")].into(), "{layout}");
    }
    let template = SITE
        .replace("server db-a 10.0.0.1:5432", "server-template db- 3 pg.example:5432 resolvers dns")
        .lines()
        .filter(|line| !line.contains("server db-"))
        .map(|line| format!("{line}\n"))
        .collect::<String>();
    assert_eq!(
        list(&of(&template))[..2],
        ["18 pgcluster_rw/db-1 primary", "18 pgcluster_rw/db-2 primary"]
    );
    assert_eq!(found(&template, false), BTreeSet::new());
}

#[test]
fn folders_and_several_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let (global, pools) = SITE.split_once("listen").expect("pools");
    let put = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).expect("a file");
    };
    put("10-rw.cfg", &format!("listen{}", pools.split("listen").next().expect("a pool")));
    put(
        "20-ro.cfg",
        &format!("listen{}", pools.split("listen").nth(1).expect("a pool"))
            .replace("OPTIONS /replica", "GET /liveness"),
    );
    put(".hidden.cfg", "nonsense");
    put("readme", "nonsense");
    put("base", global);
    let base = folder.path().join("base");
    let run = |arguments: &[&str]| {
        let output =
            Command::new(POOLS).arg("check").args(arguments).output().expect("the program");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (base, path) = (base.display().to_string(), folder.path().display().to_string());
    let (status, said) = run(&["-f", &base, "-f", &path, "--list"]);
    assert_eq!((status, said.lines().count()), (Some(0), 6), "{said}");
    assert!(said.starts_with(&format!("{path}/10-rw.cfg:6 pgcluster_rw/db-a primary\n")), "{said}");
    let (status, said) = run(&["-f", &base, "-f", &path]);
    assert_eq!((status, said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.starts_with(&format!("{path}/20-ro.cfg:3: no-role: pgcluster_ro: ")), "{said}");
    let (status, said) = run(&["-f", &base, "-f", &format!("{path}/10-rw.cfg")]);
    assert_eq!((status, &*said), (Some(0), ""));
    assert_eq!(run(&["-f", "/nowhere"]), (Some(2), String::new()));
    assert_eq!(run(&["-f", "/dev/zero"]), (Some(2), String::new()));
    assert_eq!(run(&["--nonsense"]).0, Some(64));
    let (status, said) = run(&["--rules"]);
    assert_eq!((status, said.lines().count()), (Some(0), RULES.len()));
}

/// What cannot be known is said, and no guess is made.
#[test]
fn what_is_not_understood_is_said() {
    for (line, said) in [
        (".if feature(OPENSSL)\n.endif", "condition"),
        ("server a \"${NOTHING}:5432\"", "NOTHING"),
        ("server \"a", "quote"),
        ("listen b from c", "defaults c"),
        (".endif", ".if"),
    ] {
        let configuration = of(&format!("listen a\n{line}\n"));
        assert!(
            configuration.notes.iter().any(|(place, note)| place.line == 2 && note.contains(said)),
            "{line}"
        );
    }
}

/// Whatever the files are, reading ends, without a panic.
#[test]
fn no_input_makes_it_fail() {
    let seeds = [text(GOOD[0]), text(GOOD[1]), SITE.to_owned()];
    let words = [
        "\"",
        "'",
        "\\",
        "${",
        "}",
        "[*]",
        "\n",
        "\0",
        "server-template x 1-4294967295 a:1\n",
        "\u{fffd}",
        "listen a from a\n",
        ".if ((((\n",
        ".else\n",
        "99999999999999999999",
        "é",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % limit as u64).expect("below")
    };
    for round in 0..300 {
        let mut bytes: Vec<char> = seeds[round % seeds.len()].chars().collect();
        for _ in 0..=below(6) {
            let (from, to) = (below(bytes.len() + 1), below(bytes.len() + 1));
            match below(3) {
                0 => drop(bytes.drain(from.min(to)..from.max(to).min(from.min(to) + 40))),
                1 => drop(bytes.splice(from..from, words[below(words.len())].chars())),
                _ => {
                    let part = bytes[from.min(to)..from.max(to).min(from.min(to) + 200)].to_vec();
                    let at = below(bytes.len() + 1);
                    bytes.splice(at..at, part);
                }
            }
        }
        let text: String = bytes.into_iter().collect();
        let configuration = of(&text);
        list(&configuration);
        let findings = rules::find(&configuration, round % 2 == 0);
        for finding in findings {
            assert!(finding.place.line <= text.split('\n').count());
            assert!(!configuration.say(finding.place).is_empty());
        }
    }
}

/// A thousand servers take less than 0.1 s in the program that is shipped; how long is printed.
#[test]
fn a_thousand_servers() {
    let mut text = SITE.split("    server").next().expect("a pool").to_owned();
    for number in 0..1000 {
        text += &format!(
            "    server s{number} 10.0.{}.{}:5432 check port 8008 agent-check agent-port 5555 agent-send \"primary\\n\"\n",
            number / 250,
            number % 250 + 1
        );
    }
    let began = Instant::now();
    let findings = rules::find(&of(&text), true);
    println!("1,000 servers, {} findings: {:.3} s", findings.len(), began.elapsed().as_secs_f32());
    assert!(findings.len() > 1000);
}

/// What sed -E makes of a text.
fn sed(change: &str, text: &str) -> String {
    let mut sed = Command::new("sed")
        .args(["-E", change])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sed");
    let mut input = sed.stdin.take().expect("a pipe");
    input.write_all(text.as_bytes()).expect("sed reads");
    drop(input);
    let output = sed.wait_with_output().expect("sed");
    assert!(output.status.success(), "{change}");
    String::from_utf8(output.stdout).expect("text")
}
