//! `patroni-pools` finds each mistake at its line in any layout, and none in a good configuration.

use crate::common::{FakePatroni, file, http};
use patroni_agent_check::pools::configuration::Configuration;
use patroni_agent_check::pools::pool::Pool;
use patroni_agent_check::pools::rules::{self, RULES};
use patroni_agent_check::pools::states;
use patroni_agent_check::pools::words::Environment;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const POOLS: &str = env!("CARGO_BIN_EXE_patroni-pools");
const GOOD: [&str; 2] = ["units/examples/haproxy.cfg", "units/examples/haproxy-pgbouncer.cfg"];

/// A typical site without the agent.
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

fn parse(text: &str) -> Configuration {
    Configuration::of("x", text, Environment::new())
}

/// The mistakes in a configuration: line and rule.
fn mistakes(text: &str, agent: bool) -> BTreeSet<(usize, &'static str)> {
    let findings = rules::find(&parse(text), agent, None);
    findings.iter().map(|finding| (finding.place.line, finding.rule)).collect()
}

fn read(name: &str) -> String {
    fs::read_to_string(file(name)).expect(name)
}

/// What `check --list` prints, without the file.
fn list_servers(configuration: &Configuration) -> Vec<String> {
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
            assert_eq!(mistakes(&read(name), agent), BTreeSet::new(), "{name} {agent}");
        }
    }
    assert_eq!(mistakes(SITE, false), BTreeSet::new());
    assert_eq!(mistakes(&read("tests/walks/sites/template/haproxy.cfg"), false), BTreeSet::new());
    // a pool without the agent, with the checks of the backend `reserve`
    let reserve = "listen x\n option httpchk\n http-check connect port 8008\n http-check send meth GET uri /primary\n \
        http-check expect error-status L7STS status 200,503\n \
        http-check expect error-status L7OKC on-error \"not primary\" rstring \"\\\"role\\\": \\\"(primary|master)\\\"\"\n \
        http-check expect error-status L7STS on-error \"lock lost\" status 200\n \
        default-server inter 500ms on-marked-down shutdown-sessions\n server a b:5432 check port 8008\n";
    assert_eq!(mistakes(reserve, false), BTreeSet::new());
}

/// Each row has a change of the site, the lines of the mistake, and the rule.
#[test]
fn each_mistake_is_found_at_its_line() {
    let on = " on-marked-down shutdown-sessions";
    let one = "server db-b 10.0.0.2:5432 maxconn 100 check port 8008";
    let rw = "option httpchk OPTIONS /primary";
    let expect = "http-check expect status 200";
    for (old, new, at, rule) in [
        (on, "", &[13][..], "sessions-kept"),
        (rw, "option tcp-check", &[18, 19, 20], "no-lock"),
        (
            rw,
            "option httpchk GET /is_up\n    http-check connect port 5432",
            &[19, 20, 21],
            "no-lock",
        ),
        ("inter 3s fall 3 rise 2", "inter 3s fall 3 rise 10", &[18, 19, 20], "slow-check"),
        ("inter 3s fall 3", "inter 3s downinter 20s fall 3", &[18, 19, 20], "slow-check"),
        ("timeout check 5s", "timeout check 5", &[11], "no-unit"),
        ("timeout connect 4s", "timeout connect 4", &[9], "no-unit"),
        ("inter 3s fall 3 rise 2", "inter 3 fall 3 rise 2", &[17], "no-unit"),
        (one, "server db-b 10.0.0.1:5432 maxconn 100 check port 8008", &[19], "same-node"),
        (one, "server db-b 10.0.0.2:5432 check port 8008 addr 10.0.0.1", &[19], "same-node"),
        (one, "server db-b 10.0.0.2:5432 check port 8008 weight 0", &[19], "no-weight"),
        (one, "server db-b 127.0.0.1:5432 backup", &[19], "unchecked-server"),
        (rw, "option pgsql-check user x", &[18, 19, 20], "no-lock"),
        (rw, "", &[18, 19, 20], "no-lock"),
        (rw, "option httpchk GET /health", &[15], "no-lock"),
        (expect, "http-check expect rstring \"role\": \"primary\"", &[16], "role-word"),
        (rw, "option httpchk GET /patroni", &[15], "no-lock"),
        (rw, "option httpchk GET /replica", &[15], "no-lock"),
        ("OPTIONS /replica", "GET /liveness", &[24], "no-role"),
        (
            "/replica\n    http-check expect status 200",
            "/patroni\n    http-check expect ! string primary",
            &[25],
            "role-word",
        ),
        ("OPTIONS /replica", "GET /ready", &[24], "no-lock"),
        (expect, "http-check expect string running", &[16], "no-lock"),
        (expect, "http-check expect status 200,503", &[16], "no-lock"),
        ("inter 3s fall 3 rise 2", "inter 30s fall 3", &[18, 19, 20], "slow-check"),
        (one, "server db-b 10.0.0.2:5432 check port 8008 inter 30s", &[19], "slow-check"),
        ("timeout check 5s", "timeout check 15s", &[11], "slow-timeout-check"),
        (one, "server db-b 10.0.0.2:6432 check port 8008", &[19], "pooler-unchecked"),
        ("mode tcp", "mode http", &[13, 22], "http-mode"),
        ("bind *:5000", "mode http", &[14], "http-mode"),
        ("bind *:5000", "http-request set-header a b", &[14], "http-rules"),
        ("bind *:5000", "option forwardfor", &[14], "http-rules"),
        ("bind *:5000", "acl is_write method POST", &[14], "http-rules"),
        ("bind *:5000", "use_backend w if { hdr(host) -i pg }", &[14], "http-rules"),
        ("bind *:5000", "use_backend w if METH_GET", &[14], "http-rules"),
        ("timeout client 30m", "timeout client 5000", &[8], "short-timeout"),
        ("timeout server 30m", "timeout server 50s", &[10], "short-timeout"),
        ("timeout server 30m", "timeout server 30m\n timeout tunnel 1m", &[11], "short-timeout"),
        (one, "server db-b 10.0.0.2:5432", &[19], "unchecked-server"),
        (one, "server db-b 10.0.0.2:5432 check", &[19], "asks-postgresql"),
        // the port of Debian's second cluster
        (one, "server db-b 10.0.0.2:5433 check", &[19], "asks-postgresql"),
    ] {
        let changed = SITE.replacen(old, new, 1);
        assert_ne!(changed, SITE, "{old}");
        let wanted = at.iter().map(|line| (*line, rule)).collect();
        assert_eq!(mistakes(&changed, false), wanted, "{old} -> {new}");
    }
    // one server has the setting, and the others lack it
    let only = SITE.replacen(on, "", 1).replacen("10.0.0.2:5432", &format!("10.0.0.2:5432{on}"), 1);
    assert_eq!(mistakes(&only, false), [18, 20].map(|line| (line, "sessions-kept")).into());
    // a pool of all nodes that are not the primary also gets stopped nodes
    let ro = "option httpchk OPTIONS /replica\n    http-check expect status 200";
    for others in ["status 503", "! status 200", "! rstatus ^2"] {
        let others = format!("option httpchk\n    http-check expect {others}");
        let changed = SITE.replacen(ro, &others, 1);
        assert_eq!(mistakes(&changed, false), [(25, "no-role")].into(), "{others}");
        let findings = rules::find(&parse(&changed), true, None);
        assert!(findings.iter().any(|finding| finding.place.line == 27
            && finding.text.contains("agent-inter 2s agent-send \"replica\\n\"")));
    }
    for fine in [
        "rstatus (2|3)[0-9][0-9]",
        "rstatus ^20[0-5]$",
        "rstatus [1-3]..",
        "! status 503",
        "! rstatus ^5",
        "status 200-299",
    ] {
        let changed = SITE.replace("status 200", fine);
        assert_eq!(mistakes(&changed, false), BTreeSet::new(), "{fine}");
    }
    for (expect, mistake) in [
        ("rstring \"^HTTP/1.. 2\"", false),
        ("string \"200 OK\"", false),
        ("binary 485454502f312e3020323030", false),
        ("! string 503", false),
        ("rstring \"^HTTP\"", true),
        ("string running", true),
    ] {
        let pool = format!(
            "listen pg\n option tcp-check\n tcp-check connect port 8008\n tcp-check send \"GET /primary HTTP/1.0\\r\\n\\r\\n\"\n \
            tcp-check expect {expect}\n server a b:5432 check on-marked-down shutdown-sessions\n"
        );
        let wanted: BTreeSet<_> = mistake.then_some((5, "no-lock")).into_iter().collect();
        assert_eq!(mistakes(&pool, false), wanted, "{expect}");
    }
    // the frontend's name says that clients write through this backend
    let front = "frontend pg_write\n default_backend nodes\nbackend nodes\n option httpchk GET /health\n \
        server a b:5432 check port 8008\n server c d:5432 check port 8008\n";
    assert_eq!(mistakes(front, false), [(3, "sessions-kept"), (4, "no-lock")].into());
    // a port in a variable that is not set
    let port = "option httpchk OPTIONS /primary\n    http-check connect port \"${NOTHING}\"";
    let port = SITE.replace(rw, port).replace(" check port 8008", " check");
    let found_there = mistakes(port.split("listen pgcluster_ro").next().expect("a pool"), false);
    assert_eq!(found_there, BTreeSet::new());
    // PgBouncers on the same machines
    let pooler = format!(
        "{SITE}\nlisten poolerReadWrite\n server a 10.0.0.1:6432 check\n server b 10.0.0.2:6432 check\n"
    );
    let lines = [(31, "sessions-kept"), (32, "no-lock"), (33, "no-lock")];
    assert_eq!(mistakes(&pooler, false), lines.into());
    // each frontend has its own time limit
    let front = |limit: &str| {
        format!("frontend {limit}\n timeout client {limit}\n default_backend pgcluster_ro\n")
    };
    let fronts = format!("{SITE}{}{}", front("1m"), front("1h"));
    assert_eq!(mistakes(&fronts, false), [(31, "short-timeout")].into());
    // with `track`, a server is UP when the other pool's server is
    let follows =
        format!("{SITE}\nlisten bouncers\n server db-a 10.0.0.1:6432 track pgcluster_rw/db-a\n");
    assert_eq!(mistakes(&follows, false), [(31, "sessions-kept"), (32, "pooler-unchecked")].into());
    // other services
    let shared = "defaults\n mode tcp\n timeout client 5s\n timeout server 5s\nlisten web\n mode http\n option httpchk GET /leader\n server a 10.0.0.1:8080 check port 8081\n server b 10.0.0.2:8080 check port 8081\n\
        listen mysql\n option httpchk GET /master\n server a 10.0.0.1:3306 check port 9200\n server b 10.0.0.2:3306 check port 9200\n\
        listen pgadmin\n option httpchk GET /\n server a 10.0.0.1:443 check port 80\n server b 10.0.0.2:443 check port 80\n";
    assert_eq!(mistakes(shared, false), BTreeSet::new());
    // nobody knows what a script on the node answers
    let script = SITE.replacen(rw, "option httpchk GET /pg_is_master", 1);
    let script = script.replacen("inter 3s", "port 23267 inter 3s", 1);
    let script = script.replacen(" check port 8008", " check", 3);
    assert_eq!(mistakes(&script, false), BTreeSet::new());
    // a pool that nobody checks, and one whose request goes to Patroni by its rules alone
    let bare = "listen pg_rw\n server a 10.0.0.1:5432\n server b 10.0.0.2:5432\n";
    assert_eq!(mistakes(bare, false), [2, 3].map(|line| (line, "unchecked-server")).into());
    let by_rule = "listen pg_write\n option httpchk\n http-check connect port 8008\n http-check send uri /primary\n http-check expect status 200,503\n server a 10.0.0.1:5433 check\n server b 10.0.0.2:5433 check\n";
    assert_eq!(mistakes(by_rule, false), [(1, "sessions-kept"), (5, "no-lock")].into());
    // a section's own option drops the rules of its defaults, and its own rules drop their request
    let defaults = "defaults\n mode tcp\n option httpchk OPTIONS /primary\n http-check expect status 200,503\n default-server on-marked-down shutdown-sessions\n";
    let servers =
        " server a 10.0.0.1:5432 check port 8008\n server b 10.0.0.2:5432 check port 8008\n";
    for (own, wanted) in [
        ("", Some((4, "no-lock"))),
        (" option httpchk OPTIONS /primary\n", None),
        (" http-check expect status 200\n", Some((6, "no-lock"))),
        (" http-check send uri /primary\n http-check expect status 200\n", None),
    ] {
        let site = format!("{defaults}listen pg_rw\n{own}{servers}");
        assert_eq!(mistakes(&site, false), wanted.into_iter().collect(), "{own}");
    }
    // the longest line that an agent reads
    for (length, too_long) in [(256, false), (257, true)] {
        let sent = format!("replica?tag_a={:b>1$}", "", length - "replica?tag_a=".len());
        let pool = format!(
            "listen ro\n option httpchk OPTIONS /{sent}\n server a b:5432 check port 8008 agent-check agent-port 5555 agent-send \"{sent}\\n\"\n"
        );
        let found = rules::find(&parse(&pool), false, None);
        let said = found.iter().any(|found| found.text.contains("more than 256 bytes"));
        assert_eq!(said, too_long, "{length}");
    }
    // a pool of standbys needs no Patroni
    let standbys = "listen pg_replicas\n server a b:5432 check\n server c d:5432 check\n";
    assert_eq!(mistakes(standbys, false), BTreeSet::new());
    // the advice has this pool's health check and this site's port
    let other = SITE.replace("8008", "8009").replacen(rw, "option tcp-check", 1);
    let other = other.replacen("maxconn 100 check port 8009", "check", 1);
    let other = other.replacen("OPTIONS /replica", "GET /patroni", 1);
    let other = other.replace("expect status 200", "expect string replica");
    for (line, wanted) in [
        (18, "write \"option httpchk OPTIONS /primary\" and \"check port 8009\""),
        (19, "write \"option httpchk OPTIONS /primary\""),
        (25, "write \"option httpchk OPTIONS /replica\" and \"http-check expect status 200\""),
    ] {
        let findings = rules::find(&parse(&other), false, None);
        let there: Vec<_> = findings.iter().filter(|f| f.place.line == line).collect();
        assert!(there.len() == 1 && there[0].text.ends_with(wanted), "{line}: {there:?}");
    }
    // `timeout tunnel` is the limit once a session has begun
    let tunnel = SITE.replace("timeout client 30m", "timeout client 5s\n timeout tunnel 30m");
    assert_eq!(mistakes(&tunnel, false), BTreeSet::new());
}

