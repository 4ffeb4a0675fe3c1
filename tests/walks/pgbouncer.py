"""Runs the switchover of docs/pgbouncer.md. With PAUSE no transaction may fail.

Then compares switchovers without PAUSE, with and without the waiting room of haproxy.cfg, the hook and a short
server_login_retry: how much longer PgBouncer's clients have no primary than HAProxy's clients. Some clients must fail
then, which shows that failures are noticed."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple

import psycopg2

import watch
from walk import Walk, blocks

HEADING = "Switch over with PAUSE"
POOL = "postgres-write"
HAPROXY, PGBOUNCER = 5000, 6432
HOOK = "/usr/lib/patroni-agent-check/before-stop --agent-inter 500ms"
CLIENTS = 8
# sixty transactions a second; most clients are in a transaction at any time
TRANSACTION = """\
begin;
insert into written values ('{}', :client_id);
select pg_sleep(0.1);
end;
\\sleep 20 ms
"""
# (pattern, replacement): takes the waiting room out of haproxy.cfg
ROOM = (
    (r"^ *server waiting-room .*\n", ""),
    (r"^ *tcp-request content set-dst-port .*\n", ""),
    (r"^ *retries .*\n", ""),
    (r"^( *timeout connect) .*$", r"\1 2s"),
)

# begun, ended: by the monotonic clock; said: the first line of the error, None if the write succeeded
Operation = namedtuple("Operation", "begun ended said")


def script_for(candidate):
    """The document's script, with this candidate."""
    scripts = [block for block in blocks("docs/pgbouncer.md", HEADING) if "patronictl switchover" in block]
    assert len(scripts) == 1, scripts
    script, times = re.subn(r"--candidate pg2\b", f"--candidate {candidate}", scripts[0])
    assert times == 1, scripts
    return script


class Pgbench:
    """Runs pgbench through PgBouncer until `stop`, with 8 clients. They keep their sessions, or open a new session for
    each transaction. A client ends with its first error."""

    def __init__(self, database, *options):
        self.database, self.options = database, options

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(dir=os.environ["LAB"])
        script = pathlib.Path(self.folder.name, "script")
        script.write_text(TRANSACTION.format(self.database))
        options = ("-n", "-c", str(CLIENTS), "-T", "600", "-l", "-f", script, *self.options)
        self.process = subprocess.Popen(
            ["pgbench", "-h", watch.LB, "-p", str(PGBOUNCER), "-U", "postgres", *options, self.database],
            cwd=self.folder.name, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        return self

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGALRM)  # pgbench's own signal at the end of -T
        said, errors = self.process.communicate(timeout=30)
        done = re.search(r"transactions actually processed: (\d+)", said)
        assert done, said + errors
        self.done = int(done[1])
        self.errors = [line for line in errors.splitlines() if "error:" in line and "Run was aborted" not in line]
        self.failed = len(set(re.findall(r"client (\d+)", "\n".join(self.errors))))
        assert bool(self.failed) == bool(self.process.returncode), errors
        logs = pathlib.Path(self.folder.name).glob("pgbench_log.*")
        self.longest = max(int(line.split()[2]) for log in logs for line in log.read_text().splitlines()) / 1e6

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


class Clients:
    """Opens a new session for a write five times a second, whether or not earlier writes have ended."""

    def __init__(self, port, database):
        self.port, self.database, self.operations = port, database, []
        self.ended, self.threads, self.pending = threading.Event(), [], {}
        self.timer = threading.Thread(target=self._run)
        self.timer.start()

    def _run(self):
        while not self.ended.wait(0.2):
            self.threads.append(threading.Thread(target=self._write))
            self.threads[-1].start()

    def _write(self):
        watch.local.patience, begun, said = 30, time.monotonic(), None
        self.pending[begun] = True
        try:
            session = connect(self.port, self.database)
            watch.run(session, "insert into written values ('session', 0)")
            session.close()
        except psycopg2.Error as error:
            said = (str(error).strip() or repr(error)).splitlines()[0]
        self.operations.append(Operation(begun, time.monotonic(), said))
        del self.pending[begun]

    def is_served(self):
        """Whether no client has failed or waited for a second."""
        now = time.monotonic()
        failed = any(operation.said and operation.ended > now - 1 for operation in self.operations[-20:])
        return not failed and min(self.pending.copy(), default=now) > now - 1

    def stop(self):
        self.ended.set()
        for thread in [self.timer, *self.threads]:
            thread.join()

    def longest_gap(self):
        """The end and the length of the longest time in which no client was served."""
        times = sorted(operation.ended for operation in self.operations if not operation.said)
        return max(((later, later - earlier) for earlier, later in zip(times, times[1:])), key=lambda gap: gap[1])

    def failed(self):
        return [operation.said for operation in self.operations if operation.said]

    def refused(self):
        """The errors of the writes that a shutdown of PostgreSQL did not cut off."""
        return [said for said in self.failed() if "administrator command" not in said]


