"""How to make an adapter of every kind that PEFT offers, and of LoRA's options, on a tiny model: untrained and trained.

made = make(RECIPES["VERA"], folder)      # folders `fresh` and `trained`, and the live model that was trained
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file

from tiny import make_model

Outcome = Literal["read", "refused"]


@dataclass(frozen=True)
class Recipe:
    """One kind of adapter, or one option of LoRA.

    Attributes:
        kind: name of the PEFT type.
        settings: of its config.
        architecture: of the tiny model.
        words: of the error by which it is refused; empty where it is to be read.
        edit: changes of the saved config, for options that need statistics to be made and none to be loaded.
        runs: whether the model computes anything without more inputs than tokens.
        new_tokens: by how many the vocabulary is enlarged before training.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    words: str = ""
    edit: Mapping[str, Any] = field(default_factory=dict)
    runs: bool = True
    new_tokens: int = 0


@dataclass(frozen=True)
class Made:
    """What came of a recipe: two folders, the activations of the untrained and the trained live model, and that model.

    Attributes:
        fresh, trained: adapter folders.
        activations: by "fresh" and "trained", (blocks, prompts, hidden) with one prompt per row; empty where the model
            does not run.
        live: the trained model.
    """

    fresh: Path
    trained: Path
    activations: Mapping[str, torch.Tensor]
    live: Any


_PROMPT = "adds prompt tokens"
_QV = {"target_modules": ["q_proj", "v_proj"]}


def _kind(kind: str, **settings: Any) -> Recipe:
    return Recipe(kind, _QV | settings)


def _prompt(kind: str, **settings: Any) -> Recipe:
    return Recipe(kind, {"num_virtual_tokens": 3} | settings, words=_PROMPT, runs=False)


def _lora(words: str = "", **settings: Any) -> Recipe:
    return Recipe("LORA", {"r": 4, "lora_alpha": 8} | _QV | settings, words=words)


def _edited(words: str, **edit: Any) -> Recipe:
    return Recipe("LORA", {"r": 4, "lora_alpha": 8} | _QV, words=words, edit=edit)


KINDS: dict[str, Recipe] = {
    "ADALORA": _kind("ADALORA", init_r=4, target_r=2, total_step=10),
    "ADAMSS": _kind("ADAMSS", r=8, num_subspaces=2, subspace_rank=2),
    "ADAPTION_PROMPT": Recipe("ADAPTION_PROMPT", {"adapter_len": 3, "adapter_layers": 2}, words=_PROMPT, runs=False),
    "BEFT": _kind("BEFT"),
    "BOFT": _kind("BOFT", boft_block_size=4),
    "C3A": _kind("C3A", block_size=8),
    "CARTRIDGE": _prompt("CARTRIDGE"),
    "CPT": Recipe("CPT", {"cpt_token_ids": [4, 5], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}, words=_PROMPT,
                  runs=False),
    "DEFT": _kind("DEFT"),
    "DELORA": _kind("DELORA", r=4),
    "FOURIERFT": _kind("FOURIERFT", n_frequency=20),
    "FROD": _kind("FROD", progressbar=False),
    "GLORA": _kind("GLORA"),
    "GRALORA": _kind("GRALORA", r=4, gralora_k=2),
    "HIRA": _kind("HIRA", r=4),
    "HRA": _kind("HRA", r=4),
    "IA3": _kind("IA3", feedforward_modules=[]),
    "LILY": _kind("LILY", r=2, stride_A=1, num_B=2),
    "LN_TUNING": Recipe("LN_TUNING", {"target_modules": ["input_layernorm"]}),
    "LOHA": _kind("LOHA"),
    "LOKR": _kind("LOKR"),
    "LORA": _lora(),
    "MISS": _kind("MISS", r=4),
    "MULTITASK_PROMPT_TUNING": _prompt("MULTITASK_PROMPT_TUNING", num_tasks=2),
    "OFT": _kind("OFT", oft_block_size=8, r=0),
    "OSF": _kind("OSF", effective_rank=8),
    "PEANUT": _kind("PEANUT"),
    "POLY": Recipe("POLY", _QV | {"r": 2, "n_tasks": 2, "n_skills": 2}, words="task id", runs=False),
    "PREFIX_TUNING": _prompt("PREFIX_TUNING"),
    "PROMPT_TUNING": _prompt("PROMPT_TUNING"),
    "PSOFT": _kind("PSOFT", r=4),
    "PVERA": _kind("PVERA", r=4),
    "P_TUNING": _prompt("P_TUNING", encoder_hidden_size=8),
    "RANDLORA": _kind("RANDLORA", r=4),
    "ROAD": _kind("ROAD", group_size=8),
    "SHADOW": Recipe("SHADOW", _QV, words="state shaped by the row", runs=False),
    "SHIRA": _kind("SHIRA", r=2, random_seed=1),
    "SUPERTUNING": _kind("SUPERTUNING"),
    "TINYLORA": _kind("TINYLORA"),
    "TRAINABLE_TOKENS": Recipe("TRAINABLE_TOKENS", {"token_indices": [4, 5, 6], "target_modules": ["embed_tokens"]}),
    "UNILORA": _kind("UNILORA", r=2, theta_d_length=32),
    "VBLORA": _kind("VBLORA", r=2, num_vectors=8, vector_length=8),
    "VERA": _kind("VERA", r=4),
    "WAVEFT": _kind("WAVEFT", n_frequency=20),
    "XLORA": Recipe("XLORA", words="router", runs=False),
}  # fmt: skip

