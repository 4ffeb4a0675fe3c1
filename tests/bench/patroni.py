"""A fake Patroni for the benchmarks, whose answers cost little CPU.

patroni.py PORT [CERTIFICATE KEY [CLIENTS' CA]]: listens on PORT (0: any) and prints it."""

import socket
import ssl
import sys

BODY = (
    b'{"state": "running", "postmaster_start_time": "2026-11-22 22:29:17.787235+00:00", "role": "primary", '
    b'"server_version": 150018, "xlog": {"location": 9437184}, "timeline": 5, "replication": [{"usename": '
    b'"replication", "application_name": "pg3", "client_addr": "10.55.0.13", "state": "streaming", "sync_state": '
    b'"async", "sync_priority": 0}], "dcs_last_seen": 1795386563, "database_system_identifier": '
    b'"7711126546588295308", "patroni": {"version": "4.1.5", "scope": "demo", "name": "pg2"}}'
)
HEADER = b"HTTP/1.0 200 OK\r\nServer: BaseHTTP/0.6 Python/3.11.2\r\nContent-Type: application/json\r\n\r\n"

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=128)
tls = None
if sys.argv[2:]:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=sys.argv[4] if sys.argv[4:] else None)
    tls.load_cert_chain(*sys.argv[2:4])
    tls.verify_mode = ssl.CERT_REQUIRED if sys.argv[4:] else ssl.CERT_NONE
print(listener.getsockname()[1], flush=True)
while True:
    connection, _ = listener.accept()
    try:
        with tls.wrap_socket(connection, server_side=True) if tls else connection as connection:
            request = b""
            while b"\r\n\r\n" not in request and (more := connection.recv(4096)):
                request += more
            # Patroni also makes two writes
            connection.sendall(HEADER)
            connection.sendall(BODY)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4096)
    except OSError:
        pass
