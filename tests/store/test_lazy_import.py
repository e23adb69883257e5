"""The client library is imported at its first use, perhaps in several threads at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from support.shell import SOURCES

FIRST_USE = """
import threading
from conveyor.store.transport.url import StandaloneServer
from conveyor.store.transport.connection import is_error_reply

address, errors, gate = StandaloneServer("redis://127.0.0.1:1/0"), [], threading.Barrier(4)

def use(call):
    gate.wait()
    try:
        call()
    except BaseException as error:
        errors.append(repr(error))

def by_itself():
    from redis import Redis

calls = [by_itself, address.new_async_connection, lambda: is_error_reply(OSError()), lambda: address.new_connection(read_timeout=1)]
threads = [threading.Thread(target=use, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors)
"""


def late_firsts(source: str) -> list[int]:
    """Return the lines of *source* that import a part of redis in a function before redis itself."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        whole = False
        for node in sorted((n for n in ast.walk(function) if isinstance(n, ast.ImportFrom)), key=lambda n: n.lineno):
            whole = whole or node.module == "redis"
            if not whole and (node.module or "").startswith("redis."):
                found.append(node.lineno)
    return found


def test_redis_is_imported_before_its_parts() -> None:
    """
    A function imports from redis itself first: a thread that begins with a part of it meets another one that imports
    the whole, half-way, and Python ends one of the two with a deadlock error.
    """
    assert late_firsts("def f():\n    from redis.exceptions import RedisError") == [2]
    assert late_firsts("def f():\n    from redis import RedisError\n    from redis.retry import Retry") == []

    found = {str(path.relative_to(SOURCES)): late_firsts(path.read_text()) for path in Path(SOURCES).rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_first_use_in_several_threads() -> None:
    """Threads that need the client library for the first time at the same moment all get it."""
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_USE], env={"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True,
            timeout=30, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "[]", done.stdout
