"""Computes the figures, the tables and the broken promises from the watched records. Does no input or output.

`broken_promises` checks what the agent's pool promises:

* A server that does not take writes is UP for no longer than `bound`: one agent-inter and one --timeout. A grace period
  adds its own length and one more --timeout: a check measures the grace period when it begins, and only the first check
  after its end answers DOWN. Both checks may wait for --timeout. If a grace period makes this longer, it is at most
  half as long as in the pool with Patroni's template, in the median of three or more runs.
* A write that is refused as read-only was sent before HAProxy could have known. Its node was shown UP, except in the
  blink between two looks, and had stopped taking writes less than `bound` before. With a grace period this test is
  weaker than it could be: it does not check whether a grace period was running for this server.
* No node takes a write through the pool after another node was promoted.
* No planned change loses a write. Patroni alone is responsible for other losses, which are only counted. With
  synchronous replication no fault may lose a write.
* The table has no row of a failed write, and no session sees less than it saw or wrote before (see history.py).
* Two servers are never UP at once.
* Two HAProxies, which ask at different times and over different paths, may have different servers UP. This lasts no
  longer than one of them may have a server UP that does not take writes.
* An old primary that its own Patroni demotes takes no writes once another node is promoted. The hook, and anything else
  that waits, delays the stop by no more than the remaining time of the lock.
* A node that an operator holds gets no new session that writes.
* A standby whose agent is silent takes writes as soon as it is promoted, even while its agent stays silent.
* No planned change shows DOWN. Any other fault leaves only the broken node DOWN, unless the fault affects other nodes
  as well.
* A fault that ends within the grace period shows no DOWN and cuts no session. The period begins with the last good
  answer, up to one agent-inter before the fault, so the fault must be that much shorter. The fault must also be shorter
  than HAProxy's own check needs to mark a server DOWN: three failures two seconds apart.
* Once Patroni's health check for reads has failed on a node for longer than `read_bound`, the node serves no read. Its
  agent is asked every two seconds, and may wait for --timeout.
* In a `seamless` change no operation ends with an error, and none takes more than WAITS longer than no node took writes:
  how long Patroni needs to promote is not ours. Of the kept sessions one statement in 10,000 may be cut in flight. In
  any other fault that is not `costly`, the median of failed operations in three or more runs is not above that of
  Patroni's template nor of HAProxy alone.
* Once the site has recovered, writes and reads succeed.

While a node's agent is silent, for instance on a paused machine, only HAProxy's own check remains: two seconds between
two failures, and up to two seconds for each of them."""

import math
from collections import Counter, namedtuple
from statistics import median

import clients
import history
from history import BLINK
from pools import MULTI_HOST, OFFICIAL, OURS, POOLS, READS, ROLE_ONLY, ROUTES, SILENCE, WITHOUT_AGENT
from watch import NODES, OK

AGENT_INTER, READ_INTER, TIMEOUT = 0.5, 2, 1.5
# What the pool may add to the time without a primary: the drain before the stop, which the hook bounds at 2 s, and one
# agent-inter before it and after the promotion.
WAITS = 2 + 2 * AGENT_INTER
# HAProxy's own check: the time from the first failure to the third, and the maximum until HAProxy shows DOWN
FALL, LONGEST_FALL = 4, 8

Figures = namedtuple(
    "Figures",
    "refused late split lost phantom stale unknown cut two_up down most_down false_up first_write pause alerts to_held "
    "late_read read_pause apart without_primary alive due delayed failed failed_by_kind errors in_flight longest kept gap",
)
# The columns of the table.
COLUMNS = {
    "pause": "longest without a write, s",
    "first_write": "promotion to first write, s",
    "false_up": "UP without taking writes, s",
    "two_up": "two UP, s",
    "apart": "two HAProxies apart, s",
    "down": "DOWN shown, s x servers",
    "refused": "refused as read-only",
    "split": "taken by two primaries",
    "lost": "lost",
    "cut": "sessions cut",
    "alerts": "alerts",
    "late_read": "read after Patroni called the node unfit, s",
    "read_pause": "longest without a read, s",
    "due": "operations due",
    "delayed": "late, over 1 s",
    "failed": "failed, or over 5 s",
    "in_flight": "cut in flight",
    "longest": "longest operation, s",
}
# Figures that do not exist without HAProxy, or without clients that try continuously.
SHOWN_BY_HAPROXY = "refused late false_up two_up down most_down alerts to_held".split()

