"""Every kind of adapter of the installed PEFT, and LoRA's options, untrained and trained: what comes of attaching it.

    python bench/trust/adapters.py        # a minute on one core; writes docs/results/trust.json

Right is: activations within 3e-6 of the largest of those of the live model that was trained, one prompt per row by
PEFT's own pass; for an untrained adapter without effect, a refusal as inactive; for kinds that cannot be read, a
refusal by name. After each the base's bytes are compared.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from adapter_recipes import KINDS, OPTIONS, RECIPES, activations, base_model, make, offered_kinds  # noqa: E402
from tiltmeter.capture import capture  # noqa: E402
from tiltmeter.errors import AdapterError, InactiveAdapter  # noqa: E402
from tiltmeter.lm import LM, attach, wrap  # noqa: E402
from tiltmeter.studies.figures import Figure, write_figures  # noqa: E402
from tiny import make_tokenizer, random_prompts  # noqa: E402

PROMPTS = [*random_prompts(), [9, 20, 21, 30], [9, 20, 21, 30, 31, 4], [9, 6, 5, 20, 21], [4, 5, 6]]
BLOCKS = (0, 1, 2)
_WITHOUT_EFFECT, _ROUNDING = 3e-5, 3e-6


def _bytes(model: torch.nn.Module) -> list[bytes]:
    tensors = (*model.parameters(), *model.buffers())
    return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


def _outcome(lm: LM, name: str, folder: Path, seen: torch.Tensor | None, plain: torch.Tensor, what: str) -> str:
    recipe = RECIPES[name]
    try:
        got = capture(attach(lm, folder), PROMPTS, BLOCKS).values
    except InactiveAdapter:
        quiet = what == "fresh" and seen is not None
        effect = float((seen - plain).abs().max() / plain.abs().max()) if quiet else 1.0
        # Trained tokens have rows of their own, which are those of the base before training.
        return "inactive" if effect <= _WITHOUT_EFFECT or (quiet and recipe.kind == "TRAINABLE_TOKENS") else "wrong"
    except AdapterError:
        return "refused by name" if recipe.words else "wrong"
    if recipe.words or seen is None:
        return "wrong"
    return "read" if np.abs(got - seen.numpy()).max() <= _ROUNDING * float(seen.abs().max()) else "wrong"


def main() -> None:
    """Measure and write the rows."""
    warnings.simplefilter("ignore")
    assert offered_kinds() == set(KINDS), "a kind of the installed PEFT has no recipe"
    figures = []
    for subject, names in (("kinds of PEFT", KINDS), ("options", OPTIONS)):
        for what in ("fresh", "trained"):
            counts = dict.fromkeys(("read", "inactive", "refused by name", "wrong"), 0)
            changed = 0
            for name, recipe in names.items():
                with tempfile.TemporaryDirectory() as scratch:
                    made = make(recipe, Path(scratch), PROMPTS)
                    lm = wrap(base_model(recipe), make_tokenizer(), name="tiny")
                    before = _bytes(lm.model)
                    plain = activations(lm.model, PROMPTS)
                    found = _outcome(lm, name, getattr(made, what), made.activations.get(what), plain, what)
                changed += _bytes(lm.model) != before
                counts[found] += 1
                print(f"{subject}: {name}, {what}: {found}", flush=True)
            for outcome, count in (*counts.items(), ("base changed", changed)):
                figures.append(
                    Figure("adapters", f"{subject}, {what}", outcome, float(count), None, None, len(names), "adapters")
                )
    write_figures(figures, ROOT / "docs" / "results" / "trust.json", command="python bench/trust/adapters.py")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
