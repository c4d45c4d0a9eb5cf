#!/usr/bin/env bash
# Guess: an adapter whose file holds tensors for layers that this model lacks is refused, or a warning names them;
#   missing tensors do bring a warning.
# Seen: surplus tensors are dropped without a word. A 4-layer model's adapter goes on a 2-layer model, half of it.
# Matters: an adapter put on a pruned or wrong base reads as a smaller drift, not as an error.
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
from peft import LoraConfig, PeftModel, get_peft_model

def model(layers):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                                        num_attention_heads=4, num_key_value_heads=2))

def load(layers_saved, layers_loaded):
    get_peft_model(model(layers_saved), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained("adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model(layers_loaded), "adapter")
    taken = sum("lora_" in name for name, _ in loaded.named_parameters())
    said = [str(w.message)[:60] for w in caught if "key" in str(w.message)]
    return len(load_file("adapter/adapter_model.safetensors")), taken, said

print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/peft_model.py, PeftModel.load_adapter (warns of missing keys only)")
print("expected: a warning or an exception in both directions")
short = load(2, 4)
surplus = load(4, 2)
print(f"seen: file of 2 layers on 4: {short[0]} tensors in the file, {short[1]} in the model, warnings {short[2]}")
print(f"seen: file of 4 layers on 2: {surplus[0]} tensors in the file, {surplus[1]} in the model, warnings", surplus[2])
assert short[2] and surplus[0] == 2 * surplus[1] and surplus[2] == []
EOF
