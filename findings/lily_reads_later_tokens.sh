#!/usr/bin/env bash
# Guess: an adapter on the linear layers of a causal model acts token by token, so the model stays causal and a row's
#   answer does not depend on its neighbours in the batch.
# Seen: Lily routes by an average over the whole input: a later token changes the logits of earlier ones, and another
#   row in the batch changes them too.
# Matters: activations read in batches, in packed rows or from a prefix cache are not the activations of generation.
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
from peft import LilyConfig, LoraConfig, get_peft_model

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

row = torch.arange(3, 13)[None]
later = row.clone()
later[0, -1] = 50
both = torch.cat([row, row.flip(1)])
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lily/layer.py, Linear.forward")
print("expected: logits before the changed token and logits of row 0 stay the same to rounding (1e-6)")
seen = {}
for make in (LoraConfig, LilyConfig):
    adapted = get_peft_model(model(), make(r=4, target_modules=["q_proj", "v_proj"])).eval()
    generator = torch.Generator().manual_seed(3)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.3)
    with torch.no_grad():
        plain = adapted(row).logits
        past = (adapted(later).logits - plain)[:, :-1].abs().max().item()
        neighbour = (adapted(both).logits[:1] - plain).abs().max().item()
    seen[make.__name__] = (past, neighbour)
    print(f"seen: {make.__name__:10} earlier logits moved by a later token {past:.1e}, by another row {neighbour:.1e}")
assert max(seen["LoraConfig"]) < 1e-5 and min(seen["LilyConfig"]) > 1e-3
EOF