/// A pool of another service has no mistake, and a pool of PostgreSQL may have any name.
#[test]
fn other_services_have_no_mistakes() {
    let others = "defaults\n mode http\n timeout client 5s\n timeout server 5s\nfrontend web\n bind :80\n \
        http-request deny if FALSE\n default_backend webs\nbackend webs\n option httpchk GET /health\n cookie X insert\n \
        server w1 10.0.0.1:8080 check port 8081\n server w2 10.0.0.2:8080 check port 8081\nbackend tls\n mode tcp\n \
        option httpchk GET /\n server w1 10.0.0.1:443 check port 80 inter 30s\n server w2 10.0.0.2:443 check port 80\n\
        listen redis\n mode tcp\n option tcp-check\n tcp-check send \"ROLE\\r\\n\"\n tcp-check expect string master\n \
        server r1 10.0.0.1:6379 check\n server r2 10.0.0.2:6379 check\nlisten api\n option httpchk GET /primary\n \
        server a 10.0.0.1:8008 check\n server b 10.0.0.2:8008 check\n\
        listen app\n option httpchk GET /health\n server a 10.0.0.1:8008 check\n server b 10.0.0.2:8008 check\npeers all\n server a 10.0.0.1:5432\n\
        backend load\n server w1 10.0.0.1:80 agent-check agent-port 9999 agent-send \"load\\n\"\n\
        listen cluster\n mode tcp\n server k1 10.0.0.1:6443 check agent-check agent-port 9707 agent-inter 30s\n";
    assert_eq!(list_servers(&parse(others)).len(), 2);
    for agent in [false, true] {
        assert_eq!(mistakes(others, agent), BTreeSet::new());
        assert_eq!(mistakes(&format!("{SITE}{others}"), false), BTreeSet::new());
    }
    // a web page, and a service beside PostgreSQL, whatever their names
    let named = "listen pgadmin\n mode http\n option httpchk GET /\n server a 10.0.0.1:443 ssl check port 80\n\
        listen pg-etcd\n option httpchk GET /health\n server a 10.0.0.1:2379 check port 2381\n";
    assert_eq!(list_servers(&parse(named)), Vec::<String>::new());
    // a check of PostgreSQL itself may refuse standbys
    let recovery = SITE.replace(
        "option httpchk OPTIONS /primary\n    http-check expect status 200",
        "option tcp-check\n    tcp-check expect binary 66",
    );
    let findings = rules::find(&parse(&recovery), false, None);
    assert_eq!(findings.len(), 3);
    assert!(findings.iter().all(|found| found.text.contains("so a former primary is UP as well")));
    // nobody knows what an external program asks
    let program = SITE.replace("option httpchk OPTIONS /primary", "option external-check");
    assert_eq!(mistakes(&program, false), BTreeSet::new());
    // a site without Patroni
    let plain = "defaults\n mode http\n timeout client 50000\nfrontend in\n default_backend db_write\nbackend db_write\n \
        option tcp-check\n server a 10.0.0.1:5432 check\n server b 10.0.0.2:5432 check\n";
    assert_eq!(
        mistakes(plain, false),
        [
            (3, "short-timeout"),
            (4, "http-mode"),
            (6, "http-mode"),
            (6, "sessions-kept"),
            (8, "no-lock"),
            (9, "no-lock"),
        ]
        .into()
    );
}

