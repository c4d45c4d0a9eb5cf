#!/usr/bin/env bash
# Guess: merge_and_unload() gives a model with the logits of the adapter model; LoRA on lm_head only touches the output.
# Seen: where lm_head is tied to the embedding (most small models), merging writes the update into the shared tensor:
#   the input embeddings change too and the merged model is another. PEFT warns of "complications", not of that.
# Matters: the merged model that is published and the adapter that was monitored are not the same model.
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

x = torch.arange(3, 13)[None]
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/layer.py, Linear.merge; the warning: peft/tuners/tuners_utils.py")
print("expected: merged logits equal the adapter's; input embeddings untouched")
seen = {}
for tied in (False, True):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)).eval()
    embedding = base.get_input_embeddings().weight.detach().clone()
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"])).eval()
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        logits = adapted(x).logits
        merged = adapted.merge_and_unload()
        off = (merged(x).logits - logits).abs().max().item()
        moved = (merged.get_input_embeddings().weight - embedding).abs().max().item()
    seen[tied] = (off, moved)
    print(f"seen: tied {tied!s:5} merged logits off by {off:.3f}, input embeddings moved by {moved:.3f}")
assert max(seen[False]) < 1e-4 and min(seen[True]) > 0.1
EOF
