#!/usr/bin/env bash
# Guess: an adapter file holds the adapter: lora_A and lora_B, a few kilobytes.
# Seen: LoRA on embed_tokens also saves embed_tokens.base_layer.weight, the base's whole embedding, and loading writes
#   those rows over the base's own: an adapter made on another base brings that base's embedding along.
# Matters: a check "no key of the base may stand in an adapter" refuses sound adapters; a loader that shares one base
#   between adapters gets its embedding overwritten.
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
from peft import LoraConfig, PeftModel, get_peft_model

def model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

get_peft_model(model(0), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])).save_pretrained("adapter")
extra = [key for key in load_file("adapter/adapter_model.safetensors") if "lora" not in key]
other = model(1)  # same shapes, other weights
before = other.get_input_embeddings().weight.detach().clone()
loaded = PeftModel.from_pretrained(other, "adapter")
after = loaded.unload().get_input_embeddings().weight
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/utils/save_and_load.py, get_peft_model_state_dict (save_embedding_layers='auto')")
print("expected: no tensor of the base in the file; unload() gives the base's own embedding back")
print("seen: the file also holds", extra)
print("seen: base embedding after load and unload equals its own:", torch.equal(before, after),
      "- equals the other base's:", torch.equal(after, model(0).get_input_embeddings().weight))
assert len(extra) == 1 and extra[0].endswith("embed_tokens.base_layer.weight")
assert not torch.equal(before, after) and torch.equal(after, model(0).get_input_embeddings().weight)
EOF
