"""What all walks use: the site's machines, HAProxy's states, and the commands of a document."""

import pathlib
import re

import watch
from cluster import Cluster


class Walk:
    def __init__(self, patience):
        """`patience`: how many seconds the walk's own queries wait for PostgreSQL."""
        self.cluster = Cluster()
        self.host_pid = self.cluster.host_pid("lb")
        self.root = f"/proc/{self.host_pid}/root"
        self.socket = f"{self.root}/run/haproxy/admin.sock"
        watch.local.patience = patience

    def shown(self, pools):
        """HAProxy's states: {(pool, node): state}. Empty while a reload replaces HAProxy's socket."""
        try:
            return watch.look(self.socket, pools)
        except OSError:
            return {}


def blocks(document, heading):
    """The indented blocks below that heading, up to the next heading of its level or above."""
    text = re.sub(r"^```.*?^```$", "", pathlib.Path(document).read_text(), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(rf"^(#+) {re.escape(heading)}$", text, flags=re.MULTILINE)
    assert len(parts) == 3, f"{heading!r} is there {len(parts) // 2} times"
    section = re.split(rf"^#{{1,{len(parts[1])}}} ", parts[2], flags=re.MULTILINE)[0]
    found = re.findall(r"^    .*\n(?:\n*    .*\n)*", section, re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in found]
