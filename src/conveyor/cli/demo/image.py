"""Images without a library: draw one, write and read it as PNG, and shrink it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from math import sin

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Image:
    """`width` × `height` pixels of three bytes each (RGB), row by row."""

    width: int
    height: int
    pixels: bytes


def draw(number: int, width: int, height: int) -> Image:
    """Return a pattern of waves that depends on *number*."""
    across = [sin(x / (7 + number % 5)) for x in range(width)]
    pixels = bytearray()
    for y in range(height):
        wave = sin(y / (5 + number % 7))
        for x in range(width):
            level = int(63 * (across[x] + wave + 2))
            pixels += bytes((level, (level * (1 + number % 3) + x) & 255, 255 - level))
    return Image(width, height, bytes(pixels))


def encode(image: Image) -> bytes:
    """Return an image as a PNG file, 8 bits a channel, without filters."""
    stride = 3 * image.width
    rows = b"".join(b"\0" + image.pixels[at : at + stride] for at in range(0, len(image.pixels), stride))
    head = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def decode(data: bytes) -> Image:
    """Read a PNG file that `encode` wrote; raises ValueError."""
    if not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG file")
    at, chunks = len(_SIGNATURE), {}
    while at < len(data):
        (size,), name = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if struct.unpack_from(">I", data, at + 8 + size)[0] != zlib.crc32(name + body):
            raise ValueError(f"chunk {name!r} is damaged")
        chunks[name] = body
        at += 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    rows, stride = zlib.decompress(chunks[b"IDAT"]), 3 * width + 1
    return Image(width, height, b"".join(rows[y * stride + 1 : (y + 1) * stride] for y in range(height)))


def shrink(image: Image, factor: int) -> Image:
    """Return an image *factor* times smaller; a new pixel is the mean of its box."""
    width, height, area = image.width // factor, image.height // factor, factor * factor
    pixels = bytearray()
    for top in range(0, height * factor, factor):
        for left in range(0, width * factor, factor):
            box = b"".join(
                image.pixels[3 * (y * image.width + left) : 3 * (y * image.width + left + factor)]
                for y in range(top, top + factor)
            )
            pixels += bytes(sum(box[channel::3]) // area for channel in range(3))
    return Image(width, height, bytes(pixels))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
