"""The weathers: what is done to the cluster. Does not know what is measured.

Each is a function of the cluster and a seeded random; it does its worst, and undoes it. `planned` marks
what an operator does on purpose, where nothing is broken."""

import subprocess
import time

from watch import NODES, OURS

WEATHERS = {}


def weather(name, planned=False):
    def register(function):
        function.planned = planned
        WEATHERS[name] = function
        return function

    return register


class Cluster:
    """The machines of tests/lab/cluster."""

    def _call(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def run(self, node, script):
        return self._call("tests/lab/machine", "run", node, "sh", "-c", script)

    def patronictl(self, *words):
        """patronictl says with words alone that it failed."""
        said = self._call("tests/lab/cluster", "patronictl", *words)
        if "failed" in said.lower() or "n't recognize" in said:
            raise RuntimeError(f"patronictl {' '.join(words)}: {said}")
        return said

    def setting(self, setting):
        self.patronictl("edit-config", "demo", "--force", f"--set={setting}")

    def is_primary(self, node):
        query = "psql -h /tmp -U postgres -Atc 'select pg_is_in_recovery()'"
        done = subprocess.run(
            ["tests/lab/machine", "run", node, "timeout", "1", "sh", "-c", query], capture_output=True, text=True
        )
        return done.stdout.strip() == "f"

    def primary(self, but=None):
        """The node that takes writes, other than `but`; waits for it."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            for node in NODES:
                if node != but and self.is_primary(node):
                    return node
            time.sleep(0.1)
        raise RuntimeError("no primary for 90 s")

    def switchover(self, leader, candidate):
        self.patronictl("switchover", "demo", "--leader", leader, "--candidate", candidate, "--force")
        if self.primary(but=leader) != candidate:
            raise RuntimeError(f"the switchover from {leader} did not lead to {candidate}")

    def agents(self, verb):
        """`disable agent` or `enable agent` for the servers of the pool."""
        for node in NODES:
            self.run("lb", f"echo {verb} agent {OURS}/{node} | socat stdio unix-connect:/run/haproxy/admin.sock")

    def patroni(self, node, verb):
        self.run(node, f"systemctl {verb} patroni")

    def signal_patroni(self, node, signal):
        self.run(node, f"systemctl kill -s {signal} --kill-whom=main patroni")

    def signal_postgres(self, node, signal):
        """All of PostgreSQL's processes, the postmaster first; some may end meanwhile."""
        each = f"pid=$(head -1 {DATA}/postmaster.pid); for pid in $pid $(pgrep -P $pid); do kill -{signal} $pid; done"
        self.run(node, f"({each}) 2> /dev/null; true")

    def kill_postmaster(self, node):
        self.run(node, f"kill -KILL $(head -1 {DATA}/postmaster.pid)")


DATA = "/var/lib/postgresql/patroni"


def others(node):
    return [other for other in NODES if other != node]


@weather("switchover", planned=True)
def switchover(cluster, random):
    primary = cluster.primary()
    cluster.switchover(primary, random.choice(others(primary)))


@weather("switchover, a session delays the stop", planned=True)
def delayed_switchover(cluster, random):
    primary = cluster.primary()
    stuck = cluster.run(
        primary,
        "psql -h /tmp -U postgres -Atqc 'select pg_backend_pid(), pg_sleep(60)' > /tmp/stuck 2>&1 & "
        "for i in $(seq 50); do pid=$(psql -h /tmp -U postgres -Atqc \"select pid from pg_stat_activity where"
        " query like '%pg_sleep(60)' and pid <> pg_backend_pid()\"); [ -z \"$pid\" ] || break; sleep 0.1; done; "
        "kill -STOP $pid; echo $pid",
    ).strip()
    if not stuck:
        raise RuntimeError("no session to delay the stop")
    cluster.run(primary, f"(sleep 5; kill -CONT {stuck}) > /dev/null 2>&1 &")
    cluster.switchover(primary, random.choice(others(primary)))


@weather("restart of the primary", planned=True)
def restart_primary(cluster, random):
    cluster.patronictl("restart", "demo", cluster.primary(), "--force")


@weather("restart of a replica", planned=True)
def restart_replica(cluster, random):
    cluster.patronictl("restart", "demo", random.choice(others(cluster.primary())), "--force")


@weather("reinit of a replica", planned=True)
def reinit(cluster, random):
    cluster.patronictl("reinit", "demo", random.choice(others(cluster.primary())), "--force", "--wait")


@weather("HAProxy reloaded in a switchover", planned=True)
def reload(cluster, random):
    primary = cluster.primary()
    reload = f"sleep {random.uniform(0, 2):.2f}; systemctl reload haproxy"
    with subprocess.Popen(["tests/lab/machine", "run", "lb", "sh", "-c", reload]) as reloading:
        cluster.switchover(primary, random.choice(others(primary)))
    if reloading.returncode:
        raise RuntimeError("HAProxy was not reloaded")


@weather("HAProxy restarted", planned=True)
def restart_haproxy(cluster, random):
    cluster.run("lb", "systemctl restart haproxy")


def restart_patronis(cluster):
    """As an upgrade does it: PostgreSQL stays up."""
    cluster.patronictl("pause", "demo", "--wait")
    try:
        for node in NODES:
            cluster.patroni(node, "restart")
            time.sleep(3)
    finally:
        cluster.patronictl("resume", "demo", "--wait")


@weather("Patroni upgraded in pause", planned=True)
def upgrade(cluster, random):
    cluster.agents("disable")  # as the README says
    try:
        restart_patronis(cluster)
    finally:
        cluster.agents("enable")


@weather("the same, HAProxy not prepared")
def unprepared_upgrade(cluster, random):
    restart_patronis(cluster)


@weather("the agent's socket restarted", planned=True)
def restart_socket(cluster, random):
    for node in NODES:
        cluster.run(node, "systemctl restart patroni-agent-check.socket")
        time.sleep(random.uniform(0, 1))


@weather("a flood of connections to the agents", planned=True)
def flood(cluster, random):
    client = (
        "import socket, sys, time\n"
        "kept, end = [], time.time() + 5\n"
        "for number in range(2000):\n"
        "    for address in sys.argv[1:]:\n"
        "        try:\n"
        "            client = socket.create_connection((address, 5555), 0.05)\n"
        "            client.send(b'replica\\n')\n"
        "            kept.append(client)\n"
        "        except OSError:\n"
        "            pass\n"
        "    kept = kept[-200:]\n"
        "    if time.time() > end:\n"
        "        break\n"
    )
    subprocess.run(["python3", "-c", client, *NODES.values()], check=True, timeout=60)


@weather("postmaster killed")
def kill_postmaster(cluster, random):
    cluster.kill_postmaster(cluster.primary())


@weather("Patroni killed")
def kill_patroni(cluster, random):
    primary = cluster.primary()
    cluster.signal_patroni(primary, "KILL")
    cluster.primary(but=primary)
    time.sleep(5)
    cluster.patroni(primary, "start")


@weather("Patroni and postmaster killed")
def kill_both(cluster, random):
    primary = cluster.primary()
    cluster.signal_patroni(primary, "KILL")
    cluster.kill_postmaster(primary)
    cluster.primary(but=primary)
    time.sleep(5)
    cluster.patroni(primary, "start")


@weather("Patroni frozen")
def freeze_patroni(cluster, random):
    primary = cluster.primary()
    cluster.signal_patroni(primary, "STOP")
    try:
        cluster.primary(but=primary)
        time.sleep(5)
    finally:
        cluster.signal_patroni(primary, "CONT")


@weather("Patroni frozen, HAProxy reloaded before")
def freeze_patroni_after_reload(cluster, random):
    cluster.run("lb", "systemctl reload haproxy")
    freeze_patroni(cluster, random)


@weather("PostgreSQL frozen")
def freeze_postgres(cluster, random):
    primary = cluster.primary()
    cluster.signal_postgres(primary, "STOP")
    try:
        cluster.primary(but=primary)
        time.sleep(5)
    finally:
        cluster.signal_postgres(primary, "CONT")


def freeze_etcd(cluster):
    cluster.run("lb", "systemctl kill -s STOP etcd")
    try:
        time.sleep(25)
    finally:
        cluster.run("lb", "systemctl kill -s CONT etcd")


@weather("DCS frozen")
def freeze_dcs(cluster, random):
    freeze_etcd(cluster)


@weather("DCS frozen, failsafe mode")
def freeze_dcs_failsafe(cluster, random):
    cluster.setting("failsafe_mode=true")
    try:
        time.sleep(5)
        freeze_etcd(cluster)
    finally:
        time.sleep(3)
        cluster.setting("failsafe_mode=null")


@weather("primary cut from the DCS")
def cut_from_dcs(cluster, random):
    primary = cluster.primary()
    # a neighbour that is not there: what is sent to etcd is lost without a word
    cluster.run(primary, "ip neighbour replace 10.55.0.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent")
    try:
        cluster.primary(but=primary)
        time.sleep(5)
    finally:
        cluster.run(primary, "ip neighbour delete 10.55.0.2 dev eth0")


@weather("slow promotion", planned=True)
def slow_promotion(cluster, random):
    primary = cluster.primary()
    for node in NODES:
        cluster.run(node, "touch /tmp/slow")
    try:
        cluster.switchover(primary, random.choice(others(primary)))
    finally:
        for node in NODES:
            cluster.run(node, "rm /tmp/slow")


@weather("stopped by hand in pause")
def stop_in_pause(cluster, random):
    primary = cluster.primary()
    pg_ctl = f"su postgres -s /bin/sh -c \"$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)/pg_ctl"
    cluster.patronictl("pause", "demo", "--wait")
    try:
        cluster.run(primary, f'{pg_ctl} -D {DATA} -m fast -s stop"')
        time.sleep(6)
        cluster.run(primary, f'{pg_ctl} -D {DATA} -l /tmp/postgres.log -s start" > /dev/null 2>&1')
        time.sleep(3)
    finally:
        cluster.patronictl("resume", "demo", "--wait")
