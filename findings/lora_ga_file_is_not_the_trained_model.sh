#!/usr/bin/env bash
# Guess: PEFT reloads what it saved. PiSSA redoes its subtraction on load; so must LoRA-GA, which rewrites the base too.
# Seen: LoRA-GA subtracts its first A and B from the base while training and never on load. save_pretrained and
#   from_pretrained raise nothing and give another model.
# Matters: checkpoints of such a run, read from disk, are not the run.
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
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

x = torch.arange(3, 13)[None]
base = model()
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="lora_ga",
                    lora_ga_config=LoraGAConfig())
preprocess_loraga(base, config, lambda: base(input_ids=x, labels=x).loss.backward())
run = get_peft_model(base, config).eval()
with torch.no_grad():
    original = model()(x).logits
    start = (run(x).logits - original).abs().max().item()
    for name, p in run.named_parameters():
        if "lora_B" in name:
            p.mul_(1.05)  # a little training
    trained = run(x).logits
    run.save_pretrained("adapter")
    reloaded = PeftModel.from_pretrained(model(), "adapter").eval()(x).logits
effect = (trained - original).abs().max().item()
off = (reloaded - trained).abs().max().item()
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/layer.py, LoraLayer.lora_ga_init")
print("expected: fresh adapter equals the base, and the reloaded model equals the trained one")
print(f"seen: fresh off by {start:.1e}; training moved the logits by {effect:.4f}; reloaded, they are off by {off:.4f}")
assert start < 1e-5 and off > 1e-3 and off > effect
EOF
