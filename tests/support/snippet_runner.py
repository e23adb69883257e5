"""Runs the Python blocks of one page, one after the other, in one namespace. Each arrives as a line of JSON."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Answer each block with what it printed and a last line that tells how it ended."""
    os.dup2(1, 2)
    names: dict[str, Any] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            text, place = json.loads(line)
            end = "ok"
            try:
                code = compile(text, place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                if code.co_flags & inspect.CO_COROUTINE:
                    runner.run(_await(code, names))
                else:
                    exec(code, names)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                end = "failed"
            print(f"\0{end}", flush=True)


async def _await(code: Any, names: dict[str, Any]) -> None:
    await eval(code, names)


if __name__ == "__main__":
    main()
