"""Runs Patroni's features, asks the agent beside each node, and compares each answer with PostgreSQL's own state.
Started by tests/release/acceptance, in Patroni's source.

Asks each agent ten times a second, in turns for a primary and for a replica, with the grace period and without. Asks
PostgreSQL twenty times a second, and Patroni twice. An answer of the agent is wrong if

* it is READY for a primary (or a replica), and PostgreSQL had another role from BLINK before the question to BLINK
  after the answer;
* it is not READY although the node was healthy before, during and after: Patroni promptly answered 200 and "running" to
  the same check, and PostgreSQL had the right role;
* it keeps HAProxy's state for longer than the grace period after the last good answer.

An answer is not judged if PostgreSQL did not answer in time."""

import glob
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter, namedtuple
from pathlib import Path

import psycopg2
import yaml

import watch

BLINK, GRACE, PROMPT = 0.1, 3, 1
PRIMARY, REPLICA = "primary", "replica"
READY, OUT, DOWN, HELD = "ready", "out", "down", "held"
GONE, UNKNOWN = "gone", "unknown"
# Answers of the agent, of Patroni (True: 200 and running), and of PostgreSQL (PRIMARY, REPLICA, GONE or UNKNOWN)
Answer = namedtuple("Answer", "begun ended check grace kind words")
Said = namedtuple("Said", "begun ended check well")
Truth = namedtuple("Truth", "begun ended role")


def kind_of(words):
    """What HAProxy makes of an answer."""
    if words.startswith("!"):
        return HELD
    if words.startswith("up ready"):
        return READY
    return OUT if words.startswith(("up maint", "up drain")) else DOWN


def around(records, begin, end):
    """The records that overlap this time, the last before and the first after. They do not overlap each other."""
    first = max(0, bisect_left(records, begin, key=lambda record: record.ended) - 1)
    return records[first : bisect_left(records, end, key=lambda record: record.begun) + 1]


def find_wrong(answers, said, truths):
    """The wrong answers of one node: [(answer, why)]."""
    found, good = [], {}
    for answer in answers:
        then = [truth.role for truth in around(truths, answer.begun - BLINK, answer.ended + BLINK)]
        patroni = around(said, answer.begun, answer.ended)
        if answer.kind == READY:
            if then and answer.check not in then and UNKNOWN not in then:
                found.append((answer, f"PostgreSQL: {', '.join(then)}"))
        elif all(told.check == answer.check and told.well and told.ended - told.begun < PROMPT for told in patroni):
            # one record before and one after, without a gap between them
            close = len(patroni) > 1 and patroni[0].ended <= answer.begun and answer.ended <= patroni[-1].begun
            if close and patroni[-1].begun - patroni[0].ended < 2 * PROMPT and set(then) == {answer.check}:
                found.append((answer, "the node was healthy"))
        remembered = answer.check, answer.grace
        if answer.kind == HELD and answer.begun - good.get(remembered, 0) > answer.grace:
            found.append((answer, "no good answer within the grace period"))
        if answer.kind in (READY, OUT):
            good[remembered] = answer.ended
    return found


