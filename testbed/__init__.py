"""The ground of tests, chaos runs and benchmarks: real servers, and an interpreter that forks programs."""
