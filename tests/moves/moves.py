"""Walks the moves of units/MIGRATION.md. Started by tests/moves/run."""

import pathlib
import re
import sys
import time

import cluster
import haproxy
import watch

DOCUMENT = pathlib.Path("units/MIGRATION.md")
WRITE, READ = "postgres-write", "postgres-read"
PORTS = {WRITE: 5000, READ: 5001}
EXAMPLES = "/usr/share/doc/patroni-agent-check/examples"
# through PgBouncer the address is the node's own, and the same on each
watch.NODE = "rtrim(pg_read_file('/proc/sys/kernel/hostname'), chr(10))"


def steps(heading):
    """[(where, commands)] of the indented blocks below that heading."""
    section = re.split(rf"^## {re.escape(heading)}$", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert len(section) == 2, f"{heading!r} is there {len(section) - 1} times"
    section = section[1].split("\n## ")[0]
    blocks = [re.sub("^    ", "", block, flags=re.M) for block in re.findall(r"(?:^    .*\n)+", section, re.M)]
    found = [re.fullmatch(r"# on (each node|the HAProxy machine)\n(.*)", block, re.DOTALL) for block in blocks]
    assert found and all(found), f"{heading!r} has a block that does not say where it runs: {blocks}"
    return [found.groups() for found in found]


class Moves:
    def __init__(self):
        self.cluster = cluster.Cluster()
        self.root = f"/proc/{self.cluster.leader('lb')}/root"
        self.socket = f"{self.root}/run/haproxy/admin.sock"
        self.failed = False
        watch.local.patience = 10

    def nodes(self):
        """What is there before the moves: the clients' table, PgBouncer, and certificates that nobody uses yet."""
        self.primary = self.cluster.primary()
        watch.create_table(self.primary)
        self.cluster.run(
            "lb",
            "cd /etc/haproxy; make='openssl req -x509 -newkey rsa -nodes'\n"
            "$make -subj /CN=ca -keyout ca.key -out patroni-ca.pem 2>&1\n"
            "$make -subj /CN=patroni -keyout server.key -out server.pem -CA patroni-ca.pem -CAkey ca.key "
            "-extensions usr_cert -addext subjectAltName=DNS:pg1,DNS:pg2,DNS:pg3 2>&1",
        )
        there = pathlib.Path(f"{self.root}/etc/haproxy")
        in_blocks = r"s/^restapi: {\(.*\), \(.*\)}/restapi:\n  \1\n  \2/"  # as most configurations are
        for node in watch.NODES:
            for file, name in ("server.key",) * 2, ("server.pem",) * 2, ("patroni-ca.pem", "ca.pem"):
                self.cluster.put(node, there / file, f"/etc/patroni/{name}")
            self.cluster.put(node, "tests/moves/pgbouncer.ini", "/etc/pgbouncer/pgbouncer.ini")
            self.cluster.run(
                node,
                f"chown postgres /etc/patroni/server.key; sed -i '{in_blocks}' /etc/patroni/config.yml\n"
                "systemd-tmpfiles --create postgresql-common.conf; systemctl start pgbouncer",
            )

    def poolers(self):
        """units/examples/haproxy-pgbouncer.cfg: PgBouncers that are dead or hang are DOWN where they are needed."""
        self.cluster.haproxy("units/examples/haproxy-pgbouncer.cfg")
        self.see("MAINT")
        standby = next(node for node in watch.NODES if node != self.primary)
        mend = "systemctl kill -s KILL --kill-whom=main pgbouncer || true; systemctl restart pgbouncer"
        for signals in ("KILL", "STOP"), ("STOP", "KILL"):
            ill = dict(zip((self.primary, standby), signals))
            for node, signal in ill.items():
                self.cluster.run(node, f"systemctl kill -s {signal} --kill-whom=main pgbouncer")
            self.see("MAINT", down=ill)
            for node in ill:
                self.cluster.run(node, mend)
            self.see("MAINT")
            print(f"PgBouncer of the primary and of a standby, after SIG{' and SIG'.join(signals)}: DOWN", flush=True)

    def before(self):
        """The site without the agent in HAProxy, as Patroni's template has it, and what the package puts there."""
        drop_ins = "/etc/systemd/system/haproxy.service.d"
        self.cluster.run("lb", f"rm -rf {drop_ins}; mkdir -p {EXAMPLES}; systemctl daemon-reload")
        for example in pathlib.Path("units/examples").iterdir():
            self.cluster.put("lb", example, f"{EXAMPLES}/{example.name}")
        self.cluster.haproxy("tests/moves/before.cfg")
        self.see("DOWN")

    def shown(self):
        try:
            return watch.look(self.socket, PORTS)
        except OSError:  # a reload puts a new socket into its place
            return None

    def words(self, field):
        """What "show stat" has there of the servers, without the mark of a check that is under way."""
        rows = [row for row in haproxy.stat(self.socket) if row["pxname"] in PORTS and row["svname"] in watch.NODES]
        return [row[field].lstrip("* ") for row in rows]

    def meant(self, pool, node):
        """Whether that node is there for the clients of that pool."""
        return (node == self.primary) == (pool == WRITE)

    def see(self, others, down=(), seconds=3):
        """Waits until those that are not meant for a pool are shown so, and the others UP, or DOWN if they are among
        these; they must stay so for these seconds."""
        wanted = {
            (pool, node): others if not self.meant(pool, node) else "DOWN" if node in down else "UP"
            for pool in PORTS for node in watch.NODES
        }
        end, since = time.monotonic() + 30, None
        while since is None or time.monotonic() < since + seconds:
            shown = self.shown()
            since = (since or time.monotonic()) if shown == wanted else None
            assert time.monotonic() < end, f"{shown} instead of {wanted}"
            time.sleep(0.05)

    def step(self, where, commands):
        standbys_first = sorted(watch.NODES, key=lambda node: node == self.primary)
        nodes = standbys_first if where == "each node" else ["lb"]
        return "".join(self.cluster.run(node, f"set -e\n{commands}") for node in nodes)

    def reloaded(self):
        """Reloads that did not save the states would say so here."""
        said = self.cluster.run("lb", "journalctl -q -o cat -u haproxy | grep 'were not saved' || true")
        assert not said, said

    def move(self, heading, seen, times=1, others=("MAINT",)):
        """`seen`: what must be seen after each step of the document, given what the step said. `others`: how those that
        are not meant for a pool may be shown meanwhile; the others must be UP all the time."""
        blocks = steps(heading)
        assert len(blocks) == len(seen), f"{heading!r} has {len(blocks)} steps"
        began = time.time()
        clients = watch.Watch(self.socket, {WRITE: PORTS[WRITE]}, {READ: PORTS[READ]})
        clients.start()
        try:
            time.sleep(2)
            for (where, commands), look in list(zip(blocks, seen)) * times:
                look(self.step(where, commands))
                self.reloaded()
            time.sleep(2)
        finally:
            clients.stop()
        self.judge(heading, clients, others)
        if bridged := self.bridged(began):
            print(f"    an agent bridged {max(bridged)} s", flush=True)

    def judge(self, heading, clients, others):
        failed = [f"{write.pool}: {write.outcome}" for write in clients.writes if write.done != watch.OK]
        failed += [f"{read.pool}: no answer" for read in clients.reads if read.done != watch.OK]
        failed += [f"{read.pool}: read from the primary" for read in clients.reads if read.node == self.primary]
        tried = [(write.row[0], write.done, write.ended) for write in clients.writes]
        tried += [((read.pool, read.keeps), read.done, read.ended) for read in clients.reads]
        served = {}
        for client, done, ended in tried:
            if done == watch.OK:
                served.setdefault(client, []).append(ended)
        gap = max(later - earlier for times in served.values() for earlier, later in zip(times, times[1:]))
        print(f"{heading}: {len(tried)} attempts, {len(failed)} failures, longest gap {gap:.2f} s", flush=True)
        if clients.longest_between_looks > 1:
            print(f"    this machine is busy: nobody looked for {clients.longest_between_looks:.1f} s", flush=True)
        for failure in failed[:10]:
            print(f"    {failure}")
        assert len(served) == 4 and min(map(len, served.values())) > 25, served.keys()
        for look in clients.looks:
            for server, state in look.shown.items():
                assert state in ({"UP"} if self.meant(*server) else others), f"{server} was shown {state}"
        self.failed |= bool(failed)

    def bridged(self, since):
        """How long troubles lasted that agents noticed, in seconds."""
        said = "".join(
            self.cluster.run(node, f"journalctl -q -o cat -t patroni-agent-check --since=@{since:.3f}")
            for node in watch.NODES
        )
        return [float(seconds) for seconds in re.findall(r"after ([0-9.]+) s of trouble", said)]

    def answers(self, said):
        """Of the agents and of HAProxy, as an operator sees them."""
        self.agents(said)
        self.listed(said)

    def listed(self, said):
        for pool in PORTS:
            for node in watch.NODES:
                assert f" {pool} " in said and f" {node} " in said, said

    def reached(self, said):
        """HAProxy itself reaches each agent."""
        assert sorted(said.split()) == [f"{node},UP,L7OK" for node in watch.NODES], said

    def agents(self, said):
        """Each node's agent answers as an operator sees it."""
        assert said.count("up ready") == 1 and said.count("up maint") == 2, said

    def pairs(self, said):
        """The same, and HAProxy hears all of them."""
        self.agents(said)
        self.hears(said)

    def hears(self, said):
        self.see("MAINT")
        heard = self.words("agent_status")
        assert len(heard) == 6 and set(heard) <= {"L7OK", "L7STS"}, heard

    def poolers_answer(self, said):
        assert sorted(said.split()) == ["f", "t", "t"], said

    def port(self, port):
        """HAProxy shows the same as ever, for servers with this port."""

        def look(said):
            self.see("MAINT")
            rows = haproxy.servers(self.socket)
            ports = {rows[pool, node][18] for pool in PORTS for node in watch.NODES}
            assert ports == {port}, ports

        return look

    def closed(self, said):
        """The agent's old port is closed on each node."""
        for node in watch.NODES:
            said = self.cluster.run("lb", f"socat -u TCP:{node}:5555 - 2>&1 || true")
            assert "refused" in said, f"{node}: {said!r}"
        self.hears(said)

    def https(self, said):
        """An operator takes his time: HAProxy's own check would fail three times meanwhile."""
        assert said.count("up ready") == 3, said
        self.see("MAINT", seconds=12)
        self.hears(said)

    def checks(self, others):
        """HAProxy's own check is at work where a server is not in MAINT, and agrees."""
        agrees = {("UP", "L7OK"), ("DOWN", "L7STS"), ("MAINT", "")}

        def look(said):
            self.see(others)
            end = time.monotonic() + 10
            while not (found := set(zip(self.words("status"), self.words("check_status")))) <= agrees:
                assert time.monotonic() < end, found
                time.sleep(0.05)

        return look

    def stays(self, others):
        return lambda said: self.see(others)


def main():
    moves = Moves()
    moves.nodes()
    moves.poolers()
    maint, down = moves.stays("MAINT"), moves.checks("DOWN")
    changes = ("MAINT", "DOWN")
    steps_to_it = [down, moves.answers, moves.listed, moves.reached, maint, maint]
    agent = ["From `option httpchk` to the agent", steps_to_it, 1, changes]
    back = ["Back to `option httpchk`", [down], 1, changes]
    # without `disabled`, the drop-in alone keeps clients from standbys whose agent is gone
    moves.cluster.haproxy("units/examples/haproxy.cfg")
    moves.cluster.run("lb", "sed -i 's/ disabled$//' /etc/haproxy/haproxy.cfg && systemctl reload haproxy")
    moves.see("MAINT")
    moves.move(*back)
    moves.before()
    moves.move(*agent)
    moves.move("Reload HAProxy", [maint], times=5)
    moves.move("From the usual pair of units to the listening pair", [moves.pairs])
    moves.move("From the listening pair of units to the usual pair", [moves.pairs])
    moves.move("From PostgreSQL's port to PgBouncer", [moves.poolers_answer, moves.port("6432")])
    moves.move("From PgBouncer to PostgreSQL's port", [moves.port("5432")])
    moves.move("Another port for the agent", [maint, moves.agents, moves.hears, moves.closed])
    moves.move("https to Patroni", [maint, moves.https, moves.checks("MAINT")])
    moves.move(*back)
    moves.move("Uninstall", [down], others=("DOWN",))
    sys.exit(moves.failed)


main()
