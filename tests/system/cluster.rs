//! Real everything: three machines, each a real systemd as PID 1 with the shipped units, Patroni and
//! PostgreSQL, and one with etcd and HAProxy, whose configuration is the shipped one. Needs root and
//! what tests/install installs; tests/run runs it.
//!
//! One test, since starting the site is most of the work; each step says what it does.

use crate::common::haproxy::{self, Shown};
use crate::common::{self, lab};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const NODES: [&str; 3] = ["pg1", "pg2", "pg3"];

fn cluster(arguments: &[&str]) -> String {
    lab("cluster", arguments).expect("tests/lab/cluster")
}

/// Runs a line of shell on a machine.
fn on(machine: &str, line: &str) -> Result<String, String> {
    lab("machine", &["run", machine, "sh", "-c", line])
}

struct Site;

impl Site {
    fn up() -> Site {
        let site = Site;
        cluster(&["up"]);
        site
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in NODES {
                println!(
                    "{}",
                    on(node, "journalctl --no-pager -q -n 400 | grep agent | tail -20")
                        .unwrap_or_else(|error| error)
                );
            }
        }
        if let Err(error) = lab("cluster", &["down"]) {
            println!("{error}");
        }
    }
}

type View = BTreeMap<(String, String), Shown>;

/// HAProxy's view of the pools, one look.
fn look(socket: &Path) -> View {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let states = haproxy::states(socket).map(|states| {
            let pools = states.into_iter().filter(|((pool, _), _)| pool.starts_with("postgres-"));
            pools.map(|(server, state)| (server, state.shown())).collect::<View>()
        });
        match states {
            Ok(view) if view.len() == 6 => return view,
            // a reload puts a new socket into its place, and the old process may not answer to the end
            other => assert!(Instant::now() < end, "HAProxy's socket: {other:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// All that HAProxy shows, looked at every 50 ms in the background.
struct Watch {
    socket: PathBuf,
    history: Arc<Mutex<Vec<(Instant, View)>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start() -> Watch {
        let leader = lab("machine", &["pid", "lb"]).expect("lb");
        let socket = PathBuf::from(format!("/proc/{}/root/run/haproxy/admin.sock", leader.trim()));
        let (history, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (socket, history, stop) = (socket.clone(), history.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::SeqCst) {
                    let view = look(&socket);
                    history.lock().expect("no panic").push((Instant::now(), view));
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        });
        Watch { socket, history, stop, thread: Some(thread) }
    }

    /// The server that is UP for writes now, if it is exactly one.
    fn writer(&self) -> Option<String> {
        let view = look(&self.socket);
        let mut up = view
            .iter()
            .filter(|((pool, _), shown)| pool == "postgres-write" && **shown == Shown::Up);
        match (up.next(), up.next()) {
            (Some(((_, server), _)), None) => Some(server.clone()),
            _ => None,
        }
    }

    /// Waits until the view is as wanted.
    fn until(&self, what: &str, seconds: u64, wanted: impl Fn(&View) -> bool) {
        let end = Instant::now() + Duration::from_secs(seconds);
        while !wanted(&look(&self.socket)) {
            assert!(
                Instant::now() < end,
                "{what}: not within {seconds} s\n{}",
                cluster(&["table"])
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// One writer, and if it is given, this one; two readers; nobody DOWN.
    fn settled(&self, writer: Option<&str>) {
        self.until("a settled view", 60, |view| {
            let up = |pool: &str| {
                view.iter().filter(move |((p, _), s)| p == pool && **s == Shown::Up).count()
            };
            let calm = view.values().all(|shown| matches!(shown, Shown::Up | Shown::Maint));
            let here = writer
                .is_none_or(|w| view[&("postgres-write".to_owned(), w.to_owned())] == Shown::Up);
            calm && here && up("postgres-write") == 1 && up("postgres-read") == 2
        });
    }

    /// Asserts that HAProxy showed the same all the time since then.
    fn assert_unchanged_since(&self, since: Instant) {
        let history = self.history.lock().expect("no panic");
        let looks: Vec<_> = history.iter().filter(|(at, _)| *at >= since).collect();
        let changes = changes(&looks, since);
        assert_eq!(changes.lines().count(), 1, "{changes}");
    }

    /// Asserts that a server was not UP in any pool since then.
    fn assert_never_up_since(&self, since: Instant, server: &str) {
        let history = self.history.lock().expect("no panic");
        let looks: Vec<_> = history.iter().filter(|(at, _)| *at >= since).collect();
        let changes = changes(&looks, since);
        let up =
            |view: &View| view.iter().any(|((_, s), shown)| s == server && *shown == Shown::Up);
        assert!(looks.len() > 10 && !looks.iter().any(|(_, view)| up(view)), "{changes}");
    }

    /// Asserts over all looks since then: no DOWN but of these servers.
    fn assert_since(&self, since: Instant, may_be_down: &[&str]) {
        let history = self.history.lock().expect("no panic");
        let looks: Vec<_> = history.iter().filter(|(at, _)| *at >= since).collect();
        assert!(looks.len() > 10, "{} looks", looks.len());
        let changes = changes(&looks, since);
        for (_, view) in looks {
            for ((_, server), shown) in view {
                let may = *shown != Shown::Down || may_be_down.contains(&server.as_str());
                assert!(may, "{server} is DOWN:\n{changes}");
            }
        }
    }
}

/// The looks that differ from the one before.
fn changes(looks: &[&(Instant, View)], since: Instant) -> String {
    let mut changes = String::new();
    let mut last = None;
    for (at, view) in looks {
        if last != Some(view) {
            changes += &format!("{:6.2} s {view:?}\n", (*at - since).as_secs_f64());
            last = Some(view);
        }
    }
    changes
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let end = self.thread.take().expect("a thread").join();
        assert!(end.is_ok() || std::thread::panicking(), "the watch broke off");
    }
}

/// Writes through HAProxy until it works, and returns the node that took it.
fn write(value: &str) -> String {
    let query = format!("insert into t values ('{value}') returning host(inet_server_addr())");
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match lab("cluster", &["sql", "5000", &query]) {
            Ok(address) => {
                return format!("pg{}", address.trim().strip_prefix("10.55.0.1").expect("a node"));
            }
            Err(error) => assert!(Instant::now() < end, "no write for 30 s: {error}"),
        }
    }
}

/// Does something planned and holds HAProxy to it: no DOWN, and the writes follow.
fn planned(watch: &Watch, name: &str, patronictl: &[&str], writer: &str) {
    println!("{name}");
    let started = Instant::now();
    let said = cluster(&[&["patronictl"], patronictl].concat());
    println!("{}", said.trim());
    watch.settled(Some(writer));
    assert_eq!(write(name), writer, "{name}: the writes follow");
    // some more looks: what is settled must stay so
    std::thread::sleep(Duration::from_secs(5));
    watch.assert_since(started, &[]);
    watch.settled(Some(writer));
}

/// What `table` shows of a server: status and reason.
fn row(pool: &str, server: &str) -> String {
    let table = cluster(&["table"]);
    let start = format!("{pool:15} {server}");
    table.lines().find(|line| line.starts_with(&start)).expect("a row").to_owned()
}

/// Waits for a status and a reason in the write pool.
fn until_row(server: &str, status: &str, reason: &str) {
    until("postgres-write", server, status, reason);
}

/// Waits for a status and a reason: while an agent is asked HAProxy shows no reason.
fn until(pool: &str, server: &str, status: &str, reason: &str) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let row = row(pool, server);
        if row.contains(status) && row.ends_with(reason) {
            return;
        }
        assert!(Instant::now() < end, "{row}");
    }
}

/// Waits until Patroni gives a good answer again, and until both pools have asked for one: their `agent-inter` is
/// 2 s at the most. Else two troubles would be one, longer than the grace.
fn asked_again(node: &str, check: &str) {
    let healthy = format!("curl -fsS -o /dev/null 'http://127.0.0.1:8008/{check}'");
    let end = Instant::now() + Duration::from_secs(30);
    while let Err(error) = on(node, &healthy) {
        assert!(Instant::now() < end, "{node}: {error}");
        std::thread::sleep(Duration::from_millis(200));
    }
    std::thread::sleep(Duration::from_secs(4));
}

/// The lines of the journal that have to do with the agent.
fn journal(node: &str) -> Vec<String> {
    let all = on(node, "journalctl --no-pager -q").expect("journalctl");
    // the socket's own start, and the slice of all instances, are once
    let once = ["HAProxy agent checks for the local Patroni", "Slice /system/patroni-agent-check"];
    // systemd's own error, which it has for a connection that is reset before it is accepted
    let reset = ".socket: getpeername failed: Transport endpoint is not connected";
    let known = |line: &str| line.ends_with(reset) || once.iter().any(|once| line.contains(once));
    all.lines().filter(|line| line.contains("agent") && !known(line)).map(str::to_owned).collect()
}

fn other(than: &[&str]) -> &'static str {
    NODES.into_iter().find(|node| !than.contains(node)).expect("another node")
}

#[test]
#[ignore = "needs root, systemd, Patroni, HAProxy: tests/run"]
fn a_real_site() {
    let _site = Site::up();
    let watch = Watch::start();

    println!("steady state: one UP, two MAINT for writes, no DOWN anywhere");
    watch.settled(None);
    let steady = Instant::now();
    let primary = watch.writer().expect("a writer");
    cluster(&["sql", "5000", "create table t (value text)"]);
    assert_eq!(write("steady"), primary);
    std::thread::sleep(Duration::from_secs(5));
    watch.assert_since(steady, &[]);
    until_row(&primary, "UP ", "primary, running, timeline 1");
    let replica = other(&[&primary]);
    until_row(replica, "MAINT ", "replica, streaming");
    for node in NODES {
        assert_eq!(journal(node), Vec::<String>::new(), "nothing for a healthy check");
    }

    println!("a hold takes a node out of both pools with its reason, and changes nothing else");
    let hold = "/run/patroni-agent-check/hold";
    for (node, pool, other_pool, expected, why) in [
        (replica, "postgres-read", "postgres-write", "MAINT ", "replica, streaming"),
        (primary.as_str(), "postgres-write", "postgres-read", "MAINT ", "primary, running"),
    ] {
        for (word, shown) in [("drain", "DRAIN"), ("maint", "MAINT ")] {
            on(node, &format!("echo '{word} kernel upgrade' > {hold}")).expect("written");
            until(pool, node, shown, "hold: kernel upgrade");
            until(other_pool, node, expected, why);
        }
        on(node, &format!("rm {hold}")).expect("removed");
        until(pool, node, "UP ", "timeline 1");
    }
    watch.assert_since(steady, &[]);

    let next = other(&[&primary]);
    println!("from here on {next} answers by one process for many checks");
    on(
        next,
        "systemctl disable --now patroni-agent-check.socket && systemctl enable --now patroni-agent-check-listen.socket",
    )
    .expect("the other units");
    let switchover = ["switchover", "demo", "--leader", &primary, "--candidate", next, "--force"];
    planned(&watch, "switchover", &switchover, next);
    planned(
        &watch,
        "switchover back",
        &["switchover", "demo", "--leader", next, "--candidate", &primary, "--force"],
        &primary,
    );
    planned(&watch, "restart of the primary", &["restart", "demo", &primary, "--force"], &primary);
    planned(&watch, "restart of a replica", &["restart", "demo", next, "--force"], &primary);
    planned(
        &watch,
        "reinit of a replica",
        &["reinit", "demo", next, "--force", "--wait"],
        &primary,
    );
    for node in NODES {
        assert_eq!(journal(node), Vec::<String>::new(), "nothing for planned work");
    }

    println!(
        "a standby whose Patroni is restarted, and a Patroni that is silent for two seconds, are not DOWN"
    );
    // on a busy machine a Patroni takes longer to start than the grace is by default
    let grace = |options: &str| {
        for node in NODES {
            let line = format!(
                "echo 'OPTIONS=\"--agent-send{options}\"' > /etc/default/patroni-agent-check; systemctl stop patroni-agent-check-listen.service"
            );
            on(node, &line).expect("the agent's settings");
        }
    };
    grace(" --grace 10s");
    let started = Instant::now();
    on(next, "systemctl restart patroni").expect("it restarts");
    asked_again(next, "replica?lag=16MB");
    for (node, check) in [(primary.as_str(), "primary"), (next, "replica?lag=16MB")] {
        on(node, "systemctl kill -s STOP --kill-whom=main patroni && sleep 2 && systemctl kill -s CONT --kill-whom=main patroni")
            .expect("it is stopped and goes on");
        asked_again(node, check);
    }
    watch.settled(Some(&primary));
    watch.assert_since(started, &[]);
    grace("");

    println!("restarts of the socket while HAProxy polls");
    let started = Instant::now();
    let restarts = "for i in $(seq 50); do systemctl restart patroni-agent-check.socket || exit 1; sleep 0.05; done";
    on(&primary, restarts).expect("each restart works");
    assert!(
        !journal(&primary).iter().any(|line| line.contains("in use")),
        "{:?}",
        journal(&primary)
    );
    std::thread::sleep(Duration::from_secs(5));
    watch.assert_since(started, &[]);
    watch.settled(Some(&primary));

    println!("reloads of HAProxy: who was UP stays UP, who was MAINT stays MAINT");
    let started = Instant::now();
    for _ in 0..3 {
        on("lb", "systemctl reload haproxy").expect("a reload");
        assert_eq!(write("reload"), primary);
        std::thread::sleep(Duration::from_secs(3));
    }
    watch.assert_since(started, &[]);
    watch.assert_unchanged_since(started);

    println!("a reload while an agent says down, and while HAProxy's own check does too: never UP");
    let replica = other(&[&primary]);
    let kill = "systemctl kill -s KILL --kill-whom=main patroni";
    on(replica, kill).expect("it is killed, PostgreSQL lives on");
    let down = |view: &View| {
        let both = ["postgres-write", "postgres-read"];
        both.iter().all(|pool| view[&(pool.to_string(), replica.to_owned())] == Shown::Down)
    };
    watch.until("DOWN", 10, down);
    let reload = || {
        let started = Instant::now();
        on("lb", "systemctl reload haproxy").expect("a reload");
        std::thread::sleep(Duration::from_secs(1));
        watch.until("DOWN again", 10, down);
        watch.assert_never_up_since(started, replica);
    };
    reload();
    let end = Instant::now() + Duration::from_secs(20);
    let server = ("postgres-write".to_owned(), replica.to_owned());
    while haproxy::states(&watch.socket).expect("HAProxy")[&server].health != 0 {
        assert!(Instant::now() < end, "HAProxy's own check does not fail");
    }
    reload();
    on(replica, "systemctl start patroni").expect("Patroni starts");
    watch.settled(Some(&primary));

    println!("the primary dies: Patroni is killed, then the postmaster");
    let started = Instant::now();
    on(&primary, "systemctl kill -s KILL --kill-whom=main patroni && kill -KILL $(head -1 /var/lib/postgresql/patroni/postmaster.pid)")
        .expect("both are killed");
    watch.until("DOWN", 10, |view| {
        view[&("postgres-write".to_owned(), primary.clone())] == Shown::Down
    });
    until_row(&primary, "DOWN ", "connection refused (see restapi.listen and --url)");
    watch.until("a new writer", 60, |view| {
        view.iter().any(|((pool, _), shown)| pool == "postgres-write" && *shown == Shown::Up)
    });
    let heir = watch.writer().expect("one writer");
    assert_ne!(heir, primary);
    assert_eq!(write("failover"), heir);
    watch.assert_since(started, &[&primary]);
    // two checks may meet it in the same moment; a third would have heard of it
    let began = journal(&primary);
    let replied =
        |line: &&String| line.contains("replied '") && line.contains(": connection refused");
    assert!((1..=2).contains(&began.iter().filter(replied).count()), "{began:#?}");
    assert!(began.iter().any(|line| line.contains("replied '!unreachable' to ")), "{began:#?}");

    println!("and comes back as a replica");
    on(&primary, "systemctl start patroni").expect("Patroni starts");
    watch.settled(Some(&heir));
    watch.assert_since(started, &[&primary]);
    let ended = journal(&primary);
    assert!(ended.iter().any(|line| line.ends_with(" s of trouble)")), "{ended:#?}");

    // whoever became the heir: a node with each pair of units
    let socket = |node: &str| match node == next {
        true => "patroni-agent-check-listen.socket",
        false => "patroni-agent-check.socket",
    };
    let shipped = common::file("units/examples/patroni-agent-check.xinetd");
    let shipped = shipped.to_str().expect("UTF-8");
    for node in [next, other(&[next])] {
        println!("xinetd with the shipped file in the place of {} on {node}", socket(node));
        on(node, "systemctl stop 'patroni-agent-check*.socket' patroni-agent-check-listen.service")
            .expect("it stops");
        lab("machine", &["put", node, shipped, "/etc/xinetd.d/patroni-agent-check"]).expect("put");
        on(node, "systemctl start xinetd").expect("xinetd starts");
        let expected = match node == heir {
            true => "up ready # primary, running, timeline ",
            false => "up maint # replica, streaming",
        };
        for address in [format!("10.55.0.1{}", &node[2..]), format!("[fd55::1{}]", &node[2..])] {
            let ask = format!("socat -t 5 -T 5 - TCP:{address}:5555 < /dev/null");
            let end = Instant::now() + Duration::from_secs(20);
            let line = loop {
                // a former primary may still be stopped to be rewound
                match on("lb", &ask) {
                    Ok(line) if line.starts_with(expected) => break line,
                    other => assert!(Instant::now() < end, "{other:?}"),
                }
            };
            assert_eq!(line.matches('\n').count(), 1, "{line}");
        }
        on(node, &format!("systemctl stop xinetd && systemctl start {}", socket(node)))
            .expect("back to systemd");
    }

    println!("nothing resident, nothing failed");
    watch.settled(Some(&heir));
    for node in NODES {
        let failed =
            on(node, "systemctl list-units --failed --plain --no-legend --all 'patroni-agent*'")
                .expect("systemctl");
        assert_eq!(failed, "", "{node}");
        let active = on(node, &format!("systemctl is-active {}", socket(node)));
        assert_eq!(active, Ok("active\n".to_owned()), "{node}");
    }
}
