"""Makes the moves of docs/move-in.md on each site of tests/walks/sites."""

import pathlib
import re
import subprocess
import sys
import time

import stats_socket
import watch
from walk import Walk, blocks

DOCUMENT = "docs/move-in.md"
HERE = pathlib.Path("tests/walks")
EXAMPLES = "/usr/share/doc/patroni-pools/examples"
OLD_RELEASE = "0.1.0"
# {site: (write pool, read pool)}. The first site has the files of an older release. The last one makes more moves than the
# others. The folder of each of the others has the configuration without the agent, and the administrator's changes in
# the two steps of the first move.
POOLS = {
    OLD_RELEASE: ("postgres-write", "postgres-read"),
    "debian": ("pgcluster_rw", "pgcluster_ro"),
    "collection": ("master", "replicas"),
    "dns": ("orders-write", "orders-read"),
    "template": ("postgres-write", "postgres-read"),
}
FIRST, SECOND = "state-file-and-agents.patch", "agent-check.patch"
CHANGE = "Change HAProxy's configuration"


def steps(heading):
    """The indented blocks below that heading: [(where, commands)]."""
    parts = [part for block in blocks(DOCUMENT, heading) for part in re.split(r"\n+(?=# on )", block)]
    found = [re.fullmatch(r"# on (each node|the HAProxy machine)\n(.*)", part, re.DOTALL) for part in parts]
    assert found and all(found), f"{heading!r} has a block that does not say where it runs: {parts}"
    return [found.groups() for found in found]


class Site:
    """One kind of site: its files, and the names of its pools."""

    def __init__(self, moves, name):
        self.name, self.moves, self.folder = name, moves, HERE / "sites" / name
        self.write, self.read = POOLS[name]
        self.ports = {self.write: 5000, self.read: 5001}
        self.etc = pathlib.Path(f"{moves.root}/etc/haproxy")
        self.files = sorted(file.relative_to(self.folder) for file in self.folder.rglob("*.cfg"))

    def begin(self):
        """Starts the site without agent checks."""
        for file in self.files:
            (self.etc / file).parent.mkdir(exist_ok=True)
            (self.etc / file).write_text((self.folder / file).read_text())
        folder = "-f /etc/haproxy/conf.d" if (self.folder / "conf.d").exists() else ""
        drop_ins = "/etc/systemd/system/haproxy.service.d"
        self.moves.run(f"rm -rf {drop_ins}; mkdir {drop_ins}")
        if (self.folder / "reload.conf").exists():
            self.moves.cluster.put("lb", self.folder / "reload.conf", f"{drop_ins}/reload.conf")
        self.moves.run(
            "systemctl daemon-reload; systemctl reset-failed haproxy 2> /dev/null || true\n"
            f"echo 'EXTRAOPTS=\"-S /run/haproxy-master.sock {folder}\"' > /etc/default/haproxy; systemctl restart haproxy"
        )

    def end(self):
        self.moves.run("systemctl stop haproxy")
        for file in self.files:
            (self.etc / file).unlink()

    def read_configuration(self):
        return {file: (self.etc / file).read_text() for file in self.files}

    def put(self, text):
        """Replaces each old file by a new one, as editors and templates do."""
        for file, content in text.items():
            (self.etc / "new").write_text(content)
            (self.etc / "new").rename(self.etc / file)

    def patch(self, name):
        patch = self.folder / name
        subprocess.run(["patch", "-s", "-p0", "-d", self.etc], stdin=patch.open(), check=True)

    def replace(self, *changes):
        """Replaces each `old`, which must occur, by `new`."""
        text = self.read_configuration()
        for old, new in changes:
            assert any(old in content for content in text.values()), f"no {old!r}"
            text = {file: content.replace(old, new) for file, content in text.items()}
        self.put(text)


