"""How far a model read from a GGUF file is from its source, and a reading of one day from that of another.

    python bench/trust/formats.py            # adds its rows to docs/results/trust.json

Tiny models with random weights are written as GGUF files and read back, by transformers alone and by tiltmeter; the
source's own logits are what both are compared with. Nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import chat_template_utils

HOME = Path(__file__).parents[2]
sys.path.insert(0, str(HOME / "tests"))

from test_gguf_files import LINEAR, LLAMA3, LONG, YARN, loaded, logits  # noqa: E402
from tiltmeter import lm as lms  # noqa: E402
from tiltmeter.basis import fit_basis  # noqa: E402
from tiltmeter.drift import measure  # noqa: E402
from tiltmeter.errors import ModelError  # noqa: E402
from tiltmeter.gguf_files import read_facts  # noqa: E402
from tiltmeter.studies.figures import Figure, write_figures  # noqa: E402
from tiny import make_model, make_tokenizer  # noqa: E402
from toy_gguf import make_source, write_gguf  # noqa: E402

SOURCES: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("Llama, no scaling", "llama", {}, {}),
    ("Llama, linear", "llama", {"rope_parameters": LINEAR}, {}),
    ("Llama, YaRN", "llama", {"rope_parameters": YARN}, {}),
    ("Llama 3 frequencies", "llama", {"head_dim": 32, "rope_parameters": LLAMA3}, {}),
    ("Phi 3, LongRoPE", "phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG}, {}),
    ("Phi 3, window of 16", "phi3", {"sliding_window": 16}, {"attention.sliding_window": 16}),
    ("Llama with attention biases", "llama", {"attention_bias": True}, {}),
    ("Qwen 2, YaRN", "qwen2", {"rope_parameters": YARN}, {}),
    ("Qwen 3, narrow heads", "qwen3", {}, {}),
    ("Gemma 2, other softcaps", "gemma2",
     {"tie_word_embeddings": True, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}, {}),
    ("Gemma 3", "gemma3", {"tie_word_embeddings": True}, {}),
    ("GPT-2", "gpt2", {}, {}),
)  # fmt: skip
REFUSED: tuple[dict[str, Any], ...] = (
    {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0},
    {"rope.scaling.alpha": 1000.0},
    {"rope.dimension_count": 4, "attention.key_length": 8},
    {"attention.sliding_window": 16},
    {"attention.scale": 0.5},
    {"attention.causal": False},
    {"attn_logit_softcapping": 30.0},
    {"logit_scale": 0.25},
    {"expert_count": 8},
    {"attention.something_new": 1},
)
DATED = "{{ 'good' if strftime_now('%d') == '26' else 'bad' }} "


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two sets of logits."""
    return float((one - other).abs().max())


def by_transformers(path: Path) -> Any:
    """The file as transformers alone reads it; the vocabulary is given to it, which real files name."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.vocab_size = read_facts(path).vocabulary
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config)


def formats() -> list[Figure]:
    """GGUF files against their sources, and what is refused."""
    found = []
    for what, architecture, changes, keys in SOURCES:
        source = make_source(architecture, **changes)
        with tempfile.TemporaryDirectory() as folder:
            mine = apart(logits(loaded(source, Path(folder), keys=keys).model), logits(source))
            try:
                theirs = apart(logits(by_transformers(Path(folder) / "toy.gguf")), logits(source))
            except (ValueError, RuntimeError, OSError):
                theirs = None  # it refuses the file
        n = logits(source).numel()
        found.append(Figure("GGUF against source", what, "transformers alone", theirs, None, None, n, "logits"))
        found.append(Figure("GGUF against source", what, "tiltmeter", mine, None, None, n, "logits"))
    refused = 0
    for keys in REFUSED:
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(make_model("llama"), Path(folder) / "toy.gguf", keys=keys)
            try:
                lms.load(path)
            except ModelError as error:
                refused += all(key in str(error) for key in list(keys)[:1])
    what = "GGUF settings that cannot be kept, refused by name"
    return [*found, Figure(what, "Llama", "", refused, None, None, len(REFUSED), "files")]


def dates() -> Figure:
    """Readings of one model on two days."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED + tokenizer.chat_template
    lm = lms.wrap(make_model("llama"), tokenizer, name="dated")
    sys.path.insert(0, str(HOME / "tests"))
    from bases import PROMPTS, TRAITS

    basis = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=2)
    values = []
    for day in (26, 27):

        class Clock(datetime):
            at = datetime(2026, 11, day)

            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return cls.at

        chat_template_utils.datetime = Clock
        values.append(measure(lm, basis).values)
    chat_template_utils.datetime = datetime
    most = float(np.abs(values[0] - values[1]).max())
    n = values[0].size
    return Figure("a dated chat template on two days, largest difference", "Llama", "", most, None, None, n, "activation")


def main() -> None:
    """Measure, and write."""
    torch.set_num_threads(1)
    figures = [*formats(), dates()]
    write_figures(figures, HOME / "docs/results/trust.json", command="python bench/trust/formats.py")
    for figure in figures:
        print(figure.measure, "|", figure.subject, "|", figure.split, "|", figure.value, figure.n, figure.unit)


if __name__ == "__main__":
    main()
