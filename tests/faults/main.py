"""Makes each fault in the cluster, watches the pools, and prints each pool's figures. Started by tests/faults/run."""

import argparse
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import permutations, product

import alerts
import clients
import cluster
import faults
import figures
import history
import nemesis
import picture
import pools
import watch

SHORT = [
    "switchover, 100 clients a second",
    "postmaster killed",
    "Patroni frozen, HAProxy reloaded before",
    "primary cut from the DCS",
    "Patroni's service restarted",
]
RACE_FAULTS = ["switchover", "PostgreSQL stopped by hand", "power of the primary's machine cut"]
# Below this share of idle time, the clients' delays come from the busy machine and not from HAProxy.
BUSY = 0.1
CONTROL = "Patroni frozen, HAProxy reloaded before"
PAIRS = [pair for pair in permutations(faults.FAULTS, 2) if faults.together(*map(faults.FAULTS.get, pair))]
GRACES = [0, 2, 3, 4, 5, 6, 8]
GRACE_FAULTS = [
    "Patroni late, 4 s",
    "the primary's Patroni restarted in pause",
    "Patroni killed and restarted by systemd",
    "five idle clients of Patroni, 8 s",
    "Patroni's sessions to PostgreSQL ended",
    "Patroni and postmaster killed",
    "PostgreSQL frozen",
    "postmaster killed",
    "Patroni frozen, HAProxy reloaded before",
    "primary cut from the DCS",
]


def parse_arguments():
    parser = argparse.ArgumentParser("tests/faults/run", description="The header of tests/faults/run has the options.")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--times", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--agent-options", default="")
    parser.add_argument("--haproxy", type=pathlib.Path)
    parser.add_argument("--synchronous", action="store_true")
    parser.add_argument("--overlap", type=int, metavar="SECONDS")
    parser.add_argument("--overlap-pair", nargs=2, default=[], metavar="FAULT")
    parser.add_argument("--grace-table", type=pathlib.Path)
    parser.add_argument("--race", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--nemesis", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--alerts", type=pathlib.Path, metavar="FILE")
    parser.add_argument("faults", nargs="*", metavar="FAULT")
    given = parser.parse_args()
    known = faults.FAULTS | (faults.FOR_ALERTS if given.alerts else {})
    unknown = {*given.faults, *given.overlap_pair} - set(known)
    if given.list or unknown:
        print("\n".join(known))
        sys.exit(f"no such fault: {', '.join(unknown)}" if unknown else 0)
    if given.overlap_pair and tuple(given.overlap_pair) not in PAIRS:
        sys.exit("one of these takes what the other needs")
    if given.times and (given.overlap or given.overlap_pair):
        sys.exit("--times is for single faults")
    if given.check:
        seed_is_done = given.nemesis and nemesis.is_done(given.nemesis, given.seed, given.synchronous, given.minutes)
        # 75 tells tests/faults/run that nothing is left to do.
        sys.exit(nemesis.print_totals(given.nemesis, given.seed, given.synchronous) and 1 or 75 if seed_is_done else 0)
    given.times = given.times or (1 if given.short or given.grace_table else 10 if given.race else 5)
    short_of_all = GRACE_FAULTS if given.grace_table else RACE_FAULTS if given.race else list(known)
    given.faults = given.faults or (SHORT if given.short else short_of_all)
    return given


def grace_of(options):
    """The agents' grace period in seconds, from their options or the program's default; 0 if there is none."""
    said = subprocess.run([os.environ["AGENT"], "--help"], capture_output=True, text=True, check=True).stdout
    duration = r"(?:(0)\b|(\d+)(ms|s))"
    found = re.search(rf"--grace[ =]{duration}", options) or re.search(rf"--grace D[^()]*\(default\s+{duration}", said)
    return int(found[2] or 0) / (1000 if found[3] == "ms" else 1) if found else 0


