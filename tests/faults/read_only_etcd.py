"""A proxy between Patroni and etcd that makes etcd read-only: a request that writes gets no answer.

    read_only_etcd.py ADDRESS ETCD    listens on port 2379 of ADDRESS, and asks etcd on port 2379 of ETCD"""

import asyncio
import sys

WRITES = b"/kv/put", b"/kv/txn", b"/kv/deleterange", b"/lease/"


async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve(client, back):
    etcd = None
    while head := await client.readuntil(b"\r\n\r\n"):
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = await client.readexactly(int(length[0].split(b":")[1])) if length else b""
        if any(path in head.split(b"\r\n", 1)[0] for path in WRITES):
            continue
        if etcd is None:
            answers, etcd = await asyncio.open_connection(sys.argv[2], 2379)
            asyncio.ensure_future(copy(answers, back))
        etcd.write(head + body)


async def connection(client, back):
    try:
        await serve(client, back)
    except (OSError, asyncio.IncompleteReadError):
        back.close()


async def main():
    server = await asyncio.start_server(connection, sys.argv[1], 2379)
    await server.serve_forever()


asyncio.run(main())
