"""An operator's work on the site, and failures that may happen to it. Each step prints what it does.

The clients of tests/lab/watch.py write and read all the time, and every change of HAProxy's states is recorded. So a
step can check all states since it began, and not only those at its end."""

import select
import socket
import sys
import time

import stats_socket
import view
import watch
from walk import Walk
from watch import NODES

WRITE, READ = "postgres-write", "postgres-read"
HOLD = "/run/patroni-agent-check/hold"
USUAL, LISTEN = "patroni-agent-check.socket", "patroni-agent-check-listen.socket"
# The journal may always have these lines about the agent: the start of its socket and of its slice, and systemd's own
# error for a connection that is reset before it is accepted.
KNOWN = (
    "HAProxy agent checks for the local Patroni",
    "Slice /system/patroni-agent-check",
    ".socket: getpeername failed: Transport endpoint is not connected",
)


class Operations(Walk):
    def __init__(self):
        super().__init__(patience=10)
        self.watch = watch.Watch(self.socket, {WRITE: 5000}, {READ: 5001})

    def run(self, node, line):
        return self.cluster.run(node, line)

    def until(self, what, seconds, wanted):
        """Waits until `wanted` returns something true, and returns it."""
        end = time.monotonic() + seconds
        while True:
            if self.watch.broken:
                raise self.watch.broken[0]
            assert self.watch.blind_for() < 5, "HAProxy's socket does not answer"
            if found := wanted():
                return found
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.table()}"
            time.sleep(0.05)

    def shows(self, pool, server, state):
        return self.watch.looks[-1].shown[pool, server] == state

    def up(self, pool):
        shown = self.watch.looks[-1].shown if self.watch.looks else {}
        return [server for (of, server), state in shown.items() if of == pool and state == "UP"]

    def settled(self, writer=None):
        """Waits until one server is UP for writes (`writer`, if it is given), two for reads and none is DOWN. Returns
        the name of the writer."""

        def is_so():
            calm = self.watch.looks and set(self.watch.looks[-1].shown.values()) == {"UP", "MAINT"}
            here = len(self.up(WRITE)) == 1 and writer in (None, *self.up(WRITE))
            return calm and here and len(self.up(READ)) == 2

        self.until("a settled view", 60, is_so)
        return self.up(WRITE)[0]

    def table(self):
        return "\n".join(map(str, view.look(self.leader)))

    def until_reason(self, pool, server, state, reason):
        """Waits until a server has this state and its reason ends so. HAProxy shows no reason while it asks the
        agent."""

        def is_so():
            rows = [row for row in view.look(self.leader) if (row.pool, row.name) == (pool, server)]
            return rows[0].status.startswith(state) and rows[0].reason.endswith(reason)

        self.until(f"{pool}/{server} {state}, {reason}", 10, is_so)

    def looks(self, since):
        """The states that HAProxy showed at that time, and each change since."""
        before = [look for look in self.watch.looks if look.time <= since][-1:]
        return before + [look for look in self.watch.looks if look.time > since]

    def story(self, since):
        return "\n".join(f"{look.time - since:6.2f} s {look.shown}" for look in self.looks(since))

    def assert_no_down(self, since, but=()):
        for look in self.looks(since):
            down = {server for (_, server), state in look.shown.items() if state == "DOWN"} - {*but}
            assert not down, f"{down} DOWN:\n{self.story(since)}"

    def assert_never_up(self, since, server):
        for look in self.looks(since):
            up = [pool for (pool, of), state in look.shown.items() if of == server and state == "UP"]
            assert not up, f"{server} is UP:\n{self.story(since)}"

    def until_written(self, node):
        """Waits until both clients have written to that node: the one that keeps its session and the one that does
        not."""
        since = time.time()

        def is_so():
            written = [w for w in self.watch.writes if w.begun > since and w.outcome == "written"]
            return len({w.row[0] for w in written if w.node == node}) == 2

        self.until(f"writes on {node}", 30, is_so)

    def planned(self, name, writer, *patronictl):
        """Runs a planned change: HAProxy must not show DOWN, and the writes must reach the new writer."""
        print(name, flush=True)
        since = time.time()
        self.cluster.patronictl(*patronictl)
        self.settled(writer)
        self.until_written(writer)
        time.sleep(5)  # the settled state must last
        self.assert_no_down(since)
        self.settled(writer)

    def journal(self, node):
        lines = self.run(node, "journalctl --no-pager -q").splitlines()
        return [line for line in lines if "agent" in line and not any(known in line for known in KNOWN)]

    def assert_silent_journals(self, why):
        for node in NODES:
            assert not self.journal(node), f"{why}: {self.journal(node)}"

    def asked_again(self, node, check):
        """Waits until Patroni gives a good answer again and both pools have asked the agent; their agent-inter is at
        most 2 s. Otherwise two short outages would count as one that is longer than the grace period."""
        self.cluster.until_ok(node, check)
        time.sleep(4)

    def agent_options(self, options):
        self.cluster.agent_options(options)
        for node in NODES:  # the one process for many checks reads its options only at its start
            self.run(node, "systemctl stop patroni-agent-check-listen.service")


