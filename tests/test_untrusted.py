"""The one reader of files that somebody else may have written."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from tiltmeter import untrusted
from tiltmeter.errors import AdapterError, ArtifactError
from tiltmeter.gguf_header import check_gguf

NESTED = "[" * 200 + "]" * 200


def _file(folder: Path, content: bytes | str, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


READERS: tuple[Any, ...] = (
    untrusted.read_bytes, untrusted.read_text, untrusted.read_json, untrusted.read_json_lines, untrusted.read_toml,
    untrusted.read_yaml, untrusted.check_safetensors,
)  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_only_regular_files_are_opened_and_nothing_is_waited_for(reader: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        began = time.monotonic()
        for path in (pipe, tmp_path / "socket", tmp_path, Path("/dev/null"), tmp_path / "absent", "a\0b"):
            with pytest.raises(AdapterError, match=r"fetch it again$"):
                reader(path, error=AdapterError, advice="fetch it again")
    assert time.monotonic() - began < 1


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(_file(tmp_path, "{}"))
    assert untrusted.read_json(tmp_path / "link") == {}


def test_a_file_beyond_its_limit_is_refused_unread(tmp_path: Path) -> None:
    path = _file(tmp_path, "")
    os.truncate(path, 1 << 40)  # takes no space on the disk
    for reader in READERS[:-1]:
        with pytest.raises(ArtifactError, match="more than the"):
            reader(path)
    assert untrusted.read_bytes(_file(tmp_path, b"abc"), limit=3) == b"abc"
    with pytest.raises(ArtifactError, match="more than the 2 bytes"):
        untrusted.read_bytes(path, limit=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NESTED, "nested more than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64"),
        ("9" * 5000, "whole number of 5,000 digits"),
        ("18446744073709551616", "64 bits"),
        ("-9223372036854775809", "64 bits"),
        ("NaN", "NaN stands where"),
        ("-Infinity", "-Infinity stands where"),
        ("1e999", "beyond the largest"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[1,", "char 3"),
        ("", "char 0"),
    ],
)
def test_json_that_could_run_away_or_means_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        untrusted.parse_json(text)
    with pytest.raises(ValueError, match=said):
        untrusted.parse_json(text.encode())


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(VALUES)
def test_sound_json_is_read_as_the_library_reads_it(value: object) -> None:
    for ascii_only in (True, False):
        assert untrusted.parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize("depth", [1, 63, 64])
def test_brackets_in_texts_are_no_nesting(depth: int) -> None:
    value: Any = '[{"[[\\' * 500
    for _ in range(depth):
        value = [value]
    assert untrusted.parse_json(json.dumps(value)) == value


def test_what_other_tools_write_is_read_where_the_caller_says_so() -> None:
    found = untrusted.parse_json(f'{{"model_max_length": {int(1e30)}, "a": NaN, "a": 1}}', foreign=True)
    assert found == {"model_max_length": int(1e30), "a": 1}
    assert math.isnan(untrusted.parse_json("NaN", constants=True))
    with pytest.raises(ValueError, match="stands twice"):
        untrusted.parse_json('{"a": NaN, "a": 1}', constants=True)
    with pytest.raises(ValueError, match="nested"):
        untrusted.parse_json(NESTED, foreign=True)
    with pytest.raises(ValueError, match="digits"):
        untrusted.parse_json("1" * 41, foreign=True)


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert untrusted.parse_json('{"\\ud800": ["a\\udfffb", "\\ud83d\\ude00"]}') == {
        "\ufffd": ["a\ufffdb", "\U0001f600"]
    }


def test_json_lines_skip_blank_ones_and_name_the_damaged(tmp_path: Path) -> None:
    path = _file(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert untrusted.read_json_lines(path) == [(1, {"a": 1}), (4, {"a": 2})]
    for line in (b"[1]", b"{", b"\xff", NESTED.encode()):
        with pytest.raises(ArtifactError, match=f"'{path}' is damaged at line 3: "):
            untrusted.read_json_lines(_file(tmp_path, b'{"a": 1}\n\n' + line + b"\n"))


def test_a_byte_that_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    for reader in (untrusted.read_text, untrusted.read_toml, untrusted.read_yaml):
        with pytest.raises(ArtifactError, match=r"byte 6 \(line 2\) is not UTF-8"):
            reader(_file(tmp_path, b"a = 1\n\xff"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = " + NESTED, "nested more than 64"),
        ("a = '\"' \nb = " + NESTED, "nested more than 64"),
        (".".join("a" * 100) + " = 1", "more than 64 parts"),
        (".".join(['"a b"'] * 100) + " = 1", "more than 64 parts"),
        ("a = " + "9" * 5000, "4300 digits"),
        ("a = " + "9" * 30, "64 bits"),
        ("a = nan", "nan stands"),
        ("a = -inf", "-inf stands"),
        ("a = 1\na = 2", "overwrite"),
    ],
)
def test_toml_that_could_run_away_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=said):
        untrusted.read_toml(_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NESTED, "nested more than 64"),
        ("- " * 200 + "a", "nested more than 64"),
        ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 12)), "holds more"),
        ("9" * 5000, "4300 digits"),
        ("a: 2001-13-45", "month"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!timestamp x", "."),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [", "."),
        ("a: .nan", "nan stands"),
    ],
)  # fmt: skip
def test_yaml_that_could_run_away_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=said):
        untrusted.read_yaml(_file(tmp_path, text))


def test_sound_toml_and_yaml_are_read(tmp_path: Path) -> None:
    assert untrusted.read_toml(_file(tmp_path, "[[a]]\nb.c = ['[[[']\n")) == {"a": [{"b": {"c": ["[[["]}}]}
    assert untrusted.read_yaml(_file(tmp_path, "a: &x [1, b]\nc: *x\n")) == {"a": [1, "b"], "c": [1, "b"]}


SOUND = save({"a": np.zeros((2, 3), np.float32), "b": np.zeros((0,), np.int64)}, {"k": "v"})


def _with_header(header: object, data: bytes = b"\0" * 24) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_sound_safetensors_file_is_described(tmp_path: Path) -> None:
    entries, metadata = untrusted.check_safetensors(_file(tmp_path, SOUND))
    assert entries == {"a": ("F32", (2, 3)), "b": ("I64", (0,))}
    assert metadata == {"k": "v"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header would be"),
        (SOUND[:-1], "end at byte"),
        (SOUND + b"\0", "end at byte"),
        (struct.pack("<Q", 1 << 62) + SOUND[8:], "header would be"),
        (_with_header("[" * 500 + "]" * 500), "nested"),
        (_with_header([]), "no JSON object"),
        (_with_header({"a": {"dtype": "F32", "shape": [6]}}), "is not made of"),
        (_with_header({"a": {"dtype": "F31", "shape": [6], "data_offsets": [0, 24]}}), "unknown dtype"),
        (_with_header({"a": {"dtype": [], "shape": [6], "data_offsets": [0, 24]}}), "unknown dtype"),
        (_with_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 24]}}), "do not make"),
        (_with_header({"a": {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]}}), "no lists of whole"),
        (_with_header({"a": {"dtype": "F32", "shape": [6.0], "data_offsets": [0, 24]}}), "no lists of whole"),
        (_with_header({"a": {"dtype": "F32", "shape": [6], "data_offsets": [24, 0]}}), "do not make"),
        (_with_header({"a": {"dtype": "F32", "shape": [6], "data_offsets": [8, 32]}}), "overlap, or leave holes"),
        (_with_header({n: {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]} for n in "ab"}), "overlap"),
        (_with_header({"__metadata__": {"a": 1}}), "metadata"),
        (_with_header({"a": {"dtype": "BF16", "shape": [12], "data_offsets": [0, 24]}}), "BF16; readable are F32"),
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_its_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=said):
        untrusted.check_safetensors(_file(tmp_path, content), dtypes=("F32", "I64"))


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 256, "a/" * 2500, "ä" * 200])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no name that a file or folder can have"):
        untrusted.path_in(tmp_path, name, error=AdapterError)
    assert untrusted.path_in(tmp_path, "a/b") == tmp_path / "a" / "b"


def _gguf(folder: Path) -> bytes:
    import gguf

    writer = gguf.GGUFWriter(str(folder / "v.gguf"), "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("direction.1", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "v.gguf").read_bytes()


def test_a_gguf_file_whose_counts_do_not_fit_it_is_refused(tmp_path: Path) -> None:
    sound = _gguf(tmp_path)
    check_gguf(_file(tmp_path, sound))
    lengths = [at for at in range(8, len(sound) - 32, 1) if 0 < int.from_bytes(sound[at : at + 8], "little") < 100]
    refused = 0
    for at in lengths:  # every count, length and offset among them
        try:
            check_gguf(_file(tmp_path, sound[:at] + struct.pack("<Q", 1 << 40) + sound[at + 8 :]))
        except ArtifactError:
            refused += 1
    assert refused > 0.9 * len(lengths)
    for content in (b"", b"GGUF", sound[:40], sound[:-8], b"GGML" + sound[4:], sound[:4] + b"\x09" + sound[5:]):
        with pytest.raises(ArtifactError, match="truncated or no GGUF file"):
            check_gguf(_file(tmp_path, content))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="no regular file"):
        check_gguf(tmp_path / "pipe")
