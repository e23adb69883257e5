"""Running jobs: on the event loop, on threads, in processes."""
