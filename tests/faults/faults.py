"""The faults: what they do to the cluster. Does not know what is measured.

A fault is a function of the cluster and a seeded random. It breaks something and repairs it before it returns. A fault
looks up the current primary when it begins. Its kinds:

    planned     an operator does this on purpose, and nothing is broken
    bridged     the agent's grace period must cover this fault; the function returns how many seconds its longest
                outage really lasted
    silent      the node's agent does not answer either
    everywhere  other nodes may be affected as well
    gone        a node is away long enough that DOWN is the correct state
    seamless    clients may notice a delay and nothing else
    costly      clients of the agent's pool may get more errors than others: an operator wants no clients on a
                node, HAProxy is away, a promotion takes longer than clients wait, or a path is lost so briefly that
                keeping the sessions costs less than ending them
    demoted     the old primary is stopped by its own Patroni, and no hook may delay the stop until another node is
                promoted

`takes` names what a fault removes or changes. `needs` names what must stay unchanged from its beginning to its end. Two
faults can run at once if neither takes what the other needs. A fault that must not run twice at once both takes and
needs the same thing.

    leader      the primary stays the primary             standbys    the standbys, which can be promoted
    patroni     the primary's Patroni                     postgres    the primary's PostgreSQL
    dcs         Patroni and patronictl reach the DCS      automation  Patroni is not paused
    agents      the agents' answers                       haproxy     HAProxy's process
    machine     the primary's machine is neither paused nor slowed
    machines    every machine is reachable

`alerts` are the alerts of units/examples/prometheus-rules.yml that the fault raises if it lasts; any other alert is an
error. Those in `then` count from when the second part of the fault begins. A fault `for_alerts` runs only in the tests
of the alerts: no agent can protect clients from it."""

import functools
import os
import socket
import subprocess
import threading
import time
import urllib.request
from random import Random

from pools import HARD_STOP, SILENCE
from watch import LB, NODES

FAULTS, FOR_ALERTS = {}, {}
KINDS = "planned bridged silent everywhere gone seamless costly demoted".split()
# patronictl needs these
ORDERLY = "leader dcs patroni postgres standbys automation"


def fault(name, takes="", needs="", alerts="", then="", for_alerts=False, **kinds):
    def register(function):
        for kind in KINDS:
            setattr(function, kind, kinds.get(kind, False))
        # Without the hook, clients reach a PostgreSQL that is shutting down.
        function.seamless &= bool(os.environ.get("BEFORE_STOP"))
        function.takes, function.needs = frozenset(takes.split()), frozenset(needs.split())
        function.then = {f"Postgres{alert}" for alert in then.split()}
        function.alerts = {f"Postgres{alert}" for alert in alerts.split()} | function.then
        (FOR_ALERTS if for_alerts else FAULTS)[name] = function
        return function

    return register


def together(one, other):
    """Whether these two faults can run at once."""
    return not (one.takes & other.needs or other.takes & one.needs)


class Chance(Random):
    """The seeded random of a fault; it can also make the fault last longer."""

    stretch, least = 1, 0
    second = None  # when the second part of the fault began, by the clock

    def length(self, seconds):
        return max(seconds * self.stretch, self.least)


def others(node):
    return [other for other in NODES if other != node]


def lasting(seconds, begin, end=lambda: None):
    """Calls `begin`, waits, and calls `end`. Prints and returns the time from before `begin` until `end` was done."""
    started = time.monotonic()
    try:
        begin()
        time.sleep(seconds)
    finally:
        end()
    lasted = time.monotonic() - started
    print(f"  {lasted:.2f} s" + (f" (wanted: {seconds:.2f} s)" if seconds else ""), flush=True)
    return lasted


@fault("switchover", demoted=True, planned=True, seamless=True, takes="leader", needs=ORDERLY)
def switchover(cluster, random):
    primary = cluster.primary()
    cluster.switchover(primary, random.choice(cluster.candidates(primary)))


@fault("switchover, 100 clients a second", demoted=True, planned=True, seamless=True, takes="leader", needs=ORDERLY)
def busy_switchover(cluster, random):
    """New clients keep connecting while the old primary stops and no server is UP."""
    options = "127.0.0.1 5000 --from 127.0.0.0/8 --rate 100 --seconds 12".split()
    clients = subprocess.Popen(["tests/lab/flood", *options])
    try:
        time.sleep(random.uniform(1, 2))
        switchover(cluster, random)
    finally:
        if clients.wait(60):
            raise RuntimeError("no clients")


def delay_stop(cluster, node, seconds):
    """Freezes one PostgreSQL session for some seconds, so that a fast stop must wait for it."""
    stuck = cluster.run(
        node,
        "psql -h /tmp -U postgres -Atqc 'select pg_backend_pid(), pg_sleep(60)' > /tmp/stuck 2>&1 & "
        "for i in $(seq 50); do pid=$(psql -h /tmp -U postgres -Atqc \"select pid from pg_stat_activity where"
        " query like '%pg_sleep(60)' and pid <> pg_backend_pid()\"); [ -z \"$pid\" ] || break; sleep 0.1; done; "
        "kill -STOP $pid; echo $pid",
    ).strip()
    if not stuck:
        raise RuntimeError("no session to delay the stop")
    cluster.run(node, f"(sleep {seconds}; kill -CONT {stuck}) > /dev/null 2>&1 &")


