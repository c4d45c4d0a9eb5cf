#!/usr/bin/env bash
# Guess: adapter names are free. A loop that names them "0", "1", ... saves each one whole.
# Seen: while saving adapter "1", PEFT drops every key that contains ".0.", taking it for adapter "0": the tensors of
#   layers.0 are gone from the file. Nothing warns on saving; loading warns of missing keys and goes on.
# Matters: a checkpoint of a run with numbered adapters lacks layers, so its reading shows less drift than there was.
# 2026-11-27, Python 3.11: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import warnings
import torch, transformers, peft
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model

def layers_in_file(first, second):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                        num_attention_heads=4, num_key_value_heads=2))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=first)
    adapted.add_adapter(second, LoraConfig(r=4, target_modules=["q_proj"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted.save_pretrained("saved")
    said = [str(w.message) for w in caught if "layer" in str(w.message) or "missing" in str(w.message)]
    keys = load_file(f"saved/{second}/adapter_model.safetensors")
    return sorted({key.split("layers.")[1].split(".")[0] for key in keys}), said

print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/utils/save_and_load.py, _filter_state_dict_for_adapter_name")
print("expected: layers 0, 1 and 2 in every file")
letters, _ = layers_in_file("a0", "a1")
numbers, said = layers_in_file("0", "1")
print("seen: adapter 'a1' beside 'a0' saved with layers", letters)
print("seen: adapter '1' beside '0' saved with layers", numbers, "- warnings on saving:", said)
assert letters == ["0", "1", "2"] and numbers == ["1", "2"] and not said
EOF
