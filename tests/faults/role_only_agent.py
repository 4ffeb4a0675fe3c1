"""A resident agent as many sites have one, for comparison. It asks for `/` and trusts the role in the answer."""

import json
import socketserver
import urllib.error
import urllib.request


class Agent(socketserver.BaseRequestHandler):
    def handle(self):
        try:
            answer = urllib.request.urlopen("http://localhost:8008/")
        except urllib.error.HTTPError as error:  # Patroni's 503 has the same body
            answer = error
        role = json.load(answer)["role"]
        self.request.sendall(b"READY\n" if role in ("primary", "master") else b"MAINT\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True


Server(("", 5556), Agent).serve_forever()