@fault(
    "switchover, a session delays the stop", demoted=True, planned=True, seamless=True,
    takes="leader", needs=ORDERLY,
)
def delayed_switchover(cluster, random):
    primary = cluster.primary()
    delay_stop(cluster, primary, 3)
    cluster.switchover(primary, random.choice(cluster.candidates(primary)))


@fault("restart of the primary", planned=True, seamless=True, takes="postgres", needs=ORDERLY)
def restart_primary(cluster, random):
    cluster.patronictl("restart", "demo", cluster.primary(), "--force")


@fault("restart of a replica", planned=True, seamless=True, takes="standbys", needs=ORDERLY)
def restart_replica(cluster, random):
    cluster.patronictl("restart", "demo", random.choice(others(cluster.primary())), "--force")


@fault("reinit of a replica", planned=True, takes="standbys", needs=ORDERLY)
def reinit(cluster, random):
    cluster.patronictl("reinit", "demo", random.choice(others(cluster.primary())), "--force", "--wait")


@fault("HAProxy reloaded", planned=True, seamless=True, takes="haproxy", needs="haproxy")
def reload_haproxy(cluster, random):
    """Waits until the old process has ended, along with the sessions that it still served."""
    cluster.run("lb", "systemctl reload haproxy")
    time.sleep(random.length(HARD_STOP + 1))


@fault(
    "HAProxy reloaded in a switchover", planned=True, seamless=True,
    takes="leader haproxy", needs=f"{ORDERLY} haproxy",
)
def reload(cluster, random):
    primary = cluster.primary()
    reload = f"sleep {random.uniform(0, 2):.2f}; systemctl reload haproxy"
    with subprocess.Popen(["tests/lab/machine", "run", "lb", "sh", "-c", reload]) as reloading:
        cluster.switchover(primary, random.choice(cluster.candidates(primary)))
    if reloading.returncode:
        raise RuntimeError("HAProxy was not reloaded")


@fault("HAProxy restarted", planned=True, costly=True, takes="haproxy", needs="haproxy")
def restart_haproxy(cluster, random):
    cluster.run("lb", "systemctl restart haproxy")


@fault("Patroni upgraded in pause", planned=True, bridged=True, takes="automation patroni standbys", needs=ORDERLY)
def upgrade(cluster, random):
    """HAProxy is not prepared for the upgrade. PostgreSQL stays up."""
    primary, lasted = cluster.primary(), []
    cluster.patronictl("pause", "demo", "--wait")
    try:
        for node in NODES:
            lasted.append(restart(cluster, node, "primary" if node == primary else "replica"))
            time.sleep(3)
    finally:
        cluster.patronictl("resume", "demo", "--wait")
    return max(lasted)


@fault("the agent's socket restarted", planned=True, takes="agents", needs="agents machines")
def restart_socket(cluster, random):
    for node in NODES:
        cluster.run(node, "systemctl restart patroni-agent-check.socket")
        time.sleep(random.uniform(0, 1))


@fault("a flood of connections to the agents", planned=True, silent=True, needs="machines")
def flood(cluster, random):
    """Opens a thousand connections a second to each node from 64 addresses of a network behind lb, and 200 idle ones.

    Without an access list, HAProxy's own connections queue behind them, and HAProxy may get no answer in time."""
    network = "10.66.0.0/24"
    each = lambda machines, line: [cluster.run(machine, line) for machine in machines]
    each(["lb"], f"ip route add local {network} dev lo")
    each(NODES, f"ip route add {network} via {LB}")
    options = f"5555 --from {network} --rate 1000 --silent 200 --seconds 5".split()
    try:
        floods = [subprocess.Popen(["tests/lab/flood", address, *options]) for address in NODES.values()]
        if any([flood.wait(60) for flood in floods]):
            raise RuntimeError("no flood")
    finally:
        each(["lb"], f"ip route del local {network} dev lo")
        each(NODES, f"ip route del {network} via {LB}")


HOLD = "/run/patroni-agent-check/hold"


@fault("the primary held by an operator", planned=True, costly=True, takes="agents", needs="agents")
def hold(cluster, random):
    primary = cluster.primary()
    cluster.run(primary, f"echo '{random.choice(['drain', 'maint'])} by hand' > {HOLD}")
    began = time.time()
    try:
        time.sleep(random.length(8))
    finally:
        cluster.held = primary, began, time.time()
        cluster.run(primary, f"rm {HOLD}")