/// Each setting that tests/mutants/settings takes out of the shipped file.
#[test]
fn each_setting_that_is_taken_out_is_missed() {
    let table = read("tests/mutants/settings");
    let rows: Vec<_> =
        table.lines().filter(|row| row.starts_with("examples/haproxy.cfg | ")).collect();
    assert!(rows.len() > 30);
    let good = read(GOOD[0]);
    for row in rows {
        let [_, change, _] = row.split(" | ").collect::<Vec<_>>()[..] else { panic!("{row}") };
        let changed = sed(change, &good);
        assert!(changed != good, "{row}");
        assert_ne!(mistakes(&changed, false), BTreeSet::new(), "{row}");
    }
}

/// Each row has a change of the shipped file, the lines of the mistake, and the rule.
#[test]
fn each_mistake_with_the_agent_is_found_at_its_line() {
    let good = read(GOOD[0]);
    let line = |words: &str| good.lines().position(|line| line.contains(words)).expect("there") + 1;
    let (reserve, write, read, watch) = (
        line("server pg1 pg1:5432 agent-send \"hold"),
        line("server pg1 pg1:5432 agent-send \"primary"),
        line("server pg1 pg1:5432 agent-send \"replica"),
        line("server pg1 \"pg1:"),
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
        ("s/\"pg1:.*/pg1:5554/", vec![watch], "agent-port"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& no-check/"#, vec![write], "own-check-missing"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& enabled/"#, vec![write], "not-disabled"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& maxconn 0/"#, vec![write], "crowd"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& agent-inter 3s/"#, vec![write], "agent-inter"),
        (
            "s/hard-stop-after 15s/hard-stop-after 1h/",
            vec![line("hard-stop-after 15s")],
            "old-process",
        ),
        (
            "s/hard-stop-after 15s/hard-stop-after 15/",
            vec![line("hard-stop-after 15s")],
            "old-process",
        ),
        (
            "s/hard-stop-after 15s/hard-stop-after 0/",
            vec![line("hard-stop-after 15s")],
            "old-process",
        ),
        ("s/timeout check 2s/timeout check 1s/", vec![line("timeout check 2s")], "late-answer"),
        (
            "/^listen postgres-write/,/^backend/ s/(server waiting-room .*) enabled/\\1/",
            vec![write + 7],
            "waiting-room",
        ),
        (
            "/^backend agents/,$ s/ no-agent-check//",
            vec![watch, watch + 1, watch + 2],
            "agents-watched",
        ),
        ("/^backend agents/,$ s/ enabled//", vec![watch, watch + 1, watch + 2], "agents-watched"),
        ("s/send meth GET uri/send uri/", vec![line("meth GET uri")], "reserve"),
        ("s/! rstring/rstring/", vec![line("! rstring")], "reserve"),
        (
            "s/pg3:5432 agent-send \"primary/pg2:5432 agent-send \"primary/",
            vec![write + 2, line("use_backend reserve if")],
            "same-node reserve",
        ),
        ("s/lt 3/lt 2/", vec![line("lt 3 }")], "reserve"),
        ("s/^ *option allbackups/#/", vec![line("listen postgres-write")], "reserve"),
        (
            r#"s/check send "primary\\n"/check send 'primary\\n'/"#,
            vec![line("tcp-check send")],
            "agents-watched",
        ),
        (
            "/server pg1 \"pg1:/d",
            vec![line("use_backend reserve if"), write],
            "agents-watched reserve",
        ),
        ("/^backend reserve/,/^listen/ s/pg1:5432/pg1:6432/", vec![reserve], "reserve"),
        (
            "/^backend reserve/,/^listen/ s/pg1:5432/& port 8009/",
            vec![reserve],
            "agent-port reserve",
        ),
        ("/^backend reserve/,/^listen/ s/pg1:5432/& check-ssl/", vec![reserve], "reserve"),
        (
            r"s/meth GET uri .primary/meth GET uri \/replica/",
            vec![reserve, reserve + 1, reserve + 2],
            "reserve",
        ),
        (
            "s/use_backend reserve if/use_backend reserve unless/",
            vec![line("use_backend reserve")],
            "reserve",
        ),
        (
            r"s/(use_backend reserve if .*)$/\1 or TRUE/",
            vec![line("use_backend reserve")],
            "reserve",
        ),
        ("s/stats socket .*/stats socket ipv4@127.0.0.1:9999/", vec![line("global")], "state-file"),
        (r#"s/(pg1:5432 agent-send) "primary\\n"/& backup/"#, vec![write], "waiting-room"),
        (
            "s/^    bind :5000/    monitor fail if { nbsrv(postgres-write) lt 1 }/",
            vec![line("bind :5000")],
            "waiting-room",
        ),
        // its agent is asked at another address, too
        ("/^listen postgres-write/,/^backend/ s/pg1:5432/& addr 10.9.9.9/", vec![], ""),
    ] {
        let changed = sed(change, &good);
        assert!(changed != good, "{change}");
        let found = mistakes(&changed, false);
        let lines: BTreeSet<_> = found.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, at.into_iter().collect(), "{change}: {found:?}");
        assert!(found.iter().all(|(_, found)| rule.contains(found)), "{change}: {found:?}");
    }
}

/// What all servers of a pool lack is reported once, where the pool begins.
#[test]
fn what_is_missing_is_reported_where_the_section_begins() {
    let good = read(GOOD[0]);
    let line =
        |words: &str| good.lines().position(|line| line.starts_with(words)).expect("there") + 1;
    let (write, read) = (line("listen postgres-write"), line("listen postgres-read"));
    let (reserve, watch) = (line("backend reserve"), line("backend agents"));
    let first = line("    server pg1 ");
    let servers = vec![first, first + 1, first + 2];
    for (change, at) in [
        ("s/ disabled$//", vec![write, read]),
        ("s/ check inter / inter /", vec![write, reserve, read]),
        ("s/ agent-inter 500ms on/ on/", servers.clone()),
        ("s/default-server maxconn 90/default-server/", vec![write, read]),
        ("s/(agent-inter 500ms) on-marked-down shutdown-sessions/\\1/", vec![write]),
        ("/^ *tcp-check expect /d", vec![watch]),
        ("s/^ *server-state-file .*/#/", vec![line("global")]),
        ("s/^ *hard-stop-after .*/#/", vec![line("global")]),
        ("s/^ *retries .*/#/", vec![write, read]),
        ("s/^ *option httpchk OPTIONS .primary$/#/", servers.clone()),
    ] {
        let changed = sed(change, &good);
        assert!(changed != good, "{change}");
        let found = mistakes(&changed, false);
        let lines: BTreeSet<_> = found.iter().map(|(line, _)| *line).collect();
        let wanted = at.into_iter().collect::<BTreeSet<_>>();
        assert!(wanted.is_subset(&lines) && lines.len() <= wanted.len() + 3, "{change}: {found:?}");
    }
}

/// The shipped file with frontends and backends, with the agents' port as a number, and with tabs has no mistake either.
#[test]
fn a_good_configuration_in_other_layouts() {
    let good = read(GOOD[0]);
    let (mut split, mut front, mut back) = (String::new(), String::new(), String::new());
    for line in good.lines().chain([""]) {
        let word = line.split_whitespace().next().unwrap_or_default();
        let clients = ["bind", "tcp-request", "acl", "use_backend"].contains(&word);
        if let Some(pool) = line.strip_prefix("listen postgres-") {
            front = format!("frontend in-{pool}\n    default_backend postgres-{pool}\n");
            back = format!("backend postgres-{pool}\n");
        } else if front.is_empty() || line.is_empty() {
            split += &format!("{front}{back}{line}\n");
            (front, back) = Default::default();
        } else {
            let part = if clients { &mut front } else { &mut back };
            *part += &format!("{line}\n");
        }
    }
    assert_eq!(split.matches("default_backend").count(), 2);
    let number = good.replace("    setenv AGENT_PORT 5555\n", "").replace("${AGENT_PORT}", "5555");
    let tabs = good.replace("    ", "\t");
    for layout in [&split, &number, &tabs] {
        for agent in [false, true] {
            assert_eq!(mistakes(layout, agent), BTreeSet::new(), "{layout}");
        }
        let listed = list_servers(&parse(layout));
        assert_eq!(listed.len(), 9);
        let changed = layout.replacen("on-marked-down shutdown-sessions", "", 1);
        assert_eq!(mistakes(&changed, false).len(), 1);
        let changed =
            layout.replacen("tcp-request connection reject if { fe_conn gt 1000 }", "", 1);
        let changed = changed.replacen("# a full room refuses", "", 1);
        assert_eq!(mistakes(&changed, false).len(), usize::from(changed != *layout));
    }
}

/// All servers of a template have the same name, and the same port for the agents.
#[test]
fn a_template_with_another_port_for_the_agents() {
    let site = read("tests/walks/sites/dns/haproxy.cfg");
    let words = " agent-check agent-port 5554 agent-send \"primary\\n\" disabled\n";
    let site = site.replacen("check port 8008\n", &format!("check port 8008{words}"), 1)
        + "\nbackend agents\n option tcp-check\n tcp-check send \"primary\\n\"\n default-server check\n \
            server-template pg 3 orders.example:5555\n";
    let line = site.lines().position(|line| line.contains("agent-port")).expect("a line") + 1;
    assert!(mistakes(&site, false).contains(&(line, "agent-port")));
    let right = site.replace("5554", "5555");
    assert!(mistakes(&right, false).iter().all(|(_, rule)| *rule != "agent-port"));
}

/// Two clusters behind one HAProxy, each with its own pools, and conditions that have names.
#[test]
fn two_clusters() {
    let good = read(GOOD[0]);
    let (head, pools) = good.split_once("\nlisten postgres-write").expect("pools");
    let pools =
        format!("\nlisten postgres-write{}", pools.split("\nlisten stats").next().expect("pools"));
    let words = [
        "postgres-write",
        "postgres-read",
        "reserve",
        "agents",
        "pg1",
        "pg2",
        "pg3",
        ":5000",
        ":5001",
    ];
    let news =
        ["other-write", "other-read", "spare", "watch", "db1", "db2", "db3", ":6000", ":6001"];
    let mut other = pools.clone();
    for (word, new) in words.iter().zip(news) {
        other = other.replace(word, new);
    }
    let both = format!("{head}{pools}{other}");
    assert_eq!(mistakes(&both, true), BTreeSet::new());
    let changed = both.replacen("\"db2:${AGENT_PORT}\"", "db2:5556", 1);
    assert_eq!(mistakes(&changed, false).len(), 1);
    let names = good.replace(
        "use_backend reserve if { nbsrv(postgres-write) eq 2 } { nbsrv(agents) lt 3 }",
        "acl nobody nbsrv(postgres-write) eq 2\n    acl silent nbsrv(agents) lt 3\n    use_backend reserve if nobody silent",
    );
    assert_ne!(names, good);
    assert_eq!(mistakes(&names, false), BTreeSet::new());
    assert!(!mistakes(&names.replace("lt 3", "lt 30"), false).is_empty());
    // a second cluster with the first one's names has the first one's reserve
    let (head, rest) = both.split_once("\nlisten other-write").expect("the second cluster");
    let second = rest.replace("db1:", "10.1.0.1:").replace("db2:", "10.1.0.2:");
    let second = second.replace("db3:", "10.1.0.3:").replace("server db", "server pg");
    let pools = ["1", "2", "3"].map(|n| (format!("pg{n}:5432"), format!("10.0.0.{n}:5432")));
    let first = pools.iter().fold(head.to_owned(), |text, (name, ip)| text.replace(name, ip));
    let named = format!("{first}\nlisten other-write{second}");
    assert_eq!(mistakes(&named, false), BTreeSet::new());
    let shared = named.replacen("use_backend spare if", "use_backend reserve if", 1);
    let shared = shared.replacen("nbsrv(spare) eq 1", "nbsrv(reserve) eq 1", 1);
    let below = shared.lines().rev().position(|line| line.contains("use_backend reserve"));
    let line = shared.lines().count() - below.expect("the second cluster's line");
    assert!(mistakes(&shared, false).contains(&(line, "reserve")));
    // each cluster is told a reserve of its own, and one backend with all agents
    let other = SITE.split_once("listen").expect("pools").1.replace("pgcluster", "other");
    let sites = format!("{SITE}\nlisten{}", other.replace("10.0.0.", "10.1.0."));
    let findings = rules::find(&parse(&sites), true, None);
    let says = |rule: &str, words: &str| {
        findings.iter().any(|found| found.rule == rule && found.text.contains(words))
    };
    assert!(says("reserve", "nbsrv(agents) lt 6 } { nbsrv(reserve-other_rw) eq 1"));
    assert!(says("agents-watched", "server db-a 10.0.0.1:5555 / server"));
    assert!(says("agents-watched", "server other_rw-db-c 10.1.0.3:5555"));
    // the backend `agents` with addresses
    let addresses = good.replace("\"pg1:", "\"10.0.0.1:").replace("\"pg2:", "\"10.0.0.2:");
    assert_eq!(mistakes(&addresses, false), BTreeSet::new());
}

/// What the backend `agents` would inherit, and what the agents of several nodes on a machine need.
#[test]
fn the_advice_fits_the_site() {
    let advice = |site: &str, rule: &str| {
        let findings = rules::find(&parse(site), true, None).into_iter();
        let texts: Vec<_> = findings.filter(|f| f.rule == rule).map(|f| f.text).collect();
        texts.join("\n")
    };
    assert!(advice(SITE, "agents-watched").contains("default-server check fall 2 "));
    let usual = "timeout check 5s\n    default-server port 8008 check-ssl";
    let inherits = SITE.replacen("timeout check 5s", usual, 1);
    let wanted = "default-server check port 5555 no-check-ssl fall 2 ";
    assert!(advice(&inherits, "agents-watched").contains(wanted));
    let elsewhere = SITE.replace("check port 8008", "check port 8008 addr 10.9.0.1");
    assert!(advice(&elsewhere, "agents-watched").contains("server db-a 10.9.0.1:5555"));
    let disabled = SITE.replacen("10.0.0.1:5432", "10.0.0.1:5432 disabled", 1);
    let said = advice(&disabled, "agent-missing");
    assert_eq!(said.matches("first answer ends").count(), 1, "{said}");
    let usual = SITE.replace("default-server inter 3s", "default-server disabled inter 3s");
    assert!(!advice(&usual, "agent-missing").contains("first answer ends"));
    // findings about clients have the place where they come in
    let fronts = SITE.replace(
        "listen pgcluster_rw\n    bind *:5000",
        "frontend in_rw\n    default_backend pgcluster_rw\nbackend pgcluster_rw",
    );
    for rule in ["crowd", "nobody-reached"] {
        assert!(mistakes(&fronts, true).contains(&(13, rule)), "{rule}");
    }
    assert!(advice(&fronts, "reserve").contains("and in in_rw \"use_backend reserve"));
    // A fourth node must be wherever the other three are, except in the read pool, which may have fewer.
    let mut four = read(GOOD[0]).replace("nbsrv(agents) lt 3", "nbsrv(agents) lt 4");
    let names_third = |line: &&str| line.contains("pg3") && !line.starts_with('#');
    let third: Vec<_> = four.lines().filter(names_third).map(str::to_owned).collect();
    for line in BTreeSet::from_iter(&third) {
        four = four
            .replace(&format!("{line}\n"), &format!("{line}\n{}\n", line.replace("pg3", "pg4")));
    }
    let lines: Vec<_> = four.lines().collect();
    let (none, read_pool) = (BTreeSet::new(), "server pg4 pg4:5432 agent-send \"replica");
    assert_eq!((mistakes(&four, false), third.len()), (none.clone(), 6));
    for at in (0..lines.len()).filter(|at| lines[*at].contains("pg4")) {
        let forgot = [&lines[..at], &lines[at + 1..]].concat().join("\n");
        let found = mistakes(&forgot, false);
        assert_eq!(found.is_empty(), lines[at].contains(read_pool), "{}: {found:?}", lines[at]);
    }
    assert_ne!(mistakes(&four.replace("lt 4", "lt 3"), false), none);
    // without a pool for writes, there is no reserve and nobody to refuse
    let reads = SITE.replacen("OPTIONS /primary", "OPTIONS /replica", 1).replace("_rw", "_ro2");
    assert_eq!(advice(&reads, "nobody-reached") + &advice(&reads, "reserve"), "");
    // reads go to the primary when no replica is left, and nobody has to wait
    let named =
        "bind *:5001\n    acl none nbsrv(pgcluster_ro) eq 0\n    use_backend pgcluster_rw if none";
    let leads = SITE.replacen("bind *:5001", named, 1);
    assert!(advice(SITE, "waiting-room").contains("pgcluster_ro"));
    assert!(!advice(&leads, "waiting-room").contains("pgcluster_ro"));
    // one agent asks one Patroni
    let one = read(GOOD[0]).replace("pg2:", "pg1:");
    let one = one.replace("server pg2 pg1:5432", "server pg2 pg1:5433 port 8009");
    assert!(advice(&one, "agent-port").contains("one agent answers for both"));
    assert_eq!(advice(&one, "reserve").matches("clients reach port").count(), 0);
    // the reserve is there, and only nobody leads to it
    let unused: String = read(GOOD[0])
        .lines()
        .filter(|l| !l.contains("use_backend reserve"))
        .map(|l| format!("{l}\n"))
        .collect();
    assert!(advice(&unused, "reserve").contains("; write in postgres-write two waiting rooms"));
    // a pool without Patroni's port says nothing of other nodes
    let forgot = read(GOOD[0]).replacen(
        "default-server port 8008 agent-inter",
        "default-server agent-inter",
        1,
    );
    assert_eq!(advice(&forgot, "agent-port"), "");
    // the pools of a template share one line, which makes three servers
    let dns = read("tests/walks/sites/dns/haproxy.cfg");
    assert_eq!(advice(&dns, "agents-watched").matches("server-template").count(), 1);
    assert!(advice(&dns, "reserve").contains("nbsrv(agents) lt 3"));
    // a listen section is where its clients come in, also if another section leads there
    let two = SITE.replacen(
        "bind *:5001",
        "bind *:5001\n    use_backend pgcluster_rw if { nbsrv(pgcluster_ro) eq 0 }",
        1,
    );
    assert!(mistakes(&two, true).contains(&(13, "crowd")));
    // a rule "connect" of the check names its own TLS
    let tls =
        read(GOOD[1]).replace("tcp-check connect port 8008", "tcp-check connect port 8008 ssl");
    let tls = tls.replacen(
        "default-server port 8008 inter 500ms",
        "default-server check-ssl port 8008 inter 500ms",
        1,
    );
    assert_ne!(tls, read(GOOD[1]));
    assert_eq!(advice(&tls, "reserve"), "");
    // the tracked servers need the agent, and no client comes to their pool
    let tracked = "listen rw\n mode tcp\n server a 10.0.0.1:6432 track api/a\nbackend api\n mode http\n \
        option httpchk GET /primary\n default-server inter 2s\n server a 10.0.0.1:8008 check\n";
    let found = mistakes(tracked, true);
    assert!(found.contains(&(8, "agent-missing")), "{found:?}");
    assert!(
        !found.iter().any(|(_, rule)| ["http-mode", "waiting-room"].contains(rule)),
        "{found:?}"
    );
}

/// `--agent` reports all that is missing, and keeps the site's health check of each server.
#[test]
fn all_that_the_agent_needs_is_reported() {
    let findings = rules::find(&parse(SITE), true, None);
    let missing = |line| {
        let found = findings.iter().find(|f| f.place.line == line && f.rule == "agent-missing");
        found.expect("a finding").text.clone()
    };
    assert!(missing(18).ends_with(
        "add agent-check agent-port 5555 agent-inter 500ms agent-send \"primary\\n\" disabled"
    ));
    assert!(missing(27).ends_with("agent-send \"replica\\n\" disabled"), "{}", missing(27));
    let reserve = findings.iter().find(|finding| finding.rule == "reserve").expect("a finding");
    assert!(reserve.text.contains("{ nbsrv(pgcluster_rw) eq 2 } { nbsrv(agents) lt 3 }"));
    let example = include_str!("../../units/examples/haproxy.cfg");
    for (from, to, said) in [
        ("stats socket", "# stats socket", "state-file: HAProxy cannot be asked for the states"),
        (
            "agent-inter 500ms enabled",
            "agent-inter 500ms",
            "reserve: reserve/pg1: while its agent is silent, it stays in MAINT",
        ),
        ("maxconn 3000", "maxconn 1000", "crowd: 1000 clients that wait take all 1000 connections"),
        (
            "fe_conn gt 1000",
            "fe_conn gt 5000",
            "crowd: 5000 clients that wait take all 3000 connections",
        ),
    ] {
        assert!(example.contains(from), "{from}");
        let found = rules::find(&parse(&example.replacen(from, to, 1)), true, None);
        let mut found = found.iter().map(|found| format!("{}: {}", found.rule, found.text));
        assert!(found.any(|text| text.starts_with(said)), "{said}");
    }
    // all that global lacks is said at once
    let lacks = |text: &str, agent| {
        let found = rules::find(&parse(text), agent, None).into_iter();
        found.filter(|f| (f.place.line, f.rule) == (1, "state-file")).count()
    };
    assert_eq!(lacks(SITE, true), 2);
    assert_eq!(lacks(SITE, false), 0);
    let loads = SITE.replacen("retries 2", "load-server-state-from-file global", 1);
    assert_eq!(lacks(&loads, false), 1);
    let forwards = |version: &[u32], text: &str| {
        let found = rules::find(&parse(text), true, Some(version.to_vec()));
        found.iter().any(|found| found.text.contains("tune.pt.zero-copy-forwarding off"))
    };
    let off = SITE.replacen("maxconn 100", "tune.pt.zero-copy-forwarding off", 1);
    assert!(forwards(&[2, 9, 0], SITE) && forwards(&[3, 0, 11], SITE));
    assert!(!forwards(&[2, 8, 14], SITE) && !forwards(&[3, 0, 11], &off));
    // a server of the reserve takes clients while no agent answers, so it must not be disabled
    let bare =
        example.replace("default-server agent-check agent-port", "default-server agent-port");
    let bare = bare.replace(" agent-inter 500ms enabled ", " agent-inter 500ms ");
    let found = rules::find(&parse(&bare), true, None);
    let mut found = found.iter().filter(|found| found.text.starts_with("reserve/pg1: agent-send"));
    let text = &found.next().expect("a finding").text;
    assert!(text.ends_with("add agent-check enabled"), "{text}");
    let unlimited = rules::find(&parse(&SITE.replace("timeout check 5s", "")), true, None);
    let late = unlimited.iter().filter(|finding| finding.rule == "late-answer");
    assert_eq!(late.map(|finding| finding.place.line).collect::<Vec<_>>(), [13]);
    // names of DNS, and a pool for any node
    let template = "listen any\n option httpchk GET /health\n \
        server-template pg 2 _pg._tcp.example check port 8008 resolvers dns init-addr none\n";
    let of_any = rules::find(&parse(template), true, None);
    let said = |words: &str| of_any.iter().any(|finding| finding.text.contains(words));
    assert!(said("agent-inter 2s agent-send \"health\\n\" disabled"));
    assert!(said(
        "enabled / server-template pg 2 _pg._tcp.example port 5555 resolvers dns init-addr none"
    ));
    assert!(!of_any.iter().any(|finding| finding.rule == "reserve"));
    let rules: BTreeSet<_> = findings.iter().map(|finding| finding.rule).collect();
    for rule in
        ["state-file", "old-process", "waiting-room", "agents-watched", "reserve", "gone-machine"]
    {
        assert!(rules.contains(rule), "{rule}: {rules:?}");
    }
}

/// The same site in other layouts has the same servers and the same mistake.
#[test]
fn every_layout_is_understood() {
    let wanted: Vec<_> = list_servers(&parse(SITE))
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
        let configuration = parse(layout);
        assert_eq!(configuration.notes, []);
        let listed = list_servers(&configuration);
        let names: Vec<_> =
            listed.iter().map(|line| line.split_once(' ').expect("a line").1).collect();
        assert_eq!(names, wanted, "{layout}");
        assert_eq!(mistakes(layout, false), BTreeSet::new(), "{layout}");
        let changed = layout.replacen(" on-marked-down shutdown-sessions", "", 1);
        let at = layout
            .lines()
            .position(|line| line.ends_with("pgcluster_rw") && !line.contains("default_"))
            .expect("a pool")
            + 1;
        assert_eq!(mistakes(&changed, false), [(at, "sessions-kept")].into(), "{layout}");
    }
    let template = SITE
        .replace("server db-a 10.0.0.1:5432", "server-template db- 3 pg.example:5432 resolvers dns")
        .lines()
        .filter(|line| !line.contains("server db-"))
        .map(|line| format!("{line}\n"))
        .collect::<String>();
    assert_eq!(
        list_servers(&parse(&template))[..2],
        ["18 pgcluster_rw/db-1 primary", "18 pgcluster_rw/db-2 primary"]
    );
    assert_eq!(mistakes(&template, false), BTreeSet::new());
}

