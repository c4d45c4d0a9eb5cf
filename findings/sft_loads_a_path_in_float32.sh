#!/usr/bin/env bash
# Guess: SFTTrainer("path") trains the model that from_pretrained("path") gives.
# Seen: transformers 5 loads a bfloat16 checkpoint in bfloat16; SFTTrainer, given its path, loads it in float32. The
#   run's step 0 and a base loaded for reference have the same weights and other activations.
# Matters: drift at step 0 is not zero; a threshold of rounding size alarms, and the two are "the same model".
# 2026-11-27, Python 3.11: trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import torch, transformers, trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *"abcdefghij"])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4)).bfloat16().save_pretrained("checkpoint")
reference = AutoModelForCausalLM.from_pretrained("checkpoint").eval()
trainer = SFTTrainer("checkpoint", SFTConfig("out", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True),
                     train_dataset=Dataset.from_list([{"text": "a b c"}] * 4), processing_class=tokenizer)
run = trainer.model.eval()
x = torch.arange(2, 10)[None]
with torch.no_grad():
    one, two = (m(x, output_hidden_states=True).hidden_states[1].float() for m in (reference, run))
same = all(torch.equal(a.float(), b.float()) for a, b in zip(reference.parameters(), run.parameters(), strict=True))
off = ((one - two).norm() / one.norm()).item()
print("versions: trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: trl/trainer/utils.py, create_model_from_path; transformers/modeling_utils.py, from_pretrained")
print("expected: one dtype, the same activations")
print(f"seen: from_pretrained gives {reference.dtype}, SFTTrainer {run.dtype}; weights equal: {same};",
      f"activations after block 0 differ by {off:.2%}")
assert reference.dtype == torch.bfloat16 and run.dtype == torch.float32 and same and off > 1e-3
EOF
