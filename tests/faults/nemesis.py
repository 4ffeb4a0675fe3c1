"""Makes episodes of random faults as Jepsen does: partitions, killed or paused processes and machines, and switchovers,
several at once. The seed and the number of an episode determine its operations, except for the current primary. After
each episode all operations are undone, and the clients' history is judged.

A file has a line of JSON for each episode. The line counts only for the program and the synchronous_mode of its run.

A partition drops packets at the receiver, silently. HAProxy, the second HAProxy and the DCS share a machine, but each
has its own address, by which it is cut off."""

import json
import os
import subprocess
import time
from pathlib import Path
from random import Random

import faults
import figures
import history
import pools
from watch import LB, NODES, OK

PARTIES = {"HAProxy": LB, "the second HAProxy": "10.55.0.3", "DCS": "10.55.0.2", **NODES}
HAPROXIES = list(PARTIES)[:2]
LONGEST_BEFORE, SHORTEST, LONGEST = 8, 3, 30  # seconds until an operation begins, and how long it lasts
# The kernel's rule for its own addresses comes first, so it must be moved behind the rules of the partitions.
LISTEN = "ip rule add pref 100 lookup local; ip rule del pref 0; ip rule flush pref 10"


def machine(party):
    return party if party in NODES else "lb"


def set_rules(cluster):
    """Sets the rules on each machine so that each party in `cluster.deaf` gets no packets from its counterpart."""
    for each in ("lb", *NODES):
        deaf = sorted((who, whom) for who, whom in cluster.deaf if machine(who) == each)
        rules = [f"ip rule add pref 10 from {PARTIES[whom]} to {PARTIES[who]} blackhole" for who, whom in deaf]
        try:
            cluster.run(each, f"({LISTEN}) 2> /dev/null; {'; '.join([*rules, 'true'])}")
        except RuntimeError:  # the machine's power is cut
            pass


class Operation:
    """An operation that `begin` starts and `end` undoes. `words` describe it."""

    def __init__(self, cluster, chance):
        self.cluster, self.chance = cluster, chance
        self.aim = chance.choice(["the primary", "the primary", *NODES])

    def node(self):
        """The node to hit. The primary is looked up at the start, even while machines are cut off from each other."""
        if self.aim in NODES:
            return self.aim
        return next((node for node in NODES if self.cluster.is_primary(node)), self.chance.choice(list(NODES)))

    def end(self):
        pass


class Partition(Operation):
    """`deaf`: {(receiver, sender)} of the packets that are dropped."""

    def begin(self):
        self.words, deaf = self.choose()
        self.deaf = {pair for pair in deaf if len(set(map(machine, pair))) > 1}
        self.cluster.deaf = self.cluster.deaf | self.deaf
        set_rules(self.cluster)

    def end(self):
        self.cluster.deaf = self.cluster.deaf - self.deaf
        set_rules(self.cluster)

    def between(self, one, other):
        """Cuts both directions, or one of them."""
        way = self.chance.choice(["and", "does not hear", "is not heard by"])
        ways = {"and": {(one, other), (other, one)}, "does not hear": {(one, other)}, "is not heard by": {(other, one)}}
        return f"{one} {way} {other}" + (" cut from each other" if way == "and" else ""), ways[way]


