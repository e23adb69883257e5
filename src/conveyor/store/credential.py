"""A password that lies in a file and is read anew for each connection, so that it can be changed while programs run."""

from __future__ import annotations

from pathlib import Path

from redis.credentials import CredentialProvider

from conveyor.errors import ConfigurationError


class PasswordFile(CredentialProvider):
    """The user of a URL with the password of a file; a line's end behind it does not count."""

    def __init__(self, path: str, user: str | None) -> None:
        """Take the file and the user, None for the default one. Raises ConfigurationError when nothing can be read there now."""
        self._path, self._user = Path(path), user
        try:
            self.get_credentials()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigurationError(
                f"The password of Redis cannot be read from {path!r}: {why}. Behind password_file= stands the path of a "
                "file that holds the password and nothing else.",
                code="E17",
            ) from None

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Read the file; what goes wrong later is an OSError, and repeated as if the server were away."""
        password = self._path.read_text("utf-8").rstrip("\r\n")
        if not password:
            raise OSError(0, "it is empty")  # as one that is not there: somebody is writing it
        return (password,) if self._user is None else (self._user, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Read the file; secrets are small and lie in memory."""
        return self.get_credentials()
