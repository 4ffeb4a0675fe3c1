"""Tests, on made-up answers, that acceptance.py finds each wrong answer and no other."""

import unittest

from acceptance import GONE, PRIMARY, REPLICA, UNKNOWN, Answer, Said, Truth, find_wrong, kind_of


def complaints(words, *roles, check=PRIMARY, well=(), grace=0, lasts=0.02, before=()):
    """The complaints about an answer at 10 s, with each role for a tenth of a second around it, and one answer of
    Patroni a second from `well`."""
    begin = 10 - 0.05 * len(roles)
    truths = [Truth(begin + 0.1 * n, begin + 0.1 * n + 0.09, each) for n, each in enumerate(roles)]
    said = [Said(9.4 + n, 9.4 + n + 0.1, *each) for n, each in enumerate(well)]
    answers = [Answer(at, at + 0.1, check, grace, kind_of(each), each) for at, each in before]
    answers.append(Answer(10, 10 + lasts, check, grace, kind_of(words), words))
    return [why for _, why in find_wrong(answers, said, truths)]


WELL = [(PRIMARY, True)] * 2
READY, MAINT, DOWN, HELD = "up ready # running", "up maint # replica", "down ready # refused", "!unreachable:_held_1_of_3_s"


class Acceptance(unittest.TestCase):
    def test_ready(self):
        self.assertEqual(complaints(READY, *[PRIMARY] * 9), [])
        self.assertEqual(complaints(READY, *[REPLICA] * 9, check=REPLICA), [])
        self.assertIn("replica", complaints(READY, *[REPLICA] * 9)[0])
        self.assertIn("primary", complaints(READY, *[PRIMARY] * 9, check=REPLICA)[0])
        self.assertIn("gone", complaints(READY, *[GONE] * 9)[0])
        self.assertEqual(complaints(READY, *[GONE] * 4, PRIMARY, *[GONE] * 4), [])  # the node was a primary meanwhile
        self.assertEqual(complaints(READY, *[GONE] * 4, UNKNOWN, *[GONE] * 4), [])
        self.assertEqual(len(complaints(READY, PRIMARY, *[GONE] * 8)), 1)  # the node was a primary, but long before
        self.assertEqual(complaints(READY), [])

    def test_not_ready_on_a_healthy_node(self):
        for words in MAINT, DOWN, "fail ready # crashed":
            self.assertEqual(complaints(words, *[PRIMARY] * 9, well=WELL), ["the node was healthy"])
            self.assertEqual(complaints(words, *[PRIMARY] * 4, GONE, *[PRIMARY] * 4, well=WELL), [])
            self.assertEqual(complaints(words, *[PRIMARY] * 9, well=[(PRIMARY, True), (PRIMARY, False)]), [])
            self.assertEqual(complaints(words, *[PRIMARY] * 9, well=WELL[:1]), [])  # Patroni's later state is unknown
            self.assertEqual(complaints(words, *[PRIMARY] * 9, well=[(REPLICA, True)] * 2), [])
            self.assertEqual(complaints(words, *[REPLICA] * 9, well=WELL), [])
        self.assertEqual(complaints(DOWN, *[PRIMARY] * 9, well=WELL, lasts=1.5), [])

    def test_held(self):
        held = lambda at, words=READY, grace=3: complaints(HELD, *[PRIMARY] * 9, grace=grace, before=[(at, words)])
        self.assertEqual(held(7), [])
        self.assertEqual(held(7, MAINT), [])
        self.assertEqual(held(6.8), ["no good answer within the grace period"])
        self.assertEqual(held(9, grace=0), ["no good answer within the grace period"])
        self.assertEqual(held(9, DOWN), ["no good answer within the grace period"])


if __name__ == "__main__":
    unittest.main(argv=["test_acceptance"])
