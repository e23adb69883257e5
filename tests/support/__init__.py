"""Helpers that tests and chaos runs share: servers, workers, programs and checks. No test lies here."""
