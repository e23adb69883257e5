"""The supervisor, its children, and the guard of their leases."""
