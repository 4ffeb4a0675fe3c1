"""From what was watched to figures, the table and the broken promises. Pure; does no input or output.

What the agent's pool promises, and `broken_promises` holds it to:

* a server that does not take writes is UP for no longer than `bound`: one agent-inter and one --timeout, and with a
  grace period that and one more --timeout on top. The grace period ends by the time at which a check asks, and
  only the next one says DOWN; both may wait for --timeout. What is longer than it would be without a grace period
  is at most half as long as in the pool with Patroni's template, in the median of three or more runs;
* a write that is refused as read-only was sent before HAProxy could have heard of it: its node was shown UP
  (but for the blink between two looks) and had stopped taking writes for less than `bound`. With a grace period
  that is weaker than it could be: it is not looked at whether this server was being bridged;
* no node takes a write through it after another one was promoted, and nothing planned loses one. What else is lost is
  Patroni's business and counted, unless Patroni replicates synchronously: then nothing is lost, whatever happens;
* no write that failed is there all the same, and no session sees less than it saw or wrote before (see history.py);
* two servers are never UP at once;
* two HAProxies, which ask at other times and over other paths, have different servers UP for no longer than one of them
  may have a server UP that does not take writes;
* an old primary that its own Patroni demotes takes no write any more when another one is promoted: what waits, as the
  hook does, delays its stop by no more than the lock has left;
* a node that an operator holds gets no new session that writes;
* a standby whose agent is silent takes writes when it is promoted, and not only when its agent speaks again;
* nothing planned shows DOWN, and nothing else leaves more than the broken node DOWN, but for trouble that others have
  as well;
* trouble that the grace period is there for, and that is over within it, shows no DOWN and cuts no session. The period
  begins with the last good answer, up to one agent-inter before the trouble: so much shorter the trouble must
  be; and shorter than HAProxy's own check needs to call a server DOWN, three failures two seconds apart;
* no read is served by a node that Patroni called out of the pool for reads, by the same health check, longer than
  `read_bound` before: its agent is asked every two seconds, and may wait for --timeout;
* in a change that is `seamless` no operation fails (clients.py says what that is). Of the kept sessions one statement
  in 10,000 may be cut in flight. In anything else the median of three or more runs is not above that of Patroni's
  template nor of HAProxy alone, unless the fault is `costly`;
* when all is well again, writes and reads get through.

While the node's agent is silent, be it paused with all else there, HAProxy's own check is all there is: two seconds
between two failures, and two that each may take."""

import math
from collections import Counter, namedtuple
from statistics import median

import clients
import history
from history import BLINK
from pools import MULTI_HOST, OFFICIAL, OURS, POOLS, READS, ROLE_ONLY, ROUTES, SILENCE, WITHOUT_AGENT
from watch import NODES, OK

AGENT_INTER, READ_INTER, TIMEOUT = 0.5, 2, 1.5
# HAProxy's own check: the time from the first failure to the third, and the longest until DOWN
FALL, LONGEST_FALL = 4, 8

Figures = namedtuple(
    "Figures",
    "refused late split lost phantom stale unknown cut two_up down most_down false_up first_write pause alerts to_held "
    "late_read read_pause apart without_primary alive due delayed failed failed_by_kind in_flight longest kept gap",
)
# What the table shows of them.
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
    "late_read": "read after Patroni called the node out, s",
    "read_pause": "longest without a read, s",
    "due": "operations due",
    "delayed": "late, over 1 s",
    "failed": "failed, or over 5 s",
    "in_flight": "cut in flight",
    "longest": "longest operation, s",
}
# what there is none of without HAProxy, or without the clients that keep on trying
SHOWN_BY_HAPROXY = "refused late false_up two_up down most_down alerts to_held".split()

RACE = {
    OFFICIAL: "Patroni's template",
    ROLE_ONLY: "role only",
    WITHOUT_AGENT: "HAProxy alone",
    OURS: "this agent",
    MULTI_HOST: "libpq, three hosts",
}


def bound(grace):
    """How long a server may be UP that does not take writes, if the node's agent answers."""
    return AGENT_INTER + TIMEOUT + BLINK + (grace + TIMEOUT if grace else 0)


def read_bound(silent, grace=0):
    """How long after Patroni called it out of the pool a node may still be given reads: until HAProxy has asked again,
    and, if Patroni says nothing any more by then, until its grace period is over."""
    return (LONGEST_FALL if silent else READ_INTER + TIMEOUT + (grace + TIMEOUT if grace else 0)) + BLINK


