"""Steering vectors of other tools: read theirs, and write the one that llama.cpp reads.

    tool              file            what a vector is here
    llama.cpp, repeng .gguf           `direction.N`, added to the output of block N
    persona vectors   .pt             one row per layer, or {layer: vector}; converted by the user first, see `read_pt`
    steering-lite     .safetensors    `layerN.v` and a `coeff`, added to the output of block N

Those tools write activation units, without the norm of the layer. So an imported vector has the direction,
its length as `norm` and 1 (or the tool's own factor) as `strength`: adding it does what it did there. To
compare strengths across layers, put in the layer's mean norm with `dataclasses.replace`. A layer whose direction is all
zeros steers nothing: it has no vector here, and `meta["zero_layers"]` of the others names it.

    vectors = read_gguf("happy.gguf")
    write_gguf(vectors, "again.gguf", architecture="llama")
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiltmeter.artifacts import write_file
from tiltmeter.errors import ArtifactError, InputError, NumericalError, require
from tiltmeter.gguf_header import check_gguf
from tiltmeter.steer import SteeringVector, read_safetensors
from tiltmeter.untrusted import parse_json

__all__ = ["read_gguf", "read_pt", "read_steering_lite", "write_gguf"]

_ARCHITECTURE = "controlvector"
_CONVERT = (
    "import torch,safetensors.torch as s; v=torch.load('v.pt',weights_only=True); s.save_file({str(k):"
    "t.detach().float().clone() for k,t in (v.items() if isinstance(v,dict) else enumerate(v))},'v.safetensors')"
)
"""What a user runs where the .pt file is trusted; nothing in this package unpickles."""
_ADDITIVE = {"mean_diff", "pca"}  # steering-lite methods whose coefficient times `v` is what is added


def read_gguf(path: str | Path) -> tuple[SteeringVector, ...]:
    """Read a control vector file of llama.cpp or repeng; one vector per layer, in order.

    Raises:
        MissingExtra: the `gguf` package is not installed.
        ArtifactError: missing, truncated, no control vector, of a number format that gguf cannot unpack, or without
            directions that are not zero.
    """
    gguf = require("gguf", extra="gguf")
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(str(path))
        architecture = _text(reader, "general.architecture")
        hint = _text(reader, f"{_ARCHITECTURE}.model_hint")
        found = {t.name: _numbers(t, path) for t in reader.tensors if t.name.startswith("direction.")}
    except (ValueError, IndexError, KeyError, OSError, TypeError, struct.error) as error:
        raise ArtifactError(f"'{path}' is truncated or no GGUF file ({error}); fetch it again") from error
    if architecture != _ARCHITECTURE:
        raise ArtifactError(f"'{path}' holds a '{architecture}', not a '{_ARCHITECTURE}'; pass the control vector file")
    names = {name: re.fullmatch(r"direction\.(\d+)", name) for name in found}
    rows = {int(match.group(1)): found[name] for name, match in names.items() if match}
    return _collect(rows, path, {"format": "gguf", "model_hint": hint})


def write_gguf(vectors: Sequence[SteeringVector], path: str | Path, *, architecture: str) -> Path:
    """Write what adding these vectors adds as a control vector file for llama.cpp.

    Args:
        vectors: at most one per layer; block 0 has no place in the format.
        path: the .gguf file to write.
        architecture: the model type that the file names, such as "llama".

    Raises:
        InputError: no vectors, two for one layer, or one for block 0.
        MissingExtra: the `gguf` package is not installed.
        StorageError: the file cannot be written.
    """
    layers = [vector.layer for vector in vectors]
    if not layers or len(set(layers)) < len(layers) or 0 in layers:
        raise InputError(
            f"a control vector file takes one vector per layer from layer 1 on, got layers {layers}; "
            "sum the vectors of a layer first, and leave layer 0 out"
        )
    gguf = require("gguf", extra="gguf")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(str(scratch), _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", architecture)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(layers))
        for vector in sorted(vectors, key=lambda v: v.layer):
            writer.add_tensor(f"direction.{vector.layer}", vector.added)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_file(path, scratch.read_bytes())
    return Path(path)


def read_pt(path: str | Path, *, first_row: str = "embeddings") -> tuple[SteeringVector, ...]:
    """Read vectors that torch saved, once they are converted; a .pt file is a pickle, and refused.

    Args:
        path: the safetensors file that the command in the refusal writes: rows of a (rows, hidden) tensor, or the
            vectors of {layer: (hidden,) tensor}, by their number.
        first_row: what row 0 is: "embeddings" where the tensor was made from `hidden_states` (row k + 1 is block k, as
            persona vectors has it; row 0 is dropped) or "block 0", as it is for a dictionary by layer.

    Raises:
        InputError: another `first_row`.
        ArtifactError: a pickle, missing, damaged, or of another shape.
    """
    if first_row not in ("embeddings", "block 0"):
        raise InputError(f"first_row must be 'embeddings' or 'block 0', got {first_row!r}")
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            head = file.read(2)
        if head == b"PK" or head[:1] == b"\x80" or Path(path).suffix in (".pt", ".pth", ".bin"):
            raise ArtifactError(
                f"'{path}' is a pickle, which can run code and is never read; if you trust it, convert it and read the "
                f'result: python -c "{_CONVERT}"'
            )
    tensors, _ = read_safetensors(path)
    if not all(re.fullmatch(r"\d{1,4}", name) and row.ndim == 1 for name, row in tensors.items()):
        raise ArtifactError(
            f"'{path}' does not hold vectors by layer number; convert the .pt file as the refusal of it says"
        )
    shift = 1 if first_row == "embeddings" else 0
    rows = {int(name) - shift: row for name, row in tensors.items() if int(name) >= shift}
    return _collect(rows, path, {"format": "pt"})


def read_steering_lite(path: str | Path) -> tuple[SteeringVector, ...]:
    """Read an additive vector of steering-lite; one per layer, with its coefficient as strength.

    Raises:
        ArtifactError: missing, truncated, foreign, or of a method that adds no fixed vector.
    """
    tensors, metadata = read_safetensors(path)
    try:
        settings = parse_json(metadata["cfg"])
        method, factor = str(settings["method"]), float(settings["coeff"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"'{path}' has no steering-lite settings in its header ({error!r}); pass a file of that tool"
        ) from error
    if method not in _ADDITIVE or settings.get("target_submodule"):
        raise ArtifactError(
            f"'{path}' steers by '{method}', which is no fixed vector added to a block's output; "
            f"only {', '.join(sorted(_ADDITIVE))} can be read"
        )
    names = {name: re.fullmatch(r"layer(\d+)\.v", name) for name in tensors}
    rows = {int(match.group(1)): tensors[name].reshape(-1) for name, match in names.items() if match}
    return _collect(rows, path, {"format": "steering-lite", "method": method}, strength=factor)


def _numbers(tensor: Any, path: str | Path) -> npt.NDArray[np.float32]:
    """The numbers of a GGUF tensor, flat, whatever blocks they are packed in."""
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    try:
        found = tensor.data if tensor.data.dtype.kind == "f" else dequantize(tensor.data, kind)
    except NotImplementedError as error:
        raise ArtifactError(
            f"'{tensor.name}' in '{path}' is stored as {kind.name}, which the gguf package cannot unpack; write the "
            "control vector in F32, F16, BF16 or Q8_0"
        ) from error
    return np.asarray(found, dtype=np.float32).reshape(-1)


def _text(reader: Any, key: str) -> str:
    entry = reader.get_field(key)
    return "" if entry is None else bytes(entry.parts[-1]).decode("utf-8", errors="replace")


def _collect(
    rows: dict[int, npt.NDArray[np.float32]], path: str | Path, meta: dict[str, object], *, strength: float = 1.0
) -> tuple[SteeringVector, ...]:
    if not rows:
        raise ArtifactError(f"'{path}' holds no direction of any layer; pass a file with steering vectors")
    zero = sorted(layer for layer, row in rows.items() if not row.any())
    if len(zero) == len(rows):
        raise ArtifactError(f"every direction in '{path}' is all zeros, so it steers nothing; make the vectors again")
    note = meta | {"source": Path(path).name} | ({"zero_layers": zero} if zero else {})
    return tuple(_one(layer, rows[layer], strength, note, path) for layer in sorted(set(rows) - set(zero)))


def _one(
    layer: int, row: npt.NDArray[np.float32], strength: float, meta: dict[str, object], path: str | Path
) -> SteeringVector:
    length = float(np.linalg.norm(row.astype(np.float64)))
    try:
        return SteeringVector(layer, row, strength, length, meta)
    except (InputError, NumericalError) as error:
        raise ArtifactError(f"the direction of layer {layer} in '{path}' cannot be used: {error}") from error