class Moves(Walk):
    def __init__(self):
        super().__init__(patience=10)
        self.failed = False
        self.site = None

    def run(self, commands):
        return self.cluster.run("lb", f"set -e\n{commands}")

    def prepare_nodes(self):
        """Prepares the nodes for the moves: the clients' table, PgBouncer, and certificates for later."""
        self.primary = self.cluster.primary()
        watch.create_table(self.primary)
        self.run(
            "cd /etc/haproxy; make='openssl req -x509 -newkey rsa -nodes'\n"
            "$make -subj /CN=ca -keyout ca.key -out patroni-ca.pem 2>&1\n"
            "$make -subj /CN=patroni -keyout server.key -out server.pem -CA patroni-ca.pem -CAkey ca.key "
            "-extensions usr_cert -addext subjectAltName=DNS:pg1,DNS:pg2,DNS:pg3 2>&1\n"
            f"mkdir -p {EXAMPLES}"
        )
        for example in pathlib.Path("units/examples").iterdir():
            self.cluster.put("lb", example, f"{EXAMPLES}/{example.name}")
        self.cluster.put("lb", HERE / "dns.py", "/usr/local/bin/dns")
        addresses = " ".join(watch.NODES.values())
        self.run(f"systemd-run -q --unit=dns /usr/bin/python3 /usr/local/bin/dns {addresses}")
        there = pathlib.Path(f"{self.root}/etc/haproxy")
        in_blocks = r"s/^restapi: {\(.*\), \(.*\)}/restapi:\n  \1\n  \2/"  # the style of most configurations
        for node in watch.NODES:
            for file, name in ("server.key",) * 2, ("server.pem",) * 2, ("patroni-ca.pem", "ca.pem"):
                self.cluster.put(node, there / file, f"/etc/patroni/{name}")
            self.cluster.put(node, HERE / "pgbouncer-on-a-node.ini", "/etc/pgbouncer/pgbouncer.ini")
            self.cluster.run(
                node,
                f"chown postgres /etc/patroni/server.key; sed -i '{in_blocks}' /etc/patroni/config.yml\n"
                "systemd-tmpfiles --create postgresql-common.conf; systemctl start pgbouncer",
            )

    def begin(self, name):
        """Starts another site, without agent checks unless it has an older release. Debian's Patroni listens on the
        node's address."""
        self.site = Site(self, name)
        for node in watch.NODES:
            listen = f"/^  listen:/ s|'.*'|'{node if name == 'debian' else '*'}:8008'|"
            self.cluster.run(node, f'sed -i "{listen}" /etc/patroni/config.yml; systemctl reload patroni')
        self.site.begin()
        self.wait_for("MAINT" if name == OLD_RELEASE else "DOWN")

    def check_pgbouncers(self):
        """Checks units/examples/haproxy-pgbouncer.cfg: HAProxy must show a dead or hung PgBouncer as DOWN."""
        self.site = Site(self, "template")
        self.cluster.configure_haproxy("units/examples/haproxy-pgbouncer.cfg")
        self.wait_for("MAINT")
        standby = next(node for node in watch.NODES if node != self.primary)
        mend = "systemctl kill -s KILL --kill-whom=main pgbouncer || true; systemctl restart pgbouncer"
        for signals in ("KILL", "STOP"), ("STOP", "KILL"):
            ill = dict(zip((self.primary, standby), signals))
            for node, signal in ill.items():
                self.cluster.run(node, f"systemctl kill -s {signal} --kill-whom=main pgbouncer")
            self.wait_for("MAINT", down=ill)
            for node in ill:
                self.cluster.run(node, mend)
            self.wait_for("MAINT")
            print(f"PgBouncer of the primary and of a standby, after SIG{' and SIG'.join(signals)}: DOWN", flush=True)

    def belongs(self, pool, node):
        """Whether that node should serve that pool."""
        return (node == self.primary) == (pool == self.site.write)

    def wait_for(self, others, down=(), seconds=3):
        """Waits until HAProxy has shown for these seconds the state `others` for nodes that do not belong to a pool,
        DOWN for nodes in `down`, and UP for the rest."""
        wanted = {
            (pool, node): others if not self.belongs(pool, node) else "DOWN" if node in down else "UP"
            for pool in self.site.ports for node in watch.NODES
        }
        end, since = time.monotonic() + 30, None
        while since is None or time.monotonic() < since + seconds:
            shown = self.shown(self.site.ports)
            since = (since or time.monotonic()) if shown == wanted else None
            assert time.monotonic() < end, f"{shown} instead of {wanted}"
            time.sleep(0.05)

    def step(self, where, commands):
        # In a check by hand, exit status 1 means a healthy node with another role.
        commands = re.sub("^patroni-agent-check$", "patroni-agent-check || [ $? = 1 ]", commands, flags=re.M)
        if where != "each node":
            return self.run(commands)
        standbys_first = sorted(watch.NODES, key=lambda node: node == self.primary)
        return "".join(self.cluster.run(node, f"set -e\n{commands}") for node in standbys_first)

    def change(self, others="MAINT"):
        """Runs the three commands that follow each change of HAProxy's configuration."""
        for where, commands in steps(CHANGE):
            self.step(where, commands)
        said = self.run("journalctl -q -o cat -u haproxy | grep 'were not saved' || true")
        assert not said, said
        self.wait_for(others)

    def move(self, name, do, others=("MAINT",)):
        """Makes a move while clients write and read. Nodes that belong to a pool must stay UP in it, and HAProxy may
        show the rest in the states `others`."""
        began = time.time()
        ports = self.site.ports
        clients = watch.Watch(self.socket, {self.site.write: 5000}, {self.site.read: 5001}, pairs=3)
        assert list(ports.values()) == [5000, 5001]
        clients.start()
        try:
            time.sleep(2)
            do()
            time.sleep(2)
        finally:
            clients.stop()
        self.judge(f"{self.site.name}: {name}", clients, others, began)
        if bridged := self.bridged(began):
            print(f"    an agent bridged {max(bridged)} s", flush=True)

    def judge(self, name, clients, others, began):
        said = self.run(f"journalctl -q -o short-unix -u haproxy --since=@{began:.3f} | grep ' Reloaded ' || true")
        # A replaced process ends its remaining sessions at these times (hard-stop-after 15s).
        ends = [float(line.split()[0]) + 15 for line in said.splitlines()]
        kept = lambda ended: any(end - 1 < ended < end + 3 for end in ends)
        writes = [write for write in clients.writes if write.done != watch.OK]
        reads = [read for read in clients.reads if read.done != watch.OK]
        old = [write for write in writes if write.cut and kept(write.ended)] + [read for read in reads if read.keeps and kept(read.ended)]
        failed = [f"{write.pool}: {write.outcome}" for write in writes if write not in old]
        failed += [f"{read.pool}: no answer" for read in reads if read not in old]
        failed += [f"{read.pool}: read from the primary" for read in clients.reads if read.node == self.primary]
        tried = [(write.row[0], write.done, write.ended) for write in clients.writes]
        tried += [((read.pool, read.keeps), read.done, read.ended) for read in clients.reads]
        served = {}
        for client, done, ended in tried:
            if done == watch.OK:
                served.setdefault(client, []).append(ended)
        gap = max(later - earlier for times in served.values() for earlier, later in zip(times, times[1:]))
        print(f"{name}: {len(tried)} attempts, {len(failed)} failures, longest gap {gap:.2f} s", flush=True)
        if old:
            print(f"    {len(old)} sessions of replaced processes ended after 15 s (hard-stop-after)", flush=True)
        if clients.longest_between_looks > 1:
            print(f"    this machine is busy: HAProxy was not asked for {clients.longest_between_looks:.1f} s", flush=True)
        for failure in failed[:10]:
            print(f"    {failure}")
        assert len(served) == 8 and min(map(len, served.values())) > 25, served.keys()
        for look in clients.looks:
            for server, state in look.shown.items():
                assert state in ({"UP"} if self.belongs(*server) else others), f"{server} was shown {state}"
        self.failed |= bool(failed)

    def bridged(self, since):
        """The lengths, in seconds, of the outages that agents reported."""
        said = "".join(
            self.cluster.run(node, f"journalctl -q -o cat -t patroni-agent-check --since=@{since:.3f}")
            for node in watch.NODES
        )
        return [float(seconds) for seconds in re.findall(r"after ([0-9.]+) s of trouble", said)]

    # moves

    def assert_answers(self, said):
        """Asserts that one node is READY and two are MAINT in the output of checks by hand."""
        assert said.count("up ready") == 1 and said.count("up maint") == 2, said

    def to_the_agent(self):
        on_nodes, on_haproxy = steps("From `option httpchk` to the agent")
        self.assert_answers(self.step(*on_nodes))
        self.step(*on_haproxy)
        self.assert_rules_reported("state-file", "agents-watched", "agent-missing")
        self.site.patch(FIRST)
        self.change("DOWN")
        self.copy = self.site.read_configuration()
        self.assert_rules_reported("agent-missing", "waiting-room")
        self.site.patch(SECOND)
        self.change()
        self.assert_rules_reported()

    def assert_rules_reported(self, *rules):
        """Asserts that `check --agent` reports these rules, or no mistake if there are none."""
        said = self.run("patroni-pools check --agent 2>&1 || [ $? = 1 ]")
        assert all(f": {rule}: " in said for rule in rules), f"{rules}: {said}"
        assert rules or not re.search(r"^/etc/haproxy/", said, re.M), said

    def to_the_new_release(self):
        on_nodes, on_haproxy = steps("From 0.1.0 to 0.2.0")
        # one access list for each pair of units, and a node without one
        folder, lists = "/etc/systemd/system/patroni-agent-{}.socket.d", dict(zip(watch.NODES, ("check", "check-listen")))
        fence = f"[Socket]\\nIPAddressDeny=any\\nIPAddressAllow=127.0.0.1 {watch.LB}\\n"
        for node, pair in lists.items():
            old = folder.format(pair)
            self.cluster.run(node, f"mkdir {old}; printf '{fence}' > {old}/fence.conf; systemctl daemon-reload")
        self.assert_answers(self.step(*on_nodes))
        for node in lists:
            holds = self.cluster.run(node, "systemctl show --value -p IPAddressAllow patroni-agent-check.socket")
            assert watch.LB in holds, f"{node}: {holds}"
        self.step(*on_haproxy)
        self.copy = self.site.read_configuration()
        self.run(f"patroni-pools check -f {EXAMPLES}/haproxy.cfg")
        self.site.put({file: pathlib.Path(f"units/examples/{file}").read_text() for file in self.site.files})
        self.change()
        for node in lists:
            self.cluster.run(node, f"rm {folder.format('')}/fence.conf; systemctl daemon-reload")

    def to_the_old_release(self):
        self.site.put(self.copy)
        ((where, commands),) = steps(CHANGE)
        self.assert_rules_reported("waiting-room", "reserve")
        self.step(where, commands.replace("patroni-pools check", "patroni-pools check || [ $? = 1 ]"))
        self.wait_for("MAINT")

    def to_httpchk(self):
        self.site.put(self.copy)
        self.change("DOWN")

    def reload_often(self):
        for _ in range(5):
            self.change()

    def follow(self, heading):
        """Returns a move whose steps are the blocks below that heading."""
        def walk():
            for where, commands in steps(heading):
                said = self.step(where, commands)
                if where == "each node":
                    self.assert_answers(said)
            self.wait_for("MAINT")
        return walk

    def to_another_port(self):
        both, only, status = steps("Another port for the agent")
        self.step(*both)
        self.site.replace(("AGENT_PORT 5555", "AGENT_PORT 5556"))
        self.change()
        self.step(*only)
        self.step(*status)
        for node in watch.NODES:
            said = self.run(f"socat -u TCP:{node}:5555 - 2>&1 || true")
            assert "refused" in said, f"{node}: {said!r}"

    def to_https(self):
        (block,) = steps("https to Patroni")
        self.site.replace(("fall 3", "fall 1000"))
        said = self.run("patroni-pools check 2>&1 || [ $? = 1 ]")
        assert {found.split(": ")[1] for found in said.splitlines() if found.startswith("/")} == {"slow-check"}, said
        self.run("systemctl reload haproxy; patroni-pools status --wait 15")
        restapi = r"/^restapi:/a\  certfile: /etc/patroni/server.pem\n  keyfile: /etc/patroni/server.key\n  cafile: /etc/patroni/ca.pem"
        for node in sorted(watch.NODES, key=lambda node: node == self.primary):
            said = self.cluster.run(node, f"set -e\nsed -i '{restapi}' /etc/patroni/config.yml\n{block[1]}")
            assert said.count("up ready") == 1, said
        # An administrator needs time for this step. HAProxy's own check would fail three times meanwhile.
        self.wait_for("MAINT", seconds=12)
        tls = "fall 3 check-ssl verify required ca-file /etc/haproxy/patroni-ca.pem"
        self.site.replace(("fall 1000", tls))
        self.change()
        # The way back must use Patroni's new protocol.
        self.copy = {file: text.replace("fall 3", tls).replace("5555", "5556") for file, text in self.copy.items()}

    def to_poolers(self):
        ((where, asks),) = steps("From PostgreSQL's port to PgBouncer")
        assert sorted(self.step(where, asks).split()) == ["f", "t", "t"]
        self.before_poolers = self.site.read_configuration()
        own = (
            "option tcp-check\n    tcp-check connect port 6432\n    tcp-check send-binary 0000000804d2162f\n"
            '    tcp-check expect rstring "^[NS]"\n    tcp-check connect port 8008\n'
            '    tcp-check send "{} HTTP/1.0\\r\\n\\r\\n"\n    tcp-check expect rstring "^HTTP/1.. 200"'
        )
        expect = "\n    http-check expect status 200"
        checks = [f"OPTIONS {path}" for path in ("/primary", "/replica?lag=16MB")]
        self.site.replace((":5432", ":6432"), *((f"option httpchk {asked}{expect}", own.format(asked)) for asked in checks))
        self.change()
        self.assert_port("6432")

    def from_poolers(self):
        self.site.put(self.before_poolers)
        self.change()
        self.assert_port("5432")

    def assert_port(self, port):
        rows = stats_socket.servers(self.socket)
        ports = {rows[pool, node][18] for pool in self.site.ports for node in watch.NODES}
        assert ports == {port}, ports

    def uninstall(self):
        for where, commands in steps("Uninstall"):
            self.step(where, commands)
        self.wait_for("DOWN")

    # Mistakes: a command must report each, and undoing it must refuse no client.

    def assert_reported(self, command, *words):
        said = self.run(f"{command} 2>&1 && exit 3; [ $? -le 2 ]")
        assert all(word in said for word in words), f"{words}: {said}"

    def mistake(self, what, old, new, *said):
        """Replaces `old` by `new`. Each command in `said` must report the mistake in these words. Then undoes the
        change."""
        print(f"    {what}", flush=True)
        good = self.site.read_configuration()
        self.site.replace((old, new))
        for command, *words in said:
            self.assert_reported(command, *words) if words else self.run(command)
        self.site.put(good)
        self.change()

    def wrong_steps(self):
        reload, silent = ["systemctl reload haproxy"], "its agent does not answer (L4CON) on port 5554"
        check, status = "patroni-pools check", "patroni-pools status --wait"
        self.mistake(
            "a wrong port", 'agent-port "${AGENT_PORT}"', "agent-port 5554",
            [check, "agent-port"], reload, [f"{status} 3", silent],
        )
        self.mistake(
            "a wrong port for all", "AGENT_PORT 5555", "AGENT_PORT 5554",
            [check], reload, [f"{status} 3", silent, "agents/"],
        )
        unread = "its agent leaves it as it is: !unreachable: no agent-send line within 300 ms: end it with a newline"
        self.mistake(
            "a lost newline", 'agent-send "primary\\n"', 'agent-send "primary"',
            [check, "agent-send"], reload, [f"{status} 5", unread],
        )
        self.mistake(
            "HAProxy refuses the file", "retries", "retrys",
            [check, "retrys", "HAProxy refuses these files"], [*reload, "Job for haproxy.service failed"],
        )
        self.mistake(
            "the reload is forgotten", "AGENT_PORT 5555", "AGENT_PORT 5556",
            [f"{status} 1", "the configuration says another", "has HAProxy been reloaded"],
        )
        print("    an agent that HAProxy cannot reach", flush=True)
        standby = next(node for node in watch.NODES if node != self.primary)
        self.cluster.run(standby, "systemctl stop patroni-agent-check.socket")
        # HAProxy's interval is two seconds
        silent = "its agent does not answer (L4CON)"
        # HAProxy's own check of the backend "agents" may fail first.
        self.run(f"for i in $(seq 50); do ! patroni-pools status | grep -qF '{silent}' || break; sleep 0.1; done")
        self.assert_reported("patroni-pools status", silent)
        self.cluster.run(standby, "systemctl start patroni-agent-check.socket")
        self.run("patroni-pools status --wait 15")
        print("    an agent check that stays turned off", flush=True)
        server = next(server for pool, server in stats_socket.servers(self.socket) if pool == self.site.write)
        self.run(f"echo 'disable agent {self.site.write}/{server}' | socat stdio /run/haproxy/admin.sock")
        self.assert_reported("patroni-pools status", "somebody has turned off its agent check (enable agent)")
        self.run(f"echo 'enable agent {self.site.write}/{server}' | socat stdio /run/haproxy/admin.sock")
        self.run("patroni-pools status --wait 15")