class Halves(Partition):
    def choose(self):
        parties = self.chance.sample(list(PARTIES), len(PARTIES))
        half, rest = parties[: len(parties) // 2], parties[len(parties) // 2 :]
        return f"halves: {', '.join(half)} | {', '.join(rest)}", across(half, rest)


class Ring(Partition):
    def choose(self):
        ring = self.chance.sample(list(PARTIES), len(PARTIES))
        steps = lambda one, other: (ring.index(one) - ring.index(other)) % len(ring)
        apart = {(one, other) for one in ring for other in ring if steps(one, other) not in (0, 1, len(ring) - 1)}
        return f"ring: {', '.join(ring)}", apart


class One(Partition):
    def choose(self):
        node = self.node()
        return f"{node} alone", across([node], [party for party in PARTIES if party != node])


class NodeFromDcs(Partition):
    def choose(self):
        return self.between(self.node(), "DCS")


class NodeFromNode(Partition):
    def choose(self):
        node = self.node()
        return self.between(node, self.chance.choice(faults.others(node)))


class HaproxyFromNode(Partition):
    def choose(self):
        return self.between(self.chance.choice(HAPROXIES), self.node())


def across(some, others):
    return {pair for one in some for other in others for pair in ((one, other), (other, one))}


class Kill(Operation):
    """Kills PostgreSQL, which Patroni restarts, or Patroni, which stays down until the end of the operation."""

    def begin(self):
        self.victim, self.what = self.node(), self.chance.choice(["PostgreSQL", "Patroni"])
        self.words = f"{self.what} of {self.victim} killed"
        if self.what == "Patroni":
            self.cluster.signal_patroni(self.victim, "KILL")
        else:
            self.cluster.kill_postmaster(self.victim)

    def end(self):
        if self.what == "Patroni":
            self.cluster.patroni(self.victim, "start")


class Power(Operation):
    def begin(self):
        self.victim = self.node()
        self.words = f"power of {self.victim} cut"
        self.cluster.power_off(self.victim)

    def end(self):
        self.cluster.boot(self.victim)
        set_rules(self.cluster)


class Pause(Operation):
    def begin(self):
        self.victim, self.what = self.node(), self.chance.choice(["PostgreSQL", "Patroni", "the machine"])
        self.words = f"{self.what} of {self.victim} paused"
        self.signal("STOP")

    def end(self):
        self.signal("CONT")

    def signal(self, signal):
        if self.what == "the machine":
            self.cluster.freeze(self.victim, signal == "STOP")
        elif self.what == "Patroni":
            self.cluster.signal_patroni(self.victim, signal)
        else:
            self.cluster.signal_postgres(self.victim, signal)


class Switchover(Operation):
    """A switchover. It may fail, because other operations may break what it needs."""

    def begin(self):
        primary = next((node for node in NODES if self.cluster.is_primary(node)), "pg1")
        self.words = f"switchover from {primary}"
        command = ["tests/lab/cluster", "patronictl", "switchover", "demo", "--leader", primary, "--force"]
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **nothing)

    def end(self):
        self.process.wait(60)


PARTITIONS = [Halves, Ring, One, NodeFromDcs, NodeFromNode, HaproxyFromNode]
# At most one of these at a time: a process that is down or frozen can be neither killed nor paused.
PROCESSES = [Kill, Power, Pause]


def plan(cluster, seed, number):
    """The events of an episode in their order: [(seconds, operation, begin or end)]."""
    chance = Random(f"{seed} {number}")
    kinds = chance.sample(PARTITIONS, chance.choice([0, 1, 1, 2])) + chance.sample(PROCESSES, chance.choice([0, 1]))
    kinds += chance.sample([Switchover], chance.choice([0, 0, 1]))
    events = []
    for kind in kinds or [Switchover]:
        operation, begin = kind(cluster, Random(chance.random())), chance.uniform(0, LONGEST_BEFORE)
        events += [(begin, operation, "begin"), (begin + chance.uniform(SHORTEST, LONGEST), operation, "end")]
    return sorted(events, key=lambda event: event[0])


def run_operations(cluster, seed, number):
    """Runs the operations of an episode and undoes them all. Returns [[seconds, words]]."""
    cluster.deaf, began, told = frozenset(), time.monotonic(), []
    for due, operation, verb in plan(cluster, seed, number):
        time.sleep(max(0, began + due - time.monotonic()))
        operation.words = getattr(operation, "words", type(operation).__name__)
        said = ""
        try:
            getattr(operation, verb)()
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            said = f": {error}".splitlines()[0]
        told.append([round(time.monotonic() - began, 2), f"{verb}: {operation.words}{said}"])
        print(f"  {told[-1][0]:6.2f} {told[-1][1]}", flush=True)
    for node in NODES:  # a Patroni that does not reach the DCS when it starts may end
        cluster.patroni(node, "start")
    return told


def socket_folder(node):
    """The folder of PostgreSQL's socket in that machine, which no partition can cut. The watch needs it up to 50 times a
    second, so it is not asked of tests/lab/machine, which is a process each time."""
    machine = Path(os.environ["LAB"], node)
    pid, group = ((machine / name).read_text().strip() for name in ("pid", "cgroup"))
    groups = Path("/proc", pid, "cgroup")
    # The pid of a machine that has ended may now belong to a process of another machine.
    alive = groups.exists() and Path(group).name in groups.read_text()
    return f"/proc/{pid}/root/tmp" if alive else "/nonexistent"


def run_episode(site, seed, number):
    """Runs an episode. Returns its operations and its records."""
    site.settle()
    began = site.ended or time.time()
    told = run_operations(site.cluster, seed, number)
    site.settle()
    site.watch.renew_refused()
    site.ended = time.time()
    site.clients.wait(site.ended)
    run = figures.Run(site.watch, began, site.ended, site.read_rows(), {}, site.grace, None)
    site.lost |= run.lost
    return told, run