class Node:
    """Asks the agent, Patroni and PostgreSQL of one node until `stop`."""

    def __init__(self, config, agent):
        self.name, self.agent = f"{config.parent.name}-{config.stem}", agent
        self.config = yaml.safe_load(config.read_text())
        self.address = self.config["restapi"]["connect_address"]
        self.certificate, self.key = (config.parent.parent / f"patroni.{end}" for end in ("crt", "key"))
        self.memory = {grace: Path(os.environ["TMPDIR"], f"{self.name}-{grace}") for grace in (GRACE, 0)}
        for memory in self.memory.values():
            memory.touch()  # systemd-tmpfiles creates this file
        self.port = socket.create_server(("127.0.0.1", 0))
        self.answers, self.said, self.truths, self.broken = [], [], [], []
        self.ended = threading.Event()
        tasks = (self.ask_agent, 0.1), (self.ask_patroni, 0.5), (self.ask_postgres, 0.05)
        self.threads = [threading.Thread(target=self.repeat, args=task) for task in tasks]
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.ended.set()
        for thread in self.threads:
            thread.join()
        if self.broken:
            raise self.broken[0]

    def repeat(self, ask, seconds):
        watch.local.patience = 0.3
        try:
            for _ in watch.Watch._every(self, seconds):
                ask()
        except Exception as error:  # a run must not go on if one of these threads has ended
            self.broken.append(error)

    def ask_agent(self):
        turn = len(self.answers)
        check, grace = (PRIMARY, REPLICA)[turn % 2], (GRACE, 0)[turn // 2 % 2]
        files = ["--memory-file", self.memory[grace], "--hold-file", "/nonexistent", "--before-stop-file", "/nonexistent"]
        tls = ["--cacert", self.certificate, "--cert", self.certificate, "--key", self.key]
        command = [self.agent, "--agent-send", "--grace", f"{grace}s", *files, *tls, "--url", f"https://{self.address}"]
        begun = time.time()
        # A TCP socket, as from xinetd: on another kind of socket the agent would run as a check by hand.
        with socket.create_connection(self.port.getsockname()) as haproxy:
            with self.port.accept()[0] as connection:
                asked = subprocess.Popen(command, stdin=connection, stdout=connection, stderr=subprocess.DEVNULL)
            haproxy.sendall(f"{check}\n".encode())
            words = b"".join(iter(lambda: haproxy.recv(256), b"")).decode().strip()
            asked.wait()
        self.answers.append(Answer(begun, time.time(), check, grace, kind_of(words), words))

    def ask_patroni(self):
        check = self.truths[-1].role if self.truths else GONE
        if check not in (PRIMARY, REPLICA):
            check = PRIMARY
        tls = ssl.create_default_context(cafile=self.certificate)
        tls.load_cert_chain(self.certificate, self.key)
        host, port = self.address.split(":")
        patroni, begun, well = http.client.HTTPSConnection(host, int(port), timeout=3, context=tls), time.time(), False
        try:
            patroni.request("GET", f"/{check}")
            answer = patroni.getresponse()
            well = answer.status == 200 and json.loads(answer.read())["state"] == "running"
        except (OSError, http.client.HTTPException):
            pass
        finally:
            patroni.close()
        self.said.append(Said(begun, time.time(), check, well))

    session = None

    def ask_postgres(self):
        begun = time.time()
        try:
            if self.session is None:
                self.session = watch.connect(os.environ["TMPDIR"], self.config["postgresql"]["listen"].split(":")[1])
            role = REPLICA if watch.ask(self.session, "select pg_is_in_recovery()")[0][0] else PRIMARY
        except psycopg2.Error as error:
            self.session, words = None, str(error)
            sure = any(each in words for each in ("No such file", "refused", "shutting down", "starting up", "terminat"))
            role = GONE if sure else UNKNOWN
        self.truths.append(Truth(begun, time.time(), role))


def judge(feature, nodes):
    """Prints a summary and each wrong answer. Returns the counts."""
    counted = Counter()
    for node in nodes:
        node.stop()
        found = find_wrong(node.answers, node.said, node.truths)
        for answer, why in found[:20]:
            print(f"  WRONG: {node.name}, {time.ctime(answer.begun)}, {answer.check}: {answer.words!r}; {why}", flush=True)
        counted.update(answer.kind for answer in node.answers)
        counted.update(f"{READY} {answer.check}" for answer in node.answers if answer.kind == READY)
        counted.update(answers=len(node.answers), wrong=len(found), unknown=sum(t.role == UNKNOWN for t in node.truths))
    print(format_line(feature, counted), flush=True)
    return counted


def format_line(name, counted):
    columns = "answers", f"{READY} {PRIMARY}", f"{READY} {REPLICA}", OUT, DOWN, HELD, "wrong"
    return f"| {name:24} | " + " | ".join(f"{counted[column]} {column}" for column in columns) + " |"


def main(agent, *features):
    command = ["behave", "--no-color", "--format", "progress", "--no-capture"]
    behave = subprocess.Popen(command + [f"features/{name}.feature" for name in features], stdout=open("behave.log", "w"))
    feature, configs, nodes, total = None, set(), [], Counter()
    while behave.poll() is None:
        found = [Path(file) for file in sorted(glob.glob("features/output/*/postgres*.yml"))]
        for config in found:
            if config in configs or config.parent.name.endswith("_failed"):
                continue
            if config.parent.name != feature and nodes:
                total += judge(feature, nodes)
                nodes = []
            feature = config.parent.name
            try:
                nodes.append(Node(config.resolve(), agent))
                configs.add(config)
            except (yaml.YAMLError, KeyError, TypeError):  # the file is only half written
                pass
        time.sleep(0.1)
    if nodes:
        total += judge(feature, nodes)
    print("\n".join(Path("behave.log").read_text().splitlines()[-12:]))
    print(format_line("sum", total))
    for seen in f"{READY} {PRIMARY}", f"{READY} {REPLICA}", OUT, DOWN, *([] if features else [HELD]):
        if not total[seen]:
            total["wrong"] += 1
            print(f"WRONG: no answer was {seen}")
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
