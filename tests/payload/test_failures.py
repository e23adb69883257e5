"""Records of exceptions."""

from __future__ import annotations

import logging
import re

import pytest

from conveyor import BlobUnavailable
from conveyor.errors import ConfigurationError, JobFailed, PayloadError, StoreUnavailable
from conveyor.payload import failures
from conveyor.payload.codec import UnreadablePayload
from conveyor.payload.records import AttemptHistory, read_failure, to_json
from conveyor.payload.versions import PayloadTooNew
from conveyor.worker.execution.processes import ProcessCrashed


class Hostile(Exception):
    """Every method that a formatter may call raises."""

    def __str__(self) -> str:
        raise SystemExit("from __str__")

    __repr__ = __str__


class Liar(Exception):
    def __str__(self) -> str:
        return NotImplemented  # what is no text is a failure of its own


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_says_what_and_where():
    """A record names the class with its module, the message, and the line that raised."""
    record = failures.describe(raised(ValueError("no such user")), 3, 1234, "w1")
    assert (record.type, record.message, record.attempt, record.at, record.worker) == (
        "ValueError", "no such user", 3, 1234, "w1",
    )  # fmt: skip
    assert "raise error" in record.traceback
    assert record.traceback.endswith("ValueError: no such user\n")
    assert failures.type_name(Hostile()) == f"{__name__}.Hostile"


STORED = {
    "BlobUnavailable": BlobUnavailable(""),
    "ConfigurationError": ConfigurationError(""),
    "JobFailed": JobFailed("", "", "", ""),
    "PayloadError": PayloadError(""),
    "ProcessCrashed": ProcessCrashed(""),
    "StoreUnavailable": StoreUnavailable(""),
    "TooNew": PayloadTooNew("", 2, 1),
    "Unreadable": UnreadablePayload(""),
}


@pytest.mark.parametrize("stored", STORED)
def test_our_own_exceptions_are_stored_without_their_module(stored):
    """The stored name of an exception of Conveyor stays when its class moves to another module, or gets another name."""
    assert failures.describe(STORED[stored], 1, 0, "").type == stored


def test_the_exceptions_of_others_keep_their_module():
    """Only what lies in the package itself is Conveyor's own: a class of a program that derives from one of ours is not."""
    neighbour = type("Neighbour", (PayloadError,), {"__module__": "conveyors"})
    own = type("Own", (ConfigurationError,), {"__module__": "shop.errors"})
    assert (failures.type_name(neighbour("")), failures.type_name(own(""))) == (
        "conveyors.Neighbour", "shop.errors.Own",
    )  # fmt: skip


@pytest.mark.parametrize("error", [Hostile(), Liar(), raised(Hostile())])
def test_hostile_exceptions_are_recorded(error):
    """An exception becomes a record that can be stored, whatever its __str__ and __repr__ do."""
    record = failures.describe(error, 1, 0, "")
    assert "no message" in record.message
    assert read_failure(to_json(record)) == record


def test_hostile_notes_and_causes_are_recorded():
    """Notes and causes are formatted with the same care."""
    error = ValueError("outer")
    error.__cause__ = Hostile()
    error.__notes__ = [Hostile()]
    record = failures.describe(raised(error), 1, 0, "")
    assert record.message == "outer"
    assert record.traceback


def test_long_texts_lose_their_middle():
    """Message and traceback stay within 2 and 8 KiB of UTF-8 and keep both ends."""
    record = failures.describe(raised(ValueError("begin " + "ä€𝄞" * 1_000_000 + " end")), 1, 0, "")
    assert len(record.message.encode()) <= 2048
    assert len(record.traceback.encode()) <= 8192
    assert record.message.startswith("begin ")
    assert record.message.endswith(" end")
    assert record.traceback.startswith("Traceback")
    assert record.traceback.endswith(" end\n")


def test_repeated_failures_are_counted():
    """Of failures that repeat, the traceback is logged once a minute, and the others have a line that counts them."""
    now = [0.0]
    logger = logging.getLogger("test.failures")
    handler = Collected()
    logger.addHandler(handler)
    log = failures.FailureLog(logger, clock=lambda: now[0])

    def fail(number: int) -> None:
        log.log(logging.ERROR, "job %d", number, error=raised(ValueError(str(number))))

    try:
        for number in range(3):
            fail(number)
        log.log(logging.ERROR, "another", error=KeyError("k"))
        now[0] = 60.0
        fail(3)
    finally:
        logger.removeHandler(handler)

    assert [(record.getMessage(), bool(record.exc_info)) for record in handler.records] == [
        ("job 0", True), ("job 1 (as before: 1 since its traceback)", False),
        ("job 2 (as before: 2 since its traceback)", False), ("another", True), ("job 3", True),
    ]  # fmt: skip


def test_frames_that_only_pass_an_exception_on_are_left_out():
    """The recorded traceback begins with the first frame that is not of Conveyor; one without any stays whole."""
    from conveyor.units import milliseconds

    def convert() -> None:
        milliseconds("no duration", name="delay")

    error = caught(convert)
    assert users(failures.describe(error, 1, 0, "").traceback)[0].endswith("test_failures.py")
    inner = error.__traceback__
    while inner is not None and not inner.tb_frame.f_code.co_filename.endswith("units.py"):
        inner = inner.tb_next
    assert users(failures.describe(error.with_traceback(inner), 1, 0, "").traceback)[0].endswith("units.py")


class Collected(logging.Handler):
    """A handler that keeps its records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def caught(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def users(traceback: str) -> list[str]:
    """Return the files of the frames of a traceback, outermost first."""
    return re.findall(r'File "([^"]+)"', traceback)


def test_deep_recursion_is_recorded():
    """A recursion error has a short record too."""

    def dig() -> None:
        dig()

    try:
        dig()
    except RecursionError as error:
        record = failures.describe(error, 1, 0, "")
    assert record.type == "RecursionError"
    assert 0 < len(record.traceback.encode()) <= 8192


def test_what_is_not_unicode_can_be_stored():
    """Lone surrogates and line breaks in a message survive the stored state."""
    record = failures.describe(ValueError("a\ud800\nb\x00"), 1, 0, "")
    state = AttemptHistory.decode(AttemptHistory(1, 1, 0, [to_json(record)]).encode())
    assert state.failures_list() == [record]
    assert record.message == "a\\ud800\nb\x00"
