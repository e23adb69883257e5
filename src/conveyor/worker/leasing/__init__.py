"""Getting jobs from queues, and keeping their leases."""
