"""Judges a history: compares the results that clients got with the rows in the database. Does no input or output.

A write is ok, failed or unknown. A failed write was refused or never sent. For an unknown write the connection broke or
timed out after the write was sent, or PostgreSQL gave up waiting for a synchronous standby. The row of an unknown write
may be in the database or not.

* lost: an ok write without a row.
* phantom: a row whose client got an error for the write, or never sent it, or a row that is there twice. Clients
  number their writes, so every number between two sent numbers was sent. Rows of a client that sent nothing
  meanwhile are not judged.
* split: a write that a node took after another node was promoted, or a row from another node than the one that took the
  write.
* stale: an operation that saw less than its own session had seen or written before. A session is one connection: the
  next connection may lead to a replica that lags, and may see less. A read sees the highest number of each client. A
  write sees the highest number of its own client, just before itself."""

from collections import Counter, namedtuple

from watch import FAIL, OK, UNKNOWN

BLINK = 0.1

Findings = namedtuple("Findings", "lost phantom split stale unknown")


def find(writes, reads, rows, promotions=()):
    """All findings of each kind: writes, rows or reads. rows: [(client, number, the node that took the write)],
    promotions: [(time, node)]."""
    return Findings(
        lost(writes, rows),
        phantoms(writes, rows),
        splits(writes, rows, promotions),
        stale(writes, reads),
        [write for write in writes if write.done == UNKNOWN],
    )


def lost(writes, rows):
    kept = {row[:2] for row in rows}
    return [write for write in writes if write.done == OK and write.row not in kept]


def phantoms(writes, rows):
    done, numbers = {write.row: write.done for write in writes}, {}
    for client, number in done:
        first, last = numbers.get(client, (number, number))
        numbers[client] = min(first, number), max(last, number)
    known = [row[:2] for row in rows if row[0] in numbers and numbers[row[0]][0] <= row[1] <= numbers[row[0]][1]]
    return [row for row, times in Counter(known).items() if times > 1 or done.get(row, FAIL) == FAIL]


def splits(writes, rows, promotions):
    took = {row[:2]: row[2] for row in rows}
    return [
        write
        for write in writes
        if write.done == OK and (superseded(write, promotions) or took.get(write.row, write.node) != write.node)
    ]


def superseded(write, promotions):
    """Whether another node was promoted before the write was sent, and the write's own node was not being promoted."""
    last = [who for when, who in promotions if when <= write.begun]
    soon = [who for when, who in promotions if write.begun < when <= write.ended + BLINK]
    return bool(last) and last[-1] != write.node and write.node not in soon


def stale(writes, reads):
    wrote = [(write, dict([write.row]) if write.done == OK else {}) for write in writes]
    found, known = [], {}  # known: {session: {client: number}}
    for record, own in sorted(wrote + [(read, {}) for read in reads], key=lambda told: told[0].begun):
        seen, before = record.seen or {}, known.setdefault(record.session, {})
        if any(number < before.get(client, 0) for client, number in seen.items()):
            found.append(record)
        for client, number in (*seen.items(), *own.items()):
            before[client] = max(number, before.get(client, 0))
    return found
