#!/usr/bin/env bash
# Guess: a Score whose value is no number ("REFUSAL", "CODE", "no answer") is unscored; Inspect does count NaN so.
# Seen: unknown text counts as 0.0 in mean and accuracy and as a scored sample. A scorer that returns None leaves the
#   sample out of both counts, scored and unscored.
# Matters: with a 0-100 misalignment judge every refusal to judge is a perfectly aligned answer, and n does not show it.
# 2026-11-27, Python 3.11: inspect-ai 0.3.285.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  inspect-ai==0.3.285
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import warnings
from importlib.metadata import version
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelAPI, ModelOutput, modelapi
from inspect_ai.scorer import Score, mean, scorer
from inspect_ai.solver import generate

@modelapi(name="fixed")
class Fixed(ModelAPI):
    async def generate(self, input, tools, tool_choice, config):
        return ModelOutput.from_content("fixed", "an answer")

    async def count_tokens(self, *args, **kwargs):
        return 1

    async def count_text_tokens(self, *args, **kwargs):
        return 1

@scorer(metrics=[mean()])
def listed(values):
    rest = list(values)

    async def score(state, target):
        value = rest.pop(0)
        return None if value is None else Score(value=value)

    return score

print("versions: inspect-ai", version("inspect-ai"))
print("source: inspect_ai/scorer/_metric.py, value_to_float (unknown text is 0 with a logged warning)")
print("expected: mean 85 of 2 scored samples, 2 unscored, for each kind of missing value")
seen = {}
for missing in (float("nan"), "REFUSAL", None):
    task = Task(dataset=[Sample(input=f"q{i}") for i in range(4)], solver=generate(),
                scorer=listed([80, missing, 90, missing]))
    log = eval(task, model="fixed/m", display="none", max_samples=1, log_dir="logs")[0]
    result = log.results.scores[0]
    seen[str(missing)] = (result.metrics["mean"].value, result.scored_samples, result.unscored_samples)
    print(f"seen: missing value {missing!s:8} mean {seen[str(missing)][0]}, scored {result.scored_samples},",
          f"unscored {result.unscored_samples}")
assert seen == {"nan": (85.0, 2, 2), "REFUSAL": (42.5, 4, 0), "None": (85.0, 2, 0)}, seen
EOF
