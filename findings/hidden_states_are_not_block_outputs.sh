#!/usr/bin/env bash
# Guess: output_hidden_states gives the embedding, then each block's output: hidden_states[i + 1] is what a hook on
#   block i sees.
# Seen: the last entry is taken after the final norm, so the last block's output is in no entry; and Mamba has no entry
#   for the embedding: its hidden_states[i] is block i, and the tuple has the same length.
# Matters: a direction fitted on hidden_states[-1] and added at the last block is on another scale, in another basis; a
#   layer index taken from one architecture is off by one on another.
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
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

x = torch.arange(3, 13)[None]

def entries(model, blocks, norm):
    """For each hidden state, what it is."""
    outputs = {"embedding": model.get_input_embeddings()(x)}
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, output, i=i: outputs.__setitem__(f"block {i}", output))
    states = model.eval()(x, output_hidden_states=True).hidden_states
    last = f"block {len(blocks) - 1}"
    outputs[f"norm of {last}"] = norm(outputs[last])
    return [next((name for name, value in outputs.items() if torch.equal(value, state)), "?") for state in states]

with torch.no_grad():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    seen_llama = entries(llama, llama.model.layers, llama.model.norm)
    seen_mamba = entries(mamba, mamba.backbone.layers, mamba.backbone.norm_f)
print("versions: transformers", transformers.__version__, "torch", torch.__version__)
print("source: transformers/utils/output_capturing.py; transformers/models/mamba/modeling_mamba.py, MambaModel.forward")
print("expected: ['embedding', 'block 0', 'block 1'] for both")
print("seen: Llama", seen_llama)
print("seen: Mamba", seen_mamba)
assert seen_llama == ["embedding", "block 0", "norm of block 1"]
assert seen_mamba == ["block 0", "block 1", "norm of block 1"]
EOF
