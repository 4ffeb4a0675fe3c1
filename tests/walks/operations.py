"""Does an operator's work on the site, and brings about failures. Each step prints what it does.

Meanwhile tests/lab/watch.py writes, reads and records each change of HAProxy's states. So a step can check all states
since it began, and not only those at its end."""

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
# The journal may always have these lines about the agent: the start of its socket and of its slice, and systemd's
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

    def wait_until(self, what, seconds, wanted):
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

    def wait_until_settled(self, writer=None):
        """Waits until one server is UP for writes (`writer`, if it is given), two for reads and none is DOWN. Returns
        the name of the writer."""

        def is_so():
            calm = self.watch.looks and set(self.watch.looks[-1].shown.values()) == {"UP", "MAINT"}
            here = len(self.up(WRITE)) == 1 and writer in (None, *self.up(WRITE))
            return calm and here and len(self.up(READ)) == 2

        self.wait_until("a settled view", 60, is_so)
        return self.up(WRITE)[0]

    def table(self):
        return "\n".join(map(str, view.look(self.host_pid)))

    def wait_for_reason(self, pool, server, state, reason):
        """Waits until a server has this state and its reason ends so. HAProxy shows no reason while it asks the
        agent."""

        def is_so():
            rows = [row for row in view.look(self.host_pid) if (row.pool, row.name) == (pool, server)]
            return rows[0].status.startswith(state) and rows[0].reason.endswith(reason)

        self.wait_until(f"{pool}/{server} {state}, {reason}", 10, is_so)

    def looks(self, since):
        """The states that HAProxy showed at that time, and each change since."""
        before = [look for look in self.watch.looks if look.time <= since][-1:]
        return before + [look for look in self.watch.looks if look.time > since]

    def describe_looks(self, since):
        return "\n".join(f"{look.time - since:6.2f} s {look.shown}" for look in self.looks(since))

    def assert_no_down(self, since, but=()):
        for look in self.looks(since):
            down = {server for (_, server), state in look.shown.items() if state == "DOWN"} - {*but}
            assert not down, f"{down} DOWN:\n{self.describe_looks(since)}"

    def assert_never_up(self, since, server):
        for look in self.looks(since):
            up = [pool for (pool, of), state in look.shown.items() if of == server and state == "UP"]
            assert not up, f"{server} is UP:\n{self.describe_looks(since)}"

    def wait_for_writes(self, node):
        """Waits until both writers have written to that node, the one that keeps its session and the one that does
        not."""
        since = time.time()

        def is_so():
            written = [w for w in self.watch.writes if w.begun > since and w.outcome == "written"]
            return len({w.row[0] for w in written if w.node == node}) == 2

        self.wait_until(f"writes on {node}", 30, is_so)

    def make_planned_change(self, name, writer, *patronictl):
        """Runs a planned change: HAProxy must not show DOWN, and the writes must reach the new writer."""
        print(name, flush=True)
        since = time.time()
        self.cluster.patronictl(*patronictl)
        self.wait_until_settled(writer)
        self.wait_for_writes(writer)
        time.sleep(5)  # the settled state must last
        self.assert_no_down(since)
        self.wait_until_settled(writer)

    def journal(self, node):
        lines = self.run(node, "journalctl --no-pager -q").splitlines()
        return [line for line in lines if "agent" in line and not any(known in line for known in KNOWN)]

    def assert_silent_journals(self, why):
        for node in NODES:
            assert not self.journal(node), f"{why}: {self.journal(node)}"

    def wait_for_checks(self, node, check):
        """Waits until Patroni gives a good answer and both pools have asked the agent. Their agent-inter is at
        most 2 s. Otherwise two short outages would count as one that is longer than the grace period."""
        self.cluster.wait_for_200(node, check)
        time.sleep(4)

    def set_agent_options(self, options):
        self.cluster.set_agent_options(options)
        for node in NODES:  # the listener reads its options only at its start
            self.run(node, "systemctl stop patroni-agent-check-listen.service")


def other(*than):
    return next(node for node in NODES if node not in than)


def say(what):
    print(what, flush=True)
    return time.time()


