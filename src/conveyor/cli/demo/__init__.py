"""`conveyor demo`: real jobs on a real server, a killed worker, and a report of every job."""