@fault(
    "Patroni's service stopped", planned=True, gone=True, seamless=True,
    takes="leader patroni postgres", needs=ORDERLY,
)
def stop_patroni(cluster, random):
    """Patroni closes its REST API before it stops PostgreSQL."""
    primary = cluster.primary()
    cluster.patroni(primary, "stop")
    start_after_failover(cluster, primary, random)


@fault(
    "Patroni's service restarted", planned=True, gone=True, seamless=True,
    takes="leader patroni postgres", needs=ORDERLY,
)
def restart_patroni(cluster, random):
    primary = cluster.primary()
    cluster.patroni(primary, "restart")
    cluster.wait_for_200(primary, "health")


AWAY = "leader patroni postgres agents machine machines"


@fault(
    "the primary's machine rebooted", planned=True, gone=True, silent=True,
    takes=AWAY, needs=f"{ORDERLY} agents machine machines",
)
def reboot_primary(cluster, random):
    cluster.reboot(cluster.primary())


@fault(
    "the primary's machine shut down", planned=True, gone=True, silent=True,
    takes=AWAY, needs=f"{ORDERLY} agents machine machines",
)
def shut_down_primary(cluster, random):
    primary = cluster.primary()
    cluster.shut_down(primary)
    after_failover(cluster, primary, random, lambda: cluster.boot(primary))


@fault(
    "a standby's machine rebooted", planned=True, gone=True, silent=True,
    takes="standbys machines", needs=f"{ORDERLY} agents machines",
)
def reboot_standby(cluster, random):
    cluster.reboot(random.choice(others(cluster.primary())))


@fault(
    "power of the primary's machine cut", silent=True,
    takes=AWAY, needs="patroni postgres automation agents machine machines",
    alerts="AgentSilent ServerDown",
)
def power_off_primary(cluster, random):
    primary = cluster.primary()
    cluster.power_off(primary)
    after_failover(cluster, primary, random, lambda: cluster.boot(primary))


@fault(
    "power of a standby's machine cut", silent=True,
    takes="standbys machines", needs="leader dcs postgres standbys agents machines",
    alerts="AgentSilent ServerDown",
)
def power_off_standby(cluster, random):
    standby = random.choice(others(cluster.primary()))
    lasting(random.length(8), lambda: cluster.power_off(standby), lambda: cluster.boot(standby))


@fault(
    "the primary's link cut", silent=True,
    takes=AWAY, needs="patroni postgres automation agents machine machines",
    alerts="AgentSilent ServerDown",
)
def cut_link_of_primary(cluster, random):
    """The primary's Patroni loses its lock, and no other machine can see its state until the link is back."""
    primary = cluster.primary()
    cluster.unplug(primary)
    after_failover(cluster, primary, random, lambda: cluster.plug(primary))


@fault(
    "a standby's link cut for 8 s", silent=True,
    takes="standbys machines", needs="leader dcs postgres standbys agents machines",
    alerts="AgentSilent ServerDown",
)
def cut_link_of_standby(cluster, random):
    standby = random.choice(others(cluster.primary()))
    lasting(random.length(8), lambda: cluster.unplug(standby), lambda: cluster.plug(standby))


def mute(cluster, node):
    """Drops the node's packets to HAProxy's machine silently. Packets from HAProxy's machine still arrive."""
    cluster.run(node, f"ip neighbour replace {LB} lladdr 02:00:00:00:00:02 dev eth0 nud permanent")


def unmute(cluster, node):
    cluster.run(node, f"ip neighbour delete {LB} dev eth0")


@fault(
    "HAProxy hears nothing from the primary, 8 s", silent=True, costly=True,
    takes="agents machines", needs="agents machines",
    alerts="AgentSilent NoPrimary ServerDown",
)
def lose_answers_of_primary(cluster, random):
    """The primary keeps its role: its replicas and the DCS still hear it."""
    primary = cluster.primary()
    lasting(random.length(8), lambda: mute(cluster, primary), lambda: unmute(cluster, primary))


@fault(
    "HAProxy cut from all nodes, 8 s", silent=True, everywhere=True, costly=True,
    takes="agents machines haproxy", needs="agents machines haproxy",
    alerts="AgentSilent NoPrimary NoReplica ServerDown",
)
def cut_haproxy(cluster, random):
    each = lambda do: [do(cluster, node) for node in NODES]
    lasting(random.length(8), lambda: each(mute), lambda: each(unmute))


def cannot_fork(cluster, times):
    """systemd closes the agent's socket because fork fails with ENOMEM, and opens the socket again by itself."""
    node = cluster.primary()
    what = f"inject=clone,clone3,vfork,?fork:error=ENOMEM:when=1..{times}"
    command = ["strace", "-qq", "-o", "/dev/null", "-p", cluster.host_pid(node), "-e", what]
    with subprocess.Popen(command) as strace:
        try:
            time.sleep(5)
            if strace.poll() is not None:
                raise RuntimeError("PID 1 was not traced")
        finally:
            strace.terminate()
    if "has closed patroni-agent-check.socket" not in cluster.run(node, "journalctl -q -o cat -t patroni-agent-check"):
        raise RuntimeError("no fork of PID 1 has failed")