OPTIONS: dict[str, Recipe] = {
    "LoRA, activated": _lora(alora_invocation_tokens=[20, 21]),
    "LoRA, activated by what opens every answer": _lora(alora_invocation_tokens=[6]),
    "LoRA, DoRA": _lora(use_dora=True),
    "LoRA, rank-stabilised": _lora(use_rslora=True),
    "LoRA, own bias": Recipe("LORA", _QV | {"r": 4, "lora_bias": True}, "qwen2"),
    "LoRA, random start": _lora(init_lora_weights=False),
    "LoRA, Gaussian": _lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
    "LoRA, MiCA": _lora(init_lora_weights="mica"),
    "LoRA, PiSSA": _lora(init_lora_weights="pissa"),
    "LoRA, OLoRA": _lora(init_lora_weights="olora"),
    "LoRA, KaSA": _lora(kasa_config={}),
    "LoRA, all biases": Recipe("LORA", _QV | {"r": 4, "bias": "all"}, "qwen2"),
    "LoRA, its layers' biases": Recipe("LORA", _QV | {"r": 4, "bias": "lora_only"}, "qwen2"),
    "BOFT, all biases": Recipe("BOFT", _QV | {"boft_block_size": 4, "bias": "all"}, "qwen2"),
    "LoRA, embeddings": _lora(target_modules=["embed_tokens", "q_proj"]),
    "LoRA, output layer": _lora(target_modules=["lm_head", "q_proj"]),
    "LoRA, trained tokens": _lora(trainable_token_indices=[4, 5, 6]),
    "LoRA, trained tokens, tied": Recipe(
        "LORA", _QV | {"r": 4, "trainable_token_indices": [4, 5, 6]}, "llama-tied"
    ),
    "LoRA, full copies": _lora(modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA, enlarged vocabulary": Recipe("LORA", _QV | {"r": 4}, new_tokens=3),
    "LoRA, enlarged vocabulary, full copies": Recipe(
        "LORA", _QV | {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}, new_tokens=3
    ),
    "LoRA, some blocks": _lora(layers_to_transform=[2]),
    "LoRA, VeLoRA": _lora(velora_config={}),
    "LoRA, Monte Carlo": _lora(monteclora_config={}),
    "PVeRA, sampled": Recipe("PVERA", _QV | {"r": 4, "sample_at_inference": True}, words="sample_at_inference"),
    "LoRA, LoftQ": _edited("init_lora_weights='loftq'.*quantised", init_lora_weights="loftq"),
    "LoRA-GA": _edited("init_lora_weights='lora_ga'.*path_initial_model", init_lora_weights="lora_ga"),
    "LoRA, CorDA": _edited("init_lora_weights='corda'.*path_initial_model", init_lora_weights="corda"),
    "LoRA, PiSSA by random numbers": _edited("pissa_niter_4.*path_initial_model", init_lora_weights="pissa_niter_4"),
    "LoRA, a start of the future": _edited("init_lora_weights='fancy'.*not known", init_lora_weights="fancy"),
    "LoRA, an option of the future": _edited("'fancy_config'", fancy_config={"on": True}),
    "LoRA, other blocks": _lora("layer_replication", layer_replication=[[0, 2], [1, 4]]),
    "LoRA, Arrow": _edited("arrow_config", arrow_config={"top_k": 2}),
}  # fmt: skip

RECIPES: dict[str, Recipe] = KINDS | OPTIONS


def offered_kinds() -> set[str]:
    """The kinds that the installed PEFT can make a config of."""
    return {PeftType(kind).name for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def base_model(recipe: Recipe) -> Any:
    """The tiny model that a recipe's adapter belongs on, the same at every call."""
    tied = recipe.architecture.endswith("-tied")
    return make_model(recipe.architecture.removesuffix("-tied"), tie_word_embeddings=tied)


def build(recipe: Recipe) -> Any:
    """A live untrained PEFT model."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[recipe.kind]](task_type="CAUSAL_LM", **recipe.settings)
    model = base_model(recipe)
    if recipe.new_tokens:
        model.resize_token_embeddings(model.config.vocab_size + recipe.new_tokens, mean_resizing=False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return get_peft_model(model, config).eval()


def train(model: Any, *, steps: int = 5, rate: float = 2e-2) -> None:
    """A few large steps towards random words, on everything that is trainable."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        ids = torch.randint(4, 90, (4, 12), generator=torch.Generator().manual_seed(step))
        ids[:, 5:7] = torch.tensor([20, 21])
        ids[:, 4] = 6
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def activations(model: Any, prompts: Sequence[Sequence[int]], blocks: Sequence[int] = (0, 1, 2)) -> torch.Tensor:
    """(blocks, prompts, hidden) at the last token, one prompt per row, as transformers itself gives them."""
    rows = []
    with torch.no_grad():
        for ids in prompts:
            states = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
            rows.append(torch.stack([states[block + 1][0, -1] for block in blocks]))
    return torch.stack(rows, dim=1)


def save(recipe: Recipe, model: Any, folder: Path) -> Path:
    """As a trainer does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=True if recipe.new_tokens else "auto")
    if recipe.edit:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(recipe.edit)))
    return folder


def make(recipe: Recipe, folder: Path, prompts: Sequence[Sequence[int]]) -> Made:
    """Make an adapter, untrained and trained."""
    if recipe.kind == "XLORA":  # what PEFT saves of one: a config, and no tensors
        for name in ("fresh", "trained"):
            (folder / name).mkdir(parents=True)
            config = {"peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": 32, "adapters": {"a": "a"}}
            (folder / name / "adapter_config.json").write_text(json.dumps(config))
            save_file({}, folder / name / "adapter_model.safetensors")
        return Made(folder / "fresh", folder / "trained", {}, None)
    model = build(recipe)
    seen = {}
    fresh = save(recipe, model, folder / "fresh")
    if recipe.runs:
        seen["fresh"] = activations(model, prompts)
        train(model)
        seen["trained"] = activations(model, prompts)
    return Made(fresh, save(recipe, model, folder / "trained"), seen, model)
