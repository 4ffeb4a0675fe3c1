"""Brings a real Patroni into one state after another, and asks each node every health check meanwhile. Keeps each
answer that is new in the fields that the agent reads. Started by tests/data/record."""

import csv
import functools
import json
import pathlib
import re
import socket
import sys
import threading
import time

import faults
from cluster import DATA, Cluster
from watch import NODES

WORK, VERSION, ONLY = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
# The index has these fields of an answer as flags. The agent reads only the first two.
LOOKED_AT = {"cluster_unlocked", "pause"}
OTHERS = {"failsafe_mode_is_active", "pending_restart", "sync_standby", "quorum_standby", "watchdog_failed"}
ASKING = 3  # threads for each node: Patroni has five for its REST API


def describe(raw):
    """Returns an answer's status, role, state and flags, as the index has them."""
    head, _, body = raw.partition(b"\r\n\r\n")
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    said = said if isinstance(said, dict) else {}
    flags = sorted(flag for flag in LOOKED_AT | OTHERS if said.get(flag))
    flags += [f"rs={said['replication_state']}"] if said.get("replication_state") else []
    return head.split(b" ")[1].decode(), said.get("role", ""), said.get("state", ""), ",".join(flags)


def key_of(path, status, role, state, flags):
    """The key of an answer. One recorded answer for each key is enough."""
    return path, status, role, state, frozenset(flags.split(",")) - OTHERS - {""}


class Recorder:
    """Asks every node until it is stopped."""

    def __init__(self):
        with (WORK / "index.tsv").open() as index:
            rows = list(csv.DictReader(index, delimiter="\t"))
        self.paths = sorted({row["path"] for row in rows})
        self.next = 1 + max(int(row["file"].split("/")[1].split(".")[0]) for row in rows)
        self.known = {
            key_of(*(row[column] for column in ("path", "status", "role", "state", "flags")))
            for row in rows if row["version"] == VERSION
        }
        self.scenario, self.added, self.lock, self.ended = "", 0, threading.Lock(), threading.Event()
        (WORK / "answers" / VERSION).mkdir(exist_ok=True)
        parts = [self.paths[number::ASKING] for number in range(ASKING)]
        self.threads = [threading.Thread(target=self.ask, args=(node, part)) for node in NODES for part in parts]

    def ask(self, node, paths):
        while not self.ended.is_set():
            for path in paths:
                self.keep(path, *self.ask_for(node, path))
                time.sleep(0.02)

    def ask_for(self, node, path):
        """Returns the bytes of an answer, and the error if none came."""
        raw = b""
        try:
            with socket.create_connection((NODES[node], 8008), 2) as patroni:
                patroni.sendall(f"GET {path} HTTP/1.1\r\nHost: {node}:8008\r\nConnection: close\r\n\r\n".encode())
                while received := patroni.recv(65536):
                    raw += received
        except ConnectionRefusedError:
            return b"", "refused"
        except ConnectionResetError:
            return b"", "reset"
        except OSError:  # without the node, nothing is known of its Patroni
            return b"", "timeout" if self.is_reachable(node) else None
        return raw, None if raw else "empty"

    def is_reachable(self, node):
        try:
            socket.create_connection((NODES[node], 5432), 1).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True

    def keep(self, path, raw, failed):
        if not raw and not failed:
            return
        said = describe(raw) if raw else (failed, "", "", "")
        with self.lock:
            if key_of(path, *said) in self.known:
                return
            self.known.add(key_of(path, *said))
            file = f"{VERSION}/{self.next:04}.http"
            (WORK / "answers" / file).write_bytes(raw)
            with (WORK / "index.tsv").open("a") as index:
                print(file, VERSION, path, *said, self.scenario, sep="\t", file=index)
            self.next, self.added = self.next + 1, self.added + 1


SCENARIOS = {}


def scenario(name):
    def register(function):
        SCENARIOS[name] = function
        return function

    return register


