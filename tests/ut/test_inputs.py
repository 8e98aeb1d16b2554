"""What is read from outside: kind, size, depth and types are checked, and every fault is one line."""

from __future__ import annotations

import os
import time

import pytest

from mindspeed_mm import inputs
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import parse_json, parse_yaml, read_json, read_text, shorten


def refused(function, *args, **options) -> str:
    with pytest.raises(UserError) as raised:
        function(*args, **options)
    text = str(raised.value)
    assert text.isprintable() and len(text) < 1600
    return text


def test_only_regular_files_of_a_sane_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(12 << 30)
    started = time.monotonic()
    for name, complaint in (
        ("fifo", "not a regular file"), ("/dev/zero", "not a regular file"), ("", "is a directory"),
        ("sparse", "more than the"), ("loop", "symbolic links"), ("x" * 300, "too long"), ("a\0b", "not valid"),
        ("gone", "does not exist; write it"),
    ):
        assert complaint in refused(read_text, tmp_path / name, name="--flag", remedy="write it"), name
        assert inputs.is_file(tmp_path / name) == (name == "sparse")
    assert time.monotonic() - started < 2


def test_a_file_that_is_not_utf8_and_one_with_a_byte_order_mark(tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(read_text, tmp_path / "bad")
    (tmp_path / "good").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "good") == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[" * 100_000, "nested too deep"), ("1" * 6000, "not valid JSON"), ("{", "line 1, column"),
        ("[" * 500 + "]" * 500, "nested deeper than 200"), ('{"a": 1, "a": 2}', "a occurs twice"),
        ("NaN", "NaN is not a JSON value"),
    ],
)
def test_json(text, complaint):
    assert complaint in refused(parse_json, text, "file", strict=True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a, b]: 1", "a key must be a word"), ("a: 2001-99-99", "not valid YAML"), ("a: !!int abc", "not valid YAML"),
        ("[" * 5000, "nested too deep"), ("a: 1\na: 2", "occurs twice"), ("a: !!python/name:os.system", "not valid"),
        ("a: &a [*a]", "not valid YAML"), ("a: [1", "line"),
        ("\n".join(["a0: &a0 [[x], [x]]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]),
         "repeat too much"),
    ],
)
def test_yaml(text, complaint):
    started = time.monotonic()
    assert complaint in refused(parse_yaml, text, "file")
    assert time.monotonic() - started < 10


def test_a_message_is_one_line_whatever_it_quotes():
    text = str(UserError("a\nb\x1b[31m" + "x" * 100_000))
    assert text.isprintable() and len(text) < 1600 and text.startswith("a b\\x1b[31mxxx")
    assert shorten("x" * 1000).endswith("x" * 50) and "(1000 characters)" in shorten("x" * 1000)
    assert shorten("a\ud800\n") == "a\\ud800\\n"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", 3, None, "a\0"])
def test_a_name_in_a_file_stays_in_its_directory(tmp_path, name):
    refused(inputs.inside, tmp_path, name)
    assert inputs.inside(tmp_path, "a/b.x") == tmp_path / "a/b.x"


def test_available_memory_is_the_systems_or_the_containers(tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    assert inputs.available_memory(meminfo, limit) is None
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:    2 kB\n")
    for text, expected in ((None, 2048), ("max\n", 2048), ("1024\n", 1024), ("4096\n", 2048)):
        if text is not None:
            limit.write_text(text)
        assert inputs.available_memory(meminfo, limit) == expected
