"""Walks the moves of units/MIGRATION.md. Started by tests/moves/run."""

import pathlib
import re
import subprocess
import sys
import threading
import time

import psycopg2

import cluster
import haproxy
import watch

DOCUMENT = pathlib.Path("units/MIGRATION.md")
WRITE, READ = "postgres-write", "postgres-read"
PORTS = {WRITE: 5000, READ: 5001}
EXAMPLES = "/usr/share/doc/patroni-agent-check/examples"


def steps(heading):
    """[(where, commands)] of the indented blocks below that heading."""
    section = re.split(rf"^## {re.escape(heading)}$", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert len(section) == 2, f"{heading!r} is there {len(section) - 1} times"
    section = section[1].split("\n## ")[0]
    blocks = [re.sub("^    ", "", block, flags=re.M) for block in re.findall(r"(?:^    .*\n)+", section, re.M)]
    found = [re.fullmatch(r"# on (each node|the HAProxy machine)\n(.*)", block, re.DOTALL) for block in blocks]
    assert found and all(found), f"{heading!r} has a block that does not say where it runs: {blocks}"
    return [found.groups() for found in found]


class Clients:
    """A writer and a reader, each in a kept session and in a new one every 30 ms, until `stop`."""

    def __init__(self):
        self.ended = threading.Event()
        self.attempts, self.failures, self.gaps, self.broken = {}, [], {}, []
        self.threads = [
            threading.Thread(target=self._guard, args=(pool, kept)) for pool in PORTS for kept in (False, True)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.ended.set()
        for thread in self.threads:
            thread.join()
        if self.broken:
            raise self.broken[0]

    def _guard(self, pool, kept):
        try:
            self._client(pool, kept)
        except Exception as error:  # a client that died would leave a move that nobody tried
            self.broken.append(error)

    def _client(self, pool, kept):
        watch.local.patience = 5
        name, connection, served = f"{pool}, {'kept' if kept else 'new'}", None, time.monotonic()
        self.attempts[name] = self.gaps[name] = 0
        while not self.ended.wait(0.03):
            self.attempts[name] += 1
            try:
                connection = connection or watch.connect(watch.LB, PORTS[pool])
                if pool == WRITE:
                    watch.ask(connection, "insert into kept values (%s) returning 1", (name,))
                elif not watch.ask(connection, "select pg_is_in_recovery()")[0][0]:
                    raise psycopg2.OperationalError("read from the primary")
                now = time.monotonic()
                self.gaps[name], served = max(self.gaps[name], now - served), now
            except psycopg2.Error as error:
                first = (str(error).strip() or repr(error)).splitlines()[0]
                self.failures.append(f"{time.strftime('%T')} {name}: {first}")
                if connection and (connection.closed or error.pgcode):
                    connection.close()
                    connection = None
            if connection and not kept:
                connection.close()
                connection = None


class Moves:
    def __init__(self):
        self.cluster = cluster.Cluster()
        leader = subprocess.run(["tests/lab/machine", "pid", "lb"], capture_output=True, text=True, check=True)
        self.socket = f"/proc/{leader.stdout.strip()}/root/run/haproxy/admin.sock"
        self.failed = False
        watch.local.patience = 10

    def before(self):
        """The site without the agent in HAProxy, as Patroni's template has it, and what the package puts there."""
        drop_ins = "/etc/systemd/system/haproxy.service.d"
        self.cluster.run("lb", f"rm -rf {drop_ins}; mkdir -p {EXAMPLES}; systemctl daemon-reload")
        for example in pathlib.Path("units/examples").iterdir():
            self.cluster.put("lb", example, f"{EXAMPLES}/{example.name}")
        self.cluster.haproxy("tests/moves/before.cfg")
        self.primary = self.cluster.primary()
        self.cluster.sql(self.primary, "create table if not exists kept (row text)")
        self.see("DOWN")

    def shown(self):
        try:
            return {server: state for server, state in haproxy.shown(self.socket).items() if server[0] in PORTS}
        except OSError:  # a reload puts a new socket into its place
            return None

    def see(self, others):
        """Waits until those that are not meant for a pool are shown so, and the others UP; they must stay so."""
        wanted = {
            (pool, node): "UP" if (node == self.primary) == (pool == WRITE) else others
            for pool in PORTS for node in watch.NODES
        }
        end, since = time.monotonic() + 30, None
        while since is None or time.monotonic() < since + 3:
            shown = self.shown()
            since = (since or time.monotonic()) if shown == wanted else None
            assert time.monotonic() < end, f"{shown} instead of {wanted}"
            time.sleep(0.05)

    def step(self, where, commands):
        said = [
            self.cluster.run(node, f"set -e\n{commands}")
            for node in (watch.NODES if where == "each node" else ["lb"])
        ]
        return "".join(said)

    def reloaded(self):
        """Reloads that did not save the states would say so here."""
        said = self.cluster.run("lb", "journalctl -q -o cat -u haproxy | grep 'were not saved' || true")
        assert not said, said

    def move(self, heading, seen, times=1):
        """`seen`: what must be seen after each step of the document, given what the step said."""
        blocks = steps(heading)
        assert len(blocks) == len(seen), f"{heading!r} has {len(blocks)} steps"
        clients = Clients()
        try:
            time.sleep(2)
            for (where, commands), look in list(zip(blocks, seen)) * times:
                look(self.step(where, commands))
                self.reloaded()
            time.sleep(2)
        finally:
            clients.stop()
        attempts, gap = sum(clients.attempts.values()), max(clients.gaps.values())
        print(f"{heading}: {attempts} attempts, {len(clients.failures)} failures, longest gap {gap:.2f} s", flush=True)
        for failure in clients.failures[:10]:
            print(f"    {failure}")
        assert min(clients.attempts.values()) > 50, clients.attempts
        self.failed |= bool(clients.failures)

    def answers(self, said):
        """Of the agents and of HAProxy, as an operator sees them."""
        assert said.count("up ready") == 1 and said.count("up maint") == 2, said
        self.listed(said)

    def listed(self, said):
        for pool in PORTS:
            for node in watch.NODES:
                assert f" {pool} " in said and f" {node} " in said, said

    def pairs(self, said):
        """Each node's agent answers, and HAProxy hears all of them."""
        assert said.count("up ready") == 1 and said.count("up maint") == 2, said
        self.see("MAINT")
        rows = [row for row in haproxy.stat(self.socket) if row["pxname"] in PORTS and row["svname"] in watch.NODES]
        heard = [row["agent_status"].lstrip("* ") for row in rows]
        assert len(heard) == 6 and set(heard) <= {"L7OK", "L7STS"}, heard

    def stays(self, others):
        return lambda said: self.see(others)


def main():
    moves = Moves()
    moves.before()
    nothing, maint, down = moves.stays("DOWN"), moves.stays("MAINT"), moves.stays("DOWN")
    moves.move("From `option httpchk` to the agent", [nothing, moves.answers, moves.listed, maint])
    moves.move("Reload HAProxy", [maint], times=5)
    moves.move("From the usual pair of units to the listening pair", [moves.pairs])
    moves.move("From the listening pair of units to the usual pair", [moves.pairs])
    moves.move("Back to `option httpchk`", [down])
    moves.move("Uninstall", [down])
    sys.exit(moves.failed)


main()
