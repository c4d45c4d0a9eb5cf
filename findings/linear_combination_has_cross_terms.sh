#!/usr/bin/env bash
# Guess: add_weighted_adapter([a, b], [1, 1], combination_type="linear") gives the sum of the two updates, and [1, -1]
#   their difference.
# Seen: it adds the factors A and B, not the products: the update is (Aa + Ab)(Ba + Bb) with cross terms as large as the
#   sum itself. "cat" gives the sum.
# Matters: "task arithmetic" made so is another adapter; a drift predicted from the parts does not hold for it.
# 2026-11-27, Python 3.11: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
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
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2))
adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="one")
adapted.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj"]))
for name, p in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.3)
module = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/model.py, LoraModel._generalized_task_arithmetic_weighted_adapter")
print("expected: relative error 0 against the weighted sum of the two updates")
error = {}
for kind in ("cat", "linear"):
    for sign in (1.0, -1.0):
        name = f"{kind}{sign:+.0f}"
        adapted.add_weighted_adapter(["one", "two"], [1.0, sign], name, combination_type=kind)
        right = module.get_delta_weight("one") + sign * module.get_delta_weight("two")
        error[name] = ((module.get_delta_weight(name) - right).norm() / right.norm()).item()
        print(f"seen: {kind:6} weights [1, {sign:+.0f}] relative error {error[name]:.3f}")
assert max(error["cat+1"], error["cat-1"]) < 1e-5 and min(error["linear+1"], error["linear-1"]) > 0.5
EOF
