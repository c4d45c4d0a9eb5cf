"""How a sound file is spoilt: bytes, trees of JSON, lines of text, headers of tensors. The same seed spoils alike.

Nothing that is made here is ever stored: a mutant is described by (loader, number, words) and made again from them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

MANY = 5000  # digits, more than the interpreter turns into a number
DEEP = (70, 300, 1200, 20_000)
_DIGEST = re.compile(rb'sha256\\?": \\?"([0-9a-f]{64})')
_DTYPES = ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "F32", "F64", "I8", "U16", "I32", "I64", "U64", "BOOL", "C64")


class _Raw(str):
    """Text that is to stand in JSON as it is."""


class Mutant(NamedTuple):
    """A spoilt content, and in words what was done."""

    content: bytes
    words: str


Mutator = Callable[[bytes, random.Random], Mutant]


# ---------------------------------------------------------------------- bytes


def flipped(content: bytes, rng: random.Random) -> Mutant:
    """One to eight bytes changed."""
    spoilt = bytearray(content or b"\0")
    n = rng.choice((1, 1, 2, 8))
    for _ in range(n):
        spoilt[rng.randrange(len(spoilt))] ^= rng.randrange(1, 256)
    return Mutant(bytes(spoilt), f"{n} bytes changed")


def cut(content: bytes, rng: random.Random) -> Mutant:
    """The end, the beginning or a stretch missing."""
    if not content:
        return Mutant(content, "nothing to cut")
    start = rng.randrange(len(content))
    stop = rng.choice((len(content), min(len(content), start + rng.randrange(1, 64))))
    if rng.random() < 0.2:
        start, stop = 0, start
    return Mutant(content[:start] + content[stop:], f"bytes {start} to {stop} cut out")


def grown(content: bytes, rng: random.Random) -> Mutant:
    """Bytes put in: zeros, random ones, a stretch of its own again."""
    place = rng.randrange(len(content) + 1)
    piece = rng.choice((bytes(rng.randrange(1, 5000)), rng.randbytes(rng.randrange(1, 64)), content[place : place + 99]))
    return Mutant(content[:place] + piece + content[place:], f"{len(piece)} bytes put in at {place}")


def spliced(content: bytes, rng: random.Random) -> Mutant:
    """Two stretches exchanged."""
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return Mutant(content[:a] + content[b:c] + content[a:b] + content[c:], f"stretches {a}-{b} and {b}-{c} exchanged")


def lengthened(content: bytes, rng: random.Random) -> Mutant:
    """A field of 4 or 8 bytes that looks like a count or a length, replaced by an absurd one."""
    width, code = rng.choice(((8, "<Q"), (4, "<I")))
    small = [at for at in range(0, min(len(content) - width, 4000)) if content[at + 2 : at + width] == bytes(width - 2)]
    if not small:
        return flipped(content, rng)
    at = rng.choice(small)
    value = rng.choice((0, 1, len(content), 1 << 20, 1 << 30, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
    return Mutant(content[:at] + struct.pack(code, value % (1 << 8 * width)) + content[at + width :],
                  f"the field at {at} set to {value}")  # fmt: skip


def foreign(content: bytes, rng: random.Random) -> Mutant:
    """Something else altogether."""
    made = rng.choice((b"", b"\0" * 4096, rng.randbytes(500), b"[" * 100_000, b"{}", b"[]", b"null", b"\xff\xfe{}", b"PK"))
    return Mutant(made, f"{len(made)} other bytes")


BYTES: tuple[Mutator, ...] = (flipped, cut, grown, spliced, lengthened, foreign)


# ---------------------------------------------------------------------- trees


def _odd(rng: random.Random) -> Any:
    deep = rng.choice(DEEP)
    return rng.choice((
        None, True, False, 0, -1, 1, 2, 0.5, 1e300, -1e300, 1 << 40, 1 << 62, 1 << 70, 10**30, "", "x", "0.3", "nan", "\0",
        "../..", "ngrams:9999999999", "ngrams:" + "9" * MANY, "~nobody/x", "x" * 10_000, [], {}, [[]], [None], [1, "a"], {"a": 1}, ["x"] * 1000, list(range(50)),
        _Raw("NaN"), _Raw("-Infinity"), _Raw("1e999"), _Raw("9" * MANY), _Raw("-" + "1" * 300), _Raw('"\\ud800"'),
        _Raw("[" * deep + "]" * deep), _Raw('{"a":' * deep + "1" + "}" * deep), _Raw('{"a": 1, "a": 2}'),
    ))  # fmt: skip


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree[:20]) if isinstance(tree, list) else ()
    for key, part in parts:
        found += _places(part, (*path, key))
    return found


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def spoilt_tree(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of a JSON value with one to three places dropped, doubled, retyped, wrapped or exchanged."""
    tree = json.loads(json.dumps(tree))
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(tree)
        path = rng.choice(places)
        value = _at(tree, path)
        kind = rng.choice(("drop", "odd", "odd", "odd", "wrap", "other", "near", "add"))
        if not path:
            kind, made = "odd", _odd(rng)
            tree = made if rng.random() < 0.3 else tree
            words.append("the whole replaced")
            if not isinstance(tree, dict | list):
                break
            continue
        parent, key = _at(tree, path[:-1]), path[-1]
        if kind == "drop":
            del parent[key]
        elif kind == "odd":
            parent[key] = _odd(rng)
        elif kind == "wrap":
            parent[key] = rng.choice(([value], {"a": value}, [value, value], str(value)[:1000]))
        elif kind == "other":
            parent[key] = json.loads(json.dumps(_at(tree, rng.choice(places)), default=str))
        elif kind == "add" and isinstance(parent, dict):
            parent[rng.choice(("outcome", "x", "", "format", "__class__", "a\0"))] = _odd(rng)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            parent[key] = _odd(rng)
        else:
            parent[key] = rng.choice((-value, value + 1, value - 1, value * 1000, float(value), value + 0.5))
        words.append(f"{kind} at {'.'.join(map(str, path))[:80]}")
    return tree, "; ".join(words)