RACE = {
    OFFICIAL: "httpchk",
    ROLE_ONLY: "role only",
    WITHOUT_AGENT: "HAProxy alone",
    OURS: "this agent",
    MULTI_HOST: "multi-host",
}


def bound(grace):
    """The maximum time for which a server that takes no writes may be UP, if the node's agent answers."""
    return AGENT_INTER + TIMEOUT + BLINK + (grace + TIMEOUT if grace else 0)


def read_bound(silent, grace=0):
    """The maximum time for which a node may get reads after Patroni's health check for reads failed: until HAProxy has
    asked again or, if Patroni does not answer by then, until the grace period is over."""
    return (LONGEST_FALL if silent else READ_INTER + TIMEOUT + (grace + TIMEOUT if grace else 0)) + BLINK


def writers(pool):
    """The names of the clients that write through that pool."""
    names = [*clients.RATES, True, False] if pool in POOLS else clients.RATES
    return {f"{pool}/{name}" for name in names}


def longest_pause(began, ended, times):
    times = sorted([began, *times, ended])
    return max(later - earlier for earlier, later in zip(times, times[1:]))


def at(records, time, key):
    """The record that was in force at that time."""
    held = [record for record in records if record.time <= time and key(record)]
    return held[-1] if held else None


def promotions(truths):
    """The first primary, and each promotion after it: [(time, node)]."""
    recovery, found = {}, []
    for truth in truths:
        if truth.recovery is None:
            continue
        was_standby = recovery.get(truth.node, not found)
        recovery[truth.node] = truth.recovery
        if was_standby and not truth.recovery:
            found.append((truth.time, truth.node))
    return found


