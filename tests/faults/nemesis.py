"""A random walk over what Jepsen does to a cluster: partitions, processes and machines that are killed or paused, and
switchovers, several at once. What is done follows from the seed and the number of the episode, but for who is the
primary by then. After each episode all is undone, and the history of the clients is judged.

A file keeps a line of JSON for each episode. It counts for the program and the synchronous_mode that it was made with.

A partition is cut where packets arrive: who is cut hears nothing, and nobody is told. HAProxy, the second HAProxy and
the DCS share a machine, but have an address each, and are cut by it."""

import json
import os
import subprocess
import time
from random import Random

import faults
import figures
import history
import pools
from watch import LB, NODES, OK

PARTIES = {"HAProxy": LB, "the second HAProxy": "10.55.0.3", "DCS": "10.55.0.2", **NODES}
HAPROXIES = list(PARTIES)[:2]
LONGEST_BEFORE, SHORTEST, LONGEST = 8, 3, 30  # seconds until an operation begins, and for which it lasts
# The kernel looks for its own addresses first, unless that is told to come later.
LISTEN = "ip rule add pref 100 lookup local; ip rule del pref 0; ip rule flush pref 10"


def machine(party):
    return party if party in NODES else "lb"


def cut(cluster):
    """So that each party hears nothing of those to whom it is to be deaf, and all else."""
    for each in ("lb", *NODES):
        deaf = sorted((who, whom) for who, whom in cluster.deaf if machine(who) == each)
        rules = [f"ip rule add pref 10 from {PARTIES[whom]} to {PARTIES[who]} blackhole" for who, whom in deaf]
        try:
            cluster.run(each, f"({LISTEN}) 2> /dev/null; {'; '.join([*rules, 'true'])}")
        except RuntimeError:  # its power is cut
            pass


class Operation:
    """What is done and undone: `begin`, `end`. `words` say what it was."""

    def __init__(self, cluster, chance):
        self.cluster, self.chance = cluster, chance
        self.aim = chance.choice(["the primary", "the primary", *NODES])

    def node(self):
        """Whom it hits: who is the primary is found out when it begins, even while machines cannot hear each other."""
        if self.aim in NODES:
            return self.aim
        return next((node for node in NODES if self.cluster.is_primary(node)), self.chance.choice(list(NODES)))

    def end(self):
        pass


class Partition(Operation):
    """`deaf`: {(who does not hear, whom)}."""

    def begin(self):
        self.words, deaf = self.choose()
        self.deaf = {pair for pair in deaf if len(set(map(machine, pair))) > 1}
        self.cluster.deaf = self.cluster.deaf | self.deaf
        cut(self.cluster)

    def end(self):
        self.cluster.deaf = self.cluster.deaf - self.deaf
        cut(self.cluster)

    def between(self, one, other):
        """Both ways, or one of them."""
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
    """PostgreSQL, which Patroni starts again, or Patroni, which nobody does until the end."""

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
        cut(self.cluster)


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
    """It may fail, as others break what it needs."""

    def begin(self):
        primary = next((node for node in NODES if self.cluster.is_primary(node)), "pg1")
        self.words = f"switchover from {primary}"
        command = ["tests/lab/cluster", "patronictl", "switchover", "demo", "--leader", primary, "--force"]
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **nothing)

    def end(self):
        self.process.wait(60)


PARTITIONS = [Halves, Ring, One, NodeFromDcs, NodeFromNode, HaproxyFromNode]
# at most one of them at a time: what is not there, or frozen, can be neither killed nor paused
PROCESSES = [Kill, Power, Pause]


def plan(cluster, seed, number):
    """[(seconds, operation, begin or end)] of an episode, in their order."""
    chance = Random(f"{seed} {number}")
    kinds = chance.sample(PARTITIONS, chance.choice([0, 1, 1, 2])) + chance.sample(PROCESSES, chance.choice([0, 1]))
    kinds += chance.sample([Switchover], chance.choice([0, 0, 1]))
    events = []
    for kind in kinds or [Switchover]:
        operation, begin = kind(cluster, Random(chance.random())), chance.uniform(0, LONGEST_BEFORE)
        events += [(begin, operation, "begin"), (begin + chance.uniform(SHORTEST, LONGEST), operation, "end")]
    return sorted(events, key=lambda event: event[0])


def make(cluster, seed, number):
    """Makes an episode, and undoes all of it; what was done: [[seconds, words]]."""
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
    return told


def door(node):
    """PostgreSQL's socket in that machine, which no partition cuts."""
    with open(f"{os.environ['LAB']}/{node}/pid") as file:
        return f"/proc/{file.read().strip()}/root/tmp"


