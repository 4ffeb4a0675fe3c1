"""What is wrong with a history: what clients were told, against what is in the database at the end. Pure; does no
input or output.

A write is ok, or it failed for sure (it was refused, or never sent), or it is unknown: the connection broke or timed out
after it was sent, or PostgreSQL gave up waiting for a synchronous standby. Unknown ones may be there or not.

* lost: was ok, and is not there;
* phantom: is there, though its client was told that it failed, or never sent it, or sent it once and it is there twice.
  Clients number their writes, so a number between two that were sent was sent, too. Rows of a client that sent nothing
  meanwhile are not judged;
* split: was taken by a node after another had been promoted, or is there from another node than the one that took it;
* stale: saw less than its own session had seen or written. A session is one connection: the next one may be led to a
  replica that is behind, and may see less. What a session saw is the highest number of each client; a write sees that of
  its own client, just before itself."""

from collections import Counter, namedtuple

from watch import FAIL, OK, UNKNOWN

BLINK = 0.1

Findings = namedtuple("Findings", "lost phantom split stale unknown")


def find(writes, reads, rows, promotions=()):
    """All of each kind: writes, rows or reads. rows: [(client, number, the node that took it)], promotions:
    [(time, node)]."""
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
    """Whether another node had been promoted before it was even sent, and its own was not being promoted."""
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
