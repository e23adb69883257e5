"""
The whole content of a server, by type: exactly, or with times made comparable.

`exact` is for "nothing changed". `readable` is for expected states: instants are shown relative to the
server's clock in tens of seconds ("now", "now+60s"), a TTL stands behind the key's name ("lane:L ~7200s"),
places in a lease hash read "<turn>.<position>", and the counters
of all minutes are one sum ("stats").
"""

from __future__ import annotations

import re
from typing import Any

_INSTANT = re.compile(r"(?<!\d)1[5-9]\d{11}(?!\d)")
_READ = """
local read = {
  hash = {"HGETALL"}, list = {"LRANGE", 0, -1}, zset = {"ZRANGE", 0, -1, "WITHSCORES"}, set = {"SMEMBERS"},
  string = {"GET"}, stream = {"XRANGE", "-", "+"},
}
local found = {}
for _, key in ipairs(redis.call("KEYS", "*")) do
  local kind = redis.call("TYPE", key).ok
  local command = read[kind]
  local value = redis.call(command[1], key, unpack(command, 2))
  found[#found + 1] = {key, kind, redis.call("PTTL", key), value}
end
return found
"""
"""One round trip for a whole server: some tests look at forty keys a thousand times."""
_LATE_MS = 2_900
"""A dump is made later than what it shows was written, never earlier: so an instant keeps its name for 7.9 s."""


def exact(client: Any) -> dict[str, Any]:
    """Return key → (has a TTL, value) of every key."""
    return {key: (ttl >= 0, value) for key, (ttl, value) in contents(client).items()}


def readable(client: Any, prefix: str = "") -> dict[str, Any]:
    """Return the same with texts, names without *prefix*, and comparable times."""
    seconds, micros = client.time()
    now = seconds * 1000 + micros // 1000
    shown: dict[str, Any] = {}
    for key, (ttl, value) in contents(client).items():
        name = key.removeprefix(prefix)
        minute = name.startswith("stats:")
        if minute and not name.removeprefix("stats:").isdigit():
            continue  # the sums of an hour and of all time hold the same again, once a second minute has begun
        label = ("stats" if minute else name) + ("" if ttl < 0 else f" ~{_tens(ttl)}s")
        shown[label] = (
            _sum(shown.get(label, {}), value) if minute and isinstance(value, dict) else _show(name, value, now)
        )
    return shown


def contents(client: Any) -> dict[str, tuple[int, Any]]:
    """Return key → (TTL in ms or -1, value) of every key, in the order of their names."""
    found = {key.decode(): (ttl, _value(kind, value)) for key, kind, ttl, value in client.eval(_READ, 0)}
    return dict(sorted(found.items()))


def _value(kind: bytes, reply: Any) -> Any:
    """Return what the client's own command for a value of this kind would."""
    if kind == b"hash":
        return dict(zip(reply[::2], reply[1::2], strict=True))
    if kind == b"zset":
        return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]
    if kind == b"stream":
        return [(id_, dict(zip(fields[::2], fields[1::2], strict=True))) for id_, fields in reply]
    return set(reply) if kind == b"set" else reply


def _sum(counters: dict[str, int], more: dict[bytes, bytes]) -> dict[str, int]:
    """Add up the counters of two minutes: whether one ended between two turns is not of interest."""
    return counters | {name.decode(): counters.get(name.decode(), 0) + int(number) for name, number in more.items()}


def _tens(ms: int) -> int:
    """Return *ms* in tens of seconds, as it was when it was written."""
    return round((ms + _LATE_MS) / 10_000) * 10


def postponed(key: str, value: Any, ms: int) -> list[tuple[Any, ...]]:
    """Return the commands that let each instant that *key* holds be *ms* later."""

    def later(data: bytes) -> bytes:
        return _INSTANT.sub(lambda found: str(int(found[0]) + ms), data.decode("latin-1")).encode("latin-1")

    if isinstance(value, dict):
        return [("HSET", key, field, later(data)) for field, data in value.items() if later(data) != data]
    if isinstance(value, bytes):
        return [("SET", key, later(value), "KEEPTTL")] if later(value) != value else []
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [("LSET", key, place, later(data)) for place, data in enumerate(value) if later(data) != data]
    if isinstance(value, list) and value and isinstance(value[0][1], float):
        return [("ZADD", key, score + ms, member) for member, score in value if _INSTANT.fullmatch(str(int(score)))]
    return []


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that are not alike, with what they hold *after*; None for one that is gone."""
    return {key: after.get(key) for key in sorted({*before, *after}) if before.get(key) != after.get(key)}


def _show(name: str, value: Any, now: int) -> Any:
    if isinstance(value, dict):
        return {_text(field, now): _field(name, _text(item, now)) for field, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], tuple) and isinstance(value[0][1], dict):  # a stream
        # A list, since ids of one instant or two may read alike.
        return [(_text(id_, now), _show(name, fields, now)) for id_, fields in value]
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        instants = not name.startswith("limit:")  # where a score is a place
        return {_text(member, now): _relative(int(score), now) if instants else int(score) for member, score in value}
    if isinstance(value, list):
        return [_text(item, now) for item in value]
    if isinstance(value, set):
        return {_text(item, now) for item in value}
    return _text(value, now)


def _field(name: str, text: str) -> str:
    if not name.startswith("leased:"):
        return text
    text = text.strip()
    if text.isdigit() and int(text) >= 8192 and int(text) % 8192 <= 1000:
        return f"{int(text) // 8192}.{int(text) % 8192}"
    return text


def _text(data: bytes, now: int) -> str:
    return _INSTANT.sub(lambda found: _relative(int(found[0]), now), data.decode()).replace("\t", ".")


def _relative(instant: int, now: int) -> str:
    if not _INSTANT.fullmatch(str(instant)):
        return str(instant)
    tens = _tens(instant - now)
    return "now" if tens == 0 else f"now{tens:+}s"