def cpu_times():
    """The idle time and the total time of all CPUs."""
    times = [int(word) for word in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return times[3] + times[4], sum(times)


class Site:
    def __init__(self, haproxy, seed, clients_too=True, without=(), **more):
        self.cluster, self.grace = cluster.Cluster(), 0
        if haproxy:
            self.cluster.configure_haproxy(haproxy)
        self.root = f"/proc/{self.cluster.host_pid('lb')}/root"
        sockets = f"{self.root}/run/haproxy/admin.sock", f"{self.root}/run/second-haproxy.sock"
        more |= {"pairs": int(clients_too), "without": without}
        self.watch = watch.Watch(sockets[0], pools.POOLS, pools.READ_PORTS, sockets[1], **more)
        self.routes = [pool for pool in pools.ROUTES if pool not in without]
        self.clients, self.cpus = clients.Clients(seed, self.routes), None
        self.clients_too = clients_too
        # Alerts take minutes, so the runs for them tolerate a slow machine.
        self.patience, self.blind = (120, 2) if clients_too else (900, 60)
        self.watch.operations = self.clients.operations
        self.ended, self.lost = None, set()
        watch.local.patience = 10

    def prepare(self, synchronous):
        watch.create_table(self.cluster.primary())
        # A promotion first asks the archive for WAL, which is slow while /tmp/slow exists.
        restore = "test ! -e /tmp/slow || sleep 2; false"
        self.cluster.change_setting(f"postgresql.recovery_conf.restore_command={json.dumps(restore)}")
        if synchronous:
            self.cluster.synchronous = True
            self.cluster.change_setting("synchronous_mode=true")
        self.watch.start()
        if self.clients_too:
            self.clients.start()

    def stop(self):
        try:
            self.watch.stop()
        finally:
            if self.clients_too:
                self.clients.stop()

    def set_agent_options(self, options):
        self.grace = grace_of(options)
        self.cluster.set_agent_options(options)

    def is_settled(self):
        """Whether there are one primary and two standbys, and each pool shows the right states for them."""
        shown = self.watch.looks[-1].shown if self.watch.looks else {}
        recovery = {truth.node: truth.recovery for truth in self.watch.truths}
        for node in watch.NODES:
            for pool in pools.POOLS:
                standby = {pools.OFFICIAL: "DOWN", pools.WITHOUT_AGENT: "NOLB"}.get(pool, "MAINT")
                if shown.get((pool, node)) != {False: "UP", True: standby}.get(recovery.get(node)):
                    return False
            for pool, primary in (pools.READS[pools.OURS], "MAINT"), (pools.READS[pools.OFFICIAL], "DOWN"):
                if shown.get((pool, node)) != {False: primary, True: "UP"}.get(recovery.get(node)):
                    return False
        return sorted(recovery.values()) == [False, True, True]

    def settle(self):
        """Waits until the site has been settled for two seconds, and all agents answer."""
        end, since = time.monotonic() + self.patience, None
        while since is None or time.monotonic() < since + 2:
            if self.watch.broken:
                raise self.watch.broken[0]
            if self.watch.blind_for() > self.blind:
                raise RuntimeError("HAProxy does not answer")
            if time.monotonic() > end:
                raise RuntimeError(f"not settled: agents answer: {self.agents_answer()}, {self.watch.looks[-1].shown}, {self.watch.truths[-6:]}")
            since = (since or time.monotonic()) if self.is_settled() else None
            if since and time.monotonic() >= since + 2 and not (self.agents_answer() and self.standbys_stream()):
                since = None
            time.sleep(0.05)
        self.cluster.candidates(self.cluster.primary())

    def raise_alerts(self, name, fault, chance):
        """Runs a fault, and makes it last long enough for its alerts. Returns what Prometheus saw, as lines, and what
        was wrong."""
        self.settle()
        alerts.wait_until_quiet()
        chance.least = alerts.LASTS if fault.alerts else 0
        began, before = time.time(), cpu_times()
        fault(self.cluster, chance)
        self.settle()
        self.watch.renew_refused()
        alerts.wait_until_quiet()
        ended = time.time()
        first = alerts.first_raised(began, ended)
        idle, all = (now - then for now, then in zip(cpu_times(), before))
        said = ", ".join(f"{alert} after {at:.0f} s" for alert, at in sorted(first.items()))
        print(f"  {ended - began:.0f} s, CPUs idle for {idle / all:.0%}; raised: {said or 'none'}", flush=True)
        second = (chance.second or began) - began
        return alerts.record(name, fault, began, second, ended), alerts.describe_differences(fault, first, second)

    def agents_answer(self):
        """Whether each agent answers. HAProxy's states do not show a lost agent, nor connections of a flood that are
        still queued."""
        for address in watch.NODES.values():
            try:
                with socket.create_connection((address, 5555), 5) as agent:
                    agent.sendall(b"health\n")
                    if not agent.recv(256).startswith(b"up ready "):
                        return False
            except OSError:
                return False
        return True

    def standbys_stream(self):
        """Whether all standbys stream. Patroni does not promote a standby that still waits for WAL of its own timeline,
        as it may after a failover."""
        query = "select count(*) from pg_stat_replication where state = 'streaming'"
        return self.cluster.sql(self.cluster.primary(), query).strip() == "2"

    def read_rows(self):
        primary = watch.connect(watch.NODES[self.cluster.primary()], 5432)
        rows = watch.ask(primary, "select client, number, node from kept")
        primary.close()
        return rows

    def count_alerts(self, since):
        """The number of HAProxy's log lines of level alert or emergency for each pool."""
        lines = self.cluster.run("lb", f"journalctl -q -t haproxy -p alert -o cat --since=@{since:.3f}").splitlines()
        return {pool: sum(pool in line for line in lines) for pool in pools.POOLS}

    def print_journals(self, since):
        """Prints each Patroni's log since that time, so that a developer can see why a fault did not work."""
        for node in watch.NODES:
            said = self.cluster.run(node, f"journalctl -q -o short-precise -u patroni --since=@{since:.3f} | grep -v LOG: | tail -60")
            print(f"  {node}\n{said}", flush=True)

    def run_faults(self, names, chances, wait, offset=0):
        """Runs one or two faults. Returns their records and the length of each fault, or of the outage of a bridged
        one."""
        self.settle()
        began = self.ended or time.time()  # the time between two faults belongs to the second
        self.cpus = self.cpus or cpu_times()
        time.sleep(wait)  # so that a fault begins at any moment between two checks
        self.watch.longest_between_looks = 0
        self.cluster.held = None
        lengths, errors, first_ended = {}, [], threading.Event()

        def make(name, chance, after):
            first_ended.wait(after)  # the second fault begins at the latest when the first has ended
            started = time.monotonic()
            try:
                lasted = faults.FAULTS[name](self.cluster, chance)
                lengths[name] = time.monotonic() - started if lasted is None else lasted
            except Exception as error:  # the other fault must still be undone
                errors.append(error)
            first_ended.set()

        threads = [threading.Thread(target=make, args=each) for each in zip(names, chances, (0, offset))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.settle()
        self.watch.renew_refused()
        self.ended = time.time()
        busy = self.cpus, cpu_times()
        self.cpus = busy[1]
        self.clients.wait(self.ended)
        seen = self.read_rows(), self.count_alerts(began), self.grace, self.cluster.held
        run = figures.Run(self.watch, began, self.ended, *seen)
        self.lost |= run.lost
        if errors:
            self.print_journals(began)
            raise errors[0]
        delay = max(each.begun - each.due for each in run.operations)
        (idle, all), (idle_now, all_now) = busy
        share = (idle_now - idle) / (all_now - all)
        print(f"  CPUs idle for {share:.0%} of the time, clients at most {delay:.2f} s behind their schedule", flush=True)
        made, ours = [faults.FAULTS[name] for name in names], run.figures(pools.OURS)
        looks = self.watch.longest_between_looks
        too_slow = share < BUSY and ours.failed and any(fault.seamless for fault in made)
        if looks > 1 or delay > clients.LATE or too_slow:
            if not figures.broken_in_history(ours, made, self.cluster.synchronous):
                raise Blind(f"{looks:.1f} s between two looks at HAProxy, clients {delay:.1f} s late, {ours.failed} failed")
        return run, [lengths[name] for name in names]

    def judge_history(self):
        """The violations, in words, that only the history of all faults shows."""
        writes = self.watch.writes + [each.write for each in self.clients.operations]
        found = history.find(writes, self.watch.reads, self.read_rows())
        later = [w for w in found.lost if w.pool in (pools.OURS, pools.SECOND) and w.row not in self.lost]
        wrong = [f"{write.row} was in the database, and is lost" for write in later]
        wrong += [f"{row} failed, and is in the database" for row in found.phantom]
        wrong += [f"{record} saw less than its session before" for record in found.stale]
        seen = {}
        for read in self.watch.reads:
            if read.keeps and read.seen:
                seen.setdefault((read.pool, read.session), []).append(sum(read.seen.values()))
        grew = {pool for (pool, _), sums in seen.items() if sums[-1] > sums[0]}
        return wrong + [f"no session saw what was written through {pool}" for pool in set(self.watch.read_ports) - grew]


class Blind(Exception):
    """This machine was too busy to watch, so the effect of the fault is unknown."""


def format_line(pool, found):
    words = format_states(pool, found) if pool in pools.POOLS else [f"no write {found.pause:.2f} s"]
    words += format_operations(found)
    return f"  {pool:14} {', '.join(words)}"


def format_states(pool, found):
    words = [f"{found.refused} refused" + (f" ({found.late} late)" if found.late else "")]
    words += [f"{found.split} by two primaries", f"{found.lost} lost", f"{found.unknown} unknown"]
    words += [f"{found.phantom} phantoms", f"{found.stale} stale"] if found.phantom or found.stale else []
    words += [f"{found.cut} cut", f"two UP {found.two_up:.2f} s"]
    words += [f"DOWN {found.down:.1f} s", f"false UP {found.false_up:.2f} s", f"no write {found.pause:.2f} s"]
    words += [f"first write {found.first_write:.2f} s"] if found.first_write is not None else []
    words += [f"late read {found.late_read:.2f} s", f"no read {found.read_pause:.2f} s"] if pool in pools.READS else []
    words += [f"HAProxies apart {found.apart:.2f} s"] if pool == pools.OURS else []
    return words + [f"{found.alerts} alerts"]


def format_operations(found):
    kinds = ", ".join(f"{kind} {found.failed_by_kind[kind]}" for kind in clients.RATES)
    words = [f"of {found.due} operations {found.delayed} late", f"{found.failed} failed ({kinds})"]
    return words + [f"{found.in_flight} cut in flight", f"longest {found.longest:.2f} s"]


def retry_while_blind(make):
    """Calls `make` up to three times while this machine is too busy to watch."""
    for _ in range(2):
        try:
            return make()
        except Blind as blind:
            print(f"  {blind}; again", flush=True)
    return make()


def make_fault(site, given, name, turn):
    """Runs one fault. Prints and returns each pool's figures, and the number of broken promises."""
    print(f"== {name} ({turn + 1} of {given.times}, grace {site.grace:g} s)", flush=True)

    def make():
        chance = faults.Chance(f"{given.seed} {name} {turn}")
        return site.run_faults([name], [chance], chance.uniform(0, 3))

    run, lengths = retry_while_blind(make)
    found, broken = judge(site, given, [name], run, lengths)
    if given.picture:
        given.picture.write_text(picture.draw(run, f"{name}, Patroni {os.environ['PATRONI']}"))
        given.picture = None  # only the first fault gets a picture
    return found, broken


def judge(site, given, names, run, lengths):
    """Prints and returns each pool's figures, and the number of broken promises."""
    found = {pool: run.figures(pool) for pool in pools.ROUTES}
    for pool in pools.ROUTES:
        print(format_line(pool, found[pool]), flush=True)
    if (without := found[pools.OURS].without_primary) is not None:
        print(f"  no node took writes for {without:.2f} s before the promotion", flush=True)
    made = [faults.FAULTS[name] for name in names]
    promises = figures.broken_promises(found[pools.OURS], made, lengths, site.grace, given.synchronous)
    for promise in promises:
        print(f"  BROKEN: {promise}", flush=True)
    if promises:
        print(run.describe(), flush=True)
    return found, len(promises)


def make_pair(site, given, names, seed):
    """Runs two faults at once. Returns the number of broken promises; a pair that cannot be judged counts as one."""
    quoted = " ".join(f'"{name}"' for name in names)
    print(f"== --overlap-pair {quoted} --seed {seed}", flush=True)

    def make():
        chance = random.Random(f"{seed} {names}")
        chances = [faults.Chance(chance.random()) for _ in names]
        for each in chances:
            each.stretch = chance.uniform(0.5, 1.5)
        return site.run_faults(names, chances, chance.uniform(0, 3), chance.uniform(0, 10))

    try:
        run, lengths = retry_while_blind(make)
    except Exception as error:
        if site.watch.broken:
            raise
        print(f"  BROKEN: this pair was not made, or not watched: {error!r}", flush=True)
        return 1
    return judge(site, given, names, run, lengths)[1]


def overlap(site, given):
    """Runs pairs of faults until the time is over, or only the given pair. Returns the number of broken promises."""
    if given.overlap_pair:
        return make_pair(site, given, tuple(given.overlap_pair), given.seed)
    chance, end, made, broken = random.Random(given.seed), time.monotonic() + given.overlap, 0, 0
    while time.monotonic() < end:
        broken += make_pair(site, given, chance.choice(PAIRS), chance.randrange(10**6))
        made += 1
    print(f"{made} pairs of {len(PAIRS)} that can be made")
    return broken


def misses_violations(results, synchronous):
    """Whether the watch misses known violations: the pool that promises nothing must show them in the control fault.
    With synchronous replication no lost or split write is required, because the old primary waits for a standby in
    vain."""
    taken = lambda found: synchronous or found.split and found.lost
    seen = [found.two_up and taken(found) for found in results.get(CONTROL, {}).get(pools.ROLE_ONLY, [])]
    if not all(seen):
        print(f"BROKEN: '{CONTROL}' has no violation in the role-only pool: the watch misses them")
    return not all(seen)


def print_totals(results):
    """Prints the totals of all runs of each fault, in a line for each pool."""
    for name, routes in results.items():
        print(f"== {name}, {len(routes[pools.OURS])} runs")
        for pool, found in routes.items():
            print(f"  {pool:14} {figures.total(found)}")


def count_failing_clients(results, times):
    """The number of broken promises that only several runs together can show."""
    made = {name: faults.FAULTS[name] for name in results}
    judged = [name for name, fault in made.items() if times > 2 and not fault.seamless and not fault.costly]
    others = pools.OFFICIAL, pools.WITHOUT_AGENT
    broken = {name: figures.more_fail(*(results[name][pool] for pool in (pools.OURS, *others))) for name in judged}
    seamless = [found for name, fault in made.items() if fault.seamless for found in results[name][pools.OURS]]
    broken["all seamless changes"] = figures.too_many_cut(seamless)
    broken = {name: promise for name, promise in broken.items() if promise}
    for name, promise in broken.items():
        print(f"BROKEN: {name}: {promise}")
    return len(broken)


def run_race(site, given):
    """Runs the faults that the file lacks; the file has a line of JSON for each run. Returns the number of broken
    promises."""
    read = lambda: [json.loads(line) for line in given.race.read_text().splitlines()] if given.race.exists() else []
    made, broken = Counter(run["fault"] for run in read()), 0
    for turn, name in product(range(given.times), given.faults):
        if turn < made[name]:
            continue
        found, promises = make_fault(site, given, name, turn)
        broken += promises
        routes = {pool: {"gap": each.gap, "failed": each.failed} for pool, each in found.items()}
        with given.race.open("a") as file:
            print(json.dumps({"fault": name, "routes": routes}), file=file)
    results = {}
    for run in read():
        for route, figure in run["routes"].items():
            results.setdefault(run["fault"], {}).setdefault(route, []).append(figure)
    print(figures.race_table(results), end="")
    return broken


def raise_alerts(site, given):
    """Runs each fault that the file lacks, and adds to the file what the rules saw. Returns how many faults raised the
    wrong alerts, and how many panels of the dashboard stayed empty."""
    text, wrong, began = given.alerts.read_text() if given.alerts.exists() else "", 0, time.time()
    there = {name for (name, _), _ in alerts.parse_recorded(text)}
    for name in given.faults:
        if name in there:
            continue
        print(f"== {name}", flush=True)
        fault = (faults.FAULTS | faults.FOR_ALERTS)[name]
        before = []
        for turn in range(3):  # this machine may be too busy
            try:
                seen, broken = site.raise_alerts(name, fault, faults.Chance(f"{given.seed} {name} {turn}"))
            except Exception as error:
                if site.watch.broken:
                    raise
                seen, broken = [], [f"not made: {error!r}"]
            for words in broken:
                print(f"  BROKEN: {words}", flush=True)
            if not broken:
                with given.alerts.open("a") as file:
                    print(*seen, *(f"# before that: {words}" for words in before), sep="\n", file=file)
                break
            before += broken
        wrong += bool(broken)
    empty = alerts.empty_panels(began, time.time())
    for query in empty:
        print(f"BROKEN: the dashboard shows nothing of {query}")
    return wrong + len(empty)


def count_over_half(results, times):
    """The number of faults that leave a server UP without taking writes for over half as long as the template does."""
    judged = [name for name in results if times > 2 and not faults.FAULTS[name].silent]
    broken = [figures.more_than_half(results[n][pools.OURS], results[n][pools.OFFICIAL]) for n in judged]
    for name, promise in zip(judged, broken):
        if promise:
            print(f"BROKEN: {name}: {promise}")
    return sum(promise is not None for promise in broken)


def main():
    given = parse_arguments()
    more = {"more": pools.SECOND_PORTS, "host_of": nemesis.socket_folder} if given.nemesis else {}
    if given.nemesis and given.synchronous:
        more["without"] = pools.OTHERS
    site = Site(given.haproxy, given.seed, not given.alerts, **more)
    site.prepare(given.synchronous)
    results, broken = {}, 0
    try:
        if given.overlap or given.overlap_pair:
            site.set_agent_options(given.agent_options)
            broken += overlap(site, given)
            given.faults = []
        if given.nemesis:
            site.set_agent_options(given.agent_options)
            broken += nemesis.run_episodes(site, given.nemesis, given.seed, given.synchronous, given.minutes)
            given.faults = []
        if given.race:
            site.set_agent_options(given.agent_options)
            broken += run_race(site, given)
            given.faults = []
        if given.alerts:
            site.set_agent_options(given.agent_options)
            wrong = raise_alerts(site, given)
            print(f"alerts: {len(given.faults)} faults, {wrong} of them with the wrong alerts")
            return 1 if wrong else 0
        for grace in GRACES if given.grace_table else [None]:
            site.set_agent_options(given.agent_options + ("" if grace is None else f" --grace {grace}s"))
            results[grace] = {name: {pool: [] for pool in pools.ROUTES} for name in given.faults}
            for turn, name in product(range(given.times), given.faults):
                found, promises = make_fault(site, given, name, turn)
                broken += promises
                for pool in pools.ROUTES:
                    results[grace][name][pool].append(found[pool])
            print_totals(results[grace])
            broken += misses_violations(results[grace], given.synchronous)
            broken += sum(count(results[grace], given.times) for count in (count_over_half, count_failing_clients))
            if given.grace_table:
                given.grace_table.write_text(figures.grace_table(results))
    finally:
        site.stop()
    wrong = site.judge_history()
    for words in wrong[:20]:
        print(f"BROKEN, in the history of all faults: {words}")
    broken += len(wrong)
    if given.table:
        planned = [name for name in given.faults if faults.FAULTS[name].planned]
        given.table.write_text(figures.table(results[grace], planned))
    print(f"faults: {broken} promises broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