def other(*than):
    return next(node for node in NODES if node not in than)


def say(what):
    print(what, flush=True)
    return time.time()


def steady(site):
    since = say("steady state: one UP, two MAINT for writes, no DOWN anywhere")
    primary = site.settled()
    site.until_written(primary)
    time.sleep(5)
    site.assert_no_down(since)
    site.until_reason(WRITE, primary, "UP", "primary, running, timeline 1")
    site.until_reason(WRITE, other(primary), "MAINT", "replica, streaming")
    site.assert_silent_journals("a healthy check")
    return primary


def hold(site, primary):
    since = say("a hold takes a node out of both pools with its reason, and changes nothing else")
    replica = other(primary)
    for node, pool, other_pool, why in (
        (replica, READ, WRITE, "replica, streaming"),
        (primary, WRITE, READ, "primary, running"),
    ):
        for word, state in ("drain", "DRAIN"), ("maint", "MAINT"):
            site.run(node, f"echo '{word} kernel upgrade' > {HOLD}")
            site.until_reason(pool, node, state, "hold: kernel upgrade")
            site.until_reason(other_pool, node, "MAINT", why)
        site.run(node, f"rm {HOLD}")
        site.until_reason(pool, node, "UP", "timeline 1")
    site.assert_no_down(since)


def planned_work(site, primary, listening):
    say(f"from here on {listening} answers by one process for many checks")
    site.run(listening, f"systemctl disable --now {USUAL} && systemctl enable --now {LISTEN}")
    for leader, candidate in (primary, listening), (listening, primary):
        switchover = "switchover", "demo", "--leader", leader, "--candidate", candidate, "--force"
        site.planned(f"switchover to {candidate}", candidate, *switchover)
    site.planned("restart of the primary", primary, "restart", "demo", primary, "--force")
    site.planned("restart of a replica", primary, "restart", "demo", listening, "--force")
    site.planned("reinit of a replica", primary, "reinit", "demo", listening, "--force", "--wait")
    site.assert_silent_journals("planned work")


def grace(site, primary, listening):
    since = say("a standby whose Patroni is restarted, and a Patroni that is silent for two seconds, are not DOWN")
    # On a busy machine a Patroni may start more slowly than the default grace period allows.
    site.agent_options("--grace 10s")
    site.run(listening, "systemctl restart patroni")
    site.asked_again(listening, "replica?lag=16MB")
    for node, check in (primary, "primary"), (listening, "replica?lag=16MB"):
        site.cluster.signal_patroni(node, "STOP")
        time.sleep(2)
        site.cluster.signal_patroni(node, "CONT")
        site.asked_again(node, check)
    site.settled(primary)
    site.assert_no_down(since)
    site.agent_options("")


def restarts_of_the_socket(site, primary):
    since = say("restarts of the socket while HAProxy polls")
    site.run(primary, f"for i in $(seq 50); do systemctl restart {USUAL} || exit 1; sleep 0.05; done")
    assert not any("in use" in line for line in site.journal(primary)), site.journal(primary)
    time.sleep(5)
    site.assert_no_down(since)
    site.settled(primary)


def reloads(site, primary):
    since = say("reloads of HAProxy: who was UP stays UP, who was MAINT stays MAINT")
    for _ in range(3):
        site.run("lb", "systemctl reload haproxy")
        site.until_written(primary)
        time.sleep(3)
    assert len(site.looks(since)) == 1, site.story(since)

    replica = other(primary)
    say("a reload while an agent says down, and while HAProxy's own check does too: never UP")
    site.cluster.signal_patroni(replica, "KILL")  # PostgreSQL keeps running
    down = lambda: site.shows(WRITE, replica, "DOWN") and site.shows(READ, replica, "DOWN")

    def reload():
        site.until("DOWN", 10, down)
        since = time.time()
        site.run("lb", "systemctl reload haproxy")
        time.sleep(1)
        site.until("DOWN again", 10, down)
        site.assert_never_up(since, replica)

    reload()
    site.until("HAProxy's own check fails", 20, lambda: stats_socket.fails(site.socket, (WRITE, replica)))
    reload()
    site.cluster.patroni(replica, "start")
    site.settled(primary)


