"""Clients that measure what an application notices in each pool: late operations, failed operations, and the longest
operation.

An operation writes one row. There are three kinds of clients:

    session       a new session for each write
    transaction   a new session for each transaction of 300 ms
    kept          a session of a small pool, tested before it is used: if the test fails or takes longer than TESTED, a
                  new session takes its place within the same operation. A session that brought an error is closed

The clients of the pool `multi-host` connect without HAProxy: libpq tries the three nodes in order, with
target_session_attrs=read-write and connect_timeout=CONNECTED. Clients of the other pools wait for HAProxy up to
PATIENCE.

Operations are due on a schedule, whether or not earlier ones have ended. No client retries an operation. All times are
measured from the moment when an operation was due:

    late            the operation succeeded after LATE
    failed          the operation ended with an error, or succeeded after FAILED; the client gives up after PATIENCE
    cut in flight   not counted as failed: a kept session had just passed its test and ended during the statement, and
                    the client noticed within LATE. No pool can prevent this

The clients run in a process of their own, so that they do not disturb the watch. The process prints a line for each
operation."""

import asyncio
import collections
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from random import Random

import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions

from pools import MULTI_HOST, POOLS
from watch import FAIL, LB, NODES, OK, UNKNOWN, Write

# operations a second
RATES = {"session": 5, "transaction": 1, "kept": 5}
SESSION, TRANSACTION, KEPT = RATES
LATE, FAILED, PATIENCE, TESTED, CONNECTED = 1, 5, 15, 1, 2
KEPT_SESSIONS = 5
INSERT = "insert into kept values (%s, %s) returning node, extract(epoch from clock_timestamp())::float8"

# begun: when the client began the operation; write.begun: when it sent the statement
Operation = namedtuple("Operation", "kind due begun in_flight write")


def lasted(operation):
    return operation.write.ended - operation.due


def failed(operation):
    return not operation.in_flight and (operation.write.outcome != "written" or lasted(operation) > FAILED)


def late(operation):
    return not operation.in_flight and not failed(operation) and lasted(operation) > LATE


class Clients:
    """The clients' process, which runs from `start` to `stop`, with clients in these pools. `operations` are those that
    have ended."""

    def __init__(self, seed, pools):
        self.operations, self.arguments, self.ended = [], [str(seed), *pools], threading.Condition()
        self.all_before = 0  # all operations that were due before this time have ended

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *self.arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            all_before, operations = json.loads(line)
            for *operation, (pool, row, *write) in operations:
                self.operations.append(Operation(*operation, Write(pool, tuple(row), *write)))
            with self.ended:
                self.all_before = all_before
                self.ended.notify()

    def wait(self, until):
        """Waits until all operations that were due before this time have ended."""
        with self.ended:
            if not self.ended.wait_for(lambda: self.all_before >= until, PATIENCE + 15):
                raise RuntimeError("the clients' process has ended")

    def stop(self):
        """Starts no more operations, and waits for those in progress."""
        self.process.stdin.close()
        self.reader.join()
        if self.process.wait():
            raise RuntimeError("the clients' process has ended")


async def wait_for_libpq(connection):
    """Waits until libpq is done."""
    loop = asyncio.get_running_loop()
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        reads, awaited, fd = state == psycopg2.extensions.POLL_READ, loop.create_future(), connection.fileno()
        (loop.add_reader if reads else loop.add_writer)(fd, lambda: awaited.done() or awaited.set_result(None))
        try:
            await awaited
        finally:
            (loop.remove_reader if reads else loop.remove_writer)(fd)


async def connect(host, port, **more):
    connection = psycopg2.connect(
        host=host, port=port, async_=1, user="postgres", dbname="postgres", sslmode="disable", gssencmode="disable", **more
    )
    try:
        await wait_for_libpq(connection)
    except BaseException:
        connection.close()
        raise
    return connection


async def connect_to(pool):
    if pool != MULTI_HOST:
        return await connect(LB, POOLS[pool])
    for host in NODES.values():  # as libpq does; but libpq ignores connect_timeout when it does not block
        try:
            return await asyncio.wait_for(connect(host, 5432, target_session_attrs="read-write"), CONNECTED)
        except (psycopg2.Error, asyncio.TimeoutError) as failed:
            error = failed
    raise psycopg2.OperationalError("timed out") if isinstance(error, asyncio.TimeoutError) else error


async def ask(connection, query, values=()):
    with connection.cursor() as cursor:
        cursor.execute(query, values)
        await wait_for_libpq(connection)
        return cursor.fetchall() if cursor.description else None


