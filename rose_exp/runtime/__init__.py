"""Shared infrastructure: errors, fingerprints, signals, ranks, redaction of secrets and files from wheels."""