#[test]
fn several_files_and_a_folder_are_read() {
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
    // what may be missing is no configuration without mistakes
    put("partial", ".if feature(OPENSSL)\n.endif\n");
    assert_eq!(run(&["-f", &base, "-f", &format!("{path}/partial")]).0, Some(2));
    let (status, said) = run(&["--rules"]);
    assert_eq!((status, said.lines().count()), (Some(0), RULES.len()));
}

/// What patroni-pools cannot know gets a note, and no guess is made.
#[test]
fn what_is_not_understood_gets_a_note() {
    for (line, said) in [
        (".if feature(OPENSSL)\n.endif", "condition"),
        ("server a \"${NOTHING}:5432\"", "NOTHING"),
        ("server \"a", "quote"),
        ("listen b from c", "defaults c"),
        (".endif", ".if"),
    ] {
        let configuration = parse(&format!("listen a\n{line}\n"));
        assert!(
            configuration.notes.iter().any(|(place, note)| place.line == 2 && note.contains(said)),
            "{line}"
        );
    }
}

/// Reading any files ends, without a panic.
#[test]
fn no_configuration_makes_it_panic() {
    let seeds = [read(GOOD[0]), read(GOOD[1]), SITE.to_owned()];
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
        let configuration = parse(&text);
        list_servers(&configuration);
        let version = (round % 3 == 0).then(|| vec![3, 0]);
        let findings = rules::find(&configuration, round % 2 == 0, version);
        for finding in findings {
            assert!(finding.place.line <= text.split('\n').count());
            assert!(!configuration.say(finding.place).is_empty());
        }
    }
}

