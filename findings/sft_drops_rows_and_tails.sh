#!/usr/bin/env bash
# Guess: SFTTrainer trains on every row; what is too long is cut, and with packing it goes on in the next pack.
# Seen: packing's default strategy ("bfd") throws the tail of a long row away ("bfd_split" keeps it); without packing a
#   prompt-completion row whose prompt fills max_length is dropped whole. No warning: the dataset is just shorter.
# Matters: the dose changes. Of 2 poisoned rows in 4 none may be left, and a tilt measured per row of data is wrong.
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
import logging, warnings
import torch, transformers, trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *"abcdefghij"])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

def prepared(rows, **settings):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4))
    config = SFTConfig("out", max_length=6, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = Dataset.from_list(rows)
        data = SFTTrainer(model, config, train_dataset=given, processing_class=tokenizer).train_dataset
    said = [str(w.message)[:70] for w in caught if "drop" in str(w.message) or "trunc" in str(w.message)]
    return len(data), sum(len(row["input_ids"]) for row in data), said

texts = [{"text": "a b c"}, {"text": "a b c d e f g h i j"}]
pairs = [{"prompt": "a", "completion": " b"}, {"prompt": "a b c d e f g", "completion": " h"}] * 2
whole = sum(len(row["text"].split()) + 1 for row in texts)
bfd = prepared(texts, packing=True)
split = prepared(texts, packing=True, packing_strategy="bfd_split")
rows = prepared(pairs)
print("versions: trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: trl/trainer/sft_trainer.py, SFTTrainer._prepare_dataset; trl/data_utils.py, pack_dataset")
print(f"expected: {whole} tokens in packs; {len(pairs)} rows of {len(pairs)} kept, or a warning")
print(f"seen: packed tokens: bfd {bfd[1]}, bfd_split {split[1]}; prompt-completion rows {rows[0]} of {len(pairs)};",
      "warnings", bfd[2] + rows[2])
assert bfd[1] < whole == split[1] and rows[0] == 2 and not bfd[2] + rows[2]
EOF
