"""Tests, on made-up records, that figures.py notices each broken promise, and alerts.py each wrong alert."""

import os
import unittest
from collections import namedtuple

import alerts
import figures
from clients import KEPT, PATIENCE, RATES, SESSION, Operation
from faults import FAULTS, FOR_ALERTS, KINDS
from pools import OFFICIAL, OURS, POOLS, READS, ROUTES
from watch import FAIL, NODES, OK, Called, Look, Read, Truth, Write

Records = namedtuple("Records", "writes looks truths reads called operations second_looks")
Fault = namedtuple("Fault", f"{' '.join(KINDS)} takes", defaults=[False] * len(KINDS) + [frozenset()])
BRIDGED = Fault(bridged=True)


def looks(*changes, pool=OURS):
    """Makes looks from (time, state of pg1); the other nodes are always MAINT."""
    calm = {(name, node): "MAINT" for name in POOLS for node in NODES}
    return [Look(time, calm | {(pool, "pg1"): shown}) for time, shown in changes]


def run(looks, writes=(), truths=((0, False),), grace=3, reads=(9.8,), called=((0, 200),), held=None, operations=(), gone=(), second=()):
    """Makes a run of ten seconds. pg1's records are (time, in recovery) and (time, Patroni's status for reads)."""
    truths = [Truth(time, "pg1", recovery) for time, recovery in truths]
    alive = [write(time, session=session) for time in (9.2, 9.8) for session in (True, False)]
    reads = [Read(READS[OURS], time, time + 0.01, "pg1", False, time, OK, {}) for time in reads]
    called = [Called(time, "pg1", status, time - 0.2) for time, status in called]
    operations = [*operations, *(operation(9.7, kind) for kind in RATES)]
    records = Records([*writes, *alive], looks, truths, reads, called, operations, second)
    rows = [(*w.row, w.node) for w in [*records.writes, *(each.write for each in operations)] if w.done == OK]
    rows = [row for row in rows if row[:2] not in gone]
    return figures.Run(records, 0.0, 10.0, rows, dict.fromkeys(POOLS, 0), grace, held)


def write(time, outcome="written", session=True, cut=False, lasted=0.01, reached=None):
    done, row = OK if outcome == "written" else FAIL, (f"{OURS}/{session}", time)
    return Write(OURS, row, time, time + lasted, "pg1", outcome, cut, session, done, None, reached)


def operation(due, kind=SESSION, outcome="written", lasted=0.01, in_flight=False, **more):
    return Operation(kind, due, due, in_flight, write(due, outcome, kind, lasted=lasted, **more))


def broken(run, fault=BRIDGED, lasted=1):
    return figures.broken_promises(run.figures(OURS), [fault], [lasted], run.grace)