class Run:
    """The records of one fault, and the last records before it."""

    def __init__(self, watch, began, ended, rows, alerts, grace, held):
        self.began, self.ended, self.rows, self.alerts, self.grace = began, ended, rows, alerts, grace
        self.held = held
        self.operations = [operation for operation in watch.operations if began <= operation.due < ended]
        self.writes = [write for write in watch.writes if began <= write.ended < ended]
        # lost rows, of the watch and of the clients
        written = self.writes + [operation.write for operation in self.operations]
        self.lost = {write.row for write in history.lost(written, rows)}
        self.looks = self._window(watch.looks, lambda look: "all")
        self.second_looks = self._window(watch.second_looks, lambda look: "all")
        self.truths = self._window(watch.truths, lambda truth: truth.node)
        self.reads = [read for read in watch.reads if began <= read.ended < ended]
        self.called = self._window(watch.called, lambda called: called.node)
        self.promotions = promotions(self.truths)

    def _window(self, records, key):
        """The records of the fault. The last earlier record of each key counts as one from the beginning."""
        before = {key(record): record for record in records if record.time < self.began}
        first = [record._replace(time=self.began) for record in before.values()]
        return first + [record for record in records if self.began <= record.time < self.ended]

    def takes_writes(self, node, time):
        """Whether PostgreSQL is up, is no standby, and no other node has been promoted since."""
        truth = at(self.truths, time, lambda truth: truth.node == node)
        last = [who for when, who in self.promotions if when <= time]
        return truth is not None and truth.recovery is False and last[-1:] == [node]

    def stopped_taking_writes(self, node, time):
        """When the node was last known to take writes before that time."""
        if self.takes_writes(node, time):
            return time
        changes = [truth.time for truth in self.truths] + [when for when, _ in self.promotions]
        last = [change for change in changes if change <= time and self.takes_writes(node, change - 1e-6)]
        return max(last, default=-math.inf)

    def without_primary(self):
        """How long no node took writes before the last promotion; None without a promotion. The value is negative if
        the old primary still took writes: the hook, or something else, then delayed the stop for too long."""
        if len(self.promotions) < 2:
            return None
        promoted, node = self.promotions[-1]
        ends = []
        for other in set(NODES) - {node}:
            told = [truth for truth in self.truths if truth.node == other]
            changes = [truth.time for truth in told[1:]] + [self.ended]
            ends += [end for truth, end in zip(told, changes) if truth.recovery is False and truth.time <= promoted]
        return promoted - max(ends, default=self.began)

    def unfit_for(self, read):
        """For how long Patroni's health check for reads had failed on the node when a read was sent to it."""
        said = [called for called in self.called if called.node == read.node and called.time <= read.begun]
        back = [called for called in self.called if called.node == read.node and called.time > read.begun][:1]
        if any(called.status == 200 and called.before <= read.begun <= called.before + 1 for called in back):
            return 0  # HAProxy may have asked before the watch did
        out = 0
        for called in reversed(said):
            if called.status == 200:
                break
            out = read.begun - called.time
        return out

    def to_held(self, write):
        """Whether the write's session began on a node that an operator held and whose hold HAProxy knew of. The
        session's start in PostgreSQL counts, because a client may have waited in HAProxy until the hold was over."""
        node, began, ended = self.held or (None, 0, 0)
        return write.node == node and write.reached is not None and began + bound(0) <= write.reached < ended

    def spans(self):
        """HAProxy's states as (begin, end, shown). A span also ends where a node begins or stops taking writes."""
        times = sorted({r.time for r in self.looks} | {r.time for r in self.truths} | {self.ended})
        for begin, end in zip(times, times[1:]):
            look = at(self.looks, begin, lambda look: True)
            if look:
                yield begin, end, look.shown

    def longest_apart(self):
        """The longest time for which both HAProxies had servers of the agent's pool UP, but none in common."""
        up = lambda look: {node for node in NODES if look and look.shown.get((OURS, node)) == "UP"}
        everything = lambda look: True
        times = sorted({look.time for look in [*self.looks, *self.second_looks]} | {self.ended})
        longest = lasts = 0
        for begin, end in zip(times, times[1:]):
            first, second = (up(at(looks, begin, everything)) for looks in (self.looks, self.second_looks))
            lasts = lasts + end - begin if first and second and not first & second else 0
            longest = max(longest, lasts)
        return longest

    def figures(self, pool):
        spans = list(self.spans())
        up = lambda shown: [node for node in NODES if shown.get((pool, node)) == "UP"]
        down = lambda shown: [shown.get((pool, node)) for node in NODES].count("DOWN")
        refused = [write for write in self.writes if write.pool == pool and write.outcome == "read-only"]
        operations = [operation for operation in self.operations if operation.write.pool == pool]
        writes = [write for write in self.writes if write.pool == pool] + [each.write for each in operations]
        written = [write for write in writes if write.outcome == "written" and write.ended < self.ended]
        switched = self.promotions[-1] if len(self.promotions) > 1 else None
        first = [w.ended - switched[0] for w in written if w.node == switched[1] and w.ended > switched[0]] if switched else []
        reads = [read for read in self.reads if read.pool == READS.get(pool)]
        found = history.find(writes, reads, self.rows, self.promotions)
        # A kept session may stay on its node.
        reads = [read for read in reads if read.done == OK and not read.keeps]
        figures = Figures(
            refused=len(refused),
            late=sum(self.late(pool, write) for write in refused),
            split=len(found.split),
            lost=len(found.lost),
            phantom=len(found.phantom),
            stale=len(found.stale),
            unknown=len(found.unknown),
            cut=sum(write.cut for write in writes),
            two_up=sum(end - begin for begin, end, shown in spans if len(up(shown)) > 1),
            down=sum((end - begin) * down(shown) for begin, end, shown in spans),
            most_down=max(down(shown) for _, _, shown in spans),
            false_up=sum(
                (end - begin) * sum(not self.takes_writes(node, begin) for node in up(shown))
                for begin, end, shown in spans
            ),
            first_write=min(first, default=None),
            pause=longest_pause(self.began, self.ended, [write.ended for write in written]),
            alerts=self.alerts.get(pool, 0),
            to_held=sum(map(self.to_held, written)),
            late_read=max(map(self.unfit_for, reads), default=0) if pool in READS else None,
            read_pause=longest_pause(self.began, self.ended, [r.ended for r in reads]) if pool in READS else None,
            apart=self.longest_apart() if pool == OURS else None,
            without_primary=self.without_primary(),
            # each client has written or read recently
            alive={w.row[0] for w in written if w.ended > self.ended - 1.5} >= writers(pool)
            and (pool not in READS or any(read.ended > self.ended - 1 for read in reads)),
            **self.count_operations(operations),
        )
        return figures if pool in POOLS else figures._replace(**dict.fromkeys(SHOWN_BY_HAPROXY))

    def count_operations(self, operations):
        written = [o.write.ended for o in operations if o.write.outcome == "written" and o.write.ended < self.ended]
        failed = [operation for operation in operations if clients.failed(operation)]
        return {
            "due": len(operations),
            "delayed": sum(map(clients.late, operations)),
            "failed": len(failed),
            "errors": sum(operation.write.outcome != "written" for operation in failed),
            "failed_by_kind": Counter(operation.kind for operation in failed),
            "in_flight": sum(operation.in_flight for operation in operations),
            "longest": max(map(clients.lasted, operations), default=0),
            "kept": sum(operation.kind == clients.KEPT for operation in operations),
            "gap": longest_pause(self.began, self.ended, written),  # measured the same way in all pools, for the race
        }

    def late(self, pool, write):
        """Whether a refused write was sent when HAProxy should have known that the node takes no writes."""
        looks = [look for look in self.looks if look.time <= write.begun - BLINK][-1:]
        looks += [look for look in self.looks if write.begun - BLINK < look.time <= write.begun]
        seen_up = any(look.shown[pool, write.node] == "UP" for look in looks)
        known = write.begun - self.stopped_taking_writes(write.node, write.begun)
        return not seen_up or known > bound(self.grace)

    def describe(self):
        """Every change in words, for the developer who has to explain a broken promise."""
        told = [(look.time, "HAProxy", self._shown(look.shown)) for look in self.looks]
        told += [(truth.time, truth.node, f"in recovery: {truth.recovery}") for truth in self.truths]
        told += [(when, who, "PROMOTED") for when, who in self.promotions]
        told += [(w.begun, w.node, f"refused through {w.pool}") for w in self.writes if w.outcome == "read-only"]
        told += [(called.time, called.node, f"Patroni says {called.status} for reads") for called in self.called]
        failed = [o for o in self.operations if o.write.pool == OURS and (clients.failed(o) or o.in_flight)]
        told += [(o.write.ended, "clients", f"{o.kind}: {o.write.outcome}") for o in failed]
        reads = [read for read in self.reads if read.done == OK and not read.keeps]
        late = [read for read in reads if self.unfit_for(read) > read_bound(False)]
        told += [(read.begun, read.node, f"read through {read.pool}, while Patroni calls the node unfit") for read in late]
        return "\n".join(f"    {time:6.2f} {words}" for time, words in sorted(self._join_repetitions(told)))

    def _join_repetitions(self, told):
        """Joins frequent repetitions into one line."""
        many = {key: [time - self.began for time, *words in told if words == list(key)] for key in {t[1:] for t in told}}
        for (who, what), times in many.items():
            often = len(times) > 3 and who != "HAProxy"
            for time in [min(times)] if often else times:
                yield time, f"{who:8} {what}" + (f" ({len(times)} times until {max(times):.2f})" if often else "")

    def _shown(self, shown):
        shows = [(pool, [shown.get((pool, node), "-") for node in NODES]) for pool in (*POOLS, *READS.values())]
        return "; ".join(f"{pool} {' '.join(states)}" for pool, states in shows)