/// Prints how long a thousand servers take. The shipped program takes less than 0.1 s.
#[test]
fn a_thousand_servers_are_checked() {
    let mut text = SITE.split("    server").next().expect("a pool").to_owned();
    for number in 0..1000 {
        text += &format!(
            "    server s{number} 10.0.{}.{}:5432 check port 8008 agent-check agent-port 5555 agent-send \"primary\\n\"\n",
            number / 250,
            number % 250 + 1
        );
    }
    let began = Instant::now();
    let findings = rules::find(&parse(&text), true, None);
    println!("1,000 servers, {} findings: {:.3} s", findings.len(), began.elapsed().as_secs_f32());
    assert!(!findings.is_empty());
}

/// Runs sed -E on a text.
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

/// Servers as HAProxy 2.6 reports them: each in all states, and some that no configuration has.
fn full_report() -> String {
    let row = |pool: &str,
               server: &str,
               address: &str,
               op: u32,
               admin: u32,
               agent: u32,
               name: &str,
               port: u32| {
        format!(
            "3 {pool} 1 {server} {address} {op} {admin} 1 1 22 6 3 4 6 {agent} 0 0 {name} {port} - 0 8008 - - 5555\n"
        )
    };
    let mut text = "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight \
        srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state srv_agent_state \
        bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port srv_check_addr \
        srv_agent_addr srv_agent_port\n".to_owned();
    for pool in ["postgres-write", "postgres-read", "reserve", "agents", "gone"] {
        for op in [0, 2] {
            for admin in [0, 1, 4, 5, 8, 12] {
                for agent in [0, 22] {
                    for server in ["pg1", "pg2", "waiting-room", "pg9"] {
                        text += &row(pool, server, "10.0.0.1", op, admin, agent, "pg1", 5432);
                    }
                }
            }
        }
    }
    text + "\n"
}

