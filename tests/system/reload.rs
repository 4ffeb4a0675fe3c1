//! units/examples/haproxy-reload.conf on a real systemd and HAProxy: a reload takes over the states, a change of the
//! configuration applies, and a failure changes nothing. Needs root and what tests/install installs; tests/run runs it.

use crate::common::{self, machine::Machine};
use std::fs;
use std::ops::Deref;
use std::time::{Duration, Instant};

/// Commands that take HAProxy's admin socket away and put it back.
const NO_SOCKET: &str = "mv /run/haproxy/admin.sock /run/haproxy/away";
const SOCKET: &str = "mv /run/haproxy/away /run/haproxy/admin.sock";

/// HAProxy with the shipped drop-in and `global` section. Its servers send the address and port of the connection.
struct LoadBalancer(Machine);

impl Deref for LoadBalancer {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl LoadBalancer {
    fn boot() -> LoadBalancer {
        let machine = LoadBalancer(Machine::boot("reload", "/"));
        machine.sh(
            "mkdir /etc/systemd/system/haproxy.service.d && systemd-tmpfiles --create haproxy.conf",
        );
        machine.put(
            &common::file("units/examples/haproxy-reload.conf"),
            "/etc/systemd/system/haproxy.service.d/reload.conf",
        );
        machine.put(env!("CARGO_BIN_EXE_patroni-pools").as_ref(), "/usr/bin/patroni-pools");
        let shipped =
            fs::read_to_string(common::file("units/examples/haproxy.cfg")).expect("haproxy.cfg");
        let (settings, pools) = shipped.split_once("listen postgres-write").expect("a write pool");
        let pool = pools.split("\n\n").next().expect("its lines");
        // nobody asks Patroni here
        let patroni = ["httpchk", "port 8008", "acl", "agents", "reserve"];
        let pool = pool.lines().filter(|line| !patroni.iter().any(|word| line.contains(word)));
        let pool = pool.collect::<Vec<_>>().join("\n");
        let configuration = format!("{settings}listen postgres-write{pool}\n");
        machine.file("/etc/haproxy/haproxy.cfg", &configuration);
        machine.sh(
            "printf '127.0.0.11 pg1\\n127.0.0.12 pg2\\n127.0.0.13 pg3\\n' > /etc/hosts
            for port in 5432 6432; do
                systemd-run -q -p Type=exec socat TCP-LISTEN:$port,fork \"SYSTEM:echo $port \\$SOCAT_SOCKADDR\"
            done
            agent='[ $SOCAT_SOCKADDR = 127.0.0.11 ] && echo up ready || echo up maint'
            systemd-run -q -p Type=exec --unit agent socat TCP-LISTEN:5555,fork \"SYSTEM:$agent\"
            systemctl daemon-reload && systemctl start haproxy",
        );
        machine
    }

    /// Waits until clients of the pool reach this server, and checks that they stay there.
    fn assert_reached(&self, server: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let reached = self.sh("socat -u TCP:127.0.0.1:5000 - 2> /dev/null || true");
            if reached.trim() == server {
                break;
            }
            assert!(Instant::now() < end, "{reached:?} instead of {server}");
        }
        self.sh(&format!(
            "for i in $(seq 20); do [ \"$(socat -u TCP:127.0.0.1:5000 -)\" = '{server}' ] || exit 1; done"
        ));
    }

