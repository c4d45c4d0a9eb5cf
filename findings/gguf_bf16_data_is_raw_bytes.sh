#!/usr/bin/env bash
# Guess: GGUFReader gives a tensor's numbers as an array; BF16, which is no quantisation, comes as floats of its shape.
# Seen: .data of a BF16 tensor is uint8 and twice as long, of Q8_0 uint8 and 34 bytes for 32 numbers. F16 and F32 come
#   as numbers, so code that was tried on those keeps running. gguf.dequantize gives the numbers.
# Matters: a control vector in BF16 becomes a direction of bytes 0 to 255, of the wrong length, or cut to the right one.
# 2026-11-27, Python 3.11: gguf 0.19.0, numpy 2.4.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  numpy==2.4.6 gguf==0.19.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version
import gguf
import numpy as np

vector = np.random.default_rng(0).normal(size=32).astype(np.float32)
kinds = {"BF16": gguf.GGMLQuantizationType.BF16, "Q8_0": gguf.GGMLQuantizationType.Q8_0,
         "F16": gguf.GGMLQuantizationType.F16}
writer = gguf.GGUFWriter("vector.gguf", "controlvector")
for i, kind in enumerate(kinds.values(), start=1):
    writer.add_tensor(f"direction.{i}", gguf.quantize(vector, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
print("versions: gguf", version("gguf"), "numpy", np.__version__)
print("source: gguf/gguf_reader.py, GGUFReader._build_tensors; gguf/quants.py, dequantize")
print("expected: 32 floats for each")
seen = {}
for name, tensor in zip(kinds, gguf.GGUFReader("vector.gguf").tensors, strict=True):
    right = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) - vector).max()
    seen[name] = (str(tensor.data.dtype), tensor.data.size)
    print(f"seen: {name:5} shape {tensor.shape.tolist()} data {tensor.data.dtype} x {tensor.data.size},",
          f"dequantised off by {right:.4f}")
    assert right < 0.05
assert seen == {"BF16": ("uint8", 64), "Q8_0": ("uint8", 34), "F16": ("float16", 32)}
EOF
