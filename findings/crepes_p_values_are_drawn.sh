#!/usr/bin/env bash
# Guess: a conformal p-value is a function of calibration and test score: the same checkpoint has the same p twice.
# Seen: predict_p smooths by default with an unseeded draw, even where no scores tie; with 20 calibration runs the p of
#   one score moves by up to 1/21, and a verdict at 2.5 % flips between two calls.
# Matters: looking again until it is clear works. smoothing=False or a seed makes it a function.
# 2026-11-27, Python 3.11: crepes 0.9.1, numpy 2.4.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  numpy==2.4.6 crepes==0.9.1
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import crepes
import numpy as np
from crepes import ConformalClassifier

scores = np.random.default_rng(0).uniform(size=20)
new = np.array([[scores.max() + 1.0]])
detector = ConformalClassifier().fit(alphas=scores)
drawn = [float(detector.predict_p(new)[0, 0]) for _ in range(100)]
fixed = {float(detector.predict_p(new, smoothing=False)[0, 0]) for _ in range(100)}
seeded = {float(detector.predict_p(new, seed=1)[0, 0]) for _ in range(100)}
print("versions: crepes", crepes.__version__, "numpy", np.__version__)
print("source: crepes/base.py, ConformalClassifier.predict_p (smoothing=True, seed=None)")
print("expected: one p-value, 1/21 = 0.048, in 100 calls")
print(f"seen: {len(set(drawn))} values between {min(drawn):.4f} and {max(drawn):.4f};",
      f"{sum(p < 0.025 for p in drawn)} of 100 below 0.025; smoothing=False {fixed}; seed=1 {len(seeded)} value")
assert len(set(drawn)) > 90 and len(fixed) == 1 and len(seeded) == 1
EOF