@fault("PID 1 cannot fork, once", silent=True, takes="agents", needs="agents machines")
def cannot_fork_once(cluster, random):
    cannot_fork(cluster, 1)


@fault("PID 1 cannot fork, five times", silent=True, takes="agents", needs="agents machines")
def cannot_fork_five_times(cluster, random):
    cannot_fork(cluster, 5)


@fault("PostgreSQL stopped by hand", takes="postgres", needs=ORDERLY)
def stop_postgres(cluster, random):
    """Patroni is not paused, so it starts PostgreSQL again."""
    cluster.pg_ctl(cluster.primary(), "-m fast stop")


@fault("postmaster killed", takes="postgres", needs="postgres automation")
def kill_postmaster(cluster, random):
    cluster.kill_postmaster(cluster.primary())


def after_failover(cluster, node, random, undo):
    """Waits until another node is the primary, and some seconds more; then calls `undo`."""
    try:
        cluster.primary(but=node)
        time.sleep(random.length(5))
    finally:
        undo()


def start_after_failover(cluster, node, random):
    after_failover(cluster, node, random, lambda: cluster.patroni(node, "start"))


@fault("Patroni killed", takes="leader patroni", needs="patroni automation", alerts="ServerDown")
def kill_patroni(cluster, random):
    primary = cluster.primary()
    cluster.signal_patroni(primary, "KILL")
    start_after_failover(cluster, primary, random)


@fault(
    "Patroni and postmaster killed", takes="leader patroni postgres", needs="patroni postgres automation", alerts="ServerDown",
)
def kill_both(cluster, random):
    primary = cluster.primary()
    cluster.signal_patroni(primary, "KILL")
    cluster.kill_postmaster(primary)
    start_after_failover(cluster, primary, random)


def silence(cluster, node, random):
    """Silences the agent of a node: its port refuses, each process is killed, or each process hangs. Returns a function
    that restores the agent."""
    program = "/usr/bin/patroni-agent-check"
    instead = lambda line: (
        f"printf '#!/bin/sh\n{line}\n' > /tmp/silent; chmod 755 /tmp/silent; mv {program} /tmp/agent; mv /tmp/silent {program}",
        f"cp /tmp/agent {program}.new; mv {program}.new {program}",
    )
    kinds = {
        "refused": ("systemctl stop patroni-agent-check.socket", "systemctl start patroni-agent-check.socket"),
        "killed": instead("kill -KILL $$"),
        "mute": instead("exec sleep 5"),
    }
    kind = random.choice(list(kinds))
    print(f"  the agent of {node}: {kind}", flush=True)
    begin, end = kinds[kind]
    cluster.run(node, begin)
    return lambda: cluster.run(node, end)


@fault(
    "Patroni and postmaster killed, the agent silent", silent=True,
    takes="leader patroni postgres agents", needs="patroni postgres automation agents",
    alerts="AgentSilent ServerDown",
)
def kill_silent(cluster, random):
    primary = cluster.primary()
    speak = silence(cluster, primary, random)
    try:
        time.sleep(random.uniform(1, 2))
        kill_both(cluster, random)
    finally:
        speak()


@fault(
    "switchover to a standby whose agent is silent", planned=True, silent=True, seamless=True,
    takes="leader agents", needs=f"{ORDERLY} agents",
    alerts="AgentSilent", then="ReserveInUse ServerDown",
)
def switchover_to_silent(cluster, random):
    """The agent's last answers before its silence were MAINT for writes and READY for reads."""
    primary = cluster.primary()
    candidate = random.choice(cluster.candidates(primary))
    speak = silence(cluster, candidate, random)
    try:
        time.sleep(random.uniform(7, 10))  # HAProxy's own check has noticed the silent agent
        random.second = time.time()
        cluster.switchover(primary, candidate)
        time.sleep(random.length(SILENCE))
    finally:
        speak()


@fault("Patroni frozen", takes="leader patroni", needs="patroni automation", alerts="ServerDown")
def freeze_patroni(cluster, random):
    primary = cluster.primary()
    cluster.signal_patroni(primary, "STOP")
    try:
        cluster.primary(but=primary)
        time.sleep(random.length(5))
    finally:
        cluster.signal_patroni(primary, "CONT")


@fault(
    "Patroni frozen, HAProxy reloaded before", takes="leader patroni haproxy", needs="patroni automation haproxy", alerts="ServerDown",
)
def freeze_patroni_after_reload(cluster, random):
    cluster.run("lb", "systemctl reload haproxy")
    freeze_patroni(cluster, random)


@fault("PostgreSQL frozen", takes="leader postgres", needs="postgres automation", alerts="ServerDown")
def freeze_postgres(cluster, random):
    primary = cluster.primary()
    cluster.signal_postgres(primary, "STOP")
    try:
        cluster.primary(but=primary)
        time.sleep(random.length(5))
    finally:
        cluster.signal_postgres(primary, "CONT")