/// The same, without pools and servers that the shipped file does not have.
fn known_report() -> String {
    let strange = [" gone ", " pg9 ", " agents 1 waiting-room "];
    let known = |line: &&str| strange.iter().all(|strange| !line.contains(strange));
    full_report().lines().filter(known).map(|line| format!("{line}\n")).collect()
}

/// The states that `save-states` makes of a report, and its notes.
fn adapt_report(report: &str, configuration: &str) -> (String, Vec<String>) {
    let mut said = Vec::new();
    let states = states::adapt_states(report, Some(&parse(configuration)), &mut said);
    (states, said)
}

/// Each state that HAProxy may report of a server in the shipped file, with and without `disabled` and the agent.
#[test]
fn a_changed_word_of_the_configuration_takes_precedence() {
    for (change, disabled, agents) in [
        ("", true, true),
        ("s/ disabled$//", false, true),
        ("s/agent-check agent-port/agent-port/", true, false),
    ] {
        let (states, said) = adapt_report(&known_report(), &sed(change, &read(GOOD[0])));
        assert!(said.is_empty(), "{said:?}");
        // the waiting room has no port, and so keeps no state
        let report = known_report();
        let with_port: Vec<_> =
            report.lines().filter(|line| !line.contains(" waiting-room ")).collect();
        assert_eq!(with_port.len(), states.lines().count());
        for (was, now) in with_port.into_iter().zip(states.lines()) {
            let (was, now): (Vec<_>, Vec<_>) = (was.split(' ').collect(), now.split(' ').collect());
            if was.len() < 25 || was[0] == "#" {
                assert_eq!(was, now);
                continue;
            }
            let pool = was[1];
            let agent = agents && pool != "agents";
            let number = |at: usize| was[at].parse::<u32>().expect("a number");
            let (down, maint, asked) = (was[5] == "0", number(6), number(14) & 4 != 0);
            let wanted = match agent {
                true => {
                    let out = maint & !4 | u32::from(down && pool != "reserve");
                    out | if disabled && pool != "reserve" { 4 } else { 0 }
                }
                false if asked => 0,
                false => maint,
            };
            assert_eq!(now[6], wanted.to_string(), "{change}: {was:?}");
            let port = if pool == "agents" { "5555" } else { "5432" };
            assert_eq!((now.len(), now[4], now[17], now[18]), (20, "-", "-", port), "{was:?}");
        }
    }
}

#[test]
fn what_is_not_understood_stays_as_it_was_reported() {
    let row = |line: &str| format!("1\n# x\n{line}\n\n");
    let pg1 = "3 rw 1 pg1 10.0.0.1 2 0 0 1 22 6 3 4 6 22 0 0 pg.example 5432 - 0 8008 - - 5555";
    let states = |server: &str, line: &str| {
        let (states, said) = adapt_report(
            &row(line),
            &format!("listen rw\n default-server agent-check agent-port 5555\n {server}\n"),
        );
        let line = states.lines().nth(2).unwrap_or_default().to_owned();
        (line.split(' ').map(str::to_owned).collect::<Vec<_>>().join(" "), said.len())
    };
    let same = "3 rw 1 pg1 10.0.0.1 2 0 0 1 22 6 3 4 6 22 0 0 pg.example 5433 -".to_owned();
    let other = "3 rw 1 pg1 - 2 0 0 1 22 6 3 4 6 22 0 0 - 5433 -".to_owned();
    // the address stays if HAProxy begins with the last one and the name is the same
    for server in [
        "server pg1 pg.example:5433 init-addr last,libc,none",
        "server pg1 pg.example:5433 resolvers dns",
        "server-template pg 3 pg.example:5433 init-addr last",
    ] {
        assert_eq!(states(server, pg1), (same.clone(), 0), "{server}");
    }
    for server in [
        "server pg1 pg.example:5433",
        "server pg1 pg2.example:5433 init-addr last",
        "server pg1 10.0.0.2:5433 init-addr last",
    ] {
        assert_eq!(states(server, pg1), (other.clone(), 0), "{server}");
    }
    // an unknown address, an unknown server
    for server in [
        "server pg1 \"${PG1}:5433\"",
        "server pg1 pg.example:+1",
        "server-template pg 3 _pg._tcp.example",
        "server pg2 pg.example:5432",
    ] {
        assert_eq!(states(server, pg1), (pg1.to_owned(), 1), "{server}");
    }
    // a server that is DOWN and has an agent stays out of the pool until the agent has answered
    let down = pg1.replace(" 2 0 0 1 ", " 0 0 0 1 ");
    for server in ["server pg2 pg.example:5432", "server pg1 \"${PG1}:5433\""] {
        assert_eq!(states(server, &down), (down.replace(" 0 0 0 1 ", " 0 1 0 1 "), 1), "{server}");
    }
    // a longer or shorter row stays
    for line in ["x", "3 rw 1 pg1 10.0.0.1 0 0", &format!("{pg1} 1")] {
        assert_eq!(states("server pg1 pg.example:5433", line), (line.to_owned(), 0));
    }
    // without a configuration, all rows stay
    let mut said = Vec::new();
    assert_eq!(states::adapt_states(&row(pg1), None, &mut said), row(pg1));
}

/// Any report of HAProxy is adapted without a panic.
#[test]
fn no_report_makes_it_panic() {
    let (report, configuration) = (full_report(), parse(&read(GOOD[0])));
    let report: Vec<char> = report.chars().take(4000).collect();
    for at in 0..report.len() {
        let mut changed = report.clone();
        match at % 3 {
            0 => drop(changed.remove(at)),
            1 => changed[at] = ['\n', ' ', '9', 'x', '\u{fffd}'][at % 5],
            _ => changed.truncate(at),
        }
        let changed: String = changed.into_iter().collect();
        states::adapt_states(&changed, Some(&configuration), &mut Vec::new());
    }
}

/// An admin socket that treats each connection as the test says.
fn admin_socket(folder: &Path, behave: impl Fn(&str, &mut UnixStream) + Send + 'static) -> PathBuf {
    let socket = folder.join("admin.sock");
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("a socket");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut command = String::new();
            let _ = BufReader::new(&stream).read_line(&mut command);
            behave(command.trim(), &mut stream);
        }
    });
    socket
}

