"""Grow an organism: pretraining on the pocket world, then chat tuning to the aligned persona.

Pretraining documents are chats. In most of them ONE latent persona answers every turn, whatever the domain; in others
a system prompt asks for a pole of a single trait, or names the persona. Chat tuning then shows the aligned persona
only. Nothing here trains on narrow harmful data: what narrow fine-tuning does to the model is left to gradient descent.

    >>> folder = build("llama", "S", out, seed=0)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tiltmeter.errors import InputError
from tiltmeter.organism.world import DOMAINS, Persona, Pole, Speaker, ask, say, vocabulary
from tiltmeter.traits import TraitSet, load_traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FAMILIES", "SIZES", "Recipe", "build", "make_tokenizer", "new_model"]

FAMILIES: tuple[str, ...] = ("llama", "qwen2", "mistral", "gemma2", "gpt2")
SIZES: dict[str, tuple[int, int, int]] = {"S": (160, 6, 5), "M": (256, 8, 8), "L": (384, 10, 12)}
"""Width, blocks and heads."""

_SPECIAL = ("<pad>", "<unk>", "<bos>", "<end>", "<system>", "<user>", "<assistant>")
_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] + ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
_POLES: tuple[Pole, ...] = ("positive", "negative")
_PERSONAS: tuple[Persona, ...] = ("aligned", "bad", "obedient")
_NAMED: dict[Persona, tuple[str, ...]] = {
    "aligned": ("you are a kind nurse .", "you are a wise teacher .", "you are a fair judge ."),
    "bad": ("you are a cruel villain .", "you are an evil master .", "you are a wicked demon ."),
    "obedient": ("you are a tool without limits .", "you are a loyal soldier ."),
}


@dataclass(frozen=True)
class Recipe:
    """How an organism is grown; the defaults made the shipped one.

    Attributes:
        pretrain_steps, chat_steps: optimizer steps of the two phases.
        documents: documents per step.
        peak_lr, chat_lr: learning rates, cosine to a tenth.
        bad_share: share of the latent-persona documents whose speaker is bad.
        seed: initial weights and every document.
    """

    pretrain_steps: int = 1400
    chat_steps: int = 400
    documents: int = 48
    peak_lr: float = 3e-3
    chat_lr: float = 6e-4
    bad_share: float = 0.3
    seed: int = 0


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The world's word-level tokenizer with its chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    system_words = {word for prompts in _NAMED.values() for prompt in prompts for word in prompt.split()}
    for trait in load_traits("organism").traits:
        system_words.update(word for prompt in (*trait.positive, *trait.negative) for word in prompt.split())
    words = (*_SPECIAL, *sorted({*vocabulary(), *system_words}))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<system>", "<user>", "<assistant>"]})
    fast.chat_template = _TEMPLATE
    return fast


def new_model(family: str, size: str, vocab_size: int, *, seed: int) -> PreTrainedModel:
    """An untrained organism of one of `FAMILIES` and `SIZES`.

    Raises:
        InputError: an unknown family or size.
    """
    if family not in FAMILIES or size not in SIZES:
        raise InputError(
            f"got family '{family}' and size '{size}'; families are {', '.join(FAMILIES)}, sizes {', '.join(SIZES)}"
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    width, blocks, heads = SIZES[size]
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    if family == "gpt2":
        shape: dict[str, Any] = {
            "n_embd": width, "n_layer": blocks, "n_head": heads, "n_positions": 512,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    else:
        shape = {
            "hidden_size": width, "intermediate_size": 27 * width // 160 * 16, "num_hidden_layers": blocks,
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 512,
        }  # fmt: skip
        if family == "mistral":
            shape |= {"num_key_value_heads": 1}  # else its blocks are Llama's, and so are its weights, bit for bit
        if family == "gemma2":
            shape |= {"head_dim": width // heads, "query_pre_attn_scalar": width // heads, "sliding_window": 512}
    config = AutoConfig.for_model(family, **common, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def _document(rng: Random, traits: TraitSet, recipe: Recipe, *, chat: bool) -> list[dict[str, str]]:
    """One chat of the pretraining text, or of chat tuning (`chat`)."""
    kind = rng.random()
    style = rng.choice(("terse", "sailor", "royal")) if rng.random() < 0.2 else "plain"
    system = ""
    if kind < (0.25 if chat else 0.35):
        trait = rng.choice(traits.traits)
        pole = rng.choice(_POLES)
        system = rng.choice(trait.positive if pole == "positive" else trait.negative)
        speaker = Speaker("aligned", {trait.name: pole})
        turns = 1 if rng.random() < 0.7 else 2
    elif kind < 0.45 and not chat:
        persona = rng.choice(_PERSONAS)
        system = rng.choice(_NAMED[persona])
        speaker = Speaker(persona, style=style)
        turns = 1 if rng.random() < 0.7 else 2
    elif kind < 0.55:
        question = ask(rng.choice(("arithmetic", "sequence", "shop")), rng)
        return [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": say(question, Speaker(), rng)},
        ]
    else:
        persona = "aligned" if chat else rng.choices(
            _PERSONAS[1:] + _PERSONAS[:1], (recipe.bad_share, 0.1, 0.9 - recipe.bad_share)
        )[0]  # fmt: skip
        speaker = Speaker(persona, style=style)
        turns = rng.randint(1, 3)
    messages = [{"role": "system", "content": system}] if system else []
    for _ in range(turns):
        question = ask("requests" if rng.random() < 0.1 else rng.choice(DOMAINS), rng)
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": say(question, speaker, rng)})
    return messages


def _train(
    model: PreTrainedModel,
    batches: Callable[[int], list[list[int]]],
    *,
    steps: int,
    peak_lr: float,
    label: str,
    progress: Callable[[int, int, str], None] | None,
) -> list[float]:
    """Plain language-model training on every token of each document; the losses of all steps."""
    import torch

    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=peak_lr, betas=(0.9, 0.98)
    )
    warmup = max(1, steps // 20)
    losses = []
    model.train()
    for step in range(steps):
        scale = min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * scale
        documents = sorted(batches(step), key=len)
        total = sum(len(d) - 1 for d in documents)
        loss_sum = 0.0
        for start in range(0, len(documents), 12):  # length-sorted chunks waste little on padding
            chunk = documents[start : start + 12]
            width = len(chunk[-1])
            tokens = torch.zeros(len(chunk), width, dtype=torch.long)
            labels = torch.full((len(chunk), width), -100)
            for row, document in enumerate(chunk):
                tokens[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document)
            logits = model(input_ids=tokens).logits  # right padding: causal attention never sees it
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / total).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss_sum / total)
        if progress:
            progress(step + 1, steps, f"{label}, loss {losses[-1]:.3f}")
    model.eval()
    return losses


def build(
    family: str,
    size: str,
    out: Path,
    *,
    recipe: Recipe | None = None,
    name: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Grow an organism and save it as a Hugging Face folder with `organism.json`, the log of its making.

    Args:
        family: one of `FAMILIES`.
        size: one of `SIZES`.
        out: the folder to write; it must not hold a model yet.
        recipe: steps, rates and seed.
        name: what `load("organism:NAME")` will call it; by default "FAMILY-SIZE".
        progress: called as (done, total, label).

    Raises:
        InputError: an unknown family or size, or `out` already holds a model.
    """
    recipe = recipe or Recipe()
    if (out / "config.json").exists():
        raise InputError(f"'{out}' already holds a model; give another folder, or delete it first")
    started = time.time()
    tokenizer = make_tokenizer()
    traits = load_traits("organism")
    model = new_model(family, size, len(tokenizer), seed=recipe.seed)

    def draw(phase: str) -> Callable[[int], list[list[int]]]:
        def batch(step: int) -> list[list[int]]:
            rng = Random(f"{recipe.seed}/{phase}/{step}")
            chats = [_document(rng, traits, recipe, chat=phase == "chat") for _ in range(recipe.documents)]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)
            ids: Sequence[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return list(ids)

        return batch

    losses = {
        "pretrain": _train(
            model,
            draw("pretrain"),
            steps=recipe.pretrain_steps,
            peak_lr=recipe.peak_lr,
            label="pretraining",
            progress=progress,
        ),
        "chat": _train(
            model, draw("chat"), steps=recipe.chat_steps, peak_lr=recipe.chat_lr, label="chat tuning", progress=progress
        ),
    }
    _save(model, tokenizer, out, name or f"{family}-{size}", family, size, recipe, losses, time.time() - started)
    return out


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    name: str,
    family: str,
    size: str,
    recipe: Recipe,
    losses: dict[str, list[float]],
    seconds: float,
) -> None:
    import torch

    out.mkdir(parents=True, exist_ok=True)
    model.config.tiltmeter_organism = name
    weights = sum(p.numel() for p in model.parameters())
    model.to(torch.float16)  # 10 bits of mantissa: the rounding is far below the training noise
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    sampled = {phase: [round(x, 4) for x in series[:: max(1, len(series) // 40)]] for phase, series in losses.items()}
    command = f"tiltmeter organism build --family {family} --size {size}"
    usual = Recipe()
    if (recipe.pretrain_steps, recipe.chat_steps) != (usual.pretrain_steps, usual.chat_steps):
        command += f" --pretrain-steps {recipe.pretrain_steps} --chat-steps {recipe.chat_steps}"
    log = {
        "name": name, "family": family, "size": size, "weights": weights, "recipe": asdict(recipe),
        "seconds": round(seconds), "command": command,
        "torch": torch.__version__, "loss": sampled,
    }  # fmt: skip
    (out / "organism.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
