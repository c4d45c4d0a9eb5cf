#!/usr/bin/env bash
# Guess: lora_B all zero means that the adapter does nothing; scanners use it as the sign of an untrained adapter.
# Seen: with use_dora=True a trained magnitude acts alone: B is zero, the logits move, and adaptersentry's report says
#   training_state "init_only".
# Matters: "B is zero, hence inactive" clears (or refuses) an adapter that changes the model.
# 2026-11-27, Python 3.11: peft 0.21.2, adaptersentry 2.0.2, transformers 5.23.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0 peft==0.21.2 adaptersentry==2.0.2
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
from pathlib import Path
import adaptersentry, torch, transformers, peft
from adaptersentry.scanner import scan
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2)).eval()
x = torch.arange(3, 13)[None]
with torch.no_grad():
    before = base(x).logits
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_dora=True)).eval()
    fresh = (adapted(x).logits - before).abs().max().item()
    for name, p in adapted.named_parameters():
        if "magnitude" in name:
            p.mul_(3)
    effect = (adapted(x).logits - before).abs().max().item()
    zero = all(not p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
adapted.save_pretrained("adapter")
report = scan(Path("adapter/adapter_model.safetensors"))
print("versions: peft", peft.__version__, "adaptersentry", adaptersentry.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/dora.py, DoraLinearLayer.forward; adaptersentry/scanner.py, _scan_inventory")
print("expected: B zero, so no effect; a scanner that knows DoRA does not call it untrained")
print(f"seen: B all zero: {zero}; fresh moves the logits by {fresh:.1e}, with trained magnitudes by {effect:.3f}")
print("seen: adaptersentry: status", report.status, "- use_dora", report.adapter.use_dora,
      "- training_state", report.adapter.training_state, "- action", report.verdict.action)
assert zero and fresh < 1e-5 and effect > 1e-2 and report.adapter.training_state == "init_only"
EOF