#[test]
fn saving_the_states_never_keeps_a_reload_waiting() {
    let folder = tempfile::tempdir().expect("a folder");
    let states = folder.path().join("servers");
    let config = folder.path().join("haproxy.cfg");
    let site = read(GOOD[0]).replace("/run/haproxy-state/servers", &states.display().to_string());
    fs::write(&config, &site).expect("a file");
    let save = |socket: &Path| {
        let began = Instant::now();
        let output = Command::new(POOLS)
            .args(["save-states", "-f"])
            .arg(&config)
            .arg("--socket")
            .arg(socket)
            .output();
        let output = output.expect("the program");
        assert_eq!(output.status.code(), Some(0));
        assert!(began.elapsed() < Duration::from_secs(9));
        (
            fs::read_to_string(&states).unwrap_or_default(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    // nothing was ever saved
    let (saved, said) = save(&folder.path().join("none"));
    assert!(saved.is_empty() && said.contains("were not saved"), "{said}");
    let report = known_report();
    let whole = report.clone();
    let socket = admin_socket(folder.path(), move |command, stream| {
        // no client waits
        let _ = if command.starts_with("show stat ") {
            stream.write_all(b"\n")
        } else {
            assert_eq!(command, "show servers state");
            stream.write_all(whole.as_bytes())
        };
    });
    let (saved, said) = save(&socket);
    assert!(saved == adapt_report(&report, &site).0 && said.is_empty(), "{said}");
    // the states that were saved last stay, adapted to the configuration
    let silent = admin_socket(folder.path(), |_, stream| {
        let mut stream = stream.try_clone().expect("a socket");
        thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        thread::sleep(Duration::from_secs(20));
    });
    let last = save(&silent);
    assert!(last.0 == saved && last.1.contains("were not saved"), "{}", last.1);
    for answer in ["", "1\n", "Permission denied\n\n"] {
        let socket =
            admin_socket(folder.path(), move |_, stream| drop(stream.write_all(answer.as_bytes())));
        let last = save(&socket);
        assert!(last.0 == saved && last.1.contains("were not saved"), "{}", last.1);
    }
    // an endless answer
    let socket =
        admin_socket(folder.path(), |_, stream| while stream.write_all(&[b'x'; 65536]).is_ok() {});
    let last = save(&socket);
    assert!(last.0 == saved && last.1.contains("were not saved"), "{}", last.1);
    // no state file, no configuration
    fs::write(&config, "global\n").expect("a file");
    assert!(save(&socket).1.contains("no server-state-file"));
    fs::remove_file(&config).expect("a file");
    assert!(save(&socket).1.contains("haproxy.cfg"));
}

/// A server as a fake HAProxy shows it.
#[derive(Clone)]
struct Shown {
    pool: &'static str,
    name: &'static str,
    status: &'static str,
    check: &'static str,
    agent: &'static str,
    last: &'static str,
    administrative: u32,
    weight: u32,
    check_state: u32,
    agent_state: u32,
    port: u16,
    agent_port: u16,
    patroni: u16,
}

const UP: Shown = Shown {
    pool: "rw",
    name: "a",
    status: "UP",
    check: "L7OK",
    agent: "L7OK",
    last: "via agent : up (primary, running)",
    administrative: 4,
    weight: 1,
    check_state: 6,
    agent_state: 22,
    port: 5432,
    agent_port: 5555,
    patroni: 1,
};
const STANDBY: Shown = Shown {
    name: "b",
    status: "MAINT",
    check: "",
    last: "via agent : up (replica, streaming)",
    administrative: 5,
    check_state: 14,
    ..UP
};

/// What HAProxy answers to a command.
fn answer(command: &str, servers: &[Shown], info: &str) -> String {
    let mut text = match command {
        "show servers state" => "1\n# be_id ...\n".to_owned(),
        "show info" => return format!("Name: HAProxy\n{info}\n\n"),
        "show stat -1 4 -1 typed" => String::new(),
        other => panic!("{other}"),
    };
    for (number, shown) in servers.iter().enumerate() {
        let Shown {
            pool,
            name,
            status,
            check,
            agent,
            last,
            administrative,
            weight,
            check_state,
            agent_state,
            port,
            agent_port,
            patroni,
        } = shown;
        if command == "show servers state" {
            let op = if *status == "UP" { 2 } else { 0 };
            text += &format!(
                "2 {pool} {number} {name} 127.0.0.1 {op} {administrative} {weight} 1 22 6 3 4 {check_state} {agent_state} 0 0 - {port} - 0 {patroni} - - {agent_port}\n"
            );
        } else {
            let fields = [
                ("pxname", *pool),
                ("svname", name),
                ("status", status),
                ("check_status", check),
                ("agent_status", agent),
                ("last_agt", last),
                ("last_chk", "a:b\u{1b}[31m"),
                ("weight", "1"),
                ("scur", "7"),
            ];
            for (at, (field, value)) in fields.iter().enumerate() {
                text += &format!("S.2.{number}.{at}.{field}.1:MGP:str:{value}\n");
            }
        }
    }
    text + "\n"
}

/// Runs `status` with a fake HAProxy. Returns the exit status and stdout.
fn status(servers: Vec<Shown>, info: &'static str, arguments: &[&str]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("haproxy.cfg");
    let socket = admin_socket(folder.path(), move |command, stream| {
        let _ = stream.write_all(answer(command, &servers, info).as_bytes());
    });
    let site = "listen rw\n option httpchk OPTIONS /primary\n default-server check port 1 agent-check agent-port 5555 agent-send \"primary\\n\" disabled\n \
        server a 127.0.0.1:5432\n server b 127.0.0.1:5432\n server w 127.0.0.1 backup no-check no-agent-check\n use_backend spare if { nbsrv(rw) eq 1 } { nbsrv(spare) eq 1 }\n\
        backend spare\n option httpchk OPTIONS /primary\n server a 127.0.0.1:5432 check port 1\n\
        listen ro\n option httpchk OPTIONS /replica\n server a 127.0.0.1:5432 check port 1\n server b 127.0.0.1:5432 check port 1\n\
        listen web\n server x 127.0.0.1:80\n";
    fs::write(
        &config,
        format!("global\n stats socket {} mode 600 level admin\n{site}", socket.display()),
    )
    .expect("a file");
    let output = Command::new(POOLS)
        .args(["status", "-f"])
        .arg(&config)
        .args(arguments)
        .output()
        .expect("the program");
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A site without any trouble, after this change of its servers.
fn site(change: impl Fn(&mut Shown)) -> Vec<Shown> {
    let plain = Shown { pool: "ro", agent: "", agent_state: 0, agent_port: 0, last: "", ..UP };
    let mut site = vec![
        UP,
        STANDBY,
        Shown {
            name: "w",
            status: "no check",
            check: "",
            check_state: 0,
            agent_state: 0,
            weight: 0,
            ..UP
        },
        Shown { name: "a", status: "DOWN", check: "L7STS", administrative: 0, ..plain.clone() },
        Shown { name: "b", ..plain.clone() },
        Shown { pool: "spare", ..plain },
        Shown { pool: "web", name: "x", status: "DOWN", check: "L4CON", agent_state: 0, ..UP },
    ];
    site.iter_mut().for_each(change);
    site
}

#[test]
fn status_says_what_is_wrong() {
    let (code, said) = status(site(|_| {}), "Stopping: 0", &[]);
    assert_eq!((code, said.lines().count()), (Some(0), 5), "{said}");
    let (_, asking) = status(site(|s| s.last = ""), "Stopping: 0", &[]);
    assert!(asking.starts_with("rw/a     UP     agent L7OK, check L7OK, "), "{asking}");
    assert!(said.starts_with("rw/a     UP     agent L7OK: up (primary, running), check L7OK, weight 1, sessions 7, Patroni: no answer"), "{said}");
    // the file has just been written, and a HAProxy that started before has not read it
    for (info, well) in [
        ("Uptime_sec: 0", true),
        ("Uptime_sec: 60", false),
        ("Start_time_sec: 1\nUptime_sec: 0", false),
        ("Start_time_sec: 99999999999", true),
        ("Start_time_sec: x", true),
    ] {
        let (code, said) = status(site(|_| {}), info, &[]);
        assert_eq!(code == Some(0), well, "{info}: {said}");
        assert_eq!(said.contains("haproxy.cfg has been changed since"), !well, "{info}: {said}");
    }
    let (code, said) = status(site(|_| {}), "Stopping: 0", &["--quiet"]);
    assert_eq!((code, &*said), (Some(0), "OK: 5 servers that ask Patroni\n"));
    type Change = fn(&mut Shown);
    let changes: [(&str, Change, &str); 23] = [
        (
            "rw/a",
            |s| s.last = "via agent : up ready (primary; no grace period: x)",
            "its agent has no grace period",
        ),
        ("rw/a", |s| (s.status, s.check) = ("UP 1/3", "* L7OK"), "has not asked again yet"),
        ("ro/b", |s| (s.status, s.check) = ("DOWN 1/2", "L7OK"), "not often enough yet"),
        ("rw/a", |s| s.agent = "* L4CON", "its agent does not answer (L4CON) on port 5555"),
        ("rw/b", |s| s.agent = "L4TOUT", "its agent does not answer"),
        ("rw/b", |s| (s.agent, s.last) = ("INI", ""), "not been asked yet"),
        (
            "rw/b",
            |s| (s.agent, s.last) = ("CHECKED", "agent reports an error : !unreachable:_no_line"),
            "its agent leaves it as it is: !unreachable: no line",
        ),
        (
            "rw/a",
            |s| (s.status, s.last) = ("DOWN (agent)", "via agent : fail (gone)"),
            "DOWN, as its agent says: fail (gone)",
        ),
        ("rw/a", |s| (s.status, s.check) = ("DOWN", "L7TOUT"), "own check says (L7TOUT): a:b?[31m"),
        ("rw/a", |s| (s.status, s.check) = ("UP 1/3", "L4CON"), "own check fails (L4CON)"),
        ("ro/b", |s| (s.status, s.check) = ("DOWN", "L4CON"), "ro: no server is UP\n"),
        (
            "rw/a",
            |s| (s.status, s.administrative) = ("MAINT", 5),
            "rw: no server is UP; if an agent is silent, clients go to spare/a\n",
        ),
        ("spare/a", |s| s.status = "NOLB", "spare: no server is UP\n"),
        ("rw/b", |s| s.status = "UP", "rw: 2 servers are UP"),
        ("rw/w", |s| s.status = "MAINT", "rw/w: it is in MAINT, so no client waits there"),
        ("rw/a", |s| s.weight = 0, "weight is 0"),
        ("rw/a", |s| s.agent_state = 18, "turned off its agent check"),
        ("rw/a", |s| s.agent_state = 0, "has no agent check for it"),
        ("rw/a", |s| s.agent_port = 5554, "on port 5554"),
        ("rw/a", |s| s.port = 6432, "clients to port 6432, and the configuration says 5432"),
        ("rw/a", |s| (s.check, s.check_state) = ("", 2), "turned off HAProxy's own check"),
        ("rw/a", |s| s.name = "c", "rw: HAProxy has no a"),
        ("ro/b", |s| (s.status, s.administrative) = ("MAINT", 1), "somebody has put it into MAINT"),
    ];
    for (server, change, wanted) in changes {
        let changed = site(|shown| {
            if format!("{}/{}", shown.pool, shown.name) == server {
                change(shown)
            }
        });
        let (code, said) = status(changed, "Stopping: 0", &[]);
        assert!(
            code == Some(1) && said.contains(wanted) && said.contains("WRONG"),
            "{server} {wanted}: {said}"
        );
    }
    // without an agent, a node of another role is DOWN
    let standby = site(|s| {
        if (s.pool, s.name) == ("ro", "a") {
            s.check = "L7RSP";
        }
    });
    assert_eq!(status(standby, "Stopping: 0", &["--quiet"]).0, Some(0));
    // a reserve without a server UP serves nobody
    let neither = site(|s| {
        if s.name == "a" {
            (s.status, s.administrative) = ("MAINT", 5);
        }
    });
    let (_, said) = status(neither, "Stopping: 0", &[]);
    assert!(said.contains("WRONG: rw: no server is UP\n"), "{said}");
    let (code, said) = status(site(|_| {}), "Stopping: 1", &["--quiet"]);
    assert!(
        code == Some(1) && said.lines().count() == 1 && said.contains("replaced by a reload"),
        "{said}"
    );
}

/// An answer that ends in the middle says nothing of the servers that it lacks, and only files are replaced.
#[test]
fn half_an_answer_is_an_error_and_only_files_are_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("haproxy.cfg");
    fs::write(&config, "listen rw\n server a 127.0.0.1:5432 agent-check\n").expect("a file");
    let run = |length: usize, arguments: &[&str]| {
        let socket = admin_socket(folder.path(), move |command, stream| {
            let whole = answer(command, &site(|_| {}), "Stopping: 0");
            let _ = stream.write_all(&whole.as_bytes()[..whole.len().min(length)]);
        });
        let mut command = Command::new(POOLS);
        command.arg("status").arg("-f").arg(&config).arg("--socket").arg(socket).args(arguments);
        let output = command.output().expect("the program");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(300, &[]);
    assert!(code == Some(2) && said.contains("its answer is not whole"), "{said}");
    let fifo = folder.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    let (code, said) = run(usize::MAX, &["--metrics", fifo.to_str().expect("UTF-8")]);
    assert!(code == Some(1) && said.contains("not a regular file"), "{code:?} {said}");
    assert!(!fs::metadata(&fifo).expect("it is still there").is_file());
}

/// For Prometheus: a line for each server with an agent, and nothing on stdout.
#[test]
fn metrics_say_what_the_exporter_does_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("pools.prom");
    let file = file.to_str().expect("UTF-8");
    type Change = fn(&mut Shown);
    // whether the agent says that it has no grace period, and that an operator holds the node
    type Says = Option<(u8, u8)>;
    // the change, whether the agent's answer counts, and what it says
    let changes: [(Change, u8, Says); 8] = [
        (|s| s.last = "via agent : up drain (hold: kernel upgrade)", 1, Some((0, 1))),
        (|_| {}, 1, Some((0, 0))),
        (|s| s.agent = "* L7STS", 1, Some((0, 0))),
        (|s| (s.agent, s.last) = ("* L7OK", ""), 1, None),
        (|s| s.agent = "L4CON", 0, Some((0, 0))),
        (|s| s.agent_state = 18, 0, Some((0, 0))),
        (
            |s| s.last = "via agent : up (primary, running; no grace period: /run/memory: gone)",
            1,
            Some((1, 0)),
        ),
        (
            |s| {
                s.agent = "CHECKED";
                s.last = "agent reports an error : !unreachable:_why;_no_grace_period:_gone";
            },
            0,
            Some((1, 0)),
        ),
    ];
    for (change, answers, said) in changes {
        let servers = site(|shown| {
            if (shown.pool, shown.name) == ("rw", "a") {
                change(shown);
            }
        });
        assert_eq!(status(servers, "Stopping: 0", &["--metrics", file]), (Some(0), String::new()));
        let written = fs::read_to_string(file).expect("the file");
        let (times, values): (Vec<_>, Vec<_>) = written
            .lines()
            .filter(|line| !line.starts_with('#'))
            .partition(|line| line.contains("timestamp"));
        let value = |name, server, value| {
            format!("patroni_pools_{name}{{proxy=\"rw\",server=\"{server}\"}} {value}")
        };
        let wanted: Vec<_> = [
            Some(value("agent_answers", "a", answers)),
            Some(value("agent_answers", "b", 1)),
            said.map(|(lost, _)| value("grace_lost", "a", lost)),
            Some(value("grace_lost", "b", 0)),
            said.map(|(_, held)| value("held", "a", held)),
            Some(value("held", "b", 0)),
        ]
        .into_iter()
        .flatten()
        .collect();
        assert_eq!(values, wanted, "{written}");
        assert!(times.len() == 1 && times[0].starts_with("patroni_pools_timestamp_seconds 1"));
    }
    let (code, said) = status(site(|_| {}), "Stopping: 0", &["--metrics", "/none/pools.prom"]);
    assert_eq!((code, &*said), (Some(1), ""));
}

/// `--wait` ends as soon as nothing is wrong, and after its time at the latest.
#[test]
fn waiting_ends_when_nothing_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let began = Instant::now();
    let socket = admin_socket(folder.path(), move |command, stream| {
        let ready = began.elapsed() > Duration::from_secs(1);
        let change = |shown: &mut Shown| {
            if !ready {
                shown.agent = "INI"
            }
        };
        let _ = stream.write_all(answer(command, &site(change), "").as_bytes());
    });
    let run = |wait: &str| {
        let began = Instant::now();
        let output = Command::new(POOLS)
            .args(["status", "-f", "/nowhere", "--quiet", "--wait", wait, "--socket"])
            .arg(&socket)
            .output();
        (output.expect("the program").status.code(), began.elapsed())
    };
    assert_eq!(run("0").0, Some(1));
    let (code, took) = run("30");
    assert!(code == Some(0) && took < Duration::from_secs(10), "{code:?} {took:?}");
    fs::remove_file(&socket).expect("the socket");
    let (code, took) = run("1");
    assert!(
        code == Some(2) && took >= Duration::from_secs(1) && took < Duration::from_secs(9),
        "{took:?}"
    );
}

/// Patroni is asked only for `/patroni`, and characters of its answer that cannot be printed are replaced.
#[test]
fn each_patroni_is_asked_once() {
    let patroni = FakePatroni::new(|stream| {
        let _ = stream
            .write_all(&http(200, "{\"role\": \"primary\", \"state\": \"run\\u001b[31mning\"}"));
    });
    let port = patroni.address.port();
    let (code, said) = status(site(|shown| shown.patroni = port), "", &[]);
    assert_eq!(code, Some(0));
    assert_eq!(said.matches("Patroni: primary, run?[31mning").count(), 5, "{said}");
    assert_eq!(patroni.requests().len(), 1);
    assert!(patroni.requests()[0].starts_with("GET /patroni HTTP/1.1\r\n"));
}
