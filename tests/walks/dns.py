"""A DNS server that answers each question with the nodes' addresses, in changing order. Started by moves.py."""

import socket
import sys

ADDRESSES = [socket.inet_aton(address) for address in sys.argv[1:]]

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 5353))
while True:
    asked, client = server.recvfrom(512)
    end = asked.index(b"\0", 12) + 5
    answers = ADDRESSES if asked[end - 4 : end - 2] == b"\0\1" else []  # A
    ADDRESSES.append(ADDRESSES.pop(0))
    # a header, the question, and the answers: a pointer to the name, A, IN, the time to live, four bytes
    header = asked[:2] + b"\x81\x80\0\1" + len(answers).to_bytes(2, "big") + b"\0\0\0\0"
    records = b"".join(b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + address for address in answers)
    server.sendto(header + asked[12:end] + records, client)