def more_than_half(ours, templates):
    """The broken promise, if a server is UP without taking writes for more than half as long as in the pool with
    Patroni's template. Compares medians, because single runs of the template vary from six to nine seconds."""
    ours, templates = (median(found.false_up for found in pool) for pool in (ours, templates))
    if ours > max(bound(0), templates / 2):
        return f"a server UP for {ours:.2f} s that did not take writes, over half of the {templates:.2f} s with Patroni's template"
    return None


def more_fail(ours, *theirs):
    """The broken promise, if the median of failed operations is above that of any of these pools. Outages vary by up to
    an agent-inter, so as many operations as are due in that time may fail in addition, unless a pool has no
    failures."""
    ours, *theirs = (median(found.failed for found in pool) for pool in (ours, *theirs))
    allowed = min(theirs) and min(theirs) + AGENT_INTER * sum(clients.RATES.values())
    return f"{ours:g} operations failed, and {min(theirs):g} in another pool" if ours > allowed else None


def too_many_cut(found):
    """The broken promise, if more than one in ten thousand statements of kept sessions was cut in flight."""
    cut, kept = sum(each.in_flight for each in found), sum(each.kept for each in found)
    return f"{cut} of {kept} statements of kept sessions cut in flight" if cut > math.ceil(kept / 10000) else None


