"""Watches a site (tests/lab/cluster): writes and reads through each pool as clients do, records HAProxy's states, asks
each PostgreSQL whether it takes writes, and asks each Patroni its health check for reads. Does not know what is done to
the site meanwhile.

All records are plain tuples. Their times are seconds of the host's clock."""

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

# What the database did: the operation happened, did not happen, or may have happened.
OK, FAIL, UNKNOWN = "ok", "fail", "unknown"
# outcome: "written", "read-only", or the error's first line
# row: (client, number), which identifies the row in the table
# cut: the write used a session that was already open, and the other side ended that session
# session: the number of the connection
# seen: {client: its highest number in the table just before the write}, None without an answer
# reached: when a new session began in PostgreSQL, by the same clock; None if the session was already open
Write = namedtuple("Write", "pool row begun ended node outcome cut session done seen reached")
# keeps: whether the client keeps its session; seen: {client: its highest number in the table}, None without an answer
Read = namedtuple("Read", "pool begun ended node keeps session done seen")
# status: Patroni's answer to READ_CHECK from `time` on; before: when Patroni last gave another answer
Called = namedtuple("Called", "time node status before")
# shown: {(pool, node): UP, MAINT, DRAIN, NOLB or DOWN}
Look = namedtuple("Look", "time shown")
# recovery: pg_is_in_recovery(), None without an answer; before: when PostgreSQL was last asked and gave another answer
Truth = namedtuple("Truth", "time node recovery before", defaults=[0])

NODE = "'pg' || right(host(inet_server_addr()), 1)"
# no primary key: the tests must see a row that was written twice
TABLE = f"create table kept (client text, number int, node text default {NODE}); create index on kept (client, number)"
NEWEST = "coalesce((select max(number) from kept where client = %s), 0)"

local = threading.local()


def patience(connection):
    """Waits for PostgreSQL for a limited time. psycopg2 calls this instead of blocking."""
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
    """Creates the table that the clients write and read."""
    local.patience = 10
    primary = connect(NODES[node], 5432)
    run(primary, TABLE)
    primary.close()


class Watch:
    """Watches from `start` to `stop`.

    pools, reads   {name: HAProxy's port} of the pools for writes and for reads
    second         the admin socket of another HAProxy, of which only the first pool is watched
    pairs          the number of clients of each kind: a client writes or reads, and keeps its session or does not
    more           ports for writes and for reads of further pools, whose states are not recorded
    without        the pools that have no clients
    host_of        gives the host, or the folder of the socket, through which a node's PostgreSQL is asked"""

    def __init__(self, admin_socket, pools, reads, second=None, pairs=1, more=({}, {}), without=(), host_of=NODES.get):
        self.admin_socket, self.pools, self.read_pools, self.second, self.host_of = admin_socket, pools, reads, second, host_of
        with_clients = lambda ports: {pool: port for pool, port in ports.items() if pool not in without}
        self.ports, self.read_ports = with_clients(pools | more[0]), with_clients(reads | more[1])
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
        """Ends the writers' sessions on a standby, which would refuse their writes in the next
        fault."""
        self.renewing.set()
        time.sleep(0.2)
        self.renewing.clear()

    def _guard(self, task, args):
        try:
            task(*args)
        except Exception as error:  # a run must not go on if one of these threads has ended
            self.broken.append(error)
            self.ended.set()

    def _every(self, seconds):
        due = time.monotonic()
        while not self.ended.wait(max(0, due - time.monotonic())):
            yield
            due = max(due + seconds, time.monotonic() - seconds)

    def _write(self, pool, keeps_session, pair=0):
        """Writes numbered rows as a client does, each in its own transaction, in one session or in a new one each
        time."""
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
                # PostgreSQL reports success, with a warning that the standbys may not have the row.
                if not any("synchronous replication" in notice for notice in connection.notices):
                    done = OK
            except psycopg2.Error as error:
                read_only = error.pgcode == psycopg2.errorcodes.READ_ONLY_SQL_TRANSACTION
                outcome = "read-only" if read_only else (str(error).strip() or repr(error)).splitlines()[0]
                # An ERROR rolls back. A FATAL may come after the commit, while PostgreSQL waits for a standby.
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
        """Reads the newest number of each writer as a client does, in one session or in a new one each time."""
        local.patience = 3
        writers = [f"{name}/{keeps}" for name in self.ports for keeps in (True, False)]
        query = f"select {NODE}, {', '.join([NEWEST] * len(writers))}"
        connection, node, session = None, None, None
        for _ in self._every(0.1):
            begun, done, seen = time.time(), FAIL, None  # a read without an answer has no effect
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
        """Records each change of Patroni's answer. Sends one request at a time and waits for its answer, because
        Patroni's queue is short. Silence does not count as an answer."""
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
                connection = connection or connect(self.host_of(node), 5432)
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
            except OSError:  # a reload replaces the socket
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
                # The second HAProxy has just been started.
                if self.second_looks or time.time() > began + 20:
                    raise
                continue
            if shown != last:
                self.second_looks.append(Look(time.time(), shown))
                last = shown


def look(admin_socket, pools):
    """The states that HAProxy shows for these pools: {(pool, node): state}. A server's address tells its node."""
    nodes = {address: node for node, address in NODES.items()}
    rows = [(pool, row) for (pool, _), row in stats_socket.servers(admin_socket).items() if pool in pools and row[4] in nodes]
    shown = {(pool, nodes[row[4]]): stats_socket.state(int(row[5]), int(row[6])) for pool, row in rows}
    if len(shown) != len(pools) * len(NODES):
        raise OSError(f"an incomplete answer from HAProxy: {shown}")
    return shown