def episode(site, seed, number):
    """What was done, and what was seen of it."""
    site.settle()
    began = site.ended or time.time()
    told = make(site.cluster, seed, number)
    site.settle()
    site.watch.renew_refused()
    site.ended = time.time()
    site.clients.wait(site.ended)
    run = figures.Run(site.watch, began, site.ended, site.rows(), {}, site.grace, None)
    site.lost |= run.lost
    return told, run


def find(run, pool):
    """The findings of history.py in that pool, and how many writes were ok."""
    writes = [write for write in run.writes if write.pool == pool]
    writes += [each.write for each in run.operations if each.write.pool == pool]
    read_pool = (pools.READS | {pools.SECOND: pools.SECOND_READ}).get(pool)
    reads = [read for read in run.reads if read.pool == read_pool]
    found = history.find(writes, reads, run.rows, run.promotions)
    sure = [write for write in found.split if not perhaps_promoted(write, run.truths)]
    return found._replace(split=sure), sum(write.done == OK for write in writes)


def perhaps_promoted(write, truths):
    """Whether the node that took it was seen as the primary only after that, and may have been one by then."""
    standby = 0
    for truth in truths:
        if truth.node == write.node and truth.recovery is True:
            standby = None
        elif truth.node == write.node:
            standby = truth.before if standby is None else standby  # when it was last seen as a standby
            if truth.recovery is False and standby < write.ended and write.begun < truth.time:
                return True
    return False


def wrong(found, synchronous):
    """What must not be in the agent's pools, in words."""
    kinds = {"lost": "lost", "split": "taken by two nodes", "stale": "stale in a session", "phantom": "there that failed"}
    if not synchronous:
        del kinds["lost"]  # Patroni's business
    return [f"{len(getattr(found, kind))} {words}" for kind, words in kinds.items() if getattr(found, kind)]


def made(file, seed, synchronous):
    """The lines of the file that count."""
    version = subprocess.run([os.environ["AGENT"], "--version"], capture_output=True, text=True, check=True).stdout.strip()
    same = {"seed": seed, "synchronous": synchronous, "version": version}
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return same, [line for line in lines if line | same == line]


def done(file, seed, synchronous, minutes):
    return sum(line["seconds"] for line in made(file, seed, synchronous)[1]) >= minutes * 60


def walk(site, file, seed, synchronous, minutes):
    """Makes episodes until the seed has been made for so long, and keeps each in the file."""
    while not done(file, seed, synchronous, minutes):
        same, before = made(file, seed, synchronous)
        number = len(before)
        print(f"== seed {seed}, episode {number}", flush=True)
        told, run = episode(site, seed, number)
        line = same | {"episode": number, "began": run.began, "seconds": run.ended - run.began, "did": told, "wrong": []}
        line["pools"], line["two_up"] = {}, run.figures(pools.ROLE_ONLY).two_up
        for pool in (*pools.ROUTES, pools.SECOND):
            found, ok = find(run, pool)
            counted = {kind: len(of_it) for kind, of_it in found._asdict().items()}
            line["pools"][pool] = {"ok": ok, **counted}
            if pool in (pools.OURS, pools.SECOND):
                line["wrong"] += [f"{pool}: {words}" for words in wrong(found, synchronous)]
        print(say(line["pools"]), flush=True)
        for words in line["wrong"]:
            print(f"  BROKEN: {words}", flush=True)
        if line["wrong"]:
            print(run.story(), flush=True)
        with file.open("a") as out:
            print(json.dumps(line), file=out)
    return total(file, seed, synchronous)


def total(file, seed, synchronous):
    """Prints the sums of a seed; how many episodes were wrong."""
    lines, sums = made(file, seed, synchronous)[1], {}
    for line in lines:
        for pool, counted in line["pools"].items():
            sums[pool] = {kind: number + sums.get(pool, {}).get(kind, 0) for kind, number in counted.items()}
    minutes = sum(line["seconds"] for line in lines) / 60
    mode = "synchronous" if synchronous else "asynchronous"
    broken = sum(bool(line["wrong"]) for line in lines)
    print(f"seed {seed}, {mode}: {len(lines)} episodes, {minutes:.1f} minutes, {broken} of them wrong\n{say(sums)}")
    if not any(line["two_up"] for line in lines):
        broken += 1
        print("BROKEN: the role-only pool never had two servers UP: the watch sees nothing")
    return broken


def say(sums):
    counts = {pool: ", ".join(f"{number} {kind}" for kind, number in counted.items()) for pool, counted in sums.items()}
    return "\n".join(f"  {pool:14} {words}" for pool, words in counts.items())
