#!/usr/bin/env bash
# Guess: safetensors.numpy saves what the array holds, or refuses views that are not contiguous, as
#   safetensors.torch does.
# Seen: it writes the bytes behind the view under the view's shape: a transpose, every second column or an array in
#   Fortran order comes back with other numbers, with no error. The docstring asks for contiguous arrays; nothing checks.
# Matters: directions.T, vh.T, components[::-1] are how directions are saved. They load, finite and of the right shape.
# 2026-11-27, Python 3.11: safetensors 0.8.0, numpy 2.4.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  numpy==2.4.6 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import safetensors
from safetensors.numpy import load, save

table = np.arange(6.0).reshape(2, 3)
print("versions: safetensors", safetensors.__version__, "numpy", np.__version__)
print("source: safetensors/numpy.py, save and save_file")
print("expected: the same numbers back, or an exception")
views = {"contiguous": table, "transposed": table.T, "every second column": table[:, ::2],
         "Fortran order": np.asfortranarray(table)}
back = {name: load(save({"x": view}))["x"] for name, view in views.items()}
for name, view in views.items():
    print(f"seen: {name:20} saved {view.tolist()} loaded {back[name].tolist()}")
assert np.array_equal(back["contiguous"], table)
assert all(back[name].shape == view.shape and not np.array_equal(back[name], view)
           for name, view in views.items() if name != "contiguous")
EOF
