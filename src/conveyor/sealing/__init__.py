"""What happens to a payload between its JSON and Redis: compressed, stored elsewhere, sealed; and the way back."""

from conveyor.sealing.blob import BlobStore, FileStore

__all__ = ["BlobStore", "FileStore"]