def settle(cluster, seconds=60):
    """Waits until the primary has two streaming standbys and each Patroni passes its check. Reinitializes a standby
    that does not recover from a scenario."""
    end = time.monotonic() + seconds
    streaming = "select count(*) from pg_stat_replication where state = 'streaming'"
    while time.monotonic() < end:
        try:
            if cluster.sql(cluster.primary(), streaming).strip() == "2":
                for node in NODES:
                    cluster.run(node, "curl -s -m 1 -f -o /dev/null http://127.0.0.1:8008/health")
                return
        except RuntimeError:
            pass
        time.sleep(0.2)
    assert seconds == 60, "the cluster does not settle"
    for standby in faults.others(cluster.primary()):
        cluster.patronictl("reinit", "demo", standby, "--force", "--wait")
    settle(cluster, 120)


def edit_configuration(cluster, node, change):
    cluster.run(node, f"sed -i '{change}' /etc/patroni/config.yml; systemctl reload patroni")


@scenario("healthy")
def healthy(cluster, chance):
    time.sleep(10)


@scenario("paused, DCS frozen")
def paused(cluster, chance):
    cluster.patronictl("pause", "demo", "--wait")
    try:
        time.sleep(5)
        faults.freeze_etcd(cluster, 25)
        time.sleep(5)
    finally:
        cluster.patronictl("resume", "demo", "--wait")


@scenario("a standby stopped by hand in pause")
def stopped_standby(cluster, chance):
    standby = faults.others(cluster.primary())[0]
    cluster.patronictl("pause", "demo", "--wait")
    try:
        cluster.pg_ctl(standby, "-m fast stop")
        time.sleep(8)
    finally:
        cluster.patronictl("resume", "demo", "--wait")


@scenario("pending restart")
def pending_restart(cluster, chance):
    cluster.change_setting("postgresql.parameters.max_connections=60")
    time.sleep(10)
    cluster.change_setting("postgresql.parameters.max_connections=50")


def synchronous(cluster, chance, mode):
    cluster.change_setting(f"synchronous_mode={mode}")
    try:
        time.sleep(10)
    finally:
        cluster.change_setting("synchronous_mode=null")


scenario("synchronous")(functools.partial(synchronous, mode="true"))
if int(VERSION.split(".")[0]) >= 4:
    scenario("quorum")(functools.partial(synchronous, mode="quorum"))


@scenario("tags")
def tags(cluster, chance):
    primary = cluster.primary()
    for node in NODES:
        edit_configuration(cluster, node, "$ a tags: {x: y, noloadbalance: %s}" % ("false" if node == primary else "true"))
    time.sleep(8)
    edit_configuration(cluster, primary, "s/noloadbalance: false/noloadbalance: true/")
    for node in faults.others(primary):
        edit_configuration(cluster, node, "s/noloadbalance: true/noloadbalance: false/")
    time.sleep(8)
    for node in NODES:
        edit_configuration(cluster, node, "/^tags: /d")


@scenario("a watchdog that is not there")
def watchdog(cluster, chance):
    for node in NODES:
        edit_configuration(cluster, node, "$ a watchdog: {mode: required, device: /dev/none}")
        cluster.patroni(node, "restart")
    time.sleep(15)
    for node in NODES:
        edit_configuration(cluster, node, "/^watchdog: /d")
        cluster.patroni(node, "restart")


@scenario("a standby does not start")
def start_failed(cluster, chance):
    standby = faults.others(cluster.primary())[0]
    edit_configuration(cluster, standby, "s/parameters: {unix/parameters: {shared_preload_libraries: nothing, unix/")
    time.sleep(3)
    try:
        cluster.patronictl("restart", "demo", standby, "--force")
    except RuntimeError:  # patronictl says that the restart failed
        pass
    time.sleep(8)
    edit_configuration(cluster, standby, "s/shared_preload_libraries: nothing, //")


@scenario("replication broken")
def replication_broken(cluster, chance):
    primary = cluster.primary()
    cluster.sql(primary, "alter role replication noreplication")
    cluster.sql(primary, "select pg_terminate_backend(pid) from pg_stat_replication")
    time.sleep(10)
    cluster.sql(primary, "alter role replication replication")


@scenario("a standby lags")
def lagging(cluster, chance):
    primary = cluster.primary()
    standby = faults.others(primary)[0]
    cluster.sql(standby, "select pg_wal_replay_pause()")
    cluster.sql(primary, "create table filled as select generate_series(1, 200000)")
    time.sleep(8)
    cluster.sql(standby, "select pg_wal_replay_resume()")
    cluster.sql(primary, "drop table filled")


