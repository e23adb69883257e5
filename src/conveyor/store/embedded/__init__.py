"""The embedded server: started at first use, kept by a keeper process, stopped when nobody uses it."""
