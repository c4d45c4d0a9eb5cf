#!/usr/bin/env bash
# Guess: Trainer(bf16=True) runs its own steps under autocast; the model object, called by anyone else, is what it was.
# Seen: model.forward is replaced: during training and for good afterwards every call runs under bfloat16 autocast and
#   casts its results to float32, so the dtype does not show it. Even at a learning rate of 0 the logits differ.
# Matters: a callback's activations and those of the checkpoint reloaded from disk differ with no training in between.
# 2026-11-27, Python 3.11: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0 accelerate==1.15.0 datasets==5.2.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import accelerate, torch, transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()
x = torch.arange(3, 13)[None]
rows = Dataset.from_list([{"input_ids": list(range(3, 13)), "labels": list(range(3, 13))}] * 8)
with torch.no_grad():
    before = model(x).logits
Trainer(model, TrainingArguments("out", max_steps=1, learning_rate=0.0, bf16=True, use_cpu=True, report_to=[],
                                 disable_tqdm=True, save_strategy="no"), train_dataset=rows).train()
with torch.no_grad():
    out = model.eval()(x, output_hidden_states=True)
off = (out.logits - before).abs().max().item()
dtypes = {state.dtype for state in out.hidden_states}
saved = model.state_dict()
fresh = LlamaForCausalLM(model.config).eval()
fresh.load_state_dict(saved)
with torch.no_grad():
    reloaded = (fresh(x).logits - before).abs().max().item()
print("versions: transformers", transformers.__version__, "accelerate", accelerate.__version__, torch.__version__)
print("source: accelerate/accelerator.py, Accelerator.prepare_model (wraps model.forward)")
print("expected: 0 both times: the learning rate is 0")
print(f"seen: after bf16=True the same object is off by {off:.1e}, hidden states {dtypes}")
print(f"seen: the same weights in a new object are off by {reloaded:.1e}")
assert reloaded == 0 and off > 1e-4 and dtypes == {torch.float32}
EOF
