"""Shows the site (tests/lab/cluster) as HAProxy does: each server with its agent's reason, the node that takes
writes, and each change.

  view.py table               prints a line for each server
  view.py demo [NOTE...]      shows a switchover live on a terminal until it is stopped, with the NOTEs below
  view.py demo --once         prints the switchover as plain text, at most one frame a second, and ends

The demo fails if HAProxy or the writes do not follow the switchover within a minute.
"""

import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import stats_socket

LAB = pathlib.Path(__file__).parent
WRITE, READ = "postgres-write", "postgres-read"
TITLE = "patroni-agent-check: what HAProxy shows of a Patroni cluster"
PORTS = {WRITE: 5000, READ: 5001}
INSERT = "create table if not exists demo (at timestamptz); insert into demo values (now()) returning inet_server_addr()"
BOLD, DIM, RED, GREEN, BROWN, BLUE, PLAIN = (f"\033[{code}m" for code in (1, 90, 31, 32, 33, 34, 0))
COLOURS = {"UP": GREEN, "MAINT": BROWN, "DOWN": RED, "DRAIN": BLUE}


class Server(NamedTuple):
    pool: str
    name: str
    status: str
    seconds: int
    reason: str


def look(host_pid):
    """The servers' states in lb's HAProxy."""
    for row in stats_socket.stat(f"/proc/{host_pid}/root/run/haproxy/admin.sock"):
        if row["pxname"] in PORTS and row["svname"].startswith("pg"):
            said = row["last_agt"]
            reason = said.partition("(")[2].rpartition(")")[0] or said
            yield Server(row["pxname"], row["svname"], row["status"], int(row["lastchg"]), reason)


