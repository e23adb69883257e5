"""Values to bytes and back: codecs, formats, versions, compression, sealing, blobs. No Redis, no event loop."""
