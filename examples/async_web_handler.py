"""A web server that enqueues: python async_web_handler.py 8000, then curl localhost:8000/thumbnail/cat.png"""

import asyncio
import sys
from contextlib import suppress

from conveyor import Conveyor, StoreUnavailable

app = Conveyor()


@app.task
def thumbnail(path: str) -> str:
    return f"{path} is small now"


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    _, path, _ = (await reader.readline()).decode().split()
    kind, _, name = path.strip("/").partition("/")
    try:
        if kind == "thumbnail":  # requests that arrive together share a round trip
            status, body = "202 Accepted", (await thumbnail.aenqueue(name)).id
        else:
            status, body = "200 OK", await app.job(name).astatus()
    except StoreUnavailable:
        status, body = "503 Service Unavailable", "try again"
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
    await writer.drain()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(handle, "127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
    print("listening on", server.sockets[0].getsockname()[1], flush=True)
    async with app, app.worker(), server:  # in production the worker is a process of its own
        await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # ctrl-C stops the server and the worker
        asyncio.run(main())