@scenario("standby cluster")
def standby_cluster(cluster, chance):
    """Makes a standby cluster of a copied primary on HAProxy's machine: a frozen DCS, a switchover, and
    the promotion of the standby cluster."""
    primary, folder = cluster.primary(), "/var/lib/postgresql/upstream"
    as_postgres = lambda words: cluster.run("lb", f"su postgres -s /bin/sh -c \"$(ls -d /usr/lib/postgresql/*/bin | tail -1)/{words}\" > /dev/null 2>&1")
    cluster.run("lb", "install -d -o postgres -m 700 /var/lib/postgresql")
    as_postgres(f"pg_basebackup -h {NODES[primary]} -U replication -c fast -R -D {folder}")
    as_postgres(f"pg_ctl -D {folder} -w -o '-p 5433 -c unix_socket_directories=/tmp -c hba_file={folder}/pg_hba.conf -c ident_file={folder}/pg_ident.conf' -l /tmp/upstream.log start")
    as_postgres(f"pg_ctl -D {folder} -w promote")
    try:
        cluster.change_setting("standby_cluster.host=lb")
        cluster.change_setting("standby_cluster.port=5433")
        time.sleep(30)
        leader = wait_for_leader(cluster, "standby_leader")
        faults.freeze_etcd(cluster, 25)
        time.sleep(10)
        leader = wait_for_leader(cluster, "standby_leader")
        cluster.patronictl("switchover", "demo", "--leader", leader, "--candidate", faults.others(leader)[0], "--force")
        time.sleep(10)
    finally:
        cluster.change_setting("standby_cluster=null")
        cluster.primary()
        as_postgres(f"pg_ctl -D {folder} -m immediate stop")


def wait_for_leader(cluster, role):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for node in NODES:
            try:
                said = cluster.run(node, "curl -s -m 1 http://127.0.0.1:8008/patroni || true")
            except RuntimeError:
                continue
            if f'"role": "{role}"' in said:
                return node
        time.sleep(0.2)
    raise RuntimeError(f"no {role} for 60 s")


@scenario("a new cluster")
def bootstrap(cluster, chance):
    """Bootstraps the cluster again. This removes its settings from the DCS, so it comes last."""
    for node in NODES:
        cluster.patroni(node, "stop")
    cluster.run("lb", "ETCDCTL_API=3 etcdctl --endpoints=etcd:2379 del --prefix /service/demo")
    for node in NODES:
        cluster.run(node, f"rm -rf {DATA}/*")
    for node in NODES:
        cluster.patroni(node, "start")
        time.sleep(1)


def prepare(cluster):
    # A promotion first asks the archive for WAL, which is slow while /tmp/slow exists.
    restore = "test ! -e /tmp/slow || sleep 2; false"
    cluster.change_setting(f"postgresql.recovery_conf.restore_command={json.dumps(restore)}")


def main():
    cluster, recorder = Cluster(), Recorder()
    prepare(cluster)
    # A fault of HAProxy, the agents or a link does not change Patroni's answers.
    beside = {"haproxy", "agents", "machine", "machines"}
    made = {name: fault for name, fault in faults.FAULTS.items() if not fault.takes or fault.takes - beside}
    last = {"a new cluster": SCENARIOS.pop("a new cluster")}
    failed = []
    for thread in recorder.threads:
        thread.start()
    try:
        settle(cluster)
        for name, make in {**SCENARIOS, **made, **last}.items():
            if not re.search(ONLY, name):
                continue
            time.sleep(2)
            recorder.scenario, before, began = name, recorder.added, time.monotonic()
            try:
                make(cluster, faults.Chance(f"{VERSION} {name}"))
            except RuntimeError as error:
                failed.append(f"{name}: {error}")
            settle(cluster)
            print(f"{name}: {recorder.added - before} new answers, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        recorder.ended.set()
        for thread in recorder.threads:
            thread.join()
    print(f"record: {recorder.added} new answers of Patroni {VERSION}")
    for what in failed:
        print(f"record: this scenario failed: {what}")
    sys.exit(bool(failed))


main()
