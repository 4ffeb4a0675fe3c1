"""Tests on made-up answers that acceptance.py finds each wrong answer, and nothing else."""

import unittest

from acceptance import GONE, PRIMARY, REPLICA, UNKNOWN, Answer, Said, Truth, kind, wrong


def found(words, *is_, check=PRIMARY, well=(), grace=0, lasts=0.02, before=()):
    """An answer at 10 s, with a tenth of a second of each of these around it. `well`: what Patroni said, once a
    second."""
    begin = 10 - 0.05 * len(is_)
    truths = [Truth(begin + 0.1 * n, begin + 0.1 * n + 0.09, each) for n, each in enumerate(is_)]
    said = [Said(9.4 + n, 9.4 + n + 0.1, *each) for n, each in enumerate(well)]
    answers = [Answer(at, at + 0.1, check, grace, kind(each), each) for at, each in before]
    answers.append(Answer(10, 10 + lasts, check, grace, kind(words), words))
    return [why for _, why in wrong(answers, said, truths)]


WELL = [(PRIMARY, True)] * 2
READY, MAINT, DOWN, HELD = "up ready # running", "up maint # replica", "down ready # refused", "!unreachable:_held_1_of_3_s"


class Acceptance(unittest.TestCase):
    def test_ready(self):
        self.assertEqual(found(READY, *[PRIMARY] * 9), [])
        self.assertEqual(found(READY, *[REPLICA] * 9, check=REPLICA), [])
        self.assertIn("replica", found(READY, *[REPLICA] * 9)[0])
        self.assertIn("primary", found(READY, *[PRIMARY] * 9, check=REPLICA)[0])
        self.assertIn("gone", found(READY, *[GONE] * 9)[0])
        self.assertEqual(found(READY, *[GONE] * 4, PRIMARY, *[GONE] * 4), [])  # the node was a primary meanwhile
        self.assertEqual(found(READY, *[GONE] * 4, UNKNOWN, *[GONE] * 4), [])
        self.assertEqual(len(found(READY, PRIMARY, *[GONE] * 8)), 1)  # the node was a primary, but long before
        self.assertEqual(found(READY), [])

    def test_not_ready_while_all_was_well(self):
        for words in MAINT, DOWN, "fail ready # crashed":
            self.assertEqual(found(words, *[PRIMARY] * 9, well=WELL), ["all was well"])
            self.assertEqual(found(words, *[PRIMARY] * 4, GONE, *[PRIMARY] * 4, well=WELL), [])
            self.assertEqual(found(words, *[PRIMARY] * 9, well=[(PRIMARY, True), (PRIMARY, False)]), [])
            self.assertEqual(found(words, *[PRIMARY] * 9, well=WELL[:1]), [])  # Patroni's later state is unknown
            self.assertEqual(found(words, *[PRIMARY] * 9, well=[(REPLICA, True)] * 2), [])
            self.assertEqual(found(words, *[REPLICA] * 9, well=WELL), [])
        self.assertEqual(found(DOWN, *[PRIMARY] * 9, well=WELL, lasts=1.5), [])

    def test_held(self):
        held = lambda at, words=READY, grace=3: found(HELD, *[PRIMARY] * 9, grace=grace, before=[(at, words)])
        self.assertEqual(held(7), [])
        self.assertEqual(held(7, MAINT), [])
        self.assertEqual(held(6.8), ["nothing good to hold"])
        self.assertEqual(held(9, grace=0), ["nothing good to hold"])
        self.assertEqual(held(9, DOWN), ["nothing good to hold"])


if __name__ == "__main__":
    unittest.main(argv=["test_acceptance"])
