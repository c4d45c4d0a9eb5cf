#!/usr/bin/env bash
# Guess: an adapter file and its base give one model; loading twice gives the same logits twice.
# Seen: with init_lora_weights="pissa_niter_4" the file does not say what was subtracted from the base. Loading redoes a
#   randomised SVD, so each load is another model, and none is the one that was trained.
# Matters: a reading of such a checkpoint is a reading of a model that nobody trained or will run.
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
from peft import LoraConfig, PeftModel, get_peft_model

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

x = torch.arange(3, 13)[None]
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/layer.py, LoraLayer.pissa_init (svd_lowrank draws a random projection)")
print("expected: every reload gives the logits of the model that was saved")
worst = {}
for kind in ("pissa", "pissa_niter_4"):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=kind)
    trained = get_peft_model(model(), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in trained.named_parameters():
        if "lora_" in name:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    trained.save_pretrained(kind)
    loads = []
    with torch.no_grad():
        saved = trained(x).logits
        for seed in (1, 2, 3):
            base = model()
            torch.manual_seed(seed)
            loads.append((PeftModel.from_pretrained(base, kind).eval()(x).logits - saved).abs().max().item())
    print(f"seen: {kind:13} reloads differ from what was saved by", [f"{v:.4f}" for v in loads])
    worst[kind] = loads
assert max(worst["pissa"]) < 1e-4, "the exact SVD comes back"
assert min(worst["pissa_niter_4"]) > 1e-2 and len({round(v, 6) for v in worst["pissa_niter_4"]}) == 3
EOF