def broken_in_history(figures, faults, synchronous=False):
    """The broken promises, in words, that the clients' history shows without HAProxy's states."""
    broken, planned = [], all(f.planned for f in faults)
    if figures.split:
        broken.append(f"{figures.split} writes taken by a node after another was promoted")
    if figures.lost and (planned or synchronous):
        why = "all was planned" if planned else "replication is synchronous"
        broken.append(f"{figures.lost} writes lost though {why}")
    if figures.phantom:
        broken.append(f"{figures.phantom} failed writes are in the database")
    if figures.stale:
        broken.append(f"{figures.stale} reads saw less than their own session before")
    return broken


def broken_promises(figures, faults, lengths, grace, synchronous=False):
    """The broken promises of the agent's pool, in words, in one fault or in two at once.

    `lengths`: how long each fault lasted, or the outage of a bridged fault. Two faults at once must keep the promises
    of a single one, with these exceptions. Two faults that break something may leave two nodes DOWN. Two primaries in a
    row may be UP without taking writes. Two outages of the primary add up, because there may be no good answer between
    them. And if Patroni stops answering just after its health check for reads failed, the grace period covers that."""
    broken = broken_in_history(figures, faults, synchronous)
    planned, bridged = all(f.planned for f in faults), all(f.bridged for f in faults)
    silent, everywhere = any(f.silent for f in faults), any(f.everywhere for f in faults)
    nodes = max(1, sum(not f.planned or f.gone for f in faults))
    primaries = max(1, sum(bool(f.takes & {"leader", "postgres", "machine"}) for f in faults))
    troubles = [length for f, length in zip(faults, lengths) if f.bridged or f.takes - {"standbys", "dcs"}]
    # A busy machine starts Patroni slowly.
    too_long = any(f.bridged for f in faults) and sum(troubles) >= min(grace - AGENT_INTER, FALL)
    trouble = f"in trouble of {sum(troubles):.2f} s, grace period {grace} s"
    if figures.late:
        broken.append(f"{figures.late} writes refused as read-only that HAProxy should have known of")
    if figures.two_up:
        broken.append(f"two servers UP for {figures.two_up:.2f} s")
    if figures.false_up > (LONGEST_FALL + BLINK if silent else bound(grace)) * primaries:
        broken.append(f"a server UP for {figures.false_up:.2f} s that did not take writes")
    if figures.apart > (LONGEST_FALL + BLINK if silent else bound(grace)):
        broken.append(f"two HAProxies had different servers UP for {figures.apart:.2f} s")
    if all(f.demoted for f in faults) and (figures.without_primary or 0) < -BLINK:
        broken.append(f"a former primary took writes for {-figures.without_primary:.2f} s after another was promoted")
    if planned and silent and figures.pause > SILENCE:
        broken.append(f"no write for {figures.pause:.2f} s, until a silent agent answered again")
    if figures.to_held:
        broken.append(f"{figures.to_held} writes in new sessions to a node that an operator holds")
    falls_silent = len(faults) == 2 and any(f.bridged or "patroni" in f.takes for f in faults)
    if figures.late_read > read_bound(silent, grace if falls_silent else 0):
        broken.append(f"a read {figures.late_read:.2f} s after Patroni called its node unfit")
    if all(f.planned and not f.gone or f.bridged for f in faults) and figures.down and not too_long:
        broken.append(f"a server DOWN for {figures.down:.2f} s {'though all was planned' if planned else trouble}")
    if bridged and figures.cut and not too_long:
        broken.append(f"{figures.cut} sessions cut {trouble}")
    if figures.most_down > nodes and not everywhere:
        broken.append(f"{figures.most_down} servers DOWN at once")
    too_late = figures.failed and figures.longest > (figures.without_primary or 0) + WAITS
    if len(faults) == 1 and faults[0].seamless and (figures.errors or too_late):
        broken.append(f"{figures.failed} of {figures.due} operations failed, where none may")
    if not figures.alive:
        broken.append("a client writes or reads nothing after the recovery")
    return broken