def main():
    # Through PgBouncer, PostgreSQL sees a local connection, so the address is the same on each node.
    watch.NODE = "rtrim(pg_read_file('/proc/sys/kernel/hostname'), chr(10))"
    moves = Moves()
    moves.prepare_nodes()
    changes = ("MAINT", "DOWN")
    names = sys.argv[1:] or POOLS
    if "template" in names:
        moves.check_pgbouncers()
    for name in names:
        moves.begin(name)
        if name == OLD_RELEASE:
            moves.move("to the new release", moves.to_the_new_release)
            moves.move("back to the old release", moves.to_the_old_release)
            moves.site.end()
            continue
        moves.move("from httpchk to the agent", moves.to_the_agent, changes)
        moves.move("wrong steps", moves.wrong_steps)
        if name == "template":
            moves.move("reloads", moves.reload_often)
            for heading in (
                "From the usual pair of units to the listening pair",
                "From the listening pair of units to the usual pair",
            ):
                moves.move(heading, moves.follow(heading))
            moves.move("from PostgreSQL to PgBouncer", moves.to_poolers)
            moves.move("and back", moves.from_poolers)
            moves.move("another port", moves.to_another_port)
            moves.move("https", moves.to_https)
        moves.move("back to httpchk", moves.to_httpchk, changes)
        if name == "template":
            moves.move("uninstall", moves.uninstall, ("DOWN",))
        moves.site.end()
    sys.exit(moves.failed)


main()