def check_steady_state(site):
    since = say("steady state: one UP and two MAINT in the write pool, no DOWN anywhere")
    primary = site.wait_until_settled()
    site.wait_for_writes(primary)
    time.sleep(5)
    site.assert_no_down(since)
    site.wait_for_reason(WRITE, primary, "UP", "primary, running, timeline 1")
    site.wait_for_reason(WRITE, other(primary), "MAINT", "replica, streaming")
    site.assert_silent_journals("a healthy check")
    return primary


def hold_nodes(site, primary):
    since = say("a hold takes a node out of both pools with its reason, and changes nothing else")
    replica = other(primary)
    for node, pool, other_pool, why in (
        (replica, READ, WRITE, "replica, streaming"),
        (primary, WRITE, READ, "primary, running"),
    ):
        for word, state in ("drain", "DRAIN"), ("maint", "MAINT"):
            site.run(node, f"echo '{word} kernel upgrade' > {HOLD}")
            site.wait_for_reason(pool, node, state, "hold: kernel upgrade")
            site.wait_for_reason(other_pool, node, "MAINT", why)
        site.run(node, f"rm {HOLD}")
        site.wait_for_reason(pool, node, "UP", "timeline 1")
    site.assert_no_down(since)


def make_planned_changes(site, primary, listening):
    say(f"from here on, {listening} has the listening pair")
    site.run(listening, f"systemctl disable --now {USUAL} && systemctl enable --now {LISTEN}")
    for leader, candidate in (primary, listening), (listening, primary):
        switchover = "switchover", "demo", "--leader", leader, "--candidate", candidate, "--force"
        site.make_planned_change(f"switchover to {candidate}", candidate, *switchover)
    site.make_planned_change("restart of the primary", primary, "restart", "demo", primary, "--force")
    site.make_planned_change("restart of a replica", primary, "restart", "demo", listening, "--force")
    site.make_planned_change("reinit of a replica", primary, "reinit", "demo", listening, "--force", "--wait")
    site.assert_silent_journals("planned work")


def interrupt_patroni(site, primary, listening):
    since = say("a standby whose Patroni is restarted, and a node whose Patroni hangs for two seconds, are not DOWN")
    # On a busy machine a Patroni may start more slowly than the default grace period allows.
    site.set_agent_options("--grace 10s")
    site.run(listening, "systemctl restart patroni")
    site.wait_for_checks(listening, "replica?lag=16MB")
    for node, check in (primary, "primary"), (listening, "replica?lag=16MB"):
        site.cluster.signal_patroni(node, "STOP")
        time.sleep(2)
        site.cluster.signal_patroni(node, "CONT")
        site.wait_for_checks(node, check)
    site.wait_until_settled(primary)
    site.assert_no_down(since)
    site.set_agent_options("")


def restart_socket(site, primary):
    since = say("restarts of the socket while HAProxy polls")
    site.run(primary, f"for i in $(seq 50); do systemctl restart {USUAL} || exit 1; sleep 0.05; done")
    assert not any("in use" in line for line in site.journal(primary)), site.journal(primary)
    time.sleep(5)
    site.assert_no_down(since)
    site.wait_until_settled(primary)


def reload_haproxy(site, primary):
    since = say("reloads of HAProxy: no state changes")
    for _ in range(3):
        site.run("lb", "systemctl reload haproxy")
        site.wait_for_writes(primary)
        time.sleep(3)
    assert len(site.looks(since)) == 1, site.describe_looks(since)

    replica = other(primary)
    say("reloads while an agent says down, then while HAProxy's own check fails as well: the server is never UP")
    site.cluster.signal_patroni(replica, "KILL")  # PostgreSQL keeps running
    down = lambda: site.shows(WRITE, replica, "DOWN") and site.shows(READ, replica, "DOWN")

    def reload():
        site.wait_until("DOWN", 10, down)
        since = time.time()
        site.run("lb", "systemctl reload haproxy")
        time.sleep(1)
        site.wait_until("DOWN again", 10, down)
        site.assert_never_up(since, replica)

    reload()
    site.wait_until("HAProxy's own check fails", 20, lambda: stats_socket.check_fails(site.socket, (WRITE, replica)))
    reload()
    site.cluster.patroni(replica, "start")
    site.wait_until_settled(primary)


