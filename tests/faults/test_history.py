"""Tests, on made-up histories, that history.py finds each violation and no other."""

import unittest

import figures
import history
from test_figures import Fault, looks
from test_figures import run as calm_run
from pools import OURS
from watch import FAIL, OK, UNKNOWN, Read, Write


def write(number, done=OK, seen=None, session=1, node="pg1", client="a"):
    seen = None if seen is None else {client: seen}
    return Write(OURS, (client, number), number, number + 0.5, node, "", False, session, done, seen, None)


def read(time, seen, session=1):
    return Read("postgres-read", time, time + 0.1, "pg2", True, session, OK if seen else FAIL, seen)


def found(writes=(), reads=(), rows=(), promotions=()):
    """The number of findings of each kind, without the unknown writes."""
    findings = history.find(writes, reads, rows, promotions)._asdict()
    return {kind: len(of_it) for kind, of_it in findings.items() if of_it and kind != "unknown"}


def rows(*numbers, node="pg1", client="a"):
    return [(client, number, node) for number in numbers]


class History(unittest.TestCase):
    def test_nothing_wrong(self):
        writes = [write(1, seen=0), write(2, UNKNOWN), write(3, UNKNOWN), write(4, FAIL), write(5, seen=3, session=2)]
        # A write that was in flight at the end has no record and no promise. Rows of other clients are not judged.
        at_the_end = rows(1, 3, 5, 6) + rows(1, client="stranger")
        reads = [read(1.6, {"a": 1, "b": 7}), read(3.6, None), read(5.6, {"a": 5, "b": 7}), read(6, {"a": 1}, session=9)]
        self.assertEqual(found(writes, reads, at_the_end, [(0, "pg1")]), {})
        self.assertEqual(len(history.find(writes, reads, at_the_end).unknown), 2)

    def test_lost(self):
        self.assertEqual(found([write(1), write(2), write(3, UNKNOWN)], rows=rows(1)), {"lost": 1})

    def test_phantom(self):
        self.assertEqual(found([write(1), write(2, FAIL)], rows=rows(1, 2)), {"phantom": 1})
        self.assertEqual(found([write(1), write(3)], rows=rows(1, 2, 3)), {"phantom": 1})  # the client never sent 2
        self.assertEqual(found([write(1), write(2, UNKNOWN)], rows=rows(1, 2, 2)), {"phantom": 1})  # 2 is there twice

    def test_split(self):
        promotions = [(0, "pg1"), (2.2, "pg2")]
        both = [write(number) for number in (1, 2, 3)]
        self.assertEqual(found(both, rows=rows(1, 2, 3), promotions=promotions), {"split": 1})
        self.assertEqual(found(both, rows=rows(1, 2), promotions=promotions), {"split": 1, "lost": 1})
        self.assertEqual(found([write(2, node="pg2")], rows=rows(2, node="pg2"), promotions=promotions), {})
        self.assertEqual(found([write(3, UNKNOWN)], promotions=promotions), {})
        self.assertEqual(found([write(1)], rows=rows(1, node="pg3")), {"split": 1})

    def test_stale(self):
        backwards = [read(1, {"a": 2, "b": 5}), read(2, {"a": 3, "b": 4})]
        self.assertEqual(found(reads=backwards), {"stale": 1})
        self.assertEqual(found(reads=[read(2, {"a": 2}), read(1, {"a": 1})]), {})  # in order of their start
        self.assertEqual(found(reads=[read(1, {"a": 3}), read(2, {"a": 2}), read(3, {"a": 2})]), {"stale": 2})
        self.assertEqual(found(reads=[read(1, {"a": 3}), read(2, {"a": 2}, session=2)]), {})

    def test_own_writes(self):
        ours = [write(1, seen=0), write(2, seen=1)]
        self.assertEqual(found(ours, rows=rows(1, 2)), {})
        self.assertEqual(found([write(2, seen=1), write(3, seen=1)], rows=rows(2, 3)), {"stale": 1})
        self.assertEqual(found([write(2, seen=1), write(3, seen=1, session=2)], rows=rows(2, 3)), {})
        self.assertEqual(found([write(2, seen=1)], [read(3, {"a": 1})], rows(2)), {"stale": 1})
        self.assertEqual(found([write(2, UNKNOWN)], [read(3, {"a": 1})], rows(2)), {})

    def test_promises(self):
        calm = calm_run(looks((0, "UP"))).figures(OURS)

        def broken(fault=Fault(), synchronous=False, **what):
            return figures.broken_promises(calm._replace(**what), [fault], [1], 3, synchronous)

        self.assertEqual(broken(lost=1), [])
        self.assertIn("1 writes lost though replication", broken(lost=1, synchronous=True)[0])
        self.assertIn("1 writes lost though all was planned", broken(Fault(planned=True), lost=1)[0])
        self.assertIn("2 failed writes are in the database", broken(phantom=2)[0])
        self.assertIn("3 reads saw less", broken(stale=3)[0])


if __name__ == "__main__":
    unittest.main(argv=["test_history"])