def writers(pool):
    """The clients that write there."""
    names = [*clients.RATES, True, False] if pool in POOLS else clients.RATES
    return {f"{pool}/{name}" for name in names}


def longest_pause(began, ended, times):
    times = sorted([began, *times, ended])
    return max(later - earlier for earlier, later in zip(times, times[1:]))


def at(records, time, key):
    """The record that held at that time."""
    held = [record for record in records if record.time <= time and key(record)]
    return held[-1] if held else None


def promotions(truths):
    """Who took writes at the beginning, and who was promoted when: [(time, node)]."""
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
    """The records of one fault, with what held when it began."""

    def __init__(self, watch, began, ended, rows, alerts, grace, held):
        self.began, self.ended, self.rows, self.alerts, self.grace = began, ended, rows, alerts, grace
        self.held = held
        self.operations = [operation for operation in watch.operations if began <= operation.due < ended]
        self.writes = [write for write in watch.writes if began <= write.ended < ended]
        # those that are lost, of the watch and of the clients
        written = self.writes + [operation.write for operation in self.operations]
        self.lost = {write.row for write in history.lost(written, rows)}
        self.looks = self._window(watch.looks, lambda look: "all")
        self.second_looks = self._window(watch.second_looks, lambda look: "all")
        self.truths = self._window(watch.truths, lambda truth: truth.node)
        self.reads = [read for read in watch.reads if began <= read.ended < ended]
        self.called = self._window(watch.called, lambda called: called.node)
        self.promotions = promotions(self.truths)

    def _window(self, records, key):
        """The records within, and the last one before of each key, as if it were new at the beginning."""
        before = {key(record): record for record in records if record.time < self.began}
        first = [record._replace(time=self.began) for record in before.values()]
        return first + [record for record in records if self.began <= record.time < self.ended]

    def takes_writes(self, node, time):
        """PostgreSQL is up, is no standby, and nobody has been promoted over it."""
        truth = at(self.truths, time, lambda truth: truth.node == node)
        last = [who for when, who in self.promotions if when <= time]
        return truth is not None and truth.recovery is False and last[-1:] == [node]

    def stopped_taking_writes(self, node, time):
        """When, before that time, it was last known to take them."""
        if self.takes_writes(node, time):
            return time
        changes = [truth.time for truth in self.truths] + [when for when, _ in self.promotions]
        last = [change for change in changes if change <= time and self.takes_writes(node, change - 1e-6)]
        return max(last, default=-math.inf)

    def without_primary(self):
        """How long no node took writes before the last promotion; less than 0 if the old primary still did. None without
        a promotion. This is what the hook, and all else that waits, may cost: an overrun would be below 0."""
        if len(self.promotions) < 2:
            return None
        promoted, node = self.promotions[-1]
        ends = []
        for other in set(NODES) - {node}:
            told = [truth for truth in self.truths if truth.node == other]
            changes = [truth.time for truth in told[1:]] + [self.ended]
            ends += [end for truth, end in zip(told, changes) if truth.recovery is False and truth.time <= promoted]
        return promoted - max(ends, default=self.began)

    def called_out(self, read):
        """For how long Patroni had called its node out of the pool when a read was sent."""
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
        """Whether its session began on a node that an operator held, and HAProxy had heard of it. When it began in
        PostgreSQL counts: a client may have waited in HAProxy until the hold was over."""
        node, began, ended = self.held or (None, 0, 0)
        return write.node == node and write.reached is not None and began + bound(0) <= write.reached < ended

    def spans(self):
        """(begin, end, shown) of what HAProxy showed, cut also where the truth changes."""
        times = sorted({r.time for r in self.looks} | {r.time for r in self.truths} | {self.ended})
        for begin, end in zip(times, times[1:]):
            look = at(self.looks, begin, lambda look: True)
            if look:
                yield begin, end, look.shown

    def longest_apart(self):
        """How long both HAProxies had a server of our pool UP, and none in common."""
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
        # a session that its client keeps may stay where it is
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
            late_read=max(map(self.called_out, reads), default=0) if pool in READS else None,
            read_pause=longest_pause(self.began, self.ended, [r.ended for r in reads]) if pool in READS else None,
            apart=self.longest_apart() if pool == OURS else None,
            without_primary=self.without_primary(),
            # each client that writes, and the one that reads, not long ago
            alive={w.row[0] for w in written if w.ended > self.ended - 1.5} >= writers(pool)
            and (pool not in READS or any(read.ended > self.ended - 1 for read in reads)),
            **self.felt(operations),
        )
        return figures if pool in POOLS else figures._replace(**dict.fromkeys(SHOWN_BY_HAPROXY))

    def felt(self, operations):
        written = [o.write.ended for o in operations if o.write.outcome == "written" and o.write.ended < self.ended]
        failed = [operation for operation in operations if clients.failed(operation)]
        return {
            "due": len(operations),
            "delayed": sum(map(clients.late, operations)),
            "failed": len(failed),
            "failed_by_kind": Counter(operation.kind for operation in failed),
            "in_flight": sum(operation.in_flight for operation in operations),
            "longest": max(map(clients.lasted, operations), default=0),
            "kept": sum(operation.kind == clients.KEPT for operation in operations),
            "gap": longest_pause(self.began, self.ended, written),  # of all pools alike, for the race
        }

    def late(self, pool, write):
        """Whether a refused write was sent when HAProxy should have known better."""
        looks = [look for look in self.looks if look.time <= write.begun - BLINK][-1:]
        looks += [look for look in self.looks if write.begun - BLINK < look.time <= write.begun]
        seen_up = any(look.shown[pool, write.node] == "UP" for look in looks)
        known = write.begun - self.stopped_taking_writes(write.node, write.begun)
        return not seen_up or known > bound(self.grace)

    def story(self):
        """All that changed, in words, for whoever has to find out why."""
        told = [(look.time, "HAProxy", self._shown(look.shown)) for look in self.looks]
        told += [(truth.time, truth.node, f"in recovery: {truth.recovery}") for truth in self.truths]
        told += [(when, who, "PROMOTED") for when, who in self.promotions]
        told += [(w.begun, w.node, f"refused through {w.pool}") for w in self.writes if w.outcome == "read-only"]
        told += [(called.time, called.node, f"Patroni says {called.status} for reads") for called in self.called]
        failed = [o for o in self.operations if o.write.pool == OURS and (clients.failed(o) or o.in_flight)]
        told += [(o.write.ended, "clients", f"{o.kind}: {o.write.outcome}") for o in failed]
        reads = [read for read in self.reads if read.done == OK and not read.keeps]
        late = [read for read in reads if self.called_out(read) > read_bound(False)]
        told += [(read.begun, read.node, f"read through {read.pool}, called out by Patroni") for read in late]
        return "\n".join(f"    {time:6.2f} {words}" for time, words in sorted(self._told(told)))

    def _told(self, told):
        """One line for the same thing again and again."""
        many = {key: [time - self.began for time, *words in told if words == list(key)] for key in {t[1:] for t in told}}
        for (who, what), times in many.items():
            often = len(times) > 3 and who != "HAProxy"
            for time in [min(times)] if often else times:
                yield time, f"{who:8} {what}" + (f" ({len(times)} times until {max(times):.2f})" if often else "")

    def _shown(self, shown):
        shows = [(pool, [shown.get((pool, node), "-") for node in NODES]) for pool in (*POOLS, *READS.values())]
        return "; ".join(f"{pool} {' '.join(states)}" for pool, states in shows)


