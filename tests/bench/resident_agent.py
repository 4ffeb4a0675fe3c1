"""A resident agent for comparison, with sockets, requests and a thread for each connection."""

import socket
import sys
import threading

import requests


def handle(connection, url):
    with connection:
        answer = requests.get(url, timeout=1.5).json()
        ready = answer["role"] in ("primary", "master") and answer["state"] == "running"
        connection.sendall(b"up ready # primary, running\n" if ready else b"up maint # not the primary\n")


listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=handle, args=(listener.accept()[0], f"http://127.0.0.1:{sys.argv[1]}/primary")).start()