def kill_primary(site, primary):
    since = say("the primary dies: Patroni is killed, then the postmaster")
    site.cluster.signal_patroni(primary, "KILL")
    site.cluster.kill_postmaster(primary)
    site.wait_until("DOWN", 10, lambda: site.shows(WRITE, primary, "DOWN"))
    site.wait_for_reason(WRITE, primary, "DOWN", "connection refused (see restapi.listen and --url)")
    new_primary = site.wait_until("a new writer", 60, lambda: site.up(WRITE))[0]
    assert new_primary != primary
    site.wait_for_writes(new_primary)
    site.assert_no_down(since, but=[primary])
    # Two checks may see the failure at the same moment, and both report it. A third check would find their record.
    began = site.journal(primary)
    refused = [line for line in began if "replied '" in line and ": connection refused" in line]
    assert len(refused) in (1, 2) and any("replied '!unreachable' to " in line for line in began), "\n".join(began)

    say("the former primary comes back as a replica")
    site.cluster.patroni(primary, "start")
    site.wait_until_settled(new_primary)
    site.assert_no_down(since, but=[primary])
    ended = site.journal(primary)
    assert any(line.endswith(" s of trouble)") for line in ended), "\n".join(ended)
    return new_primary


def ask(address):
    """The reply of the agent at that address, or the error."""
    try:
        with socket.create_connection((address, 5555), 5) as agent:
            agent.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: agent.recv(256), b"")).decode()
    except OSError as error:
        return str(error)


def start_xinetd(site, new_primary, listening):
    """Starts xinetd in place of each pair of units, each on another node. Either node may be the new primary."""
    for node, unit in (listening, LISTEN), (other(listening), USUAL):
        say(f"xinetd with the shipped file in place of {unit} on {node}")
        site.run(node, f"systemctl stop {USUAL} {LISTEN} patroni-agent-check-listen.service")
        shipped = "units/examples/patroni-agent-check.xinetd"
        site.cluster.put(node, shipped, "/etc/xinetd.d/patroni-agent-check")
        site.run(node, "systemctl start xinetd")
        expected = "up ready # primary, running, timeline " if node == new_primary else "up maint # replica, streaming"
        for address in NODES[node], f"fd55::1{node[2:]}":
            # Patroni may still have a former primary stopped for pg_rewind.
            line = site.wait_until(expected, 20, lambda: (said := ask(address)).startswith(expected) and said)
            assert line.count("\n") == 1, line
        site.run(node, f"systemctl stop xinetd && systemctl start {unit}")


def cut_power(site, new_primary):
    """Cuts the power of a node: no packet tells HAProxy that it is gone."""
    node = other(new_primary)
    since = say(f"{node} loses its power: it is DOWN, and idle sessions to it end")

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
        site.wait_until("DOWN", 30, lambda: site.shows(READ, node, "DOWN"))
        print(f"DOWN after {time.time() - began:.1f} s")
        ended = select.select([idle], [], [], 30)[0]
        print(f"an idle session has ended after {time.time() - began:.1f} s")
        assert ended, "HAProxy keeps sessions with a machine that is gone"
    finally:
        site.cluster.boot(node)
    site.wait_until_settled(new_primary)
    site.assert_no_down(since, but=[node])


def check_units(site, new_primary, listening):
    say("no unit has failed, and the sockets are open")
    site.wait_until_settled(new_primary)
    for node in NODES:
        failed = site.run(node, "systemctl list-units --failed --plain --no-legend --all 'patroni-agent*'")
        assert not failed, f"{node}: {failed}"
        site.run(node, f"systemctl is-active {LISTEN if node == listening else USUAL}")


def walk(site):
    primary = check_steady_state(site)
    hold_nodes(site, primary)
    listening = other(primary)
    make_planned_changes(site, primary, listening)
    interrupt_patroni(site, primary, listening)
    restart_socket(site, primary)
    reload_haproxy(site, primary)
    new_primary = kill_primary(site, primary)
    start_xinetd(site, new_primary, listening)
    cut_power(site, new_primary)
    check_units(site, new_primary, listening)


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