class Client:
    """All clients of one kind in one pool."""

    names = itertools.count()

    def __init__(self, pool, kind, seed, done):
        self.pool, self.kind, self.done, self.chance = pool, kind, done, Random(f"{seed} {pool} {kind}")
        self.idle, self.sessions, self.under_way, self.next_due = collections.deque(), 0, set(), time.time()

    def all_before(self):
        return min([self.next_due, *self.under_way])

    async def run_schedule(self, stopped):
        began = time.time()
        for number in itertools.count(1):
            self.next_due = due = began + (number + self.chance.uniform(0, 0.5)) / RATES[self.kind]
            await asyncio.wait([stopped], timeout=due - time.time())
            if stopped.done():
                self.next_due = float("inf")
                return
            self.under_way.add(due)
            asyncio.ensure_future(self.run_operation(number, due))

    async def run_operation(self, number, due):
        attempt = Attempt(self, (f"{self.pool}/{self.kind}", number), time.time())
        try:
            await asyncio.wait_for(attempt.make(), due + PATIENCE - time.time())
            attempt.outcome = "written"
        except asyncio.TimeoutError:
            attempt.outcome = "timed out"
        except psycopg2.Error as error:
            attempt.fail(error)
        self.done(attempt.as_operation(due))
        self.under_way.remove(due)

    async def get_session(self, attempt):
        """Returns (connection, name) of a kept session that passes the test, or of a new one."""
        if self.idle and self.sessions >= KEPT_SESSIONS:
            connection, name = self.idle.popleft()
            try:
                await asyncio.wait_for(ask(connection, "select 1"), TESTED)
                attempt.tested = True
                return connection, name
            except (psycopg2.Error, asyncio.TimeoutError) as error:
                attempt.cut = isinstance(error, psycopg2.Error)
                self.close(connection)
            except BaseException:
                self.close(connection)
                raise
        connection = await connect_to(self.pool)
        self.sessions += 1
        return connection, f"{self.pool} {next(self.names)}"

    def keep(self, connection, name):
        if self.kind == KEPT and self.sessions <= KEPT_SESSIONS:
            self.idle.append((connection, name))
        else:
            self.close(connection)

    def close(self, connection):
        self.sessions -= 1
        connection.close()


class Attempt:
    """One operation in progress, and what the client knows of it."""

    tested = cut = in_flight = False
    sent = node = reached = session = None
    outcome, done = "", FAIL

    def __init__(self, client, row, begun):
        self.client, self.row, self.begun = client, row, begun

    async def make(self):
        connection, self.session = await self.client.get_session(self)
        try:
            await (self.transaction if self.client.kind == TRANSACTION else self.write)(connection)
        except BaseException as error:
            ended = isinstance(error, psycopg2.Error) and (
                bool(connection.closed) or error.pgcode == psycopg2.errorcodes.ADMIN_SHUTDOWN
            )
            self.in_flight = self.tested and ended
            self.cut = self.cut or self.in_flight
            self.client.close(connection)
            raise
        # PostgreSQL reports success, with a warning that the standbys may not have the row.
        self.done = UNKNOWN if any("synchronous replication" in notice for notice in connection.notices) else OK
        self.client.keep(connection, self.session)

    async def write(self, connection):
        self.sent, self.done = time.time(), UNKNOWN
        (self.node, reached), = await ask(connection, INSERT, self.row)
        self.reached = None if self.tested else reached

    async def transaction(self, connection):
        await ask(connection, "begin")
        self.sent = time.time()
        (self.node, self.reached), = await ask(connection, INSERT, self.row)
        await ask(connection, "select pg_sleep(0.3)")
        self.done = UNKNOWN
        await ask(connection, "commit")

    def fail(self, error):
        read_only = error.pgcode == psycopg2.errorcodes.READ_ONLY_SQL_TRANSACTION
        self.outcome = "read-only" if read_only else (str(error).strip() or repr(error)).splitlines()[0]
        # An ERROR rolls back. A FATAL may come after the commit, while PostgreSQL waits for a standby.
        if error.diag.severity == "ERROR":
            self.done = FAIL

    def as_operation(self, due):
        ended, sent = time.time(), self.sent or self.begun
        in_flight = self.in_flight and ended - sent <= LATE
        known = self.node, self.outcome, self.cut, self.session, self.done, None, self.reached
        write = Write(self.client.pool, self.row, sent, ended, *known)
        return Operation(self.client.kind, due, self.begun, in_flight, write)


async def main(seed, pools):
    told, loop = [], asyncio.get_running_loop()
    stopped = loop.create_future()
    stopped.add_done_callback(lambda _: loop.remove_reader(0))
    loop.add_reader(0, lambda: stopped.done() or stopped.set_result(None))  # nothing comes on stdin but its end
    clients = [Client(pool, kind, seed, told.append) for pool in pools for kind in RATES]
    for client in clients:
        asyncio.ensure_future(client.run_schedule(stopped))
    while (before := min(client.all_before() for client in clients)) < float("inf"):
        print(json.dumps([before, told]), flush=True)
        told.clear()
        await asyncio.sleep(0.1)
    print(json.dumps([before, told]), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # real clients run on other machines, which a busy HAProxy does not slow down
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
