"""
A server of the dashboard's pages over sample answers: every field is filled, and nothing depends on a moment.

Pages that are drawn from it show what a busy system shows. `SampleDashboard(texts=...)` puts one text after the other into the
fields that a program, a producer or an operator can fill, for tests of what a page does with them.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import msgspec

import conveyor
from conveyor.admin.queue_flow import Flow, flow_document
from conveyor.dashboard.job_timeline import attempts_of, path_of
from conveyor.jobs.history import HistoryEntry

STATIC = Path(conveyor.__file__).parent / "dashboard" / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'none'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html; charset=utf-8"}
ACTIONS = [
    "retry_jobs", "cancel_jobs", "delete_jobs", "edit_jobs", "enqueue_jobs", "pull_messages", "pause_queues", "purge_queues",
    "manage_schedules", "manage_limits", "stop_workers", "view_payloads",
]  # fmt: skip
QUEUES = [
    ("mail", 1204, 31, 12, 16, 87, 3, 41.2, False), ("media", 318, 4, 0, 8, 12, 2, 96.0, False),
    ("billing", 0, 212, 3, 2, 0, 1, None, False), ("reports", 46, 7, 0, 0, 3, 0, 5400.0, False),
    ("webhooks", 88, 540, 0, 4, 29, 1, 12.5, False), ("imports", 90210, 0, 0, 0, 0, 1, 86400.0, True),
    ("default", 0, 1, 0, 1, 1, 3, None, False),
]  # fmt: skip
TRACEBACK = """Traceback (most recent call last):
  File "/srv/shop/mail/tasks.py", line 42, in send_welcome
    smtp.deliver(message, timeout=10)
  File "/usr/lib/python3.11/smtplib.py", line 910, in deliver
    raise TimeoutError("smtp.example.com did not answer within 10 s")
