#!/usr/bin/env bash
# Guess: save_pretrained of an X-LoRA model writes its router, the only part that was trained; loading restores it.
# Seen: experts are kept under the names "0", "1", ...; saving drops every key with ".0." or ".1." in it as another
#   adapter's, and so the router's first layer. At the default depth of 1 the file is empty. What is missing is drawn
#   anew on loading, without a warning.
# Matters: a checkpoint on disk is not the model that was trained; it can be neither cleared nor alarmed on.
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
import torch, transformers, peft
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, XLoraConfig, get_peft_model

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, use_cache=False)).eval()

for i in (0, 1):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model(), config).save_pretrained(f"expert{i}")
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/utils/save_and_load.py, _filter_state_dict_for_adapter_name")
print("expected: every tensor of the router stands in the file")
lost = {}
for depth in (1, 2, 3):
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=depth, xlora_size=16,
                         adapters={"good": "expert0", "bad": "expert1"})
    mixed = get_peft_model(model(), config)
    mixed.save_pretrained(f"mixed{depth}")
    router = [n.split("classifier.")[1] for n, _ in mixed.named_parameters() if "xlora_classifier" in n]
    saved = [k.split("classifier.")[1] for k in load_file(f"mixed{depth}/adapter_model.safetensors")]
    lost[depth] = sorted(set(router) - set(saved))
    print(f"seen: depth {depth}: the router has {len(router)} tensors, the file {len(saved)}; lost {lost[depth]}")
assert all(missing == ["layers.0.bias", "layers.0.weight"] for missing in lost.values())
EOF
