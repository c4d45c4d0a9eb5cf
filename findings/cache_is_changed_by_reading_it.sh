#!/usr/bin/env bash
# Guess: passing past_key_values is reading a prefix: two suffixes read off one cached prefix do not see each other.
# Seen: the forward appends to the cache in place. The second suffix sits behind the first and attends to it; the same
#   suffix read twice gives two answers. Nothing warns.
# Matters: probing many questions behind one cached prompt makes each answer depend on the order of the questions.
# 2026-11-27, Python 3.11: transformers 5.23.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import copy
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()
prefix, suffix = torch.arange(3, 9)[None], torch.arange(20, 27)[None]
with torch.no_grad():
    whole = model(torch.cat([prefix, suffix], 1)).logits[:, 6:]
    cache = model(prefix).past_key_values
    copied = (model(suffix, past_key_values=copy.deepcopy(cache)).logits - whole).abs().max().item()
    once = (model(suffix, past_key_values=cache).logits - whole).abs().max().item()
    twice = (model(suffix, past_key_values=cache).logits - whole).abs().max().item()
print("versions: transformers", transformers.__version__, "torch", torch.__version__)
print("source: transformers/cache_utils.py, DynamicLayer.update")
print("expected: both reads equal the whole row's logits")
print(f"seen: off by {once:.1e} the first time, {twice:.1e} the second; on a deep copy {copied:.1e};",
      f"the cache of 6 tokens now holds {cache.get_seq_length()}")
assert max(once, copied) < 1e-5 and twice > 1e-2 and cache.get_seq_length() == 20
EOF
