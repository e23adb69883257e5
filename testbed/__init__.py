"""What tests, chaos runs and benchmarks stand on: real servers, and an interpreter that forks programs."""
