"""Errors of libraries become one RoseExpError; errors of this package keep their traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.outside import outside_errors, parse_json, read_json_object, read_text
from rose_exp.runtime.signals import Interrupted


class PanicException(BaseException):
    """A stand-in for that of pyo3, which cannot be raised on purpose."""

    __module__ = "pyo3_runtime"


ERRORS = [
    OSError("no"),
    ValueError("no"),
    TypeError("no"),
    KeyError("no"),
    IndexError("no"),
    AttributeError("no"),
    RuntimeError("no"),
    AssertionError("no"),
    NotImplementedError("no"),
    OverflowError("no"),
    MemoryError("no"),
    EOFError("no"),
    Exception("no"),
    PanicException("no"),
    Exception(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_of_every_class_become_one_line(error):
    with pytest.raises(RoseExpError) as caught, outside_errors("model.path: cannot read X"):
        raise error
    assert str(caught.value).startswith("model.path: cannot read X: ")
    assert "no" in str(caught.value) or str(caught.value).endswith("Exception")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Interrupted("SIGTERM"), GeneratorExit()])
def test_requests_to_stop_pass(error):
    with pytest.raises(type(error)), outside_errors("x"):
        raise error


def test_own_errors_are_not_wrapped_twice():
    with pytest.raises(RoseExpError, match="^inner$"), outside_errors("outer"):
        raise RoseExpError("inner")


def test_errors_of_this_package_keep_their_traceback():
    """Also if a library calls the package, as it does with hooks."""

    def hook(_value):
        return parse_json(None, 7)  # a bug in the package: a TypeError in json, called by parse_json

    namespace = {"__name__": "rose_exp.somewhere", "json": json}
    exec("def broken(value):\n    return undefined\n", namespace)
    with pytest.raises(NameError), outside_errors("x"):
        namespace["broken"](1)
    with pytest.raises(NameError), outside_errors("x"):
        json.loads("{}", object_hook=namespace["broken"])
    with pytest.raises(RoseExpError, match="^7: TypeError"), outside_errors("x"):
        json.loads("{}", object_hook=hook)


def test_comprehensions_belong_to_the_body():
    namespace = {"__name__": "rose_exp.somewhere", "outside_errors": outside_errors}
    program = (
        "def read(texts):\n    with outside_errors('x'):\n        return [{int(part) for part in text} for text in texts]\n"
    )
    exec(program, namespace)
    with pytest.raises(RoseExpError, match="^x: invalid literal"):
        namespace["read"](["12", "1a"])


def test_errors_from_rust_are_wrapped(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": 5}')
    with pytest.raises(RoseExpError, match=r"^x: .+"), outside_errors("x"):
        Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(RoseExpError, match=r"^x: .+"), outside_errors("x"):
        tokenizer.encode("b")


def test_reasons_are_short_and_on_one_line():
    with pytest.raises(RoseExpError) as caught, outside_errors("x", "; try y"):
        raise ValueError("a\nb\n" * 1000)
    assert str(caught.value).startswith("x: a b a b")
    assert str(caught.value).endswith(" …; try y")
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\0", "got UTF-16"),
        (b"\xfe\xff\0a", "got UTF-16"),
        (b"\xff\xfe\0\0a\0\0\0", "got UTF-32"),
        (b"a\0b\0", "got a NUL character"),
        (b"caf\xe9", "can't decode byte 0xe9 in position 3"),
    ],
)
def test_text_is_utf8(content, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(RoseExpError, match=f"^x: expected UTF-8 text in .*a.txt.*{message}"):
        read_text(path, "x")
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_text(path, "x") == "café"


@pytest.mark.parametrize("path", ["missing", ".", "/proc/self/mem"])
def test_unreadable_files_are_named(path, tmp_path):
    with pytest.raises(RoseExpError, match="^x: cannot read "):
        read_text(tmp_path / path, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("[1]", "got list"),
        ("null", "got NoneType"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("1" * 10_000, "Exceeds the limit"),
    ],
)
def test_json_objects_are_checked(content, message, tmp_path):
    path: Path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(RoseExpError, match=f"^x: expected a JSON object in .*a.json.*{message}"):
        read_json_object(path, "x")