    /// Reloads, and waits until the new process serves and the old one ends.
    fn reload(&self) {
        self.sh("old=$(pgrep -P $(systemctl show -P MainPID haproxy))
            systemctl reload haproxy
            for i in $(seq 500); do [ -e /proc/$old ] || exit 0; sleep 0.02; done; exit 1");
    }

    /// The states of the servers that HAProxy shows.
    fn shown(&self, pool: &str) -> String {
        self.sh(&format!(
            "echo 'show stat' | socat stdio unix-connect:/run/haproxy/admin.sock |
            awk -F, '$1 == \"{pool}\" && $2 ~ /^pg/ {{ printf \"%s \", $18 }}'"
        ))
    }

    /// Waits until HAProxy shows these states.
    fn wait_for_states(&self, pool: &str, states: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.shown(pool) != states {
            assert!(Instant::now() < end, "{} instead of {states}", self.shown(pool));
        }
    }

    /// Counts the lines in the journal that say that the states were not saved.
    fn complaints(&self) -> usize {
        self.sh(
            "journalctl --sync; journalctl -q -o cat -u haproxy | grep -c 'were not saved' || true",
        )
        .trim()
        .parse()
        .expect("a number")
    }
}

#[test]
#[ignore = "needs root, systemd and HAProxy: tests/run"]
fn a_reload_takes_over_the_states_and_the_configuration_wins() {
    let machine = LoadBalancer::boot();
    machine.assert_reached("5432 127.0.0.11");

    println!(
        "the states are taken over: the agents are gone, and a server in MAINT would stay there"
    );
    machine.sh("systemctl stop agent");
    machine.reload();
    machine.assert_reached("5432 127.0.0.11");
    let folder =
        machine.sh("stat -c '%U %a' /run/haproxy-state; find /run/haproxy-state -links +1");
    assert!(folder.starts_with("root 755\n"), "{folder}");

    println!("a server's port changes in the configuration, then its address");
    machine.sh("sed -i s/:5432/:6432/ /etc/haproxy/haproxy.cfg");
    machine.reload();
    machine.assert_reached("6432 127.0.0.11");
    machine.sh("sed -i 's/^127.0.0.11 /127.0.0.21 /' /etc/hosts");
    machine.reload();
    machine.assert_reached("6432 127.0.0.21");
    machine.sh("sed -i 's/pg1:6432/127.0.0.31:6432/' /etc/haproxy/haproxy.cfg");
    machine.reload();
    machine.assert_reached("6432 127.0.0.31");
    assert_eq!(machine.complaints(), 0);

    println!(
        "no stats socket: the states are those saved last, the port that of the configuration"
    );
    machine.sh(&format!("sed -i s/:6432/:5432/ /etc/haproxy/haproxy.cfg; {NO_SOCKET}"));
    machine.reload();
    machine.sh(SOCKET);
    machine.assert_reached("5432 127.0.0.31");
    assert_eq!(machine.complaints(), 1);
    machine.sh("sed -i s/:5432/:6432/ /etc/haproxy/haproxy.cfg");
    machine.reload();
    machine.assert_reached("6432 127.0.0.31");
    assert_eq!(machine.complaints(), 1);

    println!("no patroni-pools: old states would override the configuration, so none are kept");
    machine.sh("mv /usr/bin/patroni-pools /usr/bin/away");
    machine.reload();
    machine.sh("mv /usr/bin/away /usr/bin/patroni-pools");
    machine.wait_for_states("postgres-write", "MAINT MAINT MAINT ");

    println!("a configuration that HAProxy refuses");
    machine.sh("cp /etc/haproxy/haproxy.cfg /etc/haproxy/good
        echo nonsense >> /etc/haproxy/haproxy.cfg
        ! systemctl reload haproxy 2> /dev/null
        cp /etc/haproxy/good /etc/haproxy/haproxy.cfg");
    machine.wait_for_states("postgres-write", "MAINT MAINT MAINT ");

    println!("the variables of RHEL's haproxy.service");
    machine.sh("mkdir /etc/haproxy/conf.d
        printf '[Service]\nEnvironment=CFGDIR=/etc/haproxy/conf.d \"OPTIONS=-f /etc/haproxy/more.cfg\"\n\
            ExecStart=\nExecStart=/usr/sbin/haproxy -Ws -f $CONFIG -f $CFGDIR -p $PIDFILE $OPTIONS\n' \
            > /etc/systemd/system/haproxy.service.d/rhel.conf
        touch /etc/haproxy/more.cfg
        systemctl daemon-reload; systemctl restart haproxy
        systemctl reload haproxy
        for file in conf.d/more.cfg more.cfg; do
            echo nonsense > /etc/haproxy/$file
            ! systemctl reload haproxy 2> /dev/null
            : > /etc/haproxy/$file
        done
        systemctl reload haproxy");

    println!("a stop removes the saved states");
    machine.sh("systemctl stop haproxy && [ ! -e /run/haproxy-state ]");
}

/// The agents are gone, so that only the drop-in decides. HAProxy's own check passes only for pg1.
#[test]
#[ignore = "needs root, systemd and HAProxy: tests/run"]
fn a_reload_keeps_the_states_when_a_word_comes_or_goes() {
    let machine = LoadBalancer::boot();
    machine.sh("systemd-run -q -p Type=exec socat TCP-LISTEN:8008,bind=127.0.0.11,fork /dev/null
        sed -i '/bind :5000/a default-server port 8008' /etc/haproxy/haproxy.cfg
        systemctl restart haproxy");
    machine.assert_reached("5432 127.0.0.11");
    machine.sh("systemctl stop agent");
    machine.reload();
    for (complaints, breaks) in ["true", NO_SOCKET].iter().enumerate() {
        for (what, change, shown) in [
            ("`disabled` removed", "s/ disabled$//", "UP MAINT MAINT "),
            ("`agent-check` removed", "s/ agent-check / /", "UP DOWN DOWN "),
            ("`agent-check` added", "s/ agent-port / agent-check&/", "UP MAINT MAINT "),
            ("`disabled` added", "s/ rise 1$/& disabled/", "UP MAINT MAINT "),
            ("both removed", "s/ disabled$//; s/ agent-check / /", "UP DOWN DOWN "),
            (
                "both added",
                "s/ rise 1$/& disabled/; s/ agent-port / agent-check&/",
                "UP MAINT MAINT ",
            ),
        ] {
            println!("{what}, {breaks}");
            let before = machine.complaints();
            machine.sh(&format!("sed -i '{change}' /etc/haproxy/haproxy.cfg; {breaks}"));
            machine.reload();
            machine.sh(&format!("[ ! -e /run/haproxy/away ] || {SOCKET}"));
            assert_eq!(machine.shown("postgres-write"), shown);
            machine.assert_reached("5432 127.0.0.11");
            assert_eq!(machine.complaints(), before + complaints);
        }
    }
}

/// The agents are silent after the reload, and the reserve takes over. A hold stays.
#[test]
#[ignore = "needs root, systemd and HAProxy: tests/run"]
fn a_reload_leaves_the_reserve_as_it_was() {
    let machine = LoadBalancer::boot();
    machine.sh("systemd-run -q -p Type=exec socat TCP-LISTEN:8008,bind=127.0.0.12,fork /dev/null
        printf '\\nbackend reserve\\n default-server port 8008 inter 500ms enabled\\n' >> /etc/haproxy/haproxy.cfg
        for pg in pg1 pg2; do
            echo \" server $pg $pg:5432 agent-send \\\"hold\\\n\\\"\" >> /etc/haproxy/haproxy.cfg
        done
        systemctl stop agent
        systemctl restart haproxy
        echo 'set server reserve/pg2 state drain' | socat stdio unix-connect:/run/haproxy/admin.sock");
    machine.wait_for_states("reserve", "DOWN DRAIN (agent) ");
    machine.reload();
    machine.sh("systemd-run -q -p Type=exec socat TCP-LISTEN:8008,bind=127.0.0.11,fork /dev/null");
    machine.wait_for_states("reserve", "UP DRAIN (agent) ");
}

/// The old process would refuse the waiting clients after ten seconds.
#[test]
#[ignore = "needs root, systemd and HAProxy: tests/run"]
fn a_reload_waits_for_clients_that_wait_for_a_server() {
    let machine = LoadBalancer::boot();
    machine.assert_reached("5432 127.0.0.11");
    let command = |command: &str| {
        machine.sh(&format!("echo '{command}' | socat stdio unix-connect:/run/haproxy/admin.sock"))
    };
    machine.sh("systemctl stop agent");
    command("set server postgres-write/pg1 state maint");
    machine.sh("for i in 1 2 3 4 5; do
            (socat -u TCP:127.0.0.1:5000 - > /tmp/client$i) > /dev/null 2>&1 &
        done
        systemctl --no-block reload haproxy; sleep 2");
    command("set server postgres-write/pg1 state ready");
    let reached = machine.sh("for i in 1 2 3 4 5; do
            for j in $(seq 600); do [ ! -s /tmp/client$i ] || break; sleep 0.02; done
            cat /tmp/client$i
        done
        while [ $(systemctl show -P ActiveState haproxy) = reloading ]; do sleep 0.02; done");
    assert_eq!(reached, "5432 127.0.0.11\n".repeat(5));
    println!("a reload waits for five seconds at most");
    command("set server postgres-write/pg1 state maint");
    machine.sh("(socat -u TCP:127.0.0.1:5000 -) > /dev/null 2>&1 & sleep 0.5");
    let began = Instant::now();
    machine.reload();
    assert!(began.elapsed() > Duration::from_secs(4), "{:?}", began.elapsed());
    println!("a reload does not wait if no client does");
    machine.sh("for i in $(seq 600); do pgrep -x -a socat | grep -q 'TCP:127.0.0.1:5000' || exit 0; sleep 0.02; done; exit 1");
    let began = Instant::now();
    machine.reload();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}
