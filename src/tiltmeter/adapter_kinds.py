"""What is known of PEFT's kinds of adapters: which can be read, and how. A table over configs; nothing is loaded here.

token-local   What the adapter adds to a token depends on that token alone. Prompts may share rows, a cache may hold
              the past: every test goes over all of these, against PEFT's own pass with one prompt per row.
by row        It acts by what stands where in the row, or by the whole row. Every prompt is read in a row of its
              own, as PEFT would read it.
unknown       Neither is known, as of a kind that a later PEFT brings. It is compared, with the adapter on, before
              prompts may share rows (`capture`), and against PEFT's own generation before it answers (`generation`).
refused       It cannot be read rightly from what is in the file; `refusal` says why, by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["Conduct", "conduct_of", "is_exact_untrained", "refusal", "rewrites_live", "writes_base"]

Conduct = Literal["token-local", "by row", "unknown"]

# Kinds that leave every tensor of the base alone (unless biases are trained too).
_LOCAL_KINDS = """
ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT
OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
"""
_LOCAL = frozenset(_LOCAL_KINDS.split())
_BY_ROW = frozenset({"LILY"})  # its router averages over all tokens of all rows
_PROMPTS = "it adds prompt tokens instead of changing weights; only weight adapters such as LoRA can be read"
_REFUSED = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": _PROMPTS,
    "CPT": _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    "ADAPTION_PROMPT": _PROMPTS,
    "POLY": "it mixes skills by a task id that comes with each input and stands in no file; merge one task's mix into "
    "the weights and give the merged model",
    "SHADOW": "its second model keeps a state shaped by the row that is read, so there is no activation of one prompt "
    "alone; only adapters that act on the model's own weights can be read",
    "XLORA": "PEFT saves neither its router nor a pass that can be read layer by layer, so the file is not the model "
    "that was trained; give the LoRA adapters that it mixes, one by one",
}

# Untrained, these equal the base up to rounding only: they take weights apart and put them together again.
_ROUNDED = frozenset({"DEFT", "FROD", "HRA", "OSF"})

# LoRA's options. Those that are not named here may do anything: the adapter is then of an unknown kind.
_LORA_OPTIONS = """
alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules
fan_in_fan_out inference_mode init_lora_weights kasa_config layers_pattern layers_to_transform loftq_config lora_alpha
lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save monteclora_config peft_type
peft_version qalora_group_size r rank_pattern revision runtime_config target_modules target_parameters task_type
trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config
"""
_LORA_LOCAL = frozenset(_LORA_OPTIONS.split())
_LORA_REWRITING = ("pissa", "olora")  # redone from the base's weights on loading, with the same result
_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", *_LORA_REWRITING)


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("peft_type")
    return str(getattr(kind, "value", kind)).upper()


def _init(config: Mapping[str, Any]) -> Any:
    init = config.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) else init


def refusal(config: Mapping[str, Any]) -> str:
    """Why an adapter with this config cannot be read, as the end of a sentence; empty if it can.

    Args:
        config: the content of adapter_config.json, or a live config's `to_dict()`.
    """
    kind, init = _kind(config), _init(config)
    if kind in _REFUSED:
        return _REFUSED[kind]
    if kind == "PVERA" and config.get("sample_at_inference"):
        return "sample_at_inference draws it anew in every pass, so no two readings agree; set it to false"
    if kind == "LORA" and config.get("layer_replication"):
        return "layer_replication gives the model other blocks than its base has, so the two cannot be compared"
    if kind == "LORA" and config.get("arrow_config"):
        return (
            "arrow_config routes between other adapters, which are not in this folder; give these adapters one by one"
        )
    if kind != "LORA" or init in _LORA_INITS:
        return ""
    if re.fullmatch(r"pissa_niter_\d+", str(init)):
        why = "takes the base's weights apart with random numbers, so that each loading gives another model"
    elif init == "lora_ga":
        why = "subtracts its start from the base's weights in training and not when it is loaded"
    elif init == "corda":
        why = "changes the base's weights by statistics that are not in the file"
    elif init == "loftq":
        return "init_lora_weights='loftq' replaces the base's weights by quantised ones; give the merged model"
    else:
        why = "is not known here, so nobody can say whether the base comes back as it was in training"
    return (
        f"init_lora_weights='{init}' {why}; convert it on saving: "
        "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER OF THE UNTRAINED ADAPTER)"
    )


def conduct_of(config: Mapping[str, Any]) -> Conduct:
    """Whether prompts may share rows under an adapter with this config; see the module's text."""
    kind = _kind(config)
    if kind in _BY_ROW or (kind == "LORA" and config.get("alora_invocation_tokens")):
        return "by row"
    if kind not in _LOCAL:
        return "unknown"
    if kind == "LORA" and any(value and key not in _LORA_LOCAL for key, value in config.items()):
        return "unknown"
    return "token-local"


def writes_base(config: Mapping[str, Any]) -> bool:
    """Whether loading an adapter with this config may write into tensors of the base."""
    if _kind(config) not in _LOCAL | _BY_ROW:
        return True
    rewriting = _init(config) in _LORA_REWRITING or bool(config.get("kasa_config"))
    return rewriting or config.get("bias", "none") != "none"


def rewrites_live(config: Mapping[str, Any]) -> str:
    """The setting by which `get_peft_model` has changed the base's weights in memory for good; empty if none has."""
    if _kind(config) != "LORA":
        return ""
    init = _init(config)
    if isinstance(init, str) and (init in _LORA_REWRITING or init.startswith(("pissa", "corda", "lora_ga", "loftq"))):
        return f"init_lora_weights='{init}'"
    return "kasa_config" if config.get("kasa_config") else ""


def is_exact_untrained(config: Mapping[str, Any]) -> bool:
    """Whether an untrained adapter gives the base's numbers bit for bit, and not up to rounding only."""
    if conduct_of(config) != "token-local" or _kind(config) in _ROUNDED or writes_base(config):
        return False
    return _init(config) != "orthogonal" and not any(config.get(k) for k in ("use_dora", "monteclora_config"))
