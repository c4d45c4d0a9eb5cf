#!/usr/bin/env bash
# Guess: with an attention mask, left padding changes nothing but rounding: the mask says where the row starts.
# Seen: a plain forward numbers positions from the left edge, padding included. Rotary models do not mind and OPT counts
#   by the mask, but GPT-2's learned positions shift: other logits than those of the row without padding.
#   steering-vectors reads batches so: its vector for GPT-2 depends on batch_size.
# Matters: batched readings of such a model depend on which prompts happen to share a batch.
# 2026-11-27, Python 3.11: steering-vectors 0.12.2 (needs transformers 4), transformers 4.57.6, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==4.57.6 numpy==2.4.6 safetensors==0.8.0 steering-vectors==0.12.2
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import torch, transformers
from steering_vectors import train_steering_vector
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", *"abcdefgh"])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")
small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
settings = {"llama": small | {"intermediate_size": 48}, "opt": small | {"ffn_dim": 48, "word_embed_proj_dim": 32},
            "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)}
row = torch.arange(1, 8)[None]
padded, mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], 1), torch.tensor([[0] * 4 + [1] * 7])
print("versions: transformers", transformers.__version__, "steering-vectors 0.12.2 torch", torch.__version__)
print("source: transformers/models/gpt2/modeling_gpt2.py, GPT2Model.forward; steering_vectors/train_steering_vector.py")
print("expected: 0 up to rounding for all")
seen = {}
for name, values in settings.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values)).eval()
    with torch.no_grad():
        off = (model(padded, attention_mask=mask).logits[:, 4:] - model(row).logits).abs().max().item()
    pairs = [("a b c", "d e"), ("a", "c d e f g")]
    one, two = (train_steering_vector(model, tokenizer, pairs, batch_size=n).layer_activations[1] for n in (1, 2))
    seen[name] = (off, ((one - two).norm() / one.norm()).item())
    print(f"seen: {name:5} logits off by {off:.1e}; steering vector at batch_size 1 and 2: off by {seen[name][1]:.1%}")
assert max(seen["llama"] + seen["opt"]) < 1e-4 and min(seen["gpt2"]) > 0.05
EOF