def run_cluster(*words):
    done = subprocess.run([LAB / "cluster", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode == 0, (done.stdout or done.stderr).strip()


class Demo:
    def __init__(self, host_pid):
        self.host_pid = host_pid
        self.servers = {}
        self.events = []  # (time of day, words)
        self.writes, self.writer, self.wrote, self.gap = 0, None, None, 0.0
        self.failure = None
        self.observe()
        self.primary = next(name for (pool, name), server in self.servers.items() if (pool, server.status) == (WRITE, "UP"))
        self.candidate = next(name for pool, name in self.servers if pool == WRITE and name != self.primary)

    def observe(self):
        for server in look(self.host_pid):
            key = server.pool, server.name
            # "UP 1/3" still means UP. HAProxy shows no reason while it asks the agent.
            server = server._replace(status=server.status.split()[0])
            before = self.servers.get(key, server)
            if not server.reason:
                server = server._replace(reason=before.reason)
            if server.status != before.status:
                self.tell(f"{server.pool:15} {server.name:4} {paint(before.status)} -> {paint(server.status)}")
            self.servers[key] = server

    def tell(self, words):
        self.events.append((f"{time.strftime('%T')}.{int(time.time() * 10) % 10}", words))

    def write(self):
        """Writes through HAProxy until the program ends, each time on a new connection."""
        while True:
            taken, address = run_cluster("sql", str(PORTS[WRITE]), INSERT)
            if taken:
                now = time.monotonic()
                self.gap = max(self.gap, now - (self.wrote or now))
                self.writes, self.writer, self.wrote = self.writes + 1, f"pg{address[-1]}", now
            time.sleep(0.2)

    def switch(self):
        words = ["switchover", "demo", "--leader", self.primary, "--candidate", self.candidate, "--force"]
        self.tell(f"{BOLD}patronictl {' '.join(words[:-1])}{PLAIN}")
        done, said = run_cluster("patronictl", *words)
        if not done or "Success" not in said:
            self.failure = f"patronictl: {said.splitlines()[-1] if said else 'failed'}"

    def followed(self):
        """Whether the candidate gets writes and no reads, and the old primary gets reads."""
        wanted = {(WRITE, self.candidate): "UP", (READ, self.candidate): "MAINT", (READ, self.primary): "UP"}
        return self.writer == self.candidate and all(self.servers[key].status == status for key, status in wanted.items())

    def frame(self, notes, columns, rows):
        """The lines of one frame."""
        lines = [f"{BOLD}{TITLE:{columns - 8}}{time.strftime('%T')}{PLAIN}"]
        for pool, port in PORTS.items():
            lines += ["", f"{BOLD}{pool}{PLAIN} {DIM}{f':{port}':{22 - len(pool)}}for   the agent says{PLAIN}"]
            for server in self.servers.values():
                if server.pool == pool:
                    dot = COLOURS.get(server.status, "") + "●" + PLAIN
                    lasts = f"{server.seconds // 60}m {server.seconds % 60:2}s" if server.seconds >= 60 else f"{server.seconds}s"
                    lines.append(f"  {dot} {server.name:6}{paint(server.status, 7)}{lasts:>9}   {DIM}{server.reason}{PLAIN}")
        silent = time.monotonic() - self.wrote if self.wrote else 0
        where = f"{RED}nowhere for {silent:.1f} s" if silent > 1 else f"{GREEN}to {self.writer or '...'}"
        lines += ["", f"writes go {where}{PLAIN} {DIM}({self.writes} taken, longest pause {self.gap:.1f} s){PLAIN}", ""]
        room = max(1, min(10, rows - 1 - len(lines) - len(notes) - 1))
        lines += [f"{DIM}{at}{PLAIN} {words}" for at, words in self.events[-room:]]
        lines += [""] * bool(notes) + [f"{DIM}{note}{PLAIN}" for note in notes]
        return [cut(line, columns) for line in lines[: rows - 1]]


def paint(status, width=0):
    return f"{COLOURS.get(status, '')}{status:{width}}{PLAIN}"


def cut(line, columns):
    """Cuts a line to the terminal's width; colours do not count."""
    cut, left = "", columns
    for part in re.split("(\033[^m]*m)", line):
        piece = part if part.startswith("\033") else part[:left]
        left -= 0 if part.startswith("\033") else len(piece)
        cut += piece
    return cut


def demo(host_pid, once, notes):
    view = Demo(host_pid)
    coloured, alive = sys.stdout.isatty(), sys.stdout.isatty() and not once
    begin, height, seen, drawn, settled = time.monotonic(), 0, None, 0, False
    threading.Thread(target=view.write, daemon=True).start()

    def draw():
        nonlocal height
        columns, rows = shutil.get_terminal_size()
        lines = view.frame(notes, columns - 1, rows)  # some terminals wrap in the last column
        if alive:  # overwrites the last frame, because a clear flickers
            lines = [f"\r\033[{height}A" * bool(height) + lines[0], *lines[1:]]
            print("\033[K\n".join(lines) + "\033[K\n\033[J", end="", flush=True)
        else:
            text = "\n".join(lines) + "\n"
            print(text if coloured else re.sub("\033[^m]*m", "", text), flush=True)
        height = len(lines)

    switch = None
    while True:
        view.observe()
        now = time.monotonic()
        if not switch and now > begin + 4 and view.writes:
            switch = threading.Thread(target=view.switch, daemon=True)
            switch.start()
        if switch and not settled and view.followed():
            settled = True
            shown = "a DOWN was shown" if any("DOWN" in words for _, words in view.events) else "no DOWN was shown"
            view.tell(f"{BOLD}HAProxy has followed; {shown}{PLAIN}")
        if not settled and now > begin + 64:
            view.failure = view.failure or "HAProxy or the writes did not follow the switchover within a minute"
        if view.failure:
            draw()
            sys.exit(f"demo: {view.failure}")
        if alive or view.writes and len(view.events) != seen and (settled or seen is None or now > drawn + 1):
            draw()
            drawn, seen = now, len(view.events)
        if once and settled:
            return
        time.sleep(0.1 if alive else 0.05)


def main(host_pid, what="", *words):
    if what not in ("table", "demo"):
        sys.exit(__doc__)
    if what == "table":
        for server in look(host_pid):
            print(f"{server.pool:15} {server.name:4} {server.status:14} {server.reason}")
        return
    sys.stdout.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    alive = sys.stdout.isatty() and "--once" not in words
    print("\033[?25l" * alive, end="") # no cursor
    try:
        demo(host_pid, "--once" in words, words if alive else ())
    finally:
        print("\033[?25h" * alive, end="", flush=True)


if __name__ == "__main__":
    lb = subprocess.run([LAB / "machine", "pid", "lb"], stdout=subprocess.PIPE, text=True)
    if lb.returncode:
        sys.exit(1) # tests/lab/machine has printed the reason
    try:
        main(lb.stdout.strip(), *sys.argv[1:])
    except OSError as error:
        sys.exit(f"view: HAProxy in lb does not answer: {error}")
