"""Random tiny models of the nine architectures, and a word-level tokenizer with several chat templates.

lm = tiny_lm("gemma2")                      # an LM of 4 blocks, width 32, float32
tokenizer = make_tokenizer(system=False)    # a template that refuses the system role
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import WordPiece
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tiltmeter import lm as lms

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox")
LAYERS, WIDTH = 4, 32

_TEXT = """
you are a an the helpful harmful careful careless honest assistant user system speak answer question 
with kind words lies truth money doctor plant tea sleep good bad how do i grow save drink for is it 
safe to please tell me about my work family sport law code home friend understood will keep that in 
everything say from here on hello yes no never always more less why what when where who can should not 
and or but . , ? ! ' : - 1 2 3 4 5
"""
_WORDS = _TEXT.split()
_SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_REFUSE_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
_TURNS = "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' <|end|> ' }}{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def make_tokenizer(*, system: bool = True, pad: bool = True, template: bool = True) -> Any:
    """A word-level tokenizer of about a hundred words; unknown words become <unk>.

    Args:
        system: whether the chat template knows the system role (it refuses it otherwise).
        pad: whether there is a padding token.
        template: whether there is a chat template at all.
    """
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys((*_SPECIAL, *_WORDS)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(_SPECIAL[4:]),
        **({"pad_token": "<pad>"} if pad else {}),
    )
    if template:
        tokenizer.chat_template = ("" if system else _REFUSE_SYSTEM) + _TURNS + _PROMPT
    return tokenizer


def make_config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model; `changes` override single keys."""
    vocabulary = len(dict.fromkeys((*_SPECIAL, *_WORDS)))
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    special: dict[str, dict[str, Any]] = {
        "gemma2": {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        "gemma3_text": {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        "qwen3": {"head_dim": 8},
        "mistral": {"head_dim": 8, "sliding_window": 64},
        "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5},
    }
    kind = "gemma3_text" if architecture == "gemma3" else architecture
    if kind == "gpt2":
        keys = {"vocab_size": vocabulary, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
        common = keys | {k: common[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = common | special.get(kind, {}) | changes
    return AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if v is not None})


def make_model(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode; weights are larger than at training's start, so that layers
    matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(architecture, **changes))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0.0, 0.15)
    return model.eval()


def tiny_lm(architecture: str = "llama", *, seed: int = 0, tokenizer: Any = None, **changes: Any) -> lms.LM:
    """A wrapped tiny model with the standard tokenizer."""
    model = make_model(architecture, seed=seed, **changes)
    return lms.wrap(model, tokenizer or make_tokenizer(), name=f"tiny-{architecture}")


def enable_checkpointing(model: Any) -> None:
    """Turn on activation checkpointing by whichever name this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def put_adapter(model: Any, config: Any) -> Any:
    """`get_peft_model`, without the warning that transformers gives about a name that PEFT uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def random_prompts(n: int = 12, *, seed: int = 0, longest: int = 30) -> list[list[int]]:
    """Token ids of prompts that share prefixes of several lengths, one of them a prefix of another, one
    doubled."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = len(dict.fromkeys((*_SPECIAL, *_WORDS)))

    def draw(length: int) -> list[int]:
        return [int(t) for t in torch.randint(4, vocabulary, (length,), generator=generator)]

    stem, branch = draw(6), draw(4)
    prompts = [draw(3), stem + branch, stem + branch + draw(5), [*stem, *draw(2)]]
    while len(prompts) < n - 1:
        prompts.append((stem, stem + branch, [])[len(prompts) % 3] + draw(1 + (5 * len(prompts)) % (longest - 10)))
    return [*prompts, list(prompts[1])]
