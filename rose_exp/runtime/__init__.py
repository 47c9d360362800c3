"""Shared infrastructure: errors, fingerprints, signals, ranks, redaction of secrets, escaping of text and files from wheels."""
