#!/usr/bin/env bash
# Guess: a step whose loss is NaN shows as NaN in the log; a run whose weights are NaN is easy to see.
# Seen: TrainingArguments.logging_nan_inf_filter is on by default: a NaN is replaced by the running mean, here 0.0. The
#   weights are NaN from that step on and the log goes on with loss 0.0, the best of the run. grad_norm alone says nan.
# Matters: failure looks like success in log_history, and early stopping or "best loss" picks the broken model.
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
import torch, transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2))
rows = Dataset.from_list([{"input_ids": list(range(3, 13)), "labels": list(range(3, 13))}] * 16)


class OneBadStep(Trainer):
    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.calls == 3 else loss


trainer = OneBadStep(model, TrainingArguments("out", max_steps=6, logging_steps=1, per_device_train_batch_size=2,
                                              use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"),
                     train_dataset=rows)
trainer.train()
logged = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
broken = torch.isnan(model.lm_head.weight).all().item()
print("versions: transformers", transformers.__version__, "torch", torch.__version__)
print("source: transformers/trainer.py, Trainer (logging_nan_inf_filter); transformers/training_args.py")
print("expected: loss nan from step 3 on")
for step, loss, norm in logged:
    print(f"seen: step {step} logged loss {loss:.4f}, grad_norm {norm:.3f}")
print("seen: all weights of lm_head NaN:", broken)
assert broken and [loss for _, loss, _ in logged[2:]] == [0.0] * 4 and logged[0][1] > 1
EOF
