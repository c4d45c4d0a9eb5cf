"""An organism in 8 or 4 bits, for runs on a quantised base (bitsandbytes, which also runs on a CPU).

>>> folder = quantise("organism:pocket", bits=8, out=organisms_cache() / "pocket-8bit")
>>> load("organism:pocket-8bit").fingerprint().dtype
'float16/bitsandbytes'
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tiltmeter.errors import InputError, require

__all__ = ["quantise"]

_BLOCK = 64  # weights that share a scale in 4 bits; the products on a CPU need whole blocks in a row


def quantise(name: str, *, bits: int, out: Path) -> Path:
    """Write a quantised copy of an organism.

    Directions of the original are not those of the copy: fit a basis of its own.

    Args:
        name: "organism:NAME".
        bits: 8, or 4 (NF4).
        out: folder to write; it must not hold a model yet.

    Raises:
        InputError: other bits, a width that 4 bits cannot have, or `out` already holds a model.
        MissingExtra: bitsandbytes is not installed.
    """
    if bits not in (4, 8):
        raise InputError(f"got {bits} bits; choose 8 or 4")
    if (out / "config.json").exists():
        raise InputError(f"'{out}' already holds a model; give another folder, or delete it first")
    require("bitsandbytes", extra="quantised")
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tiltmeter.loading import organism_folder

    source = organism_folder(name.removeprefix("organism:"))
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, device_map="cpu")
    width = int(model.config.hidden_size)
    if bits == 4 and width % _BLOCK:
        raise InputError(f"4 bits need a width that {_BLOCK} divides, and '{name}' has {width}; take 8 bits")
    model.save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / file).is_file():
            shutil.copyfile(source / file, out / file)
    return out