def find(run, pool):
    """The findings of history.py for that pool, and the number of ok writes."""
    writes = [write for write in run.writes if write.pool == pool]
    writes += [each.write for each in run.operations if each.write.pool == pool]
    read_pool = (pools.READS | {pools.SECOND: pools.SECOND_READ}).get(pool)
    reads = [read for read in run.reads if read.pool == read_pool]
    found = history.find(writes, reads, run.rows, run.promotions)
    sure = [write for write in found.split if not perhaps_promoted(write, run.truths)]
    return found._replace(split=sure), sum(write.done == OK for write in writes)


def perhaps_promoted(write, truths):
    """Whether the node that took the write may have been the primary by then, but was seen as the primary only
    later."""
    standby = 0
    for truth in truths:
        if truth.node == write.node and truth.recovery is True:
            standby = None
        elif truth.node == write.node:
            standby = truth.before if standby is None else standby  # when the node was last seen as a standby
            if truth.recovery is False and standby < write.ended and write.begun < truth.time:
                return True
    return False


def describe_wrong(found, synchronous):
    """The violations in the agent's pools, in words."""
    kinds = {"lost": "lost", "split": "taken by two nodes", "stale": "stale in a session", "phantom": "failed but there"}
    if not synchronous:
        del kinds["lost"]  # with asynchronous replication Patroni may lose writes
    return [f"{len(getattr(found, kind))} {words}" for kind, words in kinds.items() if getattr(found, kind)]


def read_lines(file, seed, synchronous):
    """The lines of the file that count for this run."""
    version = subprocess.run([os.environ["AGENT"], "--version"], capture_output=True, text=True, check=True).stdout.strip()
    same = {"seed": seed, "synchronous": synchronous, "version": version}
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return same, [line for line in lines if line | same == line]


def is_done(file, seed, synchronous, minutes):
    return sum(line["seconds"] for line in read_lines(file, seed, synchronous)[1]) >= minutes * 60


def run_episodes(site, file, seed, synchronous, minutes):
    """Runs episodes until the seed has run for this many minutes, and adds each to the file."""
    while not is_done(file, seed, synchronous, minutes):
        same, before = read_lines(file, seed, synchronous)
        number = len(before)
        print(f"== seed {seed}, episode {number}", flush=True)
        told, run = run_episode(site, seed, number)
        line = same | {"episode": number, "began": run.began, "seconds": run.ended - run.began, "did": told, "wrong": []}
        line["pools"], line["two_up"] = {}, run.figures(pools.ROLE_ONLY).two_up
        for pool in (*site.routes, pools.SECOND):
            found, ok = find(run, pool)
            counted = {kind: len(of_it) for kind, of_it in found._asdict().items()}
            line["pools"][pool] = {"ok": ok, **counted}
            if pool in (pools.OURS, pools.SECOND):
                line["wrong"] += [f"{pool}: {words}" for words in describe_wrong(found, synchronous)]
        print(format_counts(line["pools"]), flush=True)
        for words in line["wrong"]:
            print(f"  BROKEN: {words}", flush=True)
        if line["wrong"]:
            print(run.describe(), flush=True)
        with file.open("a") as out:
            print(json.dumps(line), file=out)
    return print_totals(file, seed, synchronous)


def print_totals(file, seed, synchronous):
    """Prints the sums of a seed. Returns the number of episodes with violations."""
    lines, sums = read_lines(file, seed, synchronous)[1], {}
    for line in lines:
        for pool, counted in line["pools"].items():
            sums[pool] = {kind: number + sums.get(pool, {}).get(kind, 0) for kind, number in counted.items()}
    minutes = sum(line["seconds"] for line in lines) / 60
    mode = "synchronous" if synchronous else "asynchronous"
    broken = sum(bool(line["wrong"]) for line in lines)
    print(f"seed {seed}, {mode}: {len(lines)} episodes, {minutes:.1f} minutes, {broken} of them wrong\n{format_counts(sums)}")
    if not any(line["two_up"] for line in lines):
        broken += 1
        print("BROKEN: the role-only pool never had two servers UP: the watch misses violations")
    return broken


def format_counts(sums):
    counts = {pool: ", ".join(f"{number} {kind}" for kind, number in counted.items()) for pool, counted in sums.items()}
    return "\n".join(f"  {pool:14} {words}" for pool, words in counts.items())