TimeoutError: smtp.example.com did not answer within 10 s
"""
NOW = datetime(2026, 11, 28, 3, 40, tzinfo=UTC)
EXEMPT = {
    "state",
    "status",
    "kind",
    "level",
    "page",
    "outcome",
    "origin",
    "actions",
    "live",
    "schema",
    "range",
    "order",
    "code",
}
"""Members whose values come out of a fixed set, so that nobody can write a text into them."""


def at(seconds: float) -> str:
    """Return the instant so many seconds from the sample's present, as the API writes it."""
    return (NOW + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def queue(row: tuple[Any, ...]) -> dict[str, Any]:
    name, ready, scheduled, waiting, leased, dead, workers, oldest, paused = row
    pick = random.Random(name)
    return {
        "name": name, "ready": ready, "scheduled": scheduled, "waiting": waiting, "leased": leased, "dead": dead,
        "workers": workers, "slots": {"used": min(leased, 16 * workers), "total": 16 * workers},
        "oldest_age": oldest, "paused": paused, "max_length": 100_000 if name == "imports" else None,
        "partitions": 4 if name == "webhooks" else 1, "outbox": 0, "unplaced": 0, "unanswered": [], "blocked": 0, "dropped": 0,
        "stranded": workers == 0, "flow": flow(ready, leased, workers),
        "recent": {"done": [pick.randrange(400) for _ in range(5)], "failed": [0, 1, 0, 4, 2]},
    }  # fmt: skip


def flow(ready: int, leased: int, workers: int) -> dict[str, Any] | None:
    """Return rates: a queue without a worker grows, and one that has work shrinks."""
    if not workers:
        return flow_document(Flow(4.2, 0.0, "grows"))
    return flow_document(Flow(11.4, 16.0, "shrinks", ready / 4.6) if leased and ready else Flow(0.0, 0.0, "steady"))


FLAGS = [
    {"kind": "no-worker", "level": "problem", "text": "46 jobs are ready in 'reports', and no worker serves it since 1h 30m.",
     "links": [{"page": "queue", "name": "reports"}]},
    {"kind": "failing", "level": "warning", "text": "'mail.send_welcome' failed 87 times in a row: TimeoutError.",
     "links": [{"page": "jobs", "filter": "state:dead task:mail.send_welcome"}]},
    {"kind": "running-long", "level": "warning", "text": "A job of 'media.transcode' runs for 41m 12s; 95 of 100 end within 3m 5s.",
     "links": [{"page": "job", "id": "media:01JDSAMPLE0000000000000042"}]},
]  # fmt: skip


def error(number: int, seconds: float) -> dict[str, Any]:
    frames = [
        {"file": "/srv/shop/mail/tasks.py", "line": 42, "function": "send_welcome", "code": "smtp.deliver(message, timeout=10)",
         "own": True},
        {"file": "/usr/lib/python3.11/smtplib.py", "line": 910, "function": "deliver",
         "code": 'raise TimeoutError("smtp.example.com did not answer within 10 s")', "own": False},
    ]  # fmt: skip
    return {
        "attempt": number, "at": at(seconds), "type": "TimeoutError", "worker": "web-1:4711", "traceback": TRACEBACK,
        "message": "smtp.example.com did not answer within 10 s", "frames": frames,
    }  # fmt: skip


def row(number: int, state: str = "dead") -> dict[str, Any]:
    pick = random.Random(f"{number}{state}")
    task, where = pick.choice(
        [
            ("mail.send_welcome", "mail"),
            ("mail.digest", "mail"),
            ("media.transcode", "media"),
            ("billing.charge", "billing"),
        ]
    )
    failed = state == "dead"
    return {
        "id": f"{where}:01JDSAMPLE{number:016d}", "queue": where, "state": state, "task": task,
        "attempt": 5 if failed else 1, "failures": 5 if failed else 0, "crashes": 0, "priority": pick.choice([0, 0, 0, 5]),
        "enqueued": at(-600 - number * 7), "due": at(340) if state == "scheduled" else None, "expires": None,
        "ended": at(-20 - number * 5) if state in {"dead", "done"} else None, "since": at(-20 - number * 5),
        "ran_ms": 1240 if state == "done" else None, "unique": None, "group": "acme" if number % 3 == 0 else None,
        "limits": [], "tags": [f"order:{4700 + number}"] if number % 2 else [], "worker": "web-1:4711" if state == "leased" else None,
        "host": "web-1", "pid": 4711, "args": json.dumps({"user": 9007199254740993 + number, "locale": "de"}),
        "error": {"type": "TimeoutError", "message": "smtp.example.com did not answer within 10 s"} if failed else None,
        "progress": {"done": 71, "total": 100, "text": "resizing"} if state == "leased" else None,
    }  # fmt: skip


def job(values: dict[str, str]) -> dict[str, Any]:
    number = int(values.get("id", "x:0")[-4:]) if values.get("id", "")[-4:].isdigit() else 7
    waits = values.get("id", "").startswith("reports:")
    head = row(number, "ready" if waits else "dead")
    if waits:
        head |= {"id": values["id"], "queue": "reports", "task": "reports.monthly", "attempt": 0, "failures": 0}
    why = {
        "kind": "ended",
        "sentence": "It failed for good after 5 attempts: TimeoutError: smtp.example.com did not answer.",
        "links": [],
        "also": [],
    }
    if waits:
        why = {
            "kind": "no-worker", "sentence": "No worker serves 'reports'. The last one, web-2:4712, was seen 1h 30m ago.",
            "links": [{"page": "queue", "name": "reports"}],
            "also": [{"kind": "position", "sentence": "12 of 46 jobs are before it.", "links": []}],
        }  # fmt: skip
    starts = [-900, -840, -720, -480, -30]
    ends = [] if waits else [start + 10 for start in starts]
    states = [
        ("pushed", -912, 0),
        *(one for i, end in enumerate(ends) for one in (("leased", end - 10, i + 1), ("failed", end, i + 1))),
        *([] if waits else [("dead", ends[-1], 5)]),
    ]
    entries = [
        HistoryEntry(
            state,
            NOW + timedelta(seconds=when),
            "web-1:4711" if attempt else "",
            "TimeoutError" if attempt and state != "leased" else "",
            "",
            attempt,
        )
        for state, when, attempt in states
    ]
    history = [msgspec.to_builtins(entry) for entry in entries]
    attempts = msgspec.to_builtins(attempts_of(entries))
    return {
        "job": head | {
            "keys": ["user", "locale"], "headers": {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
            "payload": json.dumps({"user": 9007199254740993, "locale": "de", "address": {"city": "Köln", "zip": "50667"}}),
            "payload_size": 96, "result": None, "result_size": 0, "reason": "", "leased_at": None, "timeout_ms": 30_000,
            "errors": [error(i + 1, start + 10) for i, start in enumerate(starts)] if not waits else [],
        },
        "why": why, "path": path_of(entries, head["state"]), "attempts": attempts,
        "history": history, "progress": None if waits else {"done": 71, "total": 100, "text": "sending"},
        "notes": {"page": 7, "cursor": "eyJvIjo3MX0"},
        "logs": [
            {"at": at(-30), "level": "INFO", "text": "connecting to smtp.example.com", "attempt": 5},
            {"at": at(-20), "level": "WARNING", "text": "no answer for 10 s", "attempt": 5},
            {"at": at(-20), "level": "ERROR", "text": "giving up", "attempt": 5},
        ],
        "actions": ["cancel", "delete", "update"] if waits else ["retry", "delete", "rerun"],
        "copy": {"python": "send_welcome.enqueue(user=9007199254740993, locale='de')",
                 "command": "conveyor enqueue mail.send_welcome user=9007199254740993 locale=de"},
    }  # fmt: skip


def history(range_: str) -> dict[str, Any]:
    count = {"15m": 15, "1h": 60, "6h": 360, "24h": 1440, "7d": 168, "30d": 720}.get(range_, 60)
    step = 3600 if range_ in {"7d", "30d"} else 60
    pick = random.Random(range_)
    start = int(NOW.timestamp()) // step * step - count * step
    wave = [900 + 300 * ((i % 40) / 40) + pick.randrange(120) for i in range(count)]
    bad = [pick.randrange(30) + (160 if 0.7 < i / count < 0.8 else 0) for i in range(count)]
    tasks = [("mail.send_welcome", 18_201, 87, 432), ("media.transcode", 931, 12, 61), ("webhooks.post", 6_120, 29, 918),
             ("billing.charge", 1_204, 0, 4)]  # fmt: skip
    return {
        "range": range_, "step": step, "times": [start + i * step for i in range(count)], "done": [int(v) for v in wave],
        "failed": [v // 6 for v in bad], "retried": bad, "p50_ms": [40 + pick.randrange(12) for _ in range(count)],
        "p95_ms": [180 + pick.randrange(60) for _ in range(count)], "p99_ms": [420 + pick.randrange(220) for _ in range(count)],
        "mean_ms": [70] * count, "read_queues": 7, "queues_total": 7,
        "tasks": [{"task": t, "done": d, "failed": f, "retried": r, "mean_ms": 90, "p50_ms": 40, "p95_ms": 210, "p99_ms": 600}
                  for t, d, f, r in tasks],
    }  # fmt: skip


def snapshot() -> dict[str, Any]:
    queues = [queue(r) for r in sorted(QUEUES)]
    totals = {name: sum(q[name] for q in queues) for name in ("ready", "scheduled", "waiting", "leased", "dead")}
    return {
        "at": at(0), "totals": totals | {"workers": 6, "slots": {"used": 24, "total": 96}, "paused_queues": 1, "oldest_age": 86400.0}, "queues": queues,
        "queues_total": len(queues), "read_queues": len(queues), "minute": {"done": 1041, "failed": 4, "retried": 22},
        "flags": FLAGS, "operations": [],
    }  # fmt: skip


def session() -> dict[str, Any]:
    return {
        "user": "ada", "actions": ACTIONS, "view_payloads": True, "read_only": False, "namespace": "shop", "version": "0.1.0",
        "server_url": "redis://localhost:6379/0", "live": "poll", "tasks": ["mail.send_welcome", "media.transcode"],
        "queues": [r[0] for r in QUEUES],
    }  # fmt: skip


def failures(range_: str) -> dict[str, Any]:
    count, step = {"1h": (60, 60), "6h": (24, 900), "24h": (24, 3600), "7d": (28, 21_600), "30d": (30, 86_400)}.get(
        range_, (24, 3600)
    )
    start = int(NOW.timestamp()) // step * step - (count - 1) * step
    groups = []
    for n, (task, where, kind, message, frame) in enumerate([
        ("mail.send_welcome", "mail", "TimeoutError", "smtp.example.com did not answer within 10 s", "shop/mail/tasks.py:42 send_welcome"),
        ("webhooks.post", "webhooks", "HTTPError", "503 Service Unavailable for url https://hooks.example.com/…", "shop/hooks.py:88 post"),
        ("media.transcode", "media", "MemoryError", "", "shop/media/video.py:310 decode"),
        ("reports.monthly", "reports", "KeyError", "'total'", "shop/reports/monthly.py:17 build"),
    ]):  # fmt: skip
        pick = random.Random(task)
        cells = [0 if pick.random() < 0.4 + n * 0.1 else pick.randrange(1, 30 // (n + 1)) for _ in range(count)]
        groups.append({
            "fingerprint": f"f{n}", "task": task, "queue": where, "type": kind, "frame": frame, "message": message,
            "count": sum(cells), "first": at(-80_000), "last": at(-20 - n * 900), "cells": cells,
            "id": f"{where}:01JDSAMPLE{n:016d}", "filter": f"state:dead task:{task} error:{kind}",
        })  # fmt: skip
    total = sum(group["count"] for group in groups)
    return {"range": range_, "step": step, "times": [start + i * step for i in range(count)], "groups": groups, "read": total,
            "total": total, "footer": None}  # fmt: skip


def schedules() -> list[dict[str, Any]]:
    return [
        {
            "name": name, "when": when, "task": task, "queue": where, "origin": origin, "paused": paused, "overlap": "skip",
            "missed": "one", "due": at(due), "fired": 412, "skipped": 3, "cron": None, "tz": "UTC", "every": "15m",
            "next": [] if paused else [at(due + i * 86_400) for i in range(5)], "late": late,
            "next_in_zone": [] if paused else [f"Mon 2026-11-30 0{i}:00:00 CET" for i in range(5)],
            "runs": [{"instant": at(-86_400 * i), "at": at(-86_400 * i + 1), "outcome": "overlap" if i == 3 else "fired",
                      "job": "" if i == 3 else f"{where}:01JDSAMPLE{i:016d}", "skipped": 1 if i == 3 else 0, "drift": None if i == 3 else 1.0} for i in range(1, 11)],
        }
        for name, when, task, where, origin, paused, due, late in [
            ("reports.monthly", "At 09:00 on Monday through Friday (Europe/Berlin)", "reports.monthly", "reports", "code", False, 15_600, False),
            ("digest", "every 15m", "mail.digest", "mail", "data", False, 312, False),
            ("cleanup", "every 1d", "default.cleanup", "default", "code", False, -7200, True),
            ("import.partner", "H H * * *", "imports.partner", "imports", "data", True, -45, False),
        ]
    ]  # fmt: skip


def workers() -> list[dict[str, Any]]:
    return [
        {
            "id": f"web-{n}:{4710 + n}", "host": f"web-{n}", "pid": 4710 + n, "queues": queues, "held": held, "lease_ends": at(12),
            "silent": n == 3, "identities": [f"w{n}"], "slots": {"used": held, "total": 0 if n == 3 else 16},
            "memory": None if n == 3 else 84_934_656 * n, "cpu": None if n == 3 else 137 // n,
            "about": {"version": "0.1.0", "concurrency": 16, "started": at(-86_000), "labels": ["gpu"] if n == 2 else [], "build": "9f3c2e1",
                      "state": "quiet" if n == 2 else "running", "loop_lag_ms": 3_200 if n == 1 else 0},
        }
        for n, queues, held in [(1, ["mail", "webhooks", "default"], 16), (2, ["media"], 8), (3, ["billing", "default"], 3)]
    ]  # fmt: skip


def limit(name: str, text: str, used: int, most: int, **more: Any) -> dict[str, Any]:
    return {"queue": "mail", "name": name, "key": None, "kind": "rate" if "/" in text else "concurrency", "by": None, "limit": text,
            "declared": text, "overridden": False, "used": used, "most": most, "waiting": 0, "opens_at": None} | more  # fmt: skip


LIMITS = [
    limit("smtp", "1000/1m", 1000, 1000, waiting=204, opens_at=at(21)),
    limit("mail", "50", 16, 50),
    limit("mail.send:tenant", "2", 2, 2, key="acme", by="tenant", waiting=12, declared="5", overridden=True),
]
GROUPS = [
    {"queue": "mail", "key": "acme", "waiting": 12, "running": 1, "weight": 3, "paused": False},
    {"queue": "mail", "key": "globex", "waiting": 3, "running": 0, "weight": 1, "paused": True},
]
REDIS = {
    "url": "redis://localhost:6379/0", "family": "valkey", "version": "9.1.2", "mode": "standalone", "uptime": 864_000,
    "memory": {"used": 184_000_000, "peak": 212_000_000, "max": 1_073_741_824, "policy": "noeviction", "fragmentation": 1.08},
    "persistence": {"aof": True, "rdb_last": at(-300), "fsync": "everysec"}, "ops_per_second": 18_204, "clients": 42,
    "evicted": 0, "expired": 120_412, "latency_ms": 0.21, "durability": "fsync every second", "replicas": 1, "keys": 912_004,
    "findings": [
        {"name": "eviction", "level": "ok", "text": "noeviction: a full server refuses new jobs and keeps the old ones", "remedy": "", "code": ""},
        {"name": "memory", "level": "warning", "text": "17 % of maxmemory is used; at the present rate it is full in 9 days.",
         "remedy": "Set max_length on large queues.", "code": ""},
    ],
}  # fmt: skip
AUDIT = [
    {"id": f"{9 - n}-0", "at": at(-600 * n), "who": who, "what": what, "target": target, "filter": text, "count": count, "detail": ""}
    for n, (who, what, target, text, count) in enumerate([
        ("ada", "retry", "", "state:dead task:mail.send_welcome", 87), ("ada", "pause", "imports", "", 1),
        ("command line (deploy@web-1)", "set limit", "mail", "", 1),
    ])
]  # fmt: skip
TOPICS = [
    {"name": "user.created", "subscribers": ["emails", "audit", "crm"], "published": 18_204, "nobody": 0},
    {"name": "order.paid", "subscribers": [], "published": 12, "nobody": 12},
]


def cause() -> dict[str, Any]:
    return {"kind": "limit", "name": "smtp", "jobs": 204, "looked": 1000, "opens_at": at(21), "seen": None, "seen_name": "",
            "sentence": "204 jobs wait at the limit 'smtp': 1000 of 1000 starts in 1m are used; it opens in 21 s.",
            "groups": 0, "largest": 0, "links": [{"page": "limits", "name": "smtp"}]}  # fmt: skip


def one_queue(values: dict[str, str]) -> dict[str, Any]:
    found = next((r for r in QUEUES if r[0] == values.get("name")), QUEUES[0])
    parts = [queue((f"{found[0]}/{n}", *found[1:])) for n in range(4)] if found[0] == "webhooks" else []
    return {"queue": queue(found), "partitions": parts, "causes": [cause()], "workers": workers()[:1] if found[6] else [],
            "slots": {"used": 16, "total": 16 if found[6] else 0, "exact": found[0] != "webhooks"},
            "limits": LIMITS, "groups": GROUPS, "paused_tasks": ["mail.digest"]}  # fmt: skip


def job_list(values: dict[str, str]) -> dict[str, Any]:
    text = f"{values.get('filter', '')} state:{values.get('state', '')}"
    state = next((s for s in ("leased", "ready", "waiting", "scheduled", "done") if f"state:{s}" in text), "dead")
    return {"jobs": [row(n, state) for n in range(1, 25)], "next": "c1", "looked": 10_000, "total": 84_211,
            "footer": "Searched 10,000 of 84,211 dead jobs.", "filter": {"text": values.get("filter", "")}, "order": "newest first"}  # fmt: skip


ROUTES: dict[str, Callable[[dict[str, str]], Any]] = {
    "session": lambda _: session(),
    "snapshot": lambda _: snapshot(),
    "overview": lambda _: {**snapshot(), "failing": [], "findings": []},
    "history": lambda v: history(v.get("range", "1h")),
    "queues": lambda _: {"queues": [queue(r) for r in sorted(QUEUES)], "total": len(QUEUES), "read": len(QUEUES), "offset": 0, "limit": 100},
    "queue": one_queue,
    "jobs": job_list,
    "jobs/counts": lambda _: {"leased": 31, "ready": 1656, "waiting": 15, "scheduled": 795, "dead": 132, "done": 1000},
    "jobs/matching": lambda _: {"count": 87, "states": {"dead": 87}, "exact": True},
    "job": job,
    "operations": lambda _: {"operations": []},
    "operation": lambda v: {"id": v.get("id"), "action": "retry", "filter": "", "state": "done", "total": 87, "done": 87, "refused": 0},
    "failures": lambda v: failures(v.get("range", "24h")),
    "schedules": lambda _: {"schedules": schedules()},
    "schedule": lambda _: {"schedule": schedules()[0]},
    "schedules/preview": lambda _: {
        "when": "At 09:00", "error": None, "next": [at(86_400 * i) for i in range(5)], "next_in_zone": [f"Mon 2026-11-30 0{i}:00:00 CET" for i in range(5)],
    },
    "tasks": lambda _: {
        "tasks": [{"name": "mail.send", "queue": "mail", "signature": "mail.send(user: int)", "parameters": ["user"], "required": ["user"]}]
    },
    "workers": lambda _: {"workers": workers(), "slots": {"used": 24, "total": 32}, "footer": None},
    "workers/jobs": lambda values: {
        "worker": values["id"], "held": 16,
        "jobs": [{"id": f"mail:01JDSAMPLE000000000000{n:04}", "task": "mail.send", "queue": "mail", "since": at(-600 // n)} for n in range(1, 11)],
    },
    "limits": lambda _: {"limits": LIMITS, "groups": GROUPS},
    "topics": lambda _: {"topics": TOPICS},
    "redis": lambda _: REDIS,
    "audit": lambda _: {"entries": AUDIT, "next": None},
}  # fmt: skip


def fill(value: Any, texts: Iterator[str], only: frozenset[str], name: str = "") -> Any:
    """Return *value* with the next of *texts* in every member that a person or a program can write, or *only* in those of these names."""
    if isinstance(value, dict):
        return {key: fill(member, texts, only, key) for key, member in value.items()}
    if isinstance(value, list):
        return value if name == "actions" else [fill(member, texts, only, name) for member in value]
    free = isinstance(value, str) and (not only or name in only) and name not in EXEMPT and not value.endswith("Z")
    return next(texts) if free else value


class SampleDashboard:
    """The sample server at `url`; *prefix*: the path below which it is mounted."""

    def __init__(self, *, prefix: str = "/", texts: Sequence[str] = (), only: Sequence[str] = ()) -> None:
        self.prefix, self.posted = prefix, list[tuple[str, Any]]()
        self._only = frozenset(only)
        self._texts = itertools.cycle(texts) if texts else None
        self.asked: list[str] = []
        self.closed = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"sample": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{prefix}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, values: dict[str, str]) -> Any:
        """Return the document at *path* below the API; None: there is none."""
        route = ROUTES.get(path)
        if route is None:
            return None
        found = route(values)
        return found if self._texts is None or path == "session" else fill(found, self._texts, self._only)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sample: SampleDashboard

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path.removeprefix(self.sample.prefix)
        self.sample.asked.append(path)
        if path == "api/v1/stream":
            self._stream()
        elif path.startswith("api/v1/"):
            found = self.sample.answer(path.removeprefix("api/v1/"), dict(parse_qsl(parts.query)))
            if found is None:
                self._send(404, json.dumps({"error": {"code": "E23", "message": f"No {path}."}}), "application/json")
            else:
                self._send(200, json.dumps(found), "application/json")
        elif path.startswith("static/"):
            file = STATIC / path.removeprefix("static/")
            if file.is_file():
                self._send(200, file.read_text(), KINDS[file.suffix])
            else:
                self._send(404, "", "text/plain")
        else:
            page = (STATIC / "index.html").read_text().replace("{{base}}", escape(self.sample.prefix))
            self._send(200, page, KINDS[".html"])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        path = urlsplit(self.path).path.removeprefix(self.sample.prefix).removeprefix("api/v1/")
        self.sample.posted.append((path, body))
        ids = body.get("ids", []) if isinstance(body, dict) else []
        answer = {
            "operation": {"id": "op1", "action": "retry", "state": "running", "total": 87, "done": 40, "refused": 0},
            "results": [{"id": one, "outcome": "retried", "detail": ""} for one in ids], "done": len(ids), "removed": 3,
            "moved": 3, "id": "mail:01JDSAMPLE0000000000000001",
        }  # fmt: skip
        self._send(200, json.dumps(answer), "application/json")

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        parts = {
            "session": session(),
            "snapshot": self.sample.answer("snapshot", {}),
            "history": self.sample.answer("history", {}),
        }
        text = "".join(f"event: {name}\ndata: {json.dumps(part)}\n\n" for name, part in parts.items())
        self.close_connection = True
        try:
            while True:
                self.wfile.write(text.encode())
                self.wfile.flush()
                if self.sample.closed.wait(0.3):
                    return
                text = f"event: snapshot\ndata: {json.dumps(self.sample.answer('snapshot', {}))}\n\n"
        except OSError:
            return  # the browser has gone

    def _send(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)
