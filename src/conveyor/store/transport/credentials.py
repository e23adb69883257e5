"""Credentials that change while programs run: asked for, or read from a file, at each connection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from conveyor.errors import ConfigurationError

Login = str | tuple[str] | tuple[str, str]
Credentials = Callable[[], Login]
"""Returns a password, or a user and a password."""


class CredentialProvider(Protocol):
    """An object that redis-py calls a credential provider: those of redis-py and redis-entraid are such."""

    def get_credentials(self) -> Any:
        """Return (password,) or (user, password)."""
        ...


NO_CREDENTIALS = "credentials= failed: "
"""The beginning of the error of a provider that raised."""


class LoginProvider:
    """A callable, or a provider, as redis-py asks for credentials at each connection."""

    def __init__(self, source: Credentials | CredentialProvider) -> None:
        """Make it of the value that an app was given; raises ConfigurationError."""
        call: Any = getattr(source, "get_credentials", source)
        if not callable(call) or inspect.iscoroutinefunction(call) or isinstance(source, type):
            raise ConfigurationError(
                "Conveyor(credentials=…) takes a function without arguments that returns a password or (user, password), or a "
                f"CredentialProvider of redis-py, not {type(source).__name__}. A blocking connection asks it too, so it "
                "cannot be an async function."
            )
        self._call = call

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Ask; a failure is an OSError, retried as if the server were away. Raises ConfigurationError for anything but texts."""
        try:
            given = self._call()
        except Exception as error:
            raise OSError(f"{NO_CREDENTIALS}{type(error).__name__}: {error}") from error
        login = (given,) if isinstance(given, str) else given
        if not isinstance(login, tuple) or not 1 <= len(login) <= 2 or not all(isinstance(one, str) for one in login):
            raise ConfigurationError(
                f"The credentials of Redis must be a password or (user, password), and the function returned something of type "
                f"{type(given).__name__}.",
                code="E17",
            )
        return login

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Ask in a thread: whoever makes tokens may be asked over the network."""
        from conveyor.store.transport.endpoint import in_thread

        return await in_thread(self.get_credentials)


class PasswordFile:  # a CredentialProvider of redis-py, which is not imported before the first connection
    """
    The user of a URL, with a password that is read from a file for each connection. A trailing line end does not count.

    So the password can be changed while programs run. *user* None is the default user. Raises ConfigurationError when the
    file cannot be read.
    """

    def __init__(self, path: str, user: str | None) -> None:
        self._path, self._user = Path(path), user
        try:
            self.get_credentials()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigurationError(
                f"The password of Redis cannot be read from {path!r}: {why}. password_file= must be the path of a file "
                "that contains only the password.",
                code="E17",
            ) from None

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Read the file; a later failure is an OSError, retried as if the server were away."""
        password = self._path.read_text("utf-8").rstrip("\r\n")
        if not password:
            raise OSError(0, "it is empty")  # treated like a missing file: it is being written
        return (password,) if self._user is None else (self._user, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Awaitable form of `get_credentials`; it reads without a thread, since the file is small."""
        return self.get_credentials()