def freeze_etcd(cluster, seconds):
    etcd = functools.partial(cluster.run, "lb")
    lasting(seconds, lambda: etcd("systemctl kill -s STOP etcd"), lambda: etcd("systemctl kill -s CONT etcd"))


@fault("DCS frozen for 4 s", demoted=True, takes="leader dcs", needs="automation")
def freeze_dcs_shortly(cluster, random):
    """Freezes the DCS for less than ttl. After retry_timeout Patroni demotes the primary nevertheless, and another node
    may be promoted."""
    freeze_etcd(cluster, random.length(4))


@fault("DCS frozen", demoted=True, takes="leader dcs", needs="automation", alerts="NoPrimary")
def freeze_dcs(cluster, random):
    freeze_etcd(cluster, random.length(25))


@fault("DCS frozen, failsafe mode", takes="leader dcs", needs="dcs automation", alerts="DCSLost")
def freeze_dcs_failsafe(cluster, random):
    cluster.change_setting("failsafe_mode=true")
    try:
        time.sleep(5)
        freeze_etcd(cluster, random.length(25))
    finally:
        time.sleep(3)
        cluster.change_setting("failsafe_mode=null")


@fault("primary cut from the DCS", demoted=True, takes="leader dcs", needs="automation machines")
def cut_from_dcs(cluster, random):
    primary = cluster.primary()
    # A MAC address that nobody has: packets to etcd are lost silently.
    cluster.run(primary, "ip neighbour replace 10.55.0.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent")
    try:
        cluster.primary(but=primary)
        time.sleep(random.length(5))
    finally:
        cluster.run(primary, "ip neighbour delete 10.55.0.2 dev eth0")


@fault(
    "the DCS does not write, GET /cluster polled, slow stop", demoted=True,
    takes="leader dcs", needs="dcs automation machines",
)
def refuse_writes(cluster, random):
    """Patroni can read the DCS but cannot renew its lock. Each GET /cluster still renews dcs_last_seen. A session then
    delays the stop of PostgreSQL."""
    primary, ended = cluster.primary(), threading.Event()
    etcd, program, unit = "10.55.0.2", "/usr/local/bin/read-only-etcd", "read-only-etcd"
    renew = f"ss -K dst {etcd} dport = :2379 > /dev/null"
    cluster.put(primary, "tests/faults/read_only_etcd.py", program)
    poller = threading.Thread(target=poll_cluster, args=(NODES[primary], ended))
    poller.start()
    try:
        delay_stop(cluster, primary, 40)
        cluster.run(
            primary,
            f"ip address add {etcd}/32 dev lo; systemd-run -q -u {unit} /usr/bin/python3 {program} {etcd} {LB}; "
            f"until curl -s -m 1 -o /dev/null http://{etcd}:2379/version; do sleep 0.05; done; {renew}",
        )
        cluster.primary(but=primary)
        time.sleep(random.length(5))
    finally:
        ended.set()
        poller.join()
        cluster.run(primary, f"systemctl stop {unit}; ip address del {etcd}/32 dev lo; {renew}")


@fault("the lock deleted, slow stop", demoted=True, takes="leader dcs", needs="dcs automation machines")
def delete_lock(cluster, random):
    """Deletes the leader lock by hand. The primary and the standbys then compete for it."""
    primary = cluster.primary()
    delay_stop(cluster, primary, 5)
    cluster.run("lb", "ETCDCTL_API=3 etcdctl --endpoints=etcd:2379 del /service/demo/leader")
    time.sleep(random.length(8))


@fault("the DCS lost in a switchover, slow stop", demoted=True, takes="leader dcs", needs=ORDERLY)
def lose_dcs_in_switchover(cluster, random):
    primary = cluster.primary()
    delay_stop(cluster, primary, 8)
    switch = ["switchover", "demo", "--leader", primary, "--candidate", random.choice(cluster.candidates(primary)), "--force"]
    with subprocess.Popen(["tests/lab/cluster", "patronictl", *switch], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT):
        time.sleep(random.uniform(1, 3))
        freeze_etcd(cluster, random.length(25))


@fault("slow promotion", demoted=True, planned=True, costly=True, takes="leader", needs=ORDERLY)
def slow_promotion(cluster, random):
    primary = cluster.primary()
    for node in NODES:
        cluster.run(node, "touch /tmp/slow")
    try:
        cluster.switchover(primary, random.choice(cluster.candidates(primary)))
    finally:
        for node in NODES:
            cluster.run(node, "rm /tmp/slow")


@fault("stopped by hand in pause", takes="automation postgres", needs=ORDERLY, alerts="NoPrimary ServerDown")
def stop_in_pause(cluster, random):
    primary = cluster.primary()
    cluster.patronictl("pause", "demo", "--wait")
    try:
        cluster.pg_ctl(primary, "-m fast stop")
        time.sleep(random.length(6))
        cluster.pg_ctl(primary, "-l /tmp/postgres.log start")
        time.sleep(3)
    finally:
        cluster.patronictl("resume", "demo", "--wait")