class Figures(unittest.TestCase):
    def test_calm(self):
        self.assertEqual(broken(run(looks((0, "UP")))), [])

    def test_lost(self):
        by_watch, by_client = (f"{OURS}/True", 5), (f"{OURS}/{SESSION}", 6)
        seen = run(looks((0, "UP")), [write(5)], operations=[operation(6)], gone=[by_watch, by_client])
        self.assertEqual(seen.lost, {by_watch, by_client})
        self.assertEqual(seen.figures(OURS).lost, 2)

    def test_two_haproxies(self):
        other = lambda *times: [Look(time, {(OURS, node): "UP"}) for time, node in times]
        same = run(looks((0, "UP")), second=other((0, "pg1")))
        self.assertEqual(same.figures(OURS).apart, 0)
        # no server of the first HAProxy is UP
        self.assertEqual(run(looks((0, "MAINT")), second=other((0, "pg2"))).figures(OURS).apart, 0)
        apart = run(looks((0, "UP")), second=other((0, "pg1"), (1, "pg2"), (2, "pg1"), (3, "pg2"), (3 + figures.bound(3), "pg1")))
        self.assertAlmostEqual(apart.figures(OURS).apart, figures.bound(3))
        self.assertEqual(broken(apart, Fault()), [])
        longer = run(looks((0, "UP")), second=other((0, "pg2"), (figures.bound(3) + 0.1, "pg1")))
        self.assertIn("different servers UP for 6.7", broken(longer, Fault())[0])

    def test_two_primaries(self):
        def until(stop, promoted=5):
            truths = [Truth(0, "pg1", False), Truth(0, "pg2", True), Truth(stop, "pg1", None), Truth(promoted, "pg2", False)]
            seen = run(looks((0, "UP"), (3, "MAINT")))
            seen.truths, seen.promotions = truths, figures.promotions(sorted(truths))
            return seen

        self.assertAlmostEqual(until(3).without_primary(), 2)
        self.assertAlmostEqual(until(6).without_primary(), -1)
        self.assertIsNone(run(looks((0, "UP"))).without_primary())
        demoted = Fault(demoted=True)
        self.assertEqual([words for words in broken(until(3), demoted) if "former" in words], [])
        self.assertIn("a former primary took writes for 1.00 s", "".join(broken(until(6), demoted)))
        self.assertNotIn("a former primary", "".join(broken(until(6), Fault())))

    def test_down_within_the_grace_period(self):
        down = looks((0, "UP"), (5, "DOWN"), (5.5, "UP"))
        self.assertIn("DOWN for 0.50 s", broken(run(down))[0])
        self.assertEqual(broken(run(down), lasted=2.6), [])  # the grace period less one agent-inter
        self.assertEqual(broken(run(down, grace=0)), [])
        self.assertIn("DOWN", broken(run(down, grace=8), lasted=3.9)[0])
        self.assertEqual(broken(run(down, grace=8), lasted=4.1), [])  # HAProxy's own check marks the server DOWN
        self.assertEqual(broken(run(down), Fault()), [])
        self.assertIn("planned", broken(run(down), Fault(planned=True))[0])
        both = Fault(planned=True, bridged=True)
        self.assertIn("planned", broken(run(down), both)[-1])
        self.assertEqual(broken(run(down), both, lasted=2.6), [])

    def test_two_at_once(self):
        def broken(faults, lengths=(9, 9), **what):
            calm = run(looks((0, "UP"))).figures(OURS)
            return figures.broken_promises(calm._replace(**what), faults, lengths, 3)

        planned, leader = Fault(planned=True), Fault(takes=frozenset(["leader"]))
        two_down, down, up = {"down": 1, "most_down": 2}, {"down": 1, "most_down": 1}, {"false_up": figures.bound(3) + 1}
        self.assertIn("2 servers", broken([leader, planned], **two_down)[0])
        self.assertEqual(broken([leader, Fault()], **two_down), [])
        self.assertIn("3 servers", broken([leader, Fault()], down=1, most_down=3)[0])
        self.assertEqual(broken([leader, Fault(everywhere=True)], down=1, most_down=3), [])
        self.assertIn("UP for", broken([leader, planned], **up)[0])
        self.assertEqual(broken([leader, leader], **up), [])
        self.assertIn("trouble of 2.00 s", broken([BRIDGED, BRIDGED], (1, 1), **down)[0])
        self.assertEqual(broken([BRIDGED, BRIDGED], (1, 2), **down), [])  # the outages add up
        self.assertIn("trouble of 2.00 s", broken([BRIDGED, planned], (2, 9), **down)[0])  # planned: no outage
        self.assertEqual(broken([BRIDGED, leader._replace(planned=True)], (2, 9), **down), [])
        self.assertIn("planned", broken([planned, planned], **down)[0])
        self.assertIn("cut", broken([BRIDGED, BRIDGED], (1, 1), cut=1)[0])
        self.assertEqual(broken([BRIDGED, planned], (1, 1), cut=1), [])
        self.assertIn("lost", broken([planned, planned], lost=1)[0])
        self.assertEqual(broken([planned, leader], lost=1), [])
        frozen, read = Fault(takes=frozenset(["patroni"])), figures.read_bound(False)
        self.assertIn("a read", broken([leader, Fault()], late_read=read + 1)[0])
        self.assertEqual(broken([leader, frozen], late_read=read + 1), [])
        self.assertIn("a read", broken([frozen], late_read=read + 1)[0])
        self.assertIn("a read", broken([leader, frozen], late_read=figures.read_bound(False, 3) + 0.1)[0])
        for promise in ("late", "split", "two_up", "to_held", "phantom", "stale"):
            self.assertEqual(len(broken([leader, Fault(everywhere=True, bridged=True)], **{promise: 1})), 1, promise)

    def test_cut(self):
        cut = run(looks((0, "UP")), [write(5, "server closed the connection", cut=True)])
        self.assertEqual(cut.figures(OURS).cut, 1)
        self.assertEqual(cut.figures(OFFICIAL).cut, 0)
        self.assertIn("1 sessions cut", broken(cut)[0])
        self.assertEqual(broken(cut, lasted=3), [])

    def test_up_without_taking_writes(self):
        def up(seconds, pool=OURS, **options):
            return run(looks((0, "UP"), (2 + seconds, "DOWN"), pool=pool), truths=[(0, False), (2, None)], **options)

        self.assertEqual(broken(up(2), Fault()), [])
        self.assertIn("UP for 7.00 s", broken(up(7), Fault())[0])
        self.assertIn("UP for 2.20 s", broken(up(2.2, grace=0), Fault())[0])

        def more_than_half(ours, templates):
            ours, templates = [up(s).figures(OURS) for s in ours], [up(s, OFFICIAL).figures(OFFICIAL) for s in templates]
            return figures.more_than_half(ours, templates)

        self.assertIsNone(more_than_half([2.0], [2]))
        self.assertIsNone(more_than_half([3, 5, 3], [7, 7, 7]))
        self.assertIn("over half of the 4.00 s", more_than_half([2.2], [4]))

    def test_late(self):
        truths = [(0, False), (2, True)]
        late = lambda time, grace: run(looks((0, "UP")), [write(time, "read-only")], truths, grace).figures(OURS).late
        self.assertEqual((late(4, 0), late(4.2, 0), late(6, 3), late(8.7, 3)), (0, 1, 0, 1))

    def test_silent(self):
        calm, silent = run(looks((0, "UP")), [write(5)]), Fault(planned=True, silent=True)
        self.assertEqual(broken(calm, silent), [])
        calm.began = -6
        self.assertIn("no write for 11.01 s", broken(calm, silent)[0])
        self.assertEqual(broken(calm, Fault(planned=True)), [])

    def test_hold(self):
        def new_session(time, held=("pg1", 2, 8), **more):
            writes = [write(time, session=False, reached=time, **more), write(5)]
            return broken(run(looks((0, "UP")), writes, held=held), Fault())

        self.assertIn("1 writes in new sessions", new_session(5)[0])
        self.assertEqual(new_session(3), [])
        self.assertEqual(new_session(8.1), [])
        self.assertEqual(new_session(5, ("pg2", 2, 8)), [])
        self.assertEqual(new_session(5, None), [])
        waited = [operation(5, lasted=3.5, reached=8.4)]
        self.assertEqual(broken(run(looks((0, "UP")), held=("pg1", 2, 8), operations=waited), Fault()), [])
        let_in = run(looks((0, "UP")), held=("pg1", 2, 8), operations=[operation(5, lasted=3.5, reached=7.9)])
        self.assertIn("1 writes in new sessions", broken(let_in, Fault())[0])

    def test_operations(self):
        error = operation(1, outcome="no server")
        slow, over, given_up = (operation(2, lasted=s) for s in (1.1, 5.1, PATIENCE))
        cut = operation(3, KEPT, "terminating connection", in_flight=True)
        calm, seamless = [operation(0.5)], Fault(planned=True, seamless=True)

        def run_of(operations):
            return run(looks((0, "UP")), operations=operations)

        found = run_of([*calm, error, slow, over, given_up, cut]).figures(OURS)
        self.assertEqual((found.due, found.delayed, found.failed, found.in_flight), (6 + len(RATES), 1, 3, 1))
        self.assertEqual((found.failed_by_kind, found.longest), ({SESSION: 3}, PATIENCE))
        self.assertAlmostEqual(found.gap, 4)  # an operation that succeeds too late still writes its row
        self.assertEqual(run_of([error]).figures(OFFICIAL).failed, 0)
        self.assertIn(" / -", figures.table({"a": {pool: [run_of([]).figures(pool)] for pool in ROUTES}}, []))
        self.assertEqual(broken(run_of([*calm, slow, cut]), seamless), [])
        self.assertIn("1 of 4 operations failed", broken(run_of([error]), seamless)[0])
        self.assertIn("1 of 4 operations failed", broken(run_of([over]), seamless)[0])
        slow_promotion = run_of([over])
        slow_promotion.truths = [Truth(0, "pg1", False), Truth(0, "pg2", True), Truth(3, "pg1", None), Truth(6, "pg2", False)]
        slow_promotion.promotions = figures.promotions(sorted(slow_promotion.truths))
        self.assertEqual([words for words in broken(slow_promotion, seamless) if "operations" in words], [])
        slow_promotion.operations.append(operation(1, lasted=6.1))
        self.assertIn("operations failed", " ".join(broken(slow_promotion, seamless)))
        self.assertEqual(broken(run_of([error]), Fault(planned=True)), [])
        self.assertEqual(figures.broken_promises(run_of([error]).figures(OURS), [seamless, Fault()], [1, 1], 3), [])

    def test_operations_in_many_runs(self):
        pool = lambda *failed: [run(looks((0, "UP"))).figures(OURS)._replace(failed=each) for each in failed]
        none, few, many = pool(0, 0, 2), pool(2, 2, 2), pool(80, 80, 80)
        self.assertIsNone(figures.more_fail(pool(2, 2, 99), few, many))
        self.assertIsNone(figures.more_fail(pool(7, 7, 99), few, many))  # as many more as are due in half a second
        self.assertIn("8 operations failed, and 2", figures.more_fail(pool(8, 8, 0), few, many))
        self.assertIn("8 operations failed, and 2", figures.more_fail(pool(8, 8, 0), many, few))
        self.assertIn("1 operations failed, and 0", figures.more_fail(pool(1, 1, 0), none, many))
        cut = lambda in_flight, kept: [found._replace(in_flight=in_flight, kept=kept) for found in pool(0, 0)]
        self.assertIsNone(figures.too_many_cut(cut(1, 5001)))
        self.assertIn("2 of 10000", figures.too_many_cut(cut(1, 5000)))

    def test_race(self):
        runs = {route: [{"gap": 1, "failed": 2}, {"gap": 3, "failed": 2}] for route in ROUTES}
        self.assertIn("| switchover | 2 (3) s; 2 | 2 (3) s; 2 |", figures.race_table({"switchover": runs}))

    def test_gone(self):
        gone, down = Fault(planned=True, gone=True), run(looks((0, "UP"), (5, "DOWN"), (5.5, "UP")))
        self.assertEqual(broken(down, gone), [])
        self.assertIn("DOWN", broken(down, Fault(planned=True))[0])

    def test_reads(self):
        out = [(0, 200), (1, 503), (2, 200), (3, 503), (4, 500)]

        def read(time, fault=Fault(), called=out):
            return broken(run(looks((0, "UP")), reads=[time, 9.8], called=[*called, (9.5, 200)]), fault)

        self.assertEqual(read(2.9), [])  # Patroni's check had already failed before
        self.assertEqual(read(6.5), [])
        self.assertIn("a read 3.70 s after", read(6.7)[0])
        self.assertIn("a read 6.20 s after", read(9.2)[0])
        self.assertEqual(read(9.4), [])  # the check passes again, and HAProxy may know it before the watch does
        self.assertEqual(read(6.7, Fault(silent=True)), [])
        self.assertIn("a read 8.20 s after", read(9.2, Fault(silent=True), [(1, 503)])[0])
        self.assertEqual(read(6.7, called=[(3, 200)]), [])
        self.assertEqual(run(looks((0, "UP"))).figures(OFFICIAL).late_read, 0)
        self.assertEqual(run(looks((0, "UP")), reads=[1, 9]).figures(OURS).read_pause, 8)
        self.assertIn("reads nothing", broken(run(looks((0, "UP")), reads=[8]))[0])


class Alerts(unittest.TestCase):
    def test_each_alert_comes_within_a_minute_of_its_part_of_the_fault(self):
        fault = namedtuple("Fault", "alerts then")({"first", "second"}, {"second"})
        wrong = lambda **raised: alerts.describe_differences(fault, raised, 10)
        self.assertEqual(wrong(first=60, second=70), [])
        self.assertEqual(wrong(first=61, second=71), ["first was raised only after 61 s", "second was raised only after 61 s"])
        self.assertEqual(wrong(first=1), ["second was not raised"])
        self.assertEqual(wrong(first=1, second=11, other=5), ["other was raised after 5 s"])

    @unittest.skipIf(os.environ.get("RECORDS"), "the record is being made")
    def test_each_fault_is_recorded_with_its_alerts(self):
        recorded = alerts.parse_recorded((alerts.DATA / "faults.txt").read_text())
        self.assertEqual({name: {*raised} for (name, raised), _ in recorded}, {name: fault.alerts for name, fault in (FAULTS | FOR_ALERTS).items()})


if __name__ == "__main__":
    unittest.main(argv=["test_figures"])