def dumped(tree: Any) -> str:
    """JSON, with raw texts as they are."""
    raws: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, _Raw):
            raws.append(str(value))
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {key: marked(part) for key, part in value.items()}
        return [marked(part) for part in value] if isinstance(value, list) else value

    text = json.dumps(marked(tree))
    for at, raw in enumerate(raws):
        text = text.replace(f'"@raw{at}@"', raw)
    return text


def json_tree(content: bytes, rng: random.Random) -> Mutant:
    """A JSON file with another tree; a digest of ours in it is made to fit where that can be."""
    from tiltmeter.fingerprint import sha

    tree, words = spoilt_tree(json.loads(content), rng)
    text = dumped(tree)
    if isinstance(tree, dict) and "sha256" in tree and rng.random() < 0.8:
        try:
            found = json.loads(text)
            found.pop("sha256", None)
            text = text.replace(str(tree["sha256"]), sha(found))
        except (ValueError, TypeError, RecursionError, UnicodeEncodeError):
            pass
    return Mutant(text.encode("utf-8", "replace"), words)


def json_line(content: bytes, rng: random.Random) -> Mutant:
    """One line of a JSONL file with another tree, or lines dropped, doubled, blank, exchanged."""
    lines = content.rstrip(b"\n").split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.choice(("tree",) * 8 + ("drop", "double", "blank", "exchange", "torn", "bom"))
    if kind == "tree":
        tree, words = spoilt_tree(json.loads(lines[at]), rng)
        lines[at] = dumped(tree).encode("utf-8", "replace")
        return Mutant(b"\n".join(lines) + b"\n", f"line {at + 1}: {words}")
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "blank":
        lines.insert(at, rng.choice((b"", b"  ", b"\r", b"\0", b"null", b"[]", b"0", b'"x"')))
    elif kind == "exchange":
        rng.shuffle(lines)
    elif kind == "bom":
        lines[at] = b"\xef\xbb\xbf" + lines[at]
    else:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    return Mutant(b"\n".join(lines) + rng.choice((b"\n", b"")), f"line {at + 1}: {kind}")


def text_value(content: bytes, rng: random.Random) -> Mutant:
    """A value of TOML, YAML or CSV replaced, or a line dropped or doubled."""
    text = content.decode("utf-8", "replace")
    deep = rng.choice(DEEP)
    odd = rng.choice((
        "", "1", "-1", "nan", "inf", "1e999", "9" * MANY, "9" * 25, "true", "[]", "{}", "[" * deep + "]" * deep, '""',
        "'x'", "2001-13-45", "2001-01-01", "!!bool x", "!!timestamp x", "!!python/name:os.system", "&a [*a]", "*a", "\0",
        "a.b" * 100, '"' + "x" * 200_000 + '"', "{a: " * deep + "}" * deep, "0x" + "f" * 5000, "- " * deep + "a", "~",
        "[[a]]", ",,,,,", '"unclosed', "\u2028", "1:2:3:4", "{a = 1, a = 2}", "a" + ".a" * 3000 + " = 1",
    ))  # fmt: skip
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.choice(("value", "value", "value", "value", "drop", "double", "line", "exchange"))
    if kind == "value":
        pieces = re.split(r"(=|: |,|\[|\]|\t)", lines[at])
        where = rng.randrange(len(pieces))
        pieces[where] = f" {odd}"
        lines[at] = "".join(pieces)
    elif kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "exchange":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines.insert(at, odd)
    return Mutant("\n".join(lines).encode("utf-8", "replace"), f"line {at + 1}: {kind} {odd[:20]!r}")


