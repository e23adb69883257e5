"""A receiver of a webhook checks who sent it. python webhooks.py"""

import asyncio
import base64
import hashlib
import hmac
import json
import secrets

from conveyor import Conveyor, Webhook

KEY = secrets.token_bytes(32)
app = Conveyor()
told: asyncio.Queue[dict[str, str]] = asyncio.Queue()


async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
    body = await reader.readexactly(int(headers["content-length"]))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    if hmac.compare_digest(headers["webhook-signature"], expected):
        told.put_nowait(json.loads(body)["data"])
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(receive, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"  # a real one has https and a public name

    @app.task(retry=1, webhook=Webhook(url, "whsec_" + base64.b64encode(KEY).decode(), allow_private=True))
    async def divide(number: int) -> float:
        return 1 / number

    async with server, app, app.worker():
        await app.aenqueue_many([divide.s(4), divide.s(0)])
        print(sorted([(await told.get())["state"], (await told.get())["state"]]))


asyncio.run(main())