def more_than_half(ours, templates):
    """What is broken if a server is UP without taking writes for more than half as long as in the pool with Patroni's
    template: of medians, since chance moves one run of the template between six and nine seconds."""
    ours, templates = (median(found.false_up for found in pool) for pool in (ours, templates))
    if ours > max(bound(0), templates / 2):
        return f"a server UP for {ours:.2f} s that did not take writes, over half of the {templates:.2f} s with Patroni's template"
    return None


def more_fail(ours, *theirs):
    """What is broken if more operations fail than in any of these pools: of medians. Chance moves each by an agent-inter,
    and so many operations may fail more, unless none fails elsewhere."""
    ours, *theirs = (median(found.failed for found in pool) for pool in (ours, *theirs))
    allowed = min(theirs) and min(theirs) + AGENT_INTER * sum(clients.RATES.values())
    return f"{ours:g} operations failed, and {min(theirs):g} in another pool" if ours > allowed else None


def too_many_cut(found):
    """What is broken if more than one statement in ten thousand of the kept sessions was cut in flight."""
    cut, kept = sum(each.in_flight for each in found), sum(each.kept for each in found)
    return f"{cut} of {kept} statements of kept sessions cut in flight" if cut > math.ceil(kept / 10000) else None


def broken_in_history(figures, faults, synchronous=False):
    """What the clients' history alone tells of broken promises, in words, without a look at HAProxy."""
    broken, planned = [], all(f.planned for f in faults)
    if figures.split:
        broken.append(f"{figures.split} writes taken by a node after another was promoted")
    if figures.lost and (planned or synchronous):
        why = "all was planned" if planned else "replication is synchronous"
        broken.append(f"{figures.lost} writes lost though {why}")
    if figures.phantom:
        broken.append(f"{figures.phantom} writes are there that failed")
    if figures.stale:
        broken.append(f"{figures.stale} reads saw less than their own session before")
    return broken


