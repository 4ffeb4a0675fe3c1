"""Tests on made-up operations and histories: which links nemesis.py cuts, and what it reports as wrong."""

import contextlib
import io
import json
import os
import pathlib
import tempfile
import unittest
from random import Random
from types import SimpleNamespace
from unittest import mock

import history
import nemesis
import pools
from test_history import write
from watch import FAIL, NODES, Truth


class Site:
    """Remembers the last rules of each machine. The power of pg3 is cut."""

    def __init__(self):
        self.deaf, self.rules, self.started = frozenset(), {}, []

    def patroni(self, node, verb):
        self.started.append(node)

    def is_primary(self, node):
        return node == "pg2"

    def run(self, node, script):
        if node == "pg3":
            raise RuntimeError("pg3 does not run")
        self.rules[node] = script.partition("2> /dev/null; ")[2].split("; ")[:-1]


def partitions(kind):
    """Makes many partitions of that kind: [who does not hear whom]."""
    return [kind(Site(), Random(seed)).choose()[1] for seed in range(50)]


class Nemesis(unittest.TestCase):
    def setUp(self):
        self.enterContext(contextlib.redirect_stdout(io.StringIO()))

    def test_partitions_cut_the_right_links(self):
        nodes = set(NODES)
        for deaf in partitions(nemesis.Halves):
            self.assertEqual(len(deaf), 2 * 3 * 3)
        for deaf in partitions(nemesis.Ring):
            hears = [6 - 1 - sum(who == party for who, _ in deaf) for party in nemesis.PARTIES]
            self.assertEqual(hears, [2] * 6)
        for deaf in partitions(nemesis.One):
            self.assertEqual(len(deaf), 2 * 5)
        sizes = set()
        for deaf in partitions(nemesis.NodeFromDcs):
            self.assertTrue(all(set(pair) - {"DCS"} < nodes for pair in deaf))
            sizes.add(len(deaf))
        self.assertEqual(sizes, {1, 2})  # in both directions, and in one
        self.assertTrue(all(set(pair) < nodes for deaf in partitions(nemesis.NodeFromNode) for pair in deaf))
        parties = {party for deaf in partitions(nemesis.HaproxyFromNode) for pair in deaf for party in pair}
        self.assertEqual(parties, {*nemesis.HAPROXIES, *NODES})

    def test_two_partitions_at_once(self):
        site = Site()
        first, second = nemesis.NodeFromDcs(site, Random(1)), nemesis.NodeFromDcs(site, Random(1))
        first.choose = lambda: ("", {("pg1", "DCS"), ("DCS", "pg1"), ("HAProxy", "DCS")})
        second.choose = lambda: ("", {("pg1", "pg2"), ("pg3", "pg1")})
        first.begin()
        second.begin()
        drop = "ip rule add pref 10 from {} to {} blackhole".format
        self.assertEqual(site.rules["pg1"], [drop("10.55.0.2", "10.55.0.11"), drop("10.55.0.12", "10.55.0.11")])
        self.assertEqual(site.rules["lb"], [drop("10.55.0.11", "10.55.0.2")])
        first.end()
        self.assertEqual(site.rules["pg1"], [drop("10.55.0.12", "10.55.0.11")])
        second.end()
        self.assertEqual(site.rules, {"lb": [], "pg1": [], "pg2": []})

    def test_a_plan_depends_on_seed_and_number(self):
        told = lambda seed, number: [(due, type(o).__name__, verb) for due, o, verb in nemesis.plan(Site(), seed, number)]
        self.assertEqual(told(1, 2), told(1, 2))
        self.assertNotEqual(told(1, 2), told(1, 3))
        self.assertNotEqual(told(1, 2), told(2, 2))
        kinds = {name for number in range(60) for _, name, _ in told(1, number)}
        self.assertEqual(kinds, {k.__name__ for k in (*nemesis.PARTITIONS, *nemesis.PROCESSES, nemesis.Switchover)})

    def test_all_is_undone(self):
        class Broken:
            ended = 0

            def begin(self):
                raise RuntimeError("no such machine\nat all")

            def end(self):
                self.ended += 1

        broken, site = Broken(), Site()
        with mock.patch.object(nemesis, "plan", lambda *_: [(0, broken, "begin"), (0, broken, "end")]):
            told = [words for _, words in nemesis.run_operations(site, 1, 1)]
        self.assertEqual(site.started, ["pg1", "pg2", "pg3"])
        self.assertEqual((told, broken.ended), (["begin: Broken: no such machine", "end: Broken"], 1))

    def find(self, writes, truths, pool=pools.OURS):
        promotions = [(5, "pg1"), (10, "pg2")]
        run = SimpleNamespace(writes=writes, operations=[], reads=[], promotions=promotions, truths=truths)
        run.rows = [(*each.row, each.node) for each in writes if each.done != FAIL]
        return nemesis.find(run, pool)

    def test_split(self):
        """pg2 was last seen as a standby at 9, and as the primary at 10."""
        truths = [Truth(4, "pg1", False), Truth(4, "pg2", True, 3)]
        truths += [Truth(9.5, "pg2", None, 9), Truth(10, "pg2", False, 9.9)]
        split = lambda number, node: len(self.find([write(number, node=node)], truths)[0].split)
        self.assertEqual([split(7, "pg1"), split(11, "pg1"), split(11, "pg2")], [0, 1, 0])
        self.assertEqual(split(8.9, "pg2"), 0)  # it ended at 9.4
        self.assertEqual(split(8, "pg2"), 1)  # pg2 was certainly a standby
        self.assertEqual(self.find([write(11)], truths, "official"), (history.Findings([], [], [], [], []), 0))

    def test_wrong_findings_are_reported(self):
        findings = history.Findings(lost=[1, 2], phantom=[1], split=[], stale=[], unknown=[1])
        self.assertEqual(nemesis.describe_wrong(findings, True), ["2 lost", "1 failed but there"])
        self.assertEqual(nemesis.describe_wrong(findings, False), ["1 failed but there"])
        findings = findings._replace(split=[1], phantom=[], stale=[2])
        self.assertEqual(nemesis.describe_wrong(findings, False), ["1 taken by two nodes", "1 stale in a session"])

    def test_a_seed_is_done_after_its_minutes(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, AGENT="/bin/echo"):
            file = pathlib.Path(folder, "made")
            line = nemesis.read_lines(file, 1, True)[0] | {"seconds": 40, "two_up": 0, "wrong": [], "pools": {}}
            done = lambda minutes=1: nemesis.is_done(file, 1, True, minutes)
            self.assertFalse(done())
            others = [line | {"seed": 2}, line | {"synchronous": False}, line | {"version": "another"}]
            file.write_text("".join(json.dumps(each) + "\n" for each in [line, *others]))
            self.assertFalse(done())
            file.write_text((json.dumps(line) + "\n") * 2)
            self.assertEqual((done(), done(2)), (True, False))
            self.assertEqual(nemesis.print_totals(file, 1, True), 1)  # no write and no read was recorded
            file.write_text(json.dumps(line | {"two_up": 1}) + "\n" + json.dumps(line))
            self.assertEqual(nemesis.print_totals(file, 1, True), 0)
            file.write_text(json.dumps(line | {"two_up": 1, "wrong": ["1 lost"]}))
            self.assertEqual(nemesis.print_totals(file, 1, True), 1)


if __name__ == "__main__":
    unittest.main(argv=["test_nemesis"])
