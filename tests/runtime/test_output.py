"""Redaction of secrets in output streams and logs."""

from __future__ import annotations

import logging
import sys

import pytest

from rose_exp.runtime.output import Redacting, RedactingStream, redacted_output

TOKEN = "hf_" + "a1B2" * 9


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


def test_log_contains_no_control_characters():
    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "a\x1b[31m\u202e\nb\tc", (), None)
    Redacting().filter(record)
    assert record.getMessage() == "a\\x1b[31m\\u202e\nb\tc"


def test_standard_streams_contain_no_secrets(capsys):
    before = sys.stdout, sys.stderr
    with redacted_output(), redacted_output():
        print("a", TOKEN, "b")
        print(TOKEN, file=sys.stderr)
        sys.stdout.writelines([f"{TOKEN}\n"])
        assert sys.stdout.encoding
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("a *** b\n***\n", "***\n")


def test_streams_are_restored_after_an_error():
    before = sys.stdout
    with pytest.raises(ValueError, match="x"), redacted_output():
        raise ValueError("x")
    assert sys.stdout is before


def test_libraries_that_replace_write_receive_redacted_text(capsys):
    captured = []
    stream = RedactingStream(sys.stdout)
    original = stream.write

    def write(text: str) -> int:
        captured.append(text)
        return original(text)

    stream.write = write
    print(f"{TOKEN} one", file=stream)
    stream.write = original
    print(f"{TOKEN} two", file=stream)
    assert captured == ["*** one", "\n"]
    assert capsys.readouterr().out == "*** one\n*** two\n"
