"""The worker: a supervisor, its children, and what runs inside them."""