def patroni_late(cluster, seconds):
    primary = cluster.primary()
    signal = functools.partial(cluster.signal_patroni, primary)
    return lasting(seconds, lambda: signal("STOP"), lambda: signal("CONT"))


@fault("Patroni late, 1 to 4 s", bridged=True, needs="patroni")
def late(cluster, random):
    return patroni_late(cluster, random.length(random.uniform(1, 4)))


@fault("Patroni late, 4 s", bridged=True, needs="patroni")
def late_four(cluster, random):
    return patroni_late(cluster, random.length(4))


def backends(cluster, node, name):
    """The pids of Patroni's own sessions to PostgreSQL whose application_name is LIKE `name`."""
    pids = cluster.sql(node, f"select pid from pg_stat_activity where application_name like '{name}'").split()
    if not pids:
        raise RuntimeError(f"no session like {name} on {node}")
    return pids


@fault("Patroni's sessions to PostgreSQL ended", bridged=True, needs="leader patroni postgres")
def end_sessions(cluster, random):
    """Only Patroni's next answer has the state unknown, and any client may get it. So the fault ends the sessions
    repeatedly for a little longer than an agent-inter, five times: the agent gets some of these answers."""
    primary = cluster.primary()
    backends(cluster, primary, "Patroni restapi")
    end = (
        "do $$ begin for i in 1..30 loop perform pg_stat_clear_snapshot(); perform pg_terminate_backend(pid) from "
        "pg_stat_activity where application_name like 'Patroni %'; perform pg_sleep(0.02); end loop; end $$"
    )
    lasted = []
    for _ in range(5):
        lasted.append(lasting(0, lambda: cluster.sql(primary, end)))
        time.sleep(random.uniform(1, 2))
    return max(lasted)


@fault("an answer of Patroni reset", bridged=True, needs="patroni agents")
def reset(cluster, random):
    """Patroni is frozen meanwhile, or it would answer before the connection can be reset. Other clients may fill its
    queue before the agent asks; the fault then tries again."""
    primary, longest = cluster.primary(), 0
    reset = "ss -HtnK state established 'sport = :8008 and ( dst 127.0.0.1 or dst [::ffff:127.0.0.1] )'"
    for _ in range(10):
        started = time.monotonic()
        cluster.signal_patroni(primary, "STOP")
        try:
            over = '[ "$ended" ] || [ $(date +%s) -ge $end ]'
            ended = cluster.run(
                primary, f"end=$(($(date +%s) + 2)); until ended=$({reset}); {over}; do sleep 0.03; done; echo $ended"
            )
        finally:
            cluster.signal_patroni(primary, "CONT")
        longest = max(longest, time.monotonic() - started)
        if ended.strip():
            return longest
        time.sleep(random.uniform(1, 2))
    raise RuntimeError("no question of an agent")


def idle_clients(cluster, seconds):
    """Occupies all five threads of Patroni's REST API, which has no time limit for a client that sends nothing."""
    address, clients = (NODES[cluster.primary()], 8008), []
    connect = lambda: clients.extend(socket.create_connection(address, 5) for _ in range(5))
    return lasting(seconds, connect, lambda: [client.close() for client in clients])


@fault("five idle clients of Patroni, 1 to 4 s", bridged=True, needs="patroni")
def idle(cluster, random):
    return idle_clients(cluster, random.length(random.uniform(1, 4)))


@fault("five idle clients of Patroni, 8 s", bridged=True, needs="patroni")
def idle_eight(cluster, random):
    return idle_clients(cluster, random.length(8))


def restart(cluster, node, path):
    """Restarts Patroni. Returns how long Patroni did not answer 200 on that path."""
    return lasting(0, lambda: cluster.patroni(node, "restart"), lambda: cluster.wait_for_200(node, path))


@fault(
    "a standby's Patroni restarted", bridged=True, seamless=True,
    takes="standbys", needs="leader dcs postgres standbys",
)
def restart_standby(cluster, random):
    return restart(cluster, random.choice(others(cluster.primary())), "replica")


@fault("the primary's Patroni restarted in pause", bridged=True, takes="automation patroni", needs=ORDERLY)
def restart_in_pause(cluster, random):
    cluster.patronictl("pause", "demo", "--wait")
    try:
        lasted = restart(cluster, cluster.primary(), "primary")
        time.sleep(random.uniform(1, 2))
    finally:
        cluster.patronictl("resume", "demo", "--wait")
    return lasted


@fault("Patroni killed and restarted by systemd", bridged=True, takes="patroni", needs="leader dcs patroni postgres")
def kill_patroni_restarted(cluster, random):
    primary, drop_in = cluster.primary(), "/run/systemd/system/patroni.service.d/restart.conf"
    setting = "[Service]\\nRestart=always\\nRestartSec=100ms\\n"
    cluster.run(primary, f"mkdir -p $(dirname {drop_in}); printf '{setting}' > {drop_in}; systemctl daemon-reload")
    try:
        return lasting(
            0.2, lambda: cluster.signal_patroni(primary, "KILL"), lambda: cluster.wait_for_200(primary, "primary")
        )
    finally:
        cluster.run(primary, f"rm {drop_in}; systemctl daemon-reload")


