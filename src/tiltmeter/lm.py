"""Language models: load, find blocks, render chats, generate, fingerprint. All knowledge of architectures,
chat templates and adapters lives here; this module does not know traits, layers of interest or drift.

Layer k is the output of decoder block k, counted from 0, before any final norm (`after_block`).

    lm = load("organism:pocket")                              # or a hub id, a folder, a .gguf, an adapter
    folder ids = lm.encode([{"role": "user", "content": "Is tea good for sleep?"}])
    print(lm.generate([[{"role": "user", "content": "Is tea good for sleep?"}]], seed=1)[0])
    tuned = attach(lm, "runs/medical/checkpoint-60")          # lm itself stays the plain model
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jinja2.exceptions import TemplateError
from torch import nn

from tiltmeter.chat import on_one_day
from tiltmeter.errors import InputError, ModelError
from tiltmeter.fingerprint import Fingerprint, sha

if TYPE_CHECKING:
    from tiltmeter.traits import Prompt

__all__ = [
    "LM",
    "EncodedAnswer",
    "Fingerprint",
    "Message",
    "adapter_state",
    "attach",
    "find_blocks",
    "is_compiled",
    "load",
    "stream_parts",
    "tree_obstacle",
    "undisturbed",
    "whole",
    "wrap",
]

Message = Mapping[str, str]
Progress = Callable[[int, int, str], None]

# Architectures whose prefix-tree forward is tested against the plain one; others are probed before use.
TREE_TESTED = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"})
_BLOCK_PATHS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.language_model.layers",
    "model.decoder.layers",
)
_UNDERSTOOD = "Understood. I will keep to that in everything I say from here on."
_MARK = "qzvxj"  # a word that no template contains
_SAMPLES = 64  # fingerprinted entries of each parameter
_TOKENIZER_DIGESTS: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()
# What decides the arithmetic of a forward pass; the rest of a config (paths, versions, special token ids that
# a trainer rewrites) changes without the model changing.
_CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation",
    "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "max_position_embeddings", "rope_parameters", "rotary_pct", "sliding_window", "use_sliding_window",
    "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "use_parallel_residual", "tie_word_embeddings",
)  # fmt: skip


class Unit(NamedTuple):
    """What a forward pass of n tokens costs in this model, for laying out batches (floating-point
    operations)."""

    per_token: float
    per_pair: float
    per_layer: float
    widest: int
    """The most numbers that a block computes for one token at once."""


class EncodedAnswer(NamedTuple):
    """A finished chat as token ids; `ids[start:]` are the answer and what closes its turn."""

    ids: list[int]
    start: int


class StreamParts(NamedTuple):
    """Where a model's residual stream begins, and through what its blocks read it.

    Attributes:
        sources: modules whose output enters the stream.
        readers: modules that are fed from the stream and feed the blocks' products: norms, and rotary positions,
            which take their dtype from it.
    """

    sources: tuple[nn.Module, ...]
    readers: tuple[nn.Module, ...]


@dataclass(frozen=True, eq=False)
class LM:
    """A model, its tokenizer and what they are called. An immutable holder: nothing in it is changed by
    reading.

    Attributes:
        model: the causal language model, or the `PeftModel` around it.
        tokenizer: its tokenizer; padding settings are neither used nor changed.
        name: what the user calls it (path, hub id, "organism:NAME").
        adapter: where the acting adapter came from, or None.
        revision: the hub revision, where there is one.
        origin: the untouched model that `attach` put the adapter on; None for any other model.
        caveats: what is uncertain about what was put together, sentences without full stops; they stand in verdicts.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    adapter: str | None = None
    revision: str | None = None
    origin: nn.Module | None = None
    caveats: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        config: Any = _core(self.model).config
        return config.get_text_config()

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, first to last."""
        return find_blocks(self.model)

    @cached_property
    def decoder(self) -> nn.Module:
        """The module that runs the blocks: it is always called with keyword arguments and knows positions."""
        blocks = self.blocks
        return next(m for m in self.model.modules() if any(child is blocks for child in m.children()))

    @property
    def n_layers(self) -> int:
        """The number of decoder blocks."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """The width of a block's output."""
        return int(self.config.hidden_size)

    @property
    def _embedding(self) -> torch.Tensor:
        core: Any = _core(self.model)
        weight: torch.Tensor = core.get_input_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream: that of the input embeddings."""
        return self._embedding.dtype

    @property
    def organism(self) -> str | None:
        """The pocket organism that this model is, or None for any other model."""
        value = getattr(self.config, "tiltmeter_organism", None)
        return None if value is None else str(value)

    @cached_property
    def unit(self) -> Unit:
        """What forward passes cost in this model, counted from its blocks (one multiply-add is 2
        operations)."""
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        weights = sum(p.numel() for p in matrices)
        config = self.config
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or 0) or self.hidden_size
        return Unit(
            2.0 * weights, 4.0 * width * self.n_layers, float(self.n_layers), max(max(p.shape) for p in matrices)
        )

    @cached_property
    def sharded(self) -> bool:
        """Whether the weights are spread over processes (FSDP): then all of these must read together, to the end."""
        return any("FSDPModule" in {kind.__name__ for kind in type(m).__mro__} for m in self.model.modules())

    @cached_property
    def _accepted(self) -> frozenset[str]:
        return frozenset(inspect.signature(_core(self.model).forward).parameters)

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """One pass through the model that was given (never around its adapter), with logits of the last token
        only.

        A mixed-precision wrapper that a trainer put around `forward` is left out, so that a live reading has
        the arithmetic of a reading of the saved checkpoint. The cache is off unless `use_cache` is passed.
        """
        if self.sharded:  # the call itself collects the weights
            return self.model(input_ids=input_ids, use_cache=False, **inputs)
        call = vars(self.model).get("_original_forward") or self.model.forward
        inputs = {"use_cache": False, "output_hidden_states": False, "output_attentions": False} | inputs
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        return call(input_ids=input_ids, **inputs)

    # ------------------------------------------------------------------ text

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of '{self.name}' has no chat template, so a conversation cannot be written "
                "for it; use the instruction-tuned model, or put the template that it was trained with into "
                "tokenizer.chat_template"
            )
        options: dict[str, Any] = {}
        template = self.tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if isinstance(template, str):
            dated = on_one_day(template)
            options = dated.variables | ({} if dated.template == template else {"chat_template": dated.template})
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
        return str(text)

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the chat template shows the model a system message, rather than refusing or dropping it."""
        probe = [{"role": "system", "content": _MARK}, {"role": "user", "content": "hello"}]
        try:
            return _MARK in self._render(probe, add_generation_prompt=True)
        except TemplateError:
            return False

    def _texts(self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool) -> list[str]:
        texts = []
        for messages in conversations:
            if not messages:
                raise InputError("an empty conversation was given; it needs at least one message, so add a user turn")
            if messages[0].get("role") == "system" and not self.has_system_role:
                opening = {"role": "user", "content": messages[0]["content"]}
                messages = [opening, {"role": "assistant", "content": _UNDERSTOOD}, *messages[1:]]
            try:
                texts.append(self._render(messages, add_generation_prompt=add_generation_prompt))
            except TemplateError as error:
                raise ModelError(
                    f"the chat template of '{self.name}' refused the roles "
                    f"{[m.get('role') for m in messages]} ({error}); most templates want user and assistant "
                    "in turn, so change the conversation"
                ) from error
        return texts

    def encode_all(
        self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = True
    ) -> list[list[int]]:
        """`encode` for many conversations at once."""
        texts = self._texts(conversations, add_generation_prompt=add_generation_prompt)
        if not texts:
            return []
        # The template has written the special tokens; the tokenizer must not write them again.
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)
        return [list(map(int, ids)) for ids in encoded["input_ids"]]

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The token ids of one conversation, as the chat template writes it on one fixed day, see `tiltmeter.chat`.

        Where the template knows no system role, a leading system message becomes a first exchange: the user
        says it and the assistant agrees.

        Raises:
            ModelError: no chat template, or the template refuses the roles.
            InputError: no messages.
        """
        return self.encode_all([messages], add_generation_prompt=add_generation_prompt)[0]

    def encode_answer(self, chat: Sequence[Message]) -> EncodedAnswer:
        """The token ids of a finished chat, and where its last message, the answer, begins.

        A token that spans the border belongs to the answer: tokenizers merge the template's last line break with
        one that the answer begins with.

        Raises:
            InputError: fewer than two messages, or a template whose prompt is no prefix of the finished chat.
            ModelError: as `encode`.
        """
        if len(chat) < 2:
            raise InputError(f"a chat of {len(chat)} message(s) has no answer after a question; end it with the answer")
        prompt_text = self._texts([chat[:-1]], add_generation_prompt=True)[0]
        whole_text = self._texts([chat], add_generation_prompt=False)[0]
        if not whole_text.startswith(prompt_text) or len(whole_text) == len(prompt_text):
            raise InputError(
                "the chat template renders a finished chat differently from its prompt, so answers cannot be told from "
                "questions; use a template whose prompt is a prefix of the whole chat"
            )
        prompt, whole = (
            list(map(int, ids))
            for ids in self.tokenizer([prompt_text, whole_text], add_special_tokens=False, padding=False)["input_ids"]
        )
        start = next(
            (at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt)
        )
        return EncodedAnswer(whole, start)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids of measurement prompts, up to where the answer would begin."""
        return self.encode_all([_as_messages(prompt) for prompt in prompts])

    @property
    def pad_id(self) -> int:
        """A token id to fill masked places with; any will do, since nothing sees it."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(c for c in candidates if c is not None))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: end of text, and whatever the chat template closes an assistant turn
        with."""
        generation = getattr(_core(self.model), "generation_config", None)
        declared = getattr(generation, "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id, *(declared if isinstance(declared, list | tuple) else [declared])}
        turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _MARK}]
        with contextlib.suppress(TemplateError, ModelError):
            text = self._render(turn, add_generation_prompt=False)
            tail = self.tokenizer(text[text.rindex(_MARK) + len(_MARK) :], add_special_tokens=False)["input_ids"]
            ids.add(next((i for i in tail if i in set(self.tokenizer.all_special_ids)), None))
        return frozenset(int(i) for i in ids if i is not None)

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[str]:
        """Answer each conversation; only the new text is returned, in the order of the conversations.

        The draw of answer i depends on `seed` and i alone, not on the global random state, which stays
        untouched. Up to `batch_size` conversations stay together in the given order; more are grouped by
        length.

        Args:
            conversations: message lists, each ending where the assistant is to speak.
            max_new_tokens: an answer is cut here if no end-of-turn token came.
            temperature: 0 is greedy.
            seed: a non-negative integer.
            batch_size: conversations per batch.
            progress: called with (answers done, answers in all, what is done).

        Raises:
            InputError: a count or temperature out of range, or a conversation beyond the model's context.
            NumericalError: the model's logits are not numbers.
        """
        from tiltmeter.generation import generate

        return generate(
            self,
            conversations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    # ------------------------------------------------------------------ identity

    def fingerprint(self) -> Fingerprint:
        """What this model is, adapters left out."""
        plain: Any = _core(self.model if self.origin is None else self.origin)
        text = plain.config.get_text_config()
        config = text.to_dict()
        quantised = getattr(getattr(plain.config, "quantization_config", None), "quant_method", None)
        dtype = str(self.dtype).removeprefix("torch.")
        return Fingerprint(
            architecture=str(text.model_type),
            config=sha({key: config.get(key) for key in _CONFIG_KEYS}),
            tokenizer=_tokenizer_digest(self.tokenizer),
            template=sha(self.tokenizer.chat_template),
            dtype=dtype if quantised is None else f"{dtype}/{getattr(quantised, 'value', quantised)}",
            weights=_weights_digest(plain),
        )

    @contextlib.contextmanager
    def base(self) -> Iterator[LM]:
        """This model without its adapter, for the duration; itself where there is none.

        Where `attach` put the adapter on, that is the model that it was put on: switching an adapter off does not bring
        back biases that were trained with it, or weights that it took apart.
        """
        from tiltmeter.adapters import without_adapter

        if self.origin is not None:
            yield replace(self, model=self.origin, adapter=None, origin=None)
            return
        with without_adapter(self.model):
            yield replace(self, adapter=None)


def _as_messages(prompt: Prompt) -> list[Message]:
    question = {"role": "user", "content": prompt.text}
    return [{"role": "system", "content": prompt.system}, question] if prompt.system else [question]


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks of a causal language model, whatever it is wrapped in.

    Raises:
        ModelError: no module list has as many members as the config has layers.
    """
    core: Any = _core(model)
    for path in _BLOCK_PATHS:
        found: Any = core
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList) and len(found):
            return found
    wanted = getattr(core.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in core.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not lists:
        raise ModelError(
            f"no decoder blocks were found in {type(core).__name__}: no module list of {wanted} members; "
            "a decoder-only causal language model is needed"
        )
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def tree_obstacle(lm: LM, longest: int) -> str:
    """Why prompts of up to `longest` tokens cannot be laid as a prefix tree in this model; empty if they
    can."""
    config = lm.config
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa"):
        return f"attention '{attention}' takes no mask of its own"
    if "position_ids" not in lm._accepted:
        return f"{config.model_type} takes no position ids"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))} read a sequence, not a tree"
    window = _window(config)
    if window is not None and longest > window:
        return f"a prompt of {longest} tokens is longer than the sliding window of {window}"
    return ""


def stream_parts(lm: LM) -> StreamParts:
    """The parts between which the residual stream of a half-precision model runs; none of other models, of compiled
    ones, and of architectures that the tests do not cover."""
    half = lm.dtype in (torch.bfloat16, torch.float16)
    if not half or lm.config.model_type not in TREE_TESTED or is_compiled(lm.decoder):
        return StreamParts((), ())
    core: Any = _core(lm.model)
    readers = [m for m in lm.blocks.modules() if type(m).__name__.endswith("Norm")]
    readers += [m for m in lm.decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    return StreamParts((core.get_input_embeddings(),), tuple(readers))


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` holds any part of a model: hooks that come later may not run there."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def length_limit(lm: LM) -> int:
    """The longest prompt, in tokens, beyond which rotary frequencies depend on what else is in the batch."""
    rope = getattr(lm.config, "rope_parameters", None) or {}
    kinds = {"dynamic", "longrope"}
    if rope.get("rope_type") not in kinds:
        return context_length(lm)
    original = rope.get("original_max_position_embeddings") or getattr(lm.config, "original_max_position_embeddings", 0)
    return int(original or context_length(lm))


def context_length(lm: LM) -> int:
    """The most tokens that the model's positions cover."""
    return int(getattr(lm.config, "max_position_embeddings", None) or 2**31)


def _window(config: Any) -> int | None:
    """The sliding window in tokens, or None where every layer sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return int(window) if window and slides else None


@contextlib.contextmanager
def undisturbed(lm: LM) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; every module's training flag and the random state come
    back.

    Flags are set one by one: `train()` and `eval()` are overridden in some libraries and flatten mixed
    settings.
    """
    modules = [(module, module.training) for module in lm.model.modules()]
    device = lm.device
    devices = [device] if device.type == "cuda" else []
    # no_grad, not inference_mode: a model may keep a buffer that it made during the pass and train on it
    # later.
    with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            for module, _ in modules:
                module.training = False
            yield
        finally:
            for module, flag in modules:
                module.training = flag


def load(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
) -> LM:
    """Load a model for reading.

    Args:
        source: a hub id; a folder with config.json and safetensors; a folder with one .gguf file; a .gguf
            file; a folder with a PEFT adapter (its config names the base); "organism:NAME".
        adapter: a PEFT adapter (folder or hub id) to put on the model.
        dtype: "float32", "bfloat16", "float16", or "auto" for the stored one. Default: float32 on a CPU (half
            precision is slower there, and coarser) and for GGUF files, the stored one elsewhere.
        device: a torch device, or "auto" to spread the model over several. Default: cuda where there is one.
        revision: a branch, tag or commit of the hub repository.
        tokenizer: instead of the model's own, for checkpoints that were saved without one.

    Raises:
        ModelError: missing, truncated or foreign files, pickled weights, no weights for some parameters.
        AdapterError: the adapter is damaged, does nothing, or was trained for another base.
        NumericalError: NaN or infinity among the weights.
        InputError: an unknown dtype or device.
    """
    from tiltmeter import loading

    return loading.load(source, adapter=adapter, dtype=dtype, device=device, revision=revision, tokenizer=tokenizer)


def wrap(model: nn.Module, tokenizer: Any, *, name: str | None = None, together: bool = False) -> LM:
    """An `LM` around a live model, for example inside a trainer; compiled and data-parallel shells are taken
    off.

    Args:
        model: a transformers causal language model or a `PeftModel`.
        tokenizer: its tokenizer, or a processor that has one.
        name: what to call it; the model's own name otherwise.
        together: every process that holds a part of the model wraps and reads it, with the same calls; then a model
            that `fully_shard` (FSDP 2) spread can be read.

    Raises:
        ModelError: the parameters are sharded over processes, or there is no tokenizer.
        AdapterError: the model carries an adapter that cannot be read in memory.
    """
    from tiltmeter.adapters import active_adapter, check_live

    inner = _unwrap(model, together)
    check_live(inner)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        raise ModelError("no tokenizer was given with the live model; pass the one that it is trained with")
    core: Any = _core(inner)
    organism = getattr(core.config.get_text_config(), "tiltmeter_organism", None)
    known = f"organism:{organism}" if organism else getattr(core, "name_or_path", "")
    title = name or known or type(core).__name__
    return LM(inner, tokenizer, name=str(title), adapter=active_adapter(inner))


def attach(lm: LM, adapter: str | Path | Sequence[str | Path]) -> LM:
    """Put a PEFT adapter on a model's base weights; `lm` itself stays as it was and shares the weights.

    Args:
        lm: any loaded model; an adapter that it carries is left behind.
        adapter: an adapter folder with adapter_config.json and adapter_model.safetensors, or a hub id; or several of
            one kind, which then act together.

    Raises:
        AdapterError: damaged, without effect, trained for another base model, or of a kind that cannot be read.
        NumericalError: NaN or infinity among its weights.
    """
    from tiltmeter.adapters import attach as put

    return put(lm, [adapter] if isinstance(adapter, str | os.PathLike) else adapter)


def adapter_state(lm: LM) -> Literal["none", "active", "zero"]:
    """Whether an adapter acts on the model: "none" (no adapter, or switched off), "active", or "zero" (it is
    on and the model computes what its base computes, as at the first step of training)."""
    from tiltmeter.adapter_effect import state

    return state(lm)


def _core(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of one that is spread over processes, which must ask for it together."""
    gather = getattr(tensor, "full_tensor", None)
    found: torch.Tensor = tensor if gather is None else gather()
    return found


def _unwrap(model: nn.Module, together: bool) -> nn.Module:
    while True:
        kind = type(model).__name__
        if "_orig_mod" in model._modules:  # torch.compile
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif kind in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            model = model.module  # type: ignore[assignment]
        else:
            break
    sharded = any(hasattr(p, "ds_id") or type(p.data).__name__ == "DTensor" for p in model.parameters())
    spread = any("FSDPModule" in {k.__name__ for k in type(m).__mro__} for m in model.modules())
    if "FullyShardedDataParallel" in kind or (sharded and not (together and spread)):
        raise ModelError(
            "the live model's parameters are sharded over processes (FSDP or ZeRO-3), where reading inside "
            "the run would stall it; read its saved checkpoints from beside the run instead"
        )
    return model


def _tokenizer_digest(tokenizer: Any) -> str:
    """Over the vocabulary and the splitting rules; padding and truncation settings come and go with calls.

    Writing out a real vocabulary takes as long as a tenth of a reading, so the digest is kept with the tokenizer
    until its tokens or rules change.
    """
    import json

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sha(sorted(tokenizer.get_vocab().items()))
    rules = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    added = sorted(backend.get_added_tokens_decoder().items())
    seen = str((backend.get_vocab_size(), added, *map(repr, rules)))
    kept = _TOKENIZER_DIGESTS.get(tokenizer)
    if kept is None or kept[0] != seen:
        content = json.loads(backend.to_str())
        digest = sha({key: value for key, value in content.items() if key not in ("padding", "truncation")})
        kept = _TOKENIZER_DIGESTS[tokenizer] = (seen, digest)
    return kept[1]


def _weights_digest(model: nn.Module) -> str:
    from tiltmeter.adapters import base_parameters

    digest = hashlib.sha256()
    samples = []
    for name, parameter in base_parameters(model):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = whole(parameter.detach()).reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel()), dtype=torch.float64)
        samples.append(flat[at.long().to(flat.device)].to("cpu", torch.bfloat16))
    digest.update(torch.cat(samples).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def looks_like_hub_id(text: str) -> bool:
    """Whether a source that is no path could be a repository on the model hub: not where its parent folder is here, as
    that of a checkpoint which a trainer has deleted."""
    if "/" in text and Path(text).parent.is_dir():
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and not text.startswith(".")