def connect(port, database):
    session = psycopg2.connect(
        host=watch.LB, port=port, user="postgres", dbname=database, sslmode="disable", gssencmode="disable"
    )
    session.autocommit = True
    return session


class Front(Walk):
    def __init__(self):
        super().__init__(patience=30)
        self.broken = []

    def check(self, true, what):
        if not true:
            self.broken.append(what)
            print(f"    BROKEN: {what}", flush=True)

    def prepare_site(self):
        """Prepares the operator's machine: the host names of the document, patronictl, PgBouncer."""
        self.cluster.run(
            "lb",
            f"echo {watch.LB} haproxy pgbouncer >> /etc/hosts\n"
            f"ln -s {os.environ['VENV']}/bin/patronictl /usr/local/bin/\n"
            "mkdir -p ~/.config/patroni\n"
            "echo '{scope: demo, etcd3: {hosts: etcd:2379, use_proxies: true}}' > ~/.config/patroni/patronictl.yaml",
        )
        self.cluster.sql(self.cluster.primary(), "create table written (client text, number int)")
        self.restart_pgbouncer(15)

    def restart_pgbouncer(self, retry):
        """Restarts PgBouncer, so that it forgets a failed login."""
        self.cluster.put("lb", "tests/walks/pgbouncer-in-front.ini", "/etc/pgbouncer/pgbouncer.ini")
        self.cluster.run(
            "lb", f"echo server_login_retry = {retry} >> /etc/pgbouncer/pgbouncer.ini; systemctl restart pgbouncer"
        )

    def start_haproxy(self, room):
        config = pathlib.Path("units/examples/haproxy.cfg").read_text()
        for taken, instead in () if room else ROOM:
            config, times = re.subn(taken, instead, config, flags=re.MULTILINE)
            assert times, taken
        with tempfile.NamedTemporaryFile("w", dir=os.environ["LAB"]) as file:
            file.write(config)
            file.flush()
            self.cluster.configure_haproxy(file.name)

    def wait_until_settled(self):
        """Waits until HAProxy shows only the primary UP for writes. Returns its name and that of a streaming
        standby."""
        end = time.monotonic() + 60
        while True:
            shown = self.shown([POOL])
            up = [node for (_, node), state in shown.items() if state == "UP"]
            if len(up) == 1 and self.cluster.is_primary(up[0]):
                streaming = "select count(*) from pg_stat_replication where state = 'streaming'"
                if self.cluster.sql(up[0], streaming).strip() == "2":
                    time.sleep(2)  # until Patroni has noticed as well
                    return up[0], next(node for node in watch.NODES if node != up[0])
            assert time.monotonic() < end, shown
            time.sleep(0.1)

    def run_script(self, script):
        """Runs the script on the operator's machine. Returns the exit status and the output."""
        done = subprocess.run(
            ["tests/lab/machine", "run", "lb", "bash", "-c", script],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )
        return done.returncode, done.stdout

    def count_rows(self, database):
        count = f"select count(*) from written where client = '{database}'"
        return int(self.cluster.sql(self.cluster.primary(), count))

    def switch_with_pause(self, what, candidate=None, status=0, kept_session=False):
        """Runs the script of the document while pgbench writes through both pools, and while a transaction of three
        seconds is open. With session pooling, pgbench's clients take a new session for each transaction.
        `kept_session`: another client has run a query and keeps its session."""
        primary, standby = self.wait_until_settled()
        before = {database: self.count_rows(database) for database in ("transaction", "session")}
        with Pgbench("transaction") as kept, Pgbench("session", "-C") as new:
            time.sleep(2)
            idle = connect(PGBOUNCER, "session") if kept_session else None
            if idle:
                watch.run(idle, "select 1")
            long = connect(PGBOUNCER, "transaction")
            watch.run(long, "begin; insert into written values ('long', 0)")
            commit = threading.Timer(3, self.commit, [long])
            commit.start()
            began = time.monotonic()
            done, said = self.run_script(script_for(candidate or standby))
            took = time.monotonic() - began
            commit.join()
            time.sleep(2)
            for bench in kept, new:
                bench.stop()
            if idle:
                idle.close()
        failed, count = kept.failed + new.failed, kept.done + new.done
        print(
            f"{what}: the script took {took:.1f} s; {failed} of {count} transactions failed; the longest took "
            f"{kept.longest:.1f} s with transaction pooling, {new.longest:.1f} s with session pooling",
            flush=True,
        )
        for error in (kept.errors + new.errors)[:5]:
            print(f"    {error}")
        self.check(done == status, f"exit status {done} instead of {status}:\n{said}")
        self.check(not failed, f"{failed} transactions failed")
        now = self.cluster.primary()
        self.check(now == (primary if status else standby), f"{now} is the primary")
        for bench in kept, new:
            rows = self.count_rows(bench.database) - before[bench.database]
            self.check(rows == bench.done, f"{rows} rows of {bench.done} transactions, {bench.database} pooling")
        self.check(self.committed is True, f"the long transaction: {self.committed}")
        long.close()
        again = self.run_script("psql -X -h pgbouncer -p 6432 -U postgres -d pgbouncer -Atc resume")
        self.check("not paused" in again[1], f"PgBouncer is still paused: {again}")

    def commit(self, session):
        watch.local.patience, self.committed = 30, None
        try:
            watch.run(session, "commit")
            self.committed = True
        except psycopg2.Error as error:
            self.committed = str(error)

    def switch_without_pause(self, room, hook, retry):
        """Runs a switchover without PAUSE. Returns how much later than HAProxy's own clients a client was served by
        PgBouncer again, how many of its new clients were refused, and how many of pgbench's clients failed."""
        self.start_haproxy(room)
        if hook:
            self.cluster.change_setting(f"postgresql.before_stop={HOOK}")
        primary, standby = self.wait_until_settled()
        self.restart_pgbouncer(retry)
        with Pgbench("transaction") as kept:
            clients = [Clients(HAPROXY, "postgres"), Clients(PGBOUNCER, "transaction"), Clients(PGBOUNCER, "session")]
            try:
                time.sleep(2)
                self.cluster.switchover(primary, standby)
                end = time.monotonic() + retry + 15
                time.sleep(2)
                while not all(client.is_served() for client in clients):
                    assert time.monotonic() < end, "clients still fail or wait"
                    time.sleep(0.2)
            finally:
                for client in clients:
                    client.stop()
            kept.stop()
        direct, *through = clients
        back, without = direct.longest_gap()
        later = [max(0, client.longest_gap()[0] - back) for client in through]
        print(
            f"{'waiting room' if room else 'no waiting room'}, {'hook' if hook else 'no hook'}, server_login_retry "
            f"{retry}: HAProxy's clients were without a primary for {without:.1f} s",
            flush=True,
        )
        for name, client, after in zip(("transaction", "session"), through, later):
            failed = client.failed()
            longest = max(operation.ended - operation.begun for operation in client.operations)
            print(
                f"    {name} pooling: {after:.1f} s longer; {len(failed)} of {len(client.operations)} new clients "
                f"failed, the longest took {longest:.1f} s; {max(failed, key=failed.count) if failed else 'no error'}"
            )
        print(f"    pgbench: {kept.failed} of {CLIENTS} clients ended with an error", flush=True)
        return max(later), sum(len(client.refused()) for client in through), kept.failed


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no pgbench is left running
    front = Front()
    front.prepare_site()
    for number in range(3):
        front.switch_with_pause(f"switchover {number + 1} with PAUSE")
    front.switch_with_pause("switchover to a node that is not there", candidate="pg9", status=1)
    front.switch_with_pause("a client that keeps its session, with session pooling", status=124, kept_session=True)
    front.start_haproxy(room=False)
    front.switch_with_pause("switchover with PAUSE, without the waiting room")
    print("without PAUSE:", flush=True)
    later, _, ended = front.switch_without_pause(room=False, hook=False, retry=15)
    front.check(ended, "pgbench reported no error, so its silence with PAUSE means nothing")
    front.check(later > 5, "server_login_retry made no difference")
    later, _, _ = front.switch_without_pause(room=False, hook=False, retry=1)
    front.check(later < 4, "a short server_login_retry did not help")
    front.switch_without_pause(room=True, hook=False, retry=15)
    front.switch_without_pause(room=True, hook=False, retry=1)
    later, refused, _ = front.switch_without_pause(room=True, hook=True, retry=15)
    front.check(later < 4 and not refused, "PgBouncer refused new clients, or served them much later than HAProxy")
    sys.exit(bool(front.broken))


main()
