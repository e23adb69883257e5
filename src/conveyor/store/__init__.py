"""All that knows Redis: key names, scripts, connections, the embedded server."""
