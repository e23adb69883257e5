"""Integrations with other libraries. Each module imports its own, which an extra of the same name installs."""