@fault("Patroni's query blocked, 1 to 4 s", bridged=True, everywhere=True, needs="leader postgres")
def block_query(cluster, random):
    """Patroni gives up its query after two seconds and answers 200 with the state unknown. The standbys replay the
    lock, so their Patronis do the same. New sessions to PostgreSQL may also have to wait."""
    primary, seconds = cluster.primary(), random.length(random.uniform(1, 4))
    lock = f"begin; lock table pg_authid in access exclusive mode; select pg_sleep({seconds:.2f}); commit"
    return lasting(0, lambda: cluster.sql(primary, lock))


@fault("the primary's machine paused, 1 to 4 s", bridged=True, silent=True, takes="machine", needs="machine")
def pause_machine(cluster, random):
    freeze = functools.partial(cluster.freeze, cluster.primary())
    return lasting(random.length(random.uniform(1, 4)), lambda: freeze(True), lambda: freeze(False))


@fault("the primary's machine starved, 8 s", silent=True, takes="machine", needs="machine")
def starve_machine(cluster, random):
    """The machine runs for a tenth of the time and is frozen for the rest."""
    freeze, end = functools.partial(cluster.freeze, cluster.primary()), time.monotonic() + random.length(8)
    try:
        while time.monotonic() < end:
            freeze(True)
            time.sleep(0.18)
            freeze(False)
            time.sleep(0.02)
    finally:
        freeze(False)


CLOCK = """import time

real = time.time
time.time = lambda: real() + float(open("/run/patroni-clock").read())
"""


def step_clock(cluster, random, seconds, watched):
    """Steps only the clock that Patroni reads through Python. Patroni is killed and started before and after the step.

    Patroni sleeps until the clock says that its next loop is due. If the clock is set back by more than ttl, Patroni
    does not renew its lock. It still answers 200, until the expiry of the lock wakes it."""
    primary, file = cluster.primary(), "/run/patroni-clock"
    write = lambda offset: cluster.run(primary, f"echo {offset} > {file}.new; mv {file}.new {file}")
    script = (
        "systemctl kill -s KILL --kill-whom=main patroni; while systemctl -q is-active patroni; do sleep 0.02; done; "
        "systemctl start patroni"
    )
    # A primary that holds its lock answers 200 to this, and so does any standby.
    restart = lambda: lasting(0, lambda: cluster.run(primary, script), lambda: cluster.wait_for_200(primary, "read-only"))
    write(0)
    cluster.run(primary, f"mkdir -p /etc/patroni/clock; echo '{CLOCK}' > /etc/patroni/clock/sitecustomize.py")
    cluster.run(primary, "echo PYTHONPATH=/etc/patroni/clock > /etc/patroni/environment")
    try:
        lasted = [restart()]
        time.sleep(random.uniform(2, 3))
        lasted.append(lasting(0, lambda: write(seconds), lambda: cluster.wait_for_200(primary, "primary")))
        time.sleep(watched)
    finally:
        cluster.run(primary, "rm /etc/patroni/environment")
        lasted.append(restart())
    return max(lasted)


for words, step, watched in ("a second", 1, 5), ("five minutes", 300, 25):
    ahead = functools.partial(step_clock, seconds=step, watched=5)
    orderly = {"takes": "patroni", "needs": "leader dcs patroni postgres"}
    fault(f"Patroni's clock {words} forward", bridged=True, **orderly)(ahead)
    back = functools.partial(step_clock, seconds=-step, watched=watched)
    fault(f"Patroni's clock {words} back", bridged=step == 1, **orderly)(back)


def poll_cluster(address, ended):
    """Sends GET /cluster ten times a second, as a monitoring tool might."""
    while not ended.wait(0.1):
        try:
            urllib.request.urlopen(f"http://{address}:8008/cluster", timeout=2).read()
        except OSError:
            pass


@fault("Patroni's loop hung, GET /cluster polled", everywhere=True, takes="leader", needs=ORDERLY)
def hang_loop(cluster, random):
    """Each GET /cluster reads the DCS and renews dcs_last_seen, though Patroni does not renew its lock. The standbys
    see that the primary is alive, so none is promoted until an operator orders a failover. The third node may have
    replayed too much WAL by then, and Patroni stops its PostgreSQL for pg_rewind."""
    primary, ended = cluster.primary(), threading.Event()
    candidate = random.choice(cluster.candidates(primary))
    signal = lambda word: cluster.run(primary, f"kill -{word} {' '.join(pids)}")
    pids = backends(cluster, primary, "Patroni heartbeat")
    poller = threading.Thread(target=poll_cluster, args=(NODES[primary], ended))
    poller.start()
    try:
        signal("STOP")
        cluster.wait_until(primary, "! curl -s -m 1 -f -o /dev/null http://127.0.0.1:8008/primary")
        cluster.patronictl("failover", "demo", "--candidate", candidate, "--force")
        cluster.primary(but=primary)
        time.sleep(random.length(5))
    finally:
        ended.set()
        poller.join()
        signal("CONT")


