"""Asks HAProxy's stats socket for the test scripts: "show stat" and "show servers state" of HAProxy's
management guide."""

import csv
import socket


def ask(path, command):
    """Sends one command and returns the answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
        client.sendall(f"{command}\n".encode())
        return b"".join(iter(lambda: client.recv(65536), b"")).decode()


def stat(path):
    """The rows of "show stat", as dictionaries by field name."""
    return csv.DictReader(ask(path, "show stat").lstrip("# ").splitlines())


def shown(path):
    """The states as an operator sees them: {(pool, server): state}."""
    return {server: state(int(row[5]), int(row[6])) for server, row in servers(path).items()}


def check_fails(path, server):
    """Whether HAProxy's own check of that server has failed often enough to mark the server DOWN."""
    try:
        row = servers(path).get(server)
    except OSError:  # a reload replaces the socket
        return False
    return row is not None and int(row[12]) == 0  # srv_check_health


def servers(path):
    """The fields of "show servers state": {(pool, server): fields}."""
    rows = [line.split(" ") for line in ask(path, "show servers state").splitlines()[2:]]
    return {(row[1], row[3]): row for row in rows if len(row) > 12}


def state(operational, administrative):
    """A server's state, from srv_op_state and srv_admin_state."""
    if administrative & 0x23:
        return "MAINT"
    if operational == 0:
        return "DOWN"
    if administrative & 0x08:
        return "DRAIN"
    return "NOLB" if operational == 3 else "UP"