def failover(site, primary):
    since = say("the primary dies: Patroni is killed, then the postmaster")
    site.cluster.signal_patroni(primary, "KILL")
    site.cluster.kill_postmaster(primary)
    site.until("DOWN", 10, lambda: site.shows(WRITE, primary, "DOWN"))
    site.until_reason(WRITE, primary, "DOWN", "connection refused (see restapi.listen and --url)")
    heir = site.until("a new writer", 60, lambda: site.up(WRITE))[0]
    assert heir != primary
    site.until_written(heir)
    site.assert_no_down(since, but=[primary])
    # Two checks may see the failure at the same moment, and both report it. A third check would find their record.
    began = site.journal(primary)
    refused = [line for line in began if "replied '" in line and ": connection refused" in line]
    assert len(refused) in (1, 2) and any("replied '!unreachable' to " in line for line in began), "\n".join(began)

    say("and comes back as a replica")
    site.cluster.patroni(primary, "start")
    site.settled(heir)
    site.assert_no_down(since, but=[primary])
    ended = site.journal(primary)
    assert any(line.endswith(" s of trouble)") for line in ended), "\n".join(ended)
    return heir


def ask(address):
    """The whole answer of the agent at that address, or the error."""
    try:
        with socket.create_connection((address, 5555), 5) as agent:
            agent.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: agent.recv(256), b"")).decode()
    except OSError as error:
        return str(error)


def xinetd(site, heir, listening):
    """Starts xinetd in place of each pair of units, on one node each. Either node may be the new primary."""
    for node, unit in (listening, LISTEN), (other(listening), USUAL):
        say(f"xinetd with the shipped file in the place of {unit} on {node}")
        site.run(node, f"systemctl stop {USUAL} {LISTEN} patroni-agent-check-listen.service")
        shipped = "units/examples/patroni-agent-check.xinetd"
        site.cluster.put(node, shipped, "/etc/xinetd.d/patroni-agent-check")
        site.run(node, "systemctl start xinetd")
        expected = "up ready # primary, running, timeline " if node == heir else "up maint # replica, streaming"
        for address in NODES[node], f"fd55::1{node[2:]}":
            # Patroni may still have a former primary stopped for pg_rewind.
            line = site.until(expected, 20, lambda: (said := ask(address)).startswith(expected) and said)
            assert line.count("\n") == 1, line
        site.run(node, f"systemctl stop xinetd && systemctl start {unit}")


def gone(site, heir):
    """Cuts the power of a node: no packet tells HAProxy that it is gone."""
    node = other(heir)
    since = say(f"{node} is gone without a word: it is DOWN, and the sessions that are idle there end")

    def session():
        while True:
            client = watch.connect(watch.LB, 5001)
            if watch.ask(client, "select host(inet_server_addr())") == [(NODES[node],)]:
                return client
            client.close()

    idle = session()
    site.cluster.power_off(node)
    try:
        began = time.time()
        site.until("DOWN", 30, lambda: site.shows(READ, node, "DOWN"))
        print(f"DOWN after {time.time() - began:.1f} s")
        ended = select.select([idle], [], [], 30)[0]
        print(f"an idle session has ended after {time.time() - began:.1f} s")
        assert ended, "HAProxy keeps sessions with a machine that is gone"
    finally:
        site.cluster.boot(node)
    site.settled(heir)
    site.assert_no_down(since, but=[node])


def nothing_left(site, heir, listening):
    say("nothing resident, nothing failed")
    site.settled(heir)
    for node in NODES:
        failed = site.run(node, "systemctl list-units --failed --plain --no-legend --all 'patroni-agent*'")
        assert not failed, f"{node}: {failed}"
        site.run(node, f"systemctl is-active {LISTEN if node == listening else USUAL}")


def walk(site):
    primary = steady(site)
    hold(site, primary)
    listening = other(primary)
    planned_work(site, primary, listening)
    grace(site, primary, listening)
    restarts_of_the_socket(site, primary)
    reloads(site, primary)
    heir = failover(site, primary)
    xinetd(site, heir, listening)
    gone(site, heir)
    nothing_left(site, heir, listening)


def main():
    site = Operations()
    watch.create_table(site.cluster.primary())
    site.watch.start()
    try:
        walk(site)
    except Exception:
        for node in NODES:
            print(site.run(node, "journalctl --no-pager -q -n 400 | grep agent | tail -20 || true"))
        raise
    finally:
        site.watch.stop()


if __name__ == "__main__":
    sys.exit(main())
