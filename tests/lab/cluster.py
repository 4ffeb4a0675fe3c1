"""Controls the site of tests/lab/cluster from Python, as an operator or a fault does."""

import json
import os
import pathlib
import subprocess
import time
import urllib.request

from watch import NODES

DATA = "/var/lib/postgresql/patroni"


class Cluster:
    """The machines of tests/lab/cluster."""

    held = None  # (node, begin, end) of an operator's hold
    synchronous = False  # Patroni's synchronous_mode

    def _call(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def run(self, node, script):
        return self._call("tests/lab/machine", "run", node, "sh", "-c", script)

    def host_pid(self, node):
        """The host's PID of a machine's systemd."""
        return self._call("tests/lab/machine", "pid", node).strip()

    def put(self, node, file, path):
        self._call("tests/lab/machine", "put", node, str(file), path)

    def patronictl(self, *words):
        """Runs patronictl, which reports some failures only in its output and not in its exit status."""
        said = self._call("tests/lab/cluster", "patronictl", *words)
        if "failed" in said.lower().replace("failed over", "") or "n't recognize" in said:
            raise RuntimeError(f"patronictl {' '.join(words)}: {said}")
        return said

    def change_setting(self, setting):
        self.patronictl("edit-config", "demo", "--force", f"--set={setting}")

    def is_primary(self, node):
        query = "psql -h /tmp -U postgres -Atc 'select pg_is_in_recovery()'"
        done = subprocess.run(
            ["tests/lab/machine", "run", node, "timeout", "1", "sh", "-c", query], capture_output=True, text=True
        )
        return done.stdout.strip() == "f"

    def primary(self, but=None):
        """Waits for a node other than `but` that takes writes, and returns it."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            for node in NODES:
                if node != but and self.is_primary(node):
                    return node
            time.sleep(0.1)
        raise RuntimeError("no primary for 90 s")

    def candidates(self, primary):
        """The standbys that a switchover may promote. Waits for the synchronous standby if replication is
        synchronous."""
        end = time.monotonic() + 60
        while self.synchronous and time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://{NODES[primary]}:8008/cluster", timeout=5) as answer:
                    members = json.load(answer)["members"]
            except OSError:
                members = []
            if fit := [member["name"] for member in members if member["role"] == "sync_standby"]:
                return fit
            time.sleep(0.1)
        if self.synchronous:
            raise RuntimeError("no synchronous standby for 60 s")
        return [node for node in NODES if node != primary]

    def switchover(self, leader, candidate):
        self.patronictl("switchover", "demo", "--leader", leader, "--candidate", candidate, "--force")
        if self.primary(but=leader) != candidate:
            raise RuntimeError(f"the switchover from {leader} did not lead to {candidate}")

    def configure_haproxy(self, file):
        """Restarts HAProxy with another haproxy.cfg."""
        self.put("lb", file, "/etc/haproxy/haproxy.cfg")
        self.run("lb", "systemctl restart haproxy")

    def tell_haproxies(self, commands, first=2):
        """Sends commands to the admin sockets of both HAProxies, or only of the first."""
        for path in ("/run/haproxy/admin.sock", "/run/second-haproxy.sock")[:first]:
            said = self.run("lb", f"echo '{commands}' | socat - {path}").strip()
            if said:
                raise RuntimeError(f"{commands}: {said}")

    def set_agent_options(self, options):
        """Sets the agent's options on each node, from the next check on."""
        for node in NODES:
            self.run(
                node,
                f"echo 'OPTIONS=\"--agent-send {options}\"' > /etc/default/new && "
                "mv /etc/default/new /etc/default/patroni-agent-check",
            )

    def sql(self, node, query):
        return self._call("tests/lab/machine", "run", node, "psql", "-h", "/tmp", "-U", "postgres", "-Atqc", query)

    def wait_until(self, node, command):
        self.run(node, f"for i in $(seq 1000); do if {command}; then exit 0; fi; sleep 0.03; done; exit 1")

    def wait_for_200(self, node, path):
        """Waits until Patroni answers 200 on that path."""
        self.wait_until(node, f"curl -s -m 1 -f -o /dev/null http://127.0.0.1:8008/{path}")

    def freeze(self, node, frozen):
        """Freezes or thaws the whole machine, with its agent, through its cgroup on the host."""
        group = pathlib.Path(os.environ["LAB"], node, "cgroup").read_text().strip()
        pathlib.Path(group, "cgroup.freeze").write_text(str(int(frozen)))

    def patroni(self, node, verb):
        self.run(node, f"systemctl {verb} patroni")

    def signal_patroni(self, node, signal):
        self.run(node, f"systemctl kill -s {signal} --kill-whom=main patroni")

    def signal_postgres(self, node, signal):
        """Signals all of PostgreSQL's processes. The postmaster is first, so that it starts no more. Others may end
        meanwhile."""
        first = f"pid=$(head -1 {DATA}/postmaster.pid); kill -{signal} $pid"
        self.run(node, f"({first}; for child in $(pgrep -P $pid); do kill -{signal} $child; done) 2> /dev/null; true")

    def pg_ctl(self, node, words):
        program = "$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)/pg_ctl"
        self.run(node, f'su postgres -s /bin/sh -c "{program} -D {DATA} -s {words}" > /dev/null 2>&1')

    def unplug(self, node):
        """Unplugs a machine: all its packets are lost silently."""
        self.run("lb", f"ip link set {node} down")

    def plug(self, node):
        self.run("lb", f"ip link set {node} up")

    def power_off(self, node):
        """Cuts a machine's link and power. With the link up, the kernel would close the killed processes' connections."""
        self.run("lb", f"ip link delete {node}")
        self._call("tests/lab/machine", "kill", node)

    def shut_down(self, node, verb="poweroff"):
        # Without logind, systemctl prints that it asks systemd itself.
        self.run(node, f"systemctl {verb} 2> /dev/null")

    def boot(self, node):
        """Boots a machine again once it has ended."""
        self._call("tests/lab/cluster", "boot", node)

    def reboot(self, node):
        self.shut_down(node, "reboot")
        self.boot(node)

    def kill_postmaster(self, node):
        self.run(node, f"kill -KILL $(head -1 {DATA}/postmaster.pid)")