def broken_promises(figures, faults, lengths, grace, synchronous=False):
    """What the agent's pool did that it must not, in words, in one fault or in two at once.

    `lengths`: how long each was; of a bridged one, how long its trouble was. Two at once are held to what one is, but:
    two that break something may leave two nodes DOWN, and two primaries after each other UP without taking writes;
    two troubles of the primary add up, as nobody knows that there was a good answer in between; and a Patroni that
    falls silent just after it has called its node out of the pool for reads is bridged, too."""
    broken = broken_in_history(figures, faults, synchronous)
    planned, bridged = all(f.planned for f in faults), all(f.bridged for f in faults)
    silent, everywhere = any(f.silent for f in faults), any(f.everywhere for f in faults)
    nodes = max(1, sum(not f.planned or f.gone for f in faults))
    primaries = max(1, sum(bool(f.takes & {"leader", "postgres", "machine"}) for f in faults))
    troubles = [length for f, length in zip(faults, lengths) if f.bridged or f.takes - {"standbys", "dcs"}]
    # a machine that is busy takes its time to start a Patroni
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
        broken.append(f"no write for {figures.pause:.2f} s, until a silent agent spoke again")
    if figures.to_held:
        broken.append(f"{figures.to_held} writes in new sessions to a node that an operator holds")
    falls_silent = len(faults) == 2 and any(f.bridged or "patroni" in f.takes for f in faults)
    if figures.late_read > read_bound(silent, grace if falls_silent else 0):
        broken.append(f"a read {figures.late_read:.2f} s after Patroni called its node out of the pool")
    if all(f.planned and not f.gone or f.bridged for f in faults) and figures.down and not too_long:
        broken.append(f"a server DOWN for {figures.down:.2f} s {'though all was planned' if planned else trouble}")
    if bridged and figures.cut and not too_long:
        broken.append(f"{figures.cut} sessions cut {trouble}")
    if figures.most_down > nodes and not everywhere:
        broken.append(f"{figures.most_down} servers DOWN at once")
    if len(faults) == 1 and faults[0].seamless and figures.failed:
        broken.append(f"{figures.failed} of {figures.due} operations failed, where none may")
    if not figures.alive:
        broken.append("a client that writes or reads nothing though all is well again")
    return broken


def table(results, planned):
    """Markdown: a row for each fault; in each cell the pools in their order, median and (worst)."""
    rows = [["fault", *COLUMNS.values(), "without a write, ratio"], ["---"] * (len(COLUMNS) + 2)]
    for name, pools in results.items():
        cells = [" / ".join(summary([getattr(f, key) for f in pools[pool]]) for pool in ROUTES) for key in COLUMNS]
        ratios = [ours.pause / theirs.pause for ours, theirs in zip(pools[OURS], pools[OFFICIAL])]
        rows.append([f"**{name}**" if name in planned else name, *cells, summary(ratios)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def total(found):
    """In words, what the operations of several runs met with."""
    sums = [sum(getattr(each, key) for each in found) for key in ("due", "delayed", "failed", "in_flight")]
    longest = [each.longest for each in found]
    words = "{} due, {} late, {} failed, {} cut in flight".format(*sums)
    return f"{words}, longest {median(longest):.2f} s in the median, {max(longest):.2f} s at most"


def race_table(results):
    """Markdown: a row for each fault, a column for each route: the median and the worst of the longest time without a
    write, and of the operations that failed. results: {fault: {route: [{"gap": s, "failed": n}]}}."""
    rows = [["fault", *RACE.values()], ["---"] * (len(RACE) + 1)]
    for name, routes in results.items():
        values = {route: {key: [run[key] for run in runs] for key in runs[0]} for route, runs in routes.items()}
        cells = [f"{summary(values[route]['gap'])} s; {summary(values[route]['failed'])}" for route in RACE]
        rows.append([name, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def grace_table(results):
    """Markdown: a row for each fault, a column for each grace period, and the other pools in the same runs.
    results: {grace: {fault: {pool: [Figures]}}}."""
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
