"""What is watched of a site (tests/lab/cluster): the writes and reads of clients through each pool, what HAProxy
shows, and, at each node itself, whether PostgreSQL takes writes and what Patroni says of reads. Does not know what is
done to the site meanwhile.

Everything is kept as plain records with the time of the machine's clock in seconds."""

import http.client
import itertools
import select
import threading
import time
from collections import namedtuple

import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions

import stats_socket

NODES = {"pg1": "10.55.0.11", "pg2": "10.55.0.12", "pg3": "10.55.0.13"}
LB = "10.55.0.1"
READ_CHECK = "/replica?lag=16MB"

# What is sure of an operation: it is done, it is not, or nobody knows.
OK, FAIL, UNKNOWN = "ok", "fail", "unknown"
# outcome: written, read-only, or the error's first line. row: (client, number), what identifies it in the table. cut: it
# was to go through a session that was there before, and somebody else had ended that. session: which connection. seen:
# {client: the highest number there just before}, None without an answer. reached: when a new session was in PostgreSQL,
# by the server's clock, which is the same; None in a session that was there before
Write = namedtuple("Write", "pool row begun ended node outcome cut session done seen reached")
# keeps: whether its client keeps its session; seen: {client: the highest number there}, None without an answer
Read = namedtuple("Read", "pool begun ended node keeps session done seen")
# status: Patroni's answer to READ_CHECK
# what Patroni says of its node since then, and when it last said something else
Called = namedtuple("Called", "time node status before")
# shown: {(pool, node): UP, MAINT, DRAIN, NOLB or DOWN}
Look = namedtuple("Look", "time shown")
# recovery: pg_is_in_recovery(), None if there was no answer; before: when PostgreSQL was last asked and said something else
Truth = namedtuple("Truth", "time node recovery before", defaults=[0])

NODE = "'pg' || right(host(inet_server_addr()), 1)"
# without a primary key: what is there twice should be seen
TABLE = f"create table kept (client text, number int, node text default {NODE}); create index on kept (client, number)"
NEWEST = "coalesce((select max(number) from kept where client = %s), 0)"

local = threading.local()


def patience(connection):
    """Waits for PostgreSQL, but not for ever: what psycopg2 calls instead of blocking."""
    end = time.monotonic() + local.patience
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        wants = [connection.fileno()]
        reads = wants if state == psycopg2.extensions.POLL_READ else []
        writes = wants if state == psycopg2.extensions.POLL_WRITE else []
        if not any(select.select(reads, writes, [], max(0, end - time.monotonic()))):
            raise psycopg2.OperationalError("timed out")


psycopg2.extensions.set_wait_callback(patience)


def connect(host, port):
    connection = psycopg2.connect(
        host=host, port=port, user="postgres", dbname="postgres", sslmode="disable", gssencmode="disable"
    )
    connection.autocommit = True
    return connection


def run(connection, query):
    with connection.cursor() as cursor:
        cursor.execute(query)


def ask(connection, query, values=None):
    with connection.cursor() as cursor:
        cursor.execute(query, values)
        return cursor.fetchall()


def create_table(node):
    """Where the clients write and read."""
    local.patience = 10
    primary = connect(NODES[node], 5432)
    run(primary, TABLE)
    primary.close()


