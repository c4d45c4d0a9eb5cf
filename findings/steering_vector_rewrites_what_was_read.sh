#!/usr/bin/env bash
# Guess: SteeringVector.apply adds to the stream; what another hook took from the block before stays as it was. And
#   min_token_index=len(prompt) steers the answer and not the prompt.
# Seen: it writes into the block's output in place, so the tensor that an earlier hook kept becomes the steered one. And
#   positions count within one forward: with the KV cache (the default) each new token has index 0: nothing is steered.
# Matters: a monitor that hooks first reads the steering it thought it was ahead of; "steered answers" are plain ones.
# 2026-11-27, Python 3.11: steering-vectors 0.12.2 (needs transformers 4), transformers 4.57.6, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==4.57.6 numpy==2.4.6 steering-vectors==0.12.2
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import torch, transformers
from steering_vectors import SteeringVector
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()
x = torch.arange(3, 13)[None]
vector = SteeringVector({0: torch.ones(32) * 3}, "decoder_block")
kept = []
hook = model.model.layers[0].register_forward_hook(
    lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output))
with torch.no_grad():
    model(x)
    with vector.apply(model):
        model(x)
hook.remove()
moved = (kept[1] - kept[0]).abs().max().item()

def answer(cache, **where):
    settings = dict(max_new_tokens=8, do_sample=False, use_cache=cache, attention_mask=torch.ones_like(x))
    if not where:
        return model.generate(x, **settings)
    with vector.apply(model, **where):
        return model.generate(x, **settings)

changed = {cache: (answer(cache) != answer(cache, min_token_index=x.shape[1])).sum().item() for cache in (False, True)}
print("versions: steering-vectors 0.12.2 transformers", transformers.__version__, "torch", torch.__version__)
print("source: steering_vectors/steering_vector.py, _create_additive_hook")
print("expected: kept tensor moved by 0; the same answer with and without the cache")
print(f"seen: the tensor that the earlier hook kept moved by {moved:.1f}")
print(f"seen: answer tokens changed by steering: {changed[False]} of 8 without the cache, {changed[True]} with it")
assert moved == 3.0 and changed[False] > 0 and changed[True] == 0
EOF
