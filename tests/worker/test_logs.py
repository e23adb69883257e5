"""The log of a worker as JSON: each line names the job that runs where it was logged."""

from __future__ import annotations

import json
import logging
from typing import Any

from conveyor import Context, Conveyor, current
from conveyor.worker.logs import FORMAT_VARIABLE, JsonFormatter, configure_log
from support.running_worker import drain


class Lines(logging.Handler):
    """Keeps what is logged, as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


async def test_a_line_names_the_job_that_runs(url: str) -> None:
    """Lines of any logger, on the loop and on threads, carry the job; those outside carry none; an error has its traceback."""
    logger, kept = logging.getLogger("shop.mail"), Lines()
    for one in (logger, logging.getLogger("conveyor.job")):
        one.addHandler(kept)
    try:
        async with Conveyor(url) as app:

            @app.task(name="loop", queue="mail")
            async def loop(context: Context = current()) -> None:
                logger.warning("on the loop\n%s", "\x1b[31m")
                context.logger.warning("by the job")

            @app.task(name="thread", queue="mail")
            def thread() -> None:
                try:
                    raise KeyError("as asked")
                except KeyError:
                    logger.exception("on a thread")

            ids = {name: (await app.tasks[name].aenqueue()).id for name in ("loop", "thread")}
            await drain(app)
        logger.warning("outside")
    finally:
        for one in (logger, logging.getLogger("conveyor.job")):
            one.removeHandler(kept)
    lines = {line["message"].partition("\n")[0]: line for line in kept.lines}
    for message, task in (("on the loop", "loop"), ("by the job", "loop"), ("on a thread", "thread")):
        about = {"job_id": ids[task], "task": task, "queue": "mail", "attempt": 1}
        assert about.items() <= lines[message].items()
    assert "KeyError: 'as asked'" in lines["on a thread"]["error"]
    assert lines["on a thread"]["level"] == "ERROR"
    assert "job_id" not in lines["outside"]


def test_the_format_is_that_of_the_variable(monkeypatch: Any) -> None:
    """The variable of the environment, by which the processes of a worker know it, chooses the format."""
    root, conveyor = logging.getLogger(), logging.getLogger("conveyor")
    before, level, own = root.handlers[:], root.level, conveyor.level
    try:
        for value, kind in (("json", True), ("text", False)):
            root.handlers.clear()
            monkeypatch.setenv(FORMAT_VARIABLE, value)
            configure_log()
            assert isinstance(root.handlers[0].formatter, JsonFormatter) is kind
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        conveyor.setLevel(own)