class Watch:
    """Runs from `start` to `stop`; the records only grow. `pools` for writes and `reads`: {name: HAProxy's port}. `second`:
    the admin socket of another HAProxy, whose first pool is looked at. `pairs`: how many clients there are of each kind,
    which write or read through a pool and keep their session or do not. `more`: ports for writes and for reads of pools
    that HAProxy is not asked about. `door`: the host or the folder of the socket by which a node's PostgreSQL is asked."""

    def __init__(self, admin_socket, pools, reads, second=None, pairs=1, more=({}, {}), door=NODES.get):
        self.admin_socket, self.pools, self.read_pools, self.second, self.door = admin_socket, pools, reads, second, door
        self.ports, self.read_ports = pools | more[0], reads | more[1]
        self.writes, self.reads, self.looks, self.truths, self.called, self.second_looks = [], [], [], [], [], []
        self.last_look, self.longest_between_looks = time.time(), 0
        self.ended, self.renewing = threading.Event(), threading.Event()
        self.broken, self.sessions = [], itertools.count()
        tasks = [(self._look, ())] + ([(self._look_at_second, ())] if second else [])
        tasks += [(task, (node,)) for task in (self._ask_the_node, self._ask_patroni) for node in NODES]
        for pair in range(pairs):
            tasks += [(self._read, (pool, session)) for pool in self.read_ports for session in (True, False)]
            tasks += [(self._write, (pool, session, pair)) for pool in self.ports for session in (True, False)]
        self.threads = [threading.Thread(target=self._guard, args=(task, args)) for task, args in tasks]

    def start(self):
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.ended.set()
        for thread in self.threads:
            thread.join()
        if self.broken:
            raise self.broken[0]

    def blind_for(self):
        """Seconds since the last look at HAProxy."""
        return time.time() - self.last_look

    def renew_refused(self):
        """Ends the sessions that are left on a standby: they would be refused in the next fault as well."""
        self.renewing.set()
        time.sleep(0.2)
        self.renewing.clear()

    def _guard(self, task, args):
        try:
            task(*args)
        except Exception as error:  # a watcher that died would leave a run that sees nothing
            self.broken.append(error)
            self.ended.set()

    def _every(self, seconds):
        due = time.monotonic()
        while not self.ended.wait(max(0, due - time.monotonic())):
            yield
            due = max(due + seconds, time.monotonic() - seconds)

    def _write(self, pool, keeps_session, pair=0):
        """A client: numbered rows, each its own transaction, in one session or in a new one each time."""
        local.patience = 3
        client = f"{pool}/{keeps_session}" + (f"/{pair}" if pair else "")
        connection, node, session, number = None, None, None, 0
        for _ in self._every(0.1):
            number += 1
            begun, kept, sent, done, seen, reached = time.time(), connection is not None, False, UNKNOWN, None, None
            try:
                if connection is None:
                    node, session = None, next(self.sessions)
                    connection = connect(LB, self.ports[pool])
                    node, reached = ask(connection, f"select {NODE}, extract(epoch from clock_timestamp())::float8")[0]
                sent = True
                insert = f"insert into kept values (%s, %s) returning {NEWEST}"
                seen = {client: ask(connection, insert, (client, number, client))[0][0]}
                outcome = "written"
                # PostgreSQL says that it is done, with a warning that no standby may have it
                if not any("synchronous replication" in notice for notice in connection.notices):
                    done = OK
            except psycopg2.Error as error:
                read_only = error.pgcode == psycopg2.errorcodes.READ_ONLY_SQL_TRANSACTION
                outcome = "read-only" if read_only else (str(error).strip() or repr(error)).splitlines()[0]
                # an ERROR rolls back; a FATAL one may come after the commit, while a standby is waited for
                if not sent or error.diag.severity == "ERROR":
                    done = FAIL
            cut = kept and bool(connection.closed) and outcome != "timed out"
            self.writes.append(
                Write(pool, (client, number), begun, time.time(), node, outcome, cut, session, done, seen, reached)
            )
            refused = outcome == "read-only" and self.renewing.is_set()
            if connection and (connection.closed or not keeps_session or refused or outcome == "timed out"):
                connection.close()
                connection = None

    def _read(self, pool, keeps_session):
        """A client that reads the newest number of each one that writes, in one session or in a new one each time."""
        local.patience = 3
        writers = [f"{name}/{keeps}" for name in self.ports for keeps in (True, False)]
        query = f"select {NODE}, {', '.join([NEWEST] * len(writers))}"
        connection, node, session = None, None, None
        for _ in self._every(0.1):
            begun, done, seen = time.time(), FAIL, None  # a read that got no answer has done nothing
            try:
                if connection is None:
                    node, session = None, next(self.sessions)
                    connection = connect(LB, self.read_ports[pool])
                node, *numbers = ask(connection, query, writers)[0]
                done, seen = OK, dict(zip(writers, numbers))
            except psycopg2.Error:
                pass
            self.reads.append(Read(pool, begun, time.time(), node, keeps_session, session, done, seen))
            if connection and (done == FAIL or not keeps_session):
                connection.close()
                connection = None

    def _ask_patroni(self, node):
        """What it answers; silence is no answer. One question at a time, and patiently: Patroni's queue is short."""
        last, before = None, 0
        for _ in self._every(0.2):
            patroni = http.client.HTTPConnection(NODES[node], 8008, timeout=3)
            try:
                patroni.request("OPTIONS", READ_CHECK)
                status = patroni.getresponse().status
            except (OSError, http.client.HTTPException):
                continue
            finally:
                patroni.close()
            if status != last:
                self.called.append(Called(time.time(), node, status, before))
                last = status
            before = time.time()

    def _ask_the_node(self, node):
        local.patience = 0.3
        connection, last, before = None, (), 0
        for _ in self._every(0.02):
            begun = time.time()
            try:
                connection = connection or connect(self.door(node), 5432)
                recovery = ask(connection, "select pg_is_in_recovery()")[0][0]
            except psycopg2.Error:
                connection, recovery = None, None
            if recovery != last:
                self.truths.append(Truth(time.time(), node, recovery, before))
                last = recovery
            before = begun

    def _look(self):
        last, self.last_look = None, time.time()
        for _ in self._every(0.02):
            try:
                shown = look(self.admin_socket, [*self.pools, *self.read_pools])
            except OSError:  # a reload puts a new socket into its place
                continue
            now = time.time()
            self.longest_between_looks = max(self.longest_between_looks, now - self.last_look)
            self.last_look = now
            if shown != last:
                self.looks.append(Look(now, shown))
                last = shown


    def _look_at_second(self):
        last, began = None, time.time()
        for _ in self._every(0.05):
            try:
                shown = look(self.second, [*self.pools][:1])
            except OSError:
                # it has just been started
                if self.second_looks or time.time() > began + 20:
                    raise
                continue
            if shown != last:
                self.second_looks.append(Look(time.time(), shown))
                last = shown


def look(admin_socket, pools):
    """What HAProxy shows now, of these pools. A server is known by its address, whatever its name."""
    nodes = {address: node for node, address in NODES.items()}
    rows = [(pool, row) for (pool, _), row in stats_socket.servers(admin_socket).items() if pool in pools and row[4] in nodes]
    shown = {(pool, nodes[row[4]]): stats_socket.state(int(row[5]), int(row[6])) for pool, row in rows}
    if len(shown) != len(pools) * len(NODES):
        raise OSError(f"an incomplete answer from HAProxy: {shown}")
    return shown
