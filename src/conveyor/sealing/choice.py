"""From the options of an app to its sealing."""

from __future__ import annotations

from collections.abc import Mapping

from conveyor.errors import ConfigurationError
from conveyor.sealing.blob import BlobStore
from conveyor.sealing.sealing import Sealing, checked_store
from conveyor.sealing.size import Size, size


def choose(
    *,
    keys: Mapping[str, str | bytes] | None,
    encrypt: bool,
    compress: Size | None,
    large: BlobStore | None,
    large_above: Size,
    max_large: Size,
    max_payload: int,
) -> Sealing | None:
    """Return what an app does to bodies, None for nothing at all; raises ConfigurationError."""
    if keys is None and compress is None and large is None:
        if encrypt:
            raise ConfigurationError(
                "Conveyor(encrypt=True) needs keys: Conveyor(keys={'2026-11': secret}, encrypt=True)."
            )
        return None
    seal = None
    if keys is not None:
        from conveyor.sealing.keyring import Keyring
        from conveyor.sealing.seal import Seal

        seal = Seal(Keyring(keys), encrypt=bool(encrypt))
    elif encrypt:
        raise ConfigurationError("Conveyor(encrypt=True) needs keys: Conveyor(keys={'2026-11': secret}, encrypt=True).")
    above, whole = size(large_above, "large_above"), size(max_large, "max_large")
    if large is not None and above > max_payload:
        raise ConfigurationError(
            f"large_above ({above:,} bytes) must not exceed max_payload ({max_payload:,}): what lies between fits nowhere."
        )
    if large is not None and whole < max_payload:
        raise ConfigurationError(f"max_large ({whole:,} bytes) must be at least max_payload ({max_payload:,}).")
    return Sealing(
        seal=seal,
        compress_above=None if compress is None else size(compress, "compress"),
        store=checked_store(large),
        large_above=above,
        max_whole=max_payload if large is None else whole,
    )
