"""Credentials that change while programs run: asked for at each connection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