# ---------------------------------------------------------------------- tensors


def tensor_header(content: bytes, rng: random.Random) -> Mutant:
    """A safetensors file with another header or other data; a digest of ours in it is made to fit."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(("metadata", "metadata", "metadata", "tree", "dtype", "shape", "drop", "numbers", "rename", "raw"))
    words = kind
    ours = header.get("__metadata__", {}).get("tiltmeter") if isinstance(header.get("__metadata__"), dict) else None
    name = rng.choice(names) if names else ""
    if kind == "metadata" and header.get("__metadata__"):
        key = rng.choice(sorted(header["__metadata__"]))
        try:
            tree, words = spoilt_tree(json.loads(header["__metadata__"][key]), rng)
            header["__metadata__"][key] = dumped(tree)
        except ValueError:
            header["__metadata__"][key] = rng.choice(("", "{", "null", "9" * MANY, "x"))
        words = f"metadata {key}: {words}"
    elif kind == "dtype" and names:
        header[name]["dtype"] = rng.choice(_DTYPES)
        words = f"'{name}' as {header[name]['dtype']}"
        width = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U16": 2}.get(
            header[name]["dtype"], 1
        )
        start, stop = header[name]["data_offsets"]
        header[name]["shape"] = [(stop - start) // width] if rng.random() < 0.3 else header[name]["shape"]
        if rng.random() < 0.7:  # data of the size that the shape needs, so that the file as such is sound
            need = width
            for n in header[name]["shape"]:
                need *= n
            need = min(need, 100_000)  # a second mutation of an absurd shape
            shift = need - (stop - start)
            data = data[:start] + rng.choice((bytes(need), data[start:stop] + bytes(max(0, shift))))[:need] + data[stop:]
            for other in names:
                a, b = header[other]["data_offsets"]
                if other == name:
                    header[other]["data_offsets"] = [a, a + need]
                elif a >= stop:
                    header[other]["data_offsets"] = [a + shift, b + shift]
    elif kind == "shape" and names:
        shape = header[name]["shape"]
        n = 1
        for part in shape:
            n *= part
        header[name]["shape"] = rng.choice(([n], [n, 1], [1, *shape], shape[::-1], [], [0], [1 << 40], [-1], shape + [1 << 31]))
        words = f"'{name}' of shape {header[name]['shape']}"
    elif kind == "drop" and names:
        start, stop = header[name]["data_offsets"]
        del header[name]
        data = data[:start] + data[stop:]
        for entry in (header[other] for other in names if other != name):
            a, b = entry["data_offsets"]
            entry["data_offsets"] = [a - (stop - start), b - (stop - start)] if a >= stop else [a, b]
        words = f"'{name}' left out"
    elif kind == "rename" and names:
        header[rng.choice((name + "x", "", "x" * 1000, "layer99999999.v", name[:-1], "direction.0"))] = header.pop(name)
        words = f"'{name}' renamed"
    elif kind == "numbers" and data:
        at = rng.randrange(0, max(1, len(data) - 8), 4) if len(data) > 8 else 0
        piece = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\x7f", b"\xff" * 8))
        data = data[:at] + piece + data[at + len(piece) :]
        words = f"{piece.hex()} at {at} of the data"
    elif kind == "raw":
        return rng.choice(BYTES)(content, rng)
    else:
        header, words = spoilt_tree(header, rng)
    text = dumped(header).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    made = struct.pack("<Q", len(text)) + text + data
    return Mutant(_signed(made) if ours and rng.random() < 0.9 else made, words)


def _signed(content: bytes) -> bytes:
    """The file with a digest that fits, as the writer of artifacts would have put it there."""
    match = _DIGEST.search(content)
    if match is None:
        return content
    blank = b"0" * 64
    blanked = content.replace(match.group(1), blank, 1)
    return blanked.replace(blank, hashlib.sha256(blanked).hexdigest().encode(), 1)


def mutator_for(name: str, rng: random.Random) -> Mutator:
    """By the kind of file, mostly one that knows it; otherwise one of bytes."""
    if rng.random() < 0.3:
        return rng.choice(BYTES)
    if name.endswith(".safetensors"):
        return tensor_header
    if name.endswith((".jsonl", ".ndjson")):
        return json_line
    if name.endswith(".json"):
        return json_tree
    if name.endswith((".toml", ".yaml", ".yml", ".csv", ".tsv", ".txt", ".jinja")):
        return text_value
    return rng.choice((lengthened, lengthened, flipped, cut))
