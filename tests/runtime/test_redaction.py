"""Redaction of keys and tokens from all output."""

from __future__ import annotations

import json
import logging

from rose_exp.runtime.redaction import Redacting, redacted
from rose_exp.tracking import RunRecord

TOKEN = "hf_" + "a1B2" * 9


def test_secrets_are_redacted(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redacted("key 0123456789abcdef0123 in abc") == "key *** in abc"
    assert redacted(f"401 for {TOKEN}") == "401 for ***"
    assert redacted("https://me:pass@hub.example/x") == "https://***@hub.example/x"
    assert redacted("Authorization: Bearer abcdefghijklmnop.q") == "Authorization: Bearer ***"
    for text in ("seed=0 model=llama", "sha256 " + "ab" * 32, "http://localhost:8000/x"):
        assert redacted(text) == text


def test_run_record_contains_no_secrets(tmp_path):
    record = RunRecord(tmp_path, {"model": {"path": f"https://user:{TOKEN}@hub"}}, "Dense", "x")
    record.fail(RuntimeError(f"no access with {TOKEN}"))
    text = (tmp_path / "run.json").read_text()
    assert TOKEN not in text
    assert json.loads(text)["error"] == "RuntimeError: no access with ***"


def test_log_contains_no_secrets():
    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "token %s", (TOKEN,), None)
    Redacting().filter(record)
    assert record.getMessage() == "token ***"
    try:
        raise RuntimeError(TOKEN)
    except RuntimeError as error:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "failed", (), (type(error), error, error.__traceback__))
    Redacting().filter(record)
    assert TOKEN not in logging.Formatter().format(record)