def table(results, planned):
    """A Markdown table with a row for each fault. Each cell has the pools in their order: median and (worst)."""
    rows = [["fault", *COLUMNS.values(), "without a write, ratio"], ["---"] * (len(COLUMNS) + 2)]
    for name, pools in results.items():
        cells = [" / ".join(summary([getattr(f, key) for f in pools[pool]]) for pool in ROUTES) for key in COLUMNS]
        ratios = [ours.pause / theirs.pause for ours, theirs in zip(pools[OURS], pools[OFFICIAL])]
        rows.append([f"**{name}**" if name in planned else name, *cells, summary(ratios)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def total(found):
    """Sums up the operations of several runs in words."""
    sums = [sum(getattr(each, key) for each in found) for key in ("due", "delayed", "failed", "in_flight")]
    longest = [each.longest for each in found]
    words = "{} due, {} late, {} failed, {} cut in flight".format(*sums)
    return f"{words}, longest {median(longest):.2f} s in the median, {max(longest):.2f} s at most"


def race_table(results):
    """A Markdown table with a row for each fault and a column for each route: median and worst of the longest time
    without a write, and of the failed operations. results: {fault: {route: [{"gap": s, "failed": n}]}}."""
    rows = [["fault", *RACE.values()], ["---"] * (len(RACE) + 1)]
    for name, routes in results.items():
        values = {route: {key: [run[key] for run in runs] for key in runs[0]} for route, runs in routes.items()}
        cells = [f"{summary(values[route]['gap'])} s; {summary(values[route]['failed'])}" for route in RACE]
        rows.append([name, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def grace_table(results):
    """A Markdown table with a row for each fault and a column for each grace period; then the other pools of the same
    runs. results: {grace: {fault: {pool: [Figures]}}}."""
    cell = lambda found: " / ".join(summary([getattr(f, key) for f in found]) for key in ("pause", "down", "false_up"))
    head = ["fault", *(f"grace {grace} s" for grace in results), OFFICIAL, WITHOUT_AGENT]
    rows = [head, ["---"] * len(head)]
    for name in next(iter(results.values())):
        runs = [pools[name] for pools in results.values()]
        others = [[found for run in runs for found in run[pool]] for pool in (OFFICIAL, WITHOUT_AGENT)]
        rows.append([name, *map(cell, [run[OURS] for run in runs] + others)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(values):
    """The median, and the worst if it differs."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    middle, worst = short(median(values)), short(max(values))
    return middle if middle == worst else f"{middle} ({worst})"


def short(value):
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