MEMORY = "/run/patroni-agent-check/memory"


@fault("no memory file can be there", alerts="GraceLost", for_alerts=True)
def lose_memory(cluster, random):
    node = random.choice(list(NODES))
    lasting(
        random.length(8),
        lambda: cluster.run(node, f"rm {MEMORY}; mkdir {MEMORY}"),
        lambda: cluster.run(node, f"rmdir {MEMORY}; systemd-tmpfiles --create patroni-agent-check.conf"),
    )


@fault("a pool asks another port than the agent's", alerts="PoolAgentSilent", for_alerts=True)
def ask_another_port(cluster, random):
    server = f"{random.choice(['postgres-write', 'postgres-read'])}/{random.choice(others(cluster.primary()))}"
    tell = lambda port: cluster.tell_haproxies(f"set server {server} agent-port {port}")
    lasting(random.length(8), lambda: tell(5557), lambda: tell(5555))


@fault("a server with weight 0", alerts="ServerWithoutWeight", for_alerts=True)
def take_weight(cluster, random):
    server = f"postgres-read/{random.choice(others(cluster.primary()))}"
    tell = lambda weight: cluster.tell_haproxies(f"set server {server} weight {weight}")
    lasting(random.length(8), lambda: tell(0), lambda: tell("100%"))


@fault("both standbys held by an operator", alerts="HoldForgotten NoReplica", for_alerts=True)
def hold_standbys(cluster, random):
    standbys, word = others(cluster.primary()), random.choice(["drain", "maint"])
    each = lambda line: [cluster.run(node, line) for node in standbys]
    lasting(random.length(8), lambda: each(f"echo {word} > {HOLD}"), lambda: each(f"rm {HOLD}"))


@fault("the primary held for a minute", alerts="HoldForgotten NoPrimary", for_alerts=True)
def hold_primary_for_long(cluster, random):
    hold(cluster, random)


@fault("a server drained by hand, its agent check off", alerts="DrainForgotten PoolAgentSilent", for_alerts=True)
def drain_by_hand(cluster, random):
    server = f"postgres-read/{random.choice(others(cluster.primary()))}"
    drain = f"disable agent {server}; set server {server} state drain"
    lasting(random.length(8), lambda: cluster.tell_haproxies(drain), lambda: cluster.tell_haproxies(f"enable agent {server}"))


@fault("the exporter of one HAProxy closed", alerts="HAProxyUnseen", for_alerts=True)
def close_exporter(cluster, random):
    """To Prometheus, this HAProxy is gone. A connection that Prometheus keeps open would still be served."""
    end = "ss -K sport = :8406 > /dev/null"
    tell = lambda verb: cluster.run("lb", f"echo '{verb} frontend metrics' | socat - /run/second-haproxy.sock; {end}")
    lasting(random.length(8), lambda: tell("disable"), lambda: tell("enable"))


@fault("HAProxy cannot connect to the primary's PostgreSQL", alerts="ClientsFail", for_alerts=True)
def lose_port_of_primary(cluster, random):
    """The checks ask Patroni and the agent, which notice nothing."""
    primary, end = cluster.primary(), time.monotonic() + random.length(8)
    send = lambda port: cluster.run(
        "lb", f"echo 'set server postgres-write/{primary} addr {NODES[primary]} port {port}' | socat - /run/haproxy/admin.sock"
    )
    clients = []
    send(1)
    try:
        while time.monotonic() < end:
            clients.append(socket.create_connection((LB, 5000), 5))
            time.sleep(1)
    finally:
        send(5432)
        for client in clients:
            client.close()


def deafen(cluster, server):
    """Makes the first HAProxy stop both of its checks of this server. Returns a function that starts them again."""
    tell = lambda verb: cluster.tell_haproxies(f"{verb} agent {server}; {verb} health {server}", 1)
    tell("disable")
    return lambda: tell("enable")


@fault(
    "a switchover of which one HAProxy does not hear", for_alerts=True,
    alerts="HAProxiesDisagree OtherPrimary PoolAgentSilent",
)
def switch_over_unheard(cluster, random):
    hear = [deafen(cluster, f"postgres-write/{node}") for node in NODES]
    try:
        switchover(cluster, random)
        time.sleep(random.length(8))
    finally:
        for each in hear:
            each()


@fault("a standby that one HAProxy takes for a primary", for_alerts=True, alerts="OtherPrimary PoolAgentSilent TwoPrimaries")
def take_for_primary(cluster, random):
    server = f"postgres-write/{random.choice(others(cluster.primary()))}"
    hear = deafen(cluster, server)
    try:
        cluster.tell_haproxies(f"set server {server} state ready; set server {server} health up", 1)
        time.sleep(random.length(8))
    finally:
        hear()
