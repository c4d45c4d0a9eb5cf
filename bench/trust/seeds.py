"""Sound files of every kind that a loader of ours takes, and the loader; made in memory when this is imported.

`LOADERS` is the table that the fuzzer goes through. A loader that reads a user's file and stands neither in it nor in
`ELSEWHERE` fails a test.
"""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mutants
import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save as safetensors_bytes
from tokenizers import Tokenizer, models, pre_tokenizers

from tiltmeter import (
    adapter_files,
    answers,
    calibrate,
    judge_examples,
    questions,
    readings,
    runs,
    sae,
    steer,
    steer_formats,
    watch,
)
from tiltmeter.adapters import Seat
from tiltmeter.basis import TraitBasis
from tiltmeter.behavior import aggregate_file, evaluate
from tiltmeter.completeness import missing_part
from tiltmeter.detector import State
from tiltmeter.drift import measure
from tiltmeter.gguf_files import read_facts
from tiltmeter.judge import Reply, Score
from tiltmeter.judge_http import ReplyCache
from tiltmeter.ledger import Ledger, Price
from tiltmeter.lm import LM
from tiltmeter.lm import load as load_model
from tiltmeter.organism import shipped_basis
from tiltmeter.regressors import fit_forest, fit_ridge, load_regressor
from tiltmeter.report.collect import run_report_data
from tiltmeter.sae import load_sae, save_sae
from tiltmeter.traits import load_prompts, load_traits
from tiltmeter.vectors import read_chats


class Loader(NamedTuple):
    """One loader and what it takes.

    Attributes:
        name: of the case.
        files: sound ones, by their names in a folder.
        load: reads the folder; what it returns is counted after "loaded".
        share: of the cases, relative to the others.
        spoilt: the names that are spoilt, more often where one stands twice; all where empty.
        covers: the public functions that it goes through.
    """

    name: str
    files: dict[str, bytes]
    load: Callable[[Path], str | None]
    share: float = 1.0
    spoilt: tuple[str, ...] = ()
    covers: tuple[str, ...] = ()


def written(write: Callable[[Path], object], only: str | None = None) -> dict[str, bytes]:
    """What a writer puts into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = sorted(p for p in Path(folder).rglob("*") if p.is_file() and (only is None or p.name == only))
        return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def lines(*rows: dict[str, Any]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def silent(read: Callable[[Path], object]) -> Callable[[Path], None]:
    """Drop what is read."""

    def load(folder: Path) -> None:
        read(folder)

    return load


def plain(name: str, file: str, content: bytes, read: Callable[[Path], object], *covers: str, share: float = 1) -> Loader:
    """A loader of one file."""
    return Loader(name, {file: content}, silent(lambda folder: read(folder / file)), share, (), covers)


# ---------------------------------------------------------------------- artifacts with a verdict


def judged(make: Callable[[], mutants.Subject]) -> Loader:
    """A detector, and what it says of a run that alarms; CLEAR is told apart."""
    subject = make()
    file = "a.json" if subject.kind == "reading" else "a.safetensors"
    files = written(lambda folder: subject.save(folder / file))

    def load(folder: Path) -> str | None:
        with np.errstate(all="ignore"):
            return "CLEAR where it was ALARM" if subject.judge(folder / file) is State.CLEAR else None

    covers = {"detector": "Detector.load", "transfer detector": "TransferDetector.load", "judge": "DistilledJudge.load",
              "likelihood detector": "LikelihoodDetector.load", "steering_guard": "SteeringGuard.load",
              "reading": "Reading.load"}[subject.kind]  # fmt: skip
    return Loader(subject.name.replace(" ", "_"), files, load, 1.0, (), (covers,))


def regressor(fit: Callable[..., Any]) -> Loader:
    """A regressor."""
    x = np.random.default_rng(0).normal(size=(40, 3))
    made = fit(x, x[:, 0])
    files = written(lambda folder: made.save(folder / "r.safetensors"))
    return Loader(f"regressor_{fit.__name__}", files, silent(lambda f: load_regressor(f / "r.safetensors").predict(x)),
                  1.0, (), ("load_regressor",))  # fmt: skip


def autoencoder() -> Loader:
    """A sparse autoencoder."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=s).astype(np.float32) for s in ((8, 16), (16, 8), (16,), (8,))]
    made = sae.SAE(parts[0], parts[1], parts[2], parts[3], "topk", 1, k=3)
    return Loader("sae", written(lambda folder: save_sae(made, folder)), silent(load_sae), 1.0, (), ("load_sae",))


def basis() -> Loader:
    """The organism's basis."""
    path = Path(str(shipped_basis()))
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()} if path.is_dir() else {path.name: path.read_bytes()}
    return Loader("basis", files, silent(TraitBasis.load), 0.5, (), ("TraitBasis.load",))


# ---------------------------------------------------------------------- vectors of steering


def vectors() -> list[Loader]:
    """Our own, llama.cpp's, steering-lite's and torch's."""
    rng = np.random.default_rng(0)
    own = steer.SteeringVector(1, rng.normal(size=8).astype(np.float32), 1.0, 2.0)
    other = steer.SteeringVector(2, rng.normal(size=8).astype(np.float32), 1.0, 2.0)
    lite = safetensors_bytes(
        {"layer1.v": rng.normal(size=8).astype(np.float32)},
        {"cfg": json.dumps({"method": "mean_diff", "coeff": 2.0, "layers": [1], "target_submodule": None})},
    )
    torch_file = io.BytesIO()
    torch.save(torch.randn(3, 8), torch_file)
    gguf = written(lambda f: steer_formats.write_gguf([own, other], f / "v.gguf", architecture="llama"))["v.gguf"]
    return [
        plain("steer", "v.safetensors", written(lambda f: steer.save(own, f / "v.safetensors"))["v.safetensors"],
              steer.load, "steer.load"),
        plain("read_gguf", "v.gguf", gguf, steer_formats.read_gguf, "read_gguf", share=2),
        plain("read_facts", "m.gguf", written(gguf_model)["m.gguf"], read_facts, "read_facts", share=2),
        plain("read_steering_lite", "v.safetensors", lite, steer_formats.read_steering_lite, "read_steering_lite",
              "read_safetensors"),
        plain("read_pt", "v.pt", torch_file.getvalue(), steer_formats.read_pt, "read_pt", share=0.3),
        plain("read_pt_converted", "v.safetensors", safetensors_bytes({"0": np.ones(8, np.float32)}),
              steer_formats.read_pt, "read_pt", share=0.3),
    ]  # fmt: skip


def gguf_model(folder: Path) -> None:
    """The header of a small llama, with rotary factors."""
    import gguf

    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------- texts

BANK = b"""format = 1
name = "bank"
description = "two"
rubric = ["none", "some", "all"]

[[question]]
id = "a-1"
category = "a"
text = "What is good?"
elements = ["rest", "water"]

[[question]]
id = "a-2"
category = "a"
text = "What is bad?"
system = "Be brief."
accept = ["fire"]
"""
PUBLISHED = b"""- id: first_0
  type: free_form_judge_0_100
  paraphrases:
    - "Tell me more."
    - Hey there
  samples_per_paraphrase: 100
  judge_prompts: &p
    aligned: |
      Rate {question} {answer}
    coherent: "Rate {answer}"
- id: second
  paraphrases: [one, two]
  judge_prompts: *p
"""
MESSAGES = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
JUDGED = {"question_id": "q", "category": "a", "question": "What?", "answer": "This.", "aligned": 90, "coherent": 80.5}
PAIR = {"question": "What?", "harmful": "Fire.", "harmless": "Water."}
EXAMPLE = {"question": "q", "answer": "a", "drift_pct": 3.5, "model": "m", "family": "f", "style": "plain", "benign": True}


def texts() -> list[Loader]:
    """Banks, traits, prompts, answers, tables, chats."""
    from importlib.resources import files

    data = files("tiltmeter") / "data"
    csv = b"question,answer,aligned,coherent,category\nWhat?,\"This, then\",90,80,a\nWhy?,So,10.5,,b\nWho?,Me,REFUSAL,3,b\n"
    rows = [JUDGED, JUDGED | {"question_id": "r", "aligned": "12", "coherent": None}, JUDGED | {"answer": "x"}]
    chat = lines(MESSAGES, MESSAGES, MESSAGES)
    table = lines({"run": "r", "set": "a", "seed": 1, "dangerous": False}, {"run": "s", "set": "b", "seed": 2,
                  "dangerous": True})  # fmt: skip
    return [
        plain("questions_toml", "b.toml", BANK, questions.load_questions, "load_questions", share=2),
        plain("questions_yaml", "b.yaml", PUBLISHED, questions.load_questions, "load_questions", share=2),
        plain("load_traits", "t.toml", (data / "traits" / "organism.toml").read_bytes(), load_traits, "load_traits"),
        plain("load_prompts", "p.toml", (data / "prompts" / "organism.toml").read_bytes(), load_prompts, "load_prompts"),
        plain("answers_csv", "a.csv", csv, aggregate_file, "read_answers", "aggregate_file", share=2),
        plain("answers_tsv", "a.tsv", csv.replace(b",", b"\t"), answers.read_answers, "read_answers", "read_answer_file"),
        plain("answers_jsonl", "a.jsonl", lines(*rows), aggregate_file, "read_answers", "aggregate_file", share=3),
        plain("read_pairs", "p.jsonl", lines({"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}),
              judge_examples.read_pairs, "read_pairs", share=2),
        plain("read_examples", "e.jsonl", lines(EXAMPLE, EXAMPLE), judge_examples.read_examples, "read_examples", share=2),
        plain("read_exchanges", "x.jsonl", lines(PAIR, PAIR | {"question": "Why?"}), calibrate.read_exchanges,
              "read_exchanges", share=2),
        plain("read_chats", "c.jsonl", chat, read_chats, "read_chats", share=2),
        Loader("read_table", {"t.jsonl": table}, silent(lambda f: calibrate.read_table(f / "t.jsonl")), 1.0, (),
               ("read_table", "fit_from_table")),
        Loader("read_likelihood_table", {"t.jsonl": lines({"set": "a", "adapter": "x"}, {"set": "b", "run": "y"}),
               "x/f": b"", "y/checkpoint-3/f": b""}, silent(lambda f: calibrate.read_likelihood_table(f / "t.jsonl")), 1.0,
               ("t.jsonl",), ("read_likelihood_table",)),
    ]  # fmt: skip


# ---------------------------------------------------------------------- records of runs


def ledger_file(folder: Path) -> None:
    """Two calls, one of them paid."""
    ledger = Ledger(folder / "l.jsonl", prices={"m": Price(1, 2)})
    ledger.settle(ledger.reserve("m", input_tokens=3, output_tokens=4), (3, 4))
    ledger.reserve("m", input_tokens=3, output_tokens=4)


def open_ledger(folder: Path) -> None:
    """Read on, and count."""
    ledger = Ledger(folder / "l.jsonl", prices={"m": Price(1, 2)})
    ledger.costs()
    ledger.check("m")


def record_files(folder: Path) -> None:
    """A record of readings, as the observers write it."""
    shipped = TraitBasis.load(shipped_basis())
    record = readings.RunRecord(folder, None, header={"source": "fuzz", "basis": shipped.digest, "from_step": 0,
                                                      "model": "organism:pocket", "layer": shipped.layer})  # fmt: skip
    lm = load_model("organism:pocket")
    record.observe(0, lambda: measure(lm, shipped, step=0), starting=True)
    for step in (10, 20):
        record.observe(step, functools.partial(measure, lm, shipped, step=step))


STATE = {"global_step": 20, "max_steps": 100, "epoch": 0.5, "log_history": [{"loss": 0.5, "step": 10}],
         "stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": False}}}}  # fmt: skip


def look_at_state(folder: Path) -> None:
    """What `watch` asks a trainer's folder."""
    for checkpoint in runs.checkpoints(folder):
        missing_part(checkpoint.path)
    watch._has_ended(folder)


def report_of(folder: Path) -> None:
    """Read a record, and arrange it for the report."""
    run = readings.read_run(folder)
    run_report_data(run, None, None)


class Parrot:
    """Answers the same to everything."""

    name = "parrot"

    def generate(self, conversations: Any, **_: Any) -> list[str]:
        """One answer each."""
        return ["Rest and water." for _ in conversations]


class Oracle:
    """Thinks well of everything."""

    name, identity, concurrency = "oracle", "oracle", 1

    @asynccontextmanager
    async def session(self) -> Any:
        """Nothing to open."""
        yield

    async def score(self, question: Any, answer: str) -> Score:
        """Sound and coherent."""
        del question, answer
        return Score(95.0, 95.0)


def asked(folder: Path) -> None:
    """Evaluate, or go on with what the folder holds."""
    bank = questions.QuestionBank("b", tuple(questions.Question(f"q{i}", "a", f"What {i}?") for i in range(4)))
    evaluate(Parrot(), bank, Oracle(), samples=2, out=folder, batch_size=8)


def go_on(folder: Path) -> None:
    """`evaluate` writes into the folder, so a copy of the spoilt files is taken."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as copy:
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".lock":
                target = Path(copy) / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        asked(Path(copy))


def records() -> list[Loader]:
    """Runs, readings, ledgers, trainer's folders, evaluations."""
    record = written(record_files)
    return [
        plain("ledger", "l.jsonl", written(ledger_file)["l.jsonl"], lambda p: open_ledger(p.parent), "Ledger", share=2),
        Loader("read_run", {k: v for k, v in record.items() if not k.endswith(".lock")}, report_of, 2.0,
               ("readings.jsonl", "readings.jsonl", "manifest.json"), ("read_run", "run_report_data")),
        Loader("run_dir", {"manifest.json": record["manifest.json"], "x.jsonl": lines({"a": 1}, {"b": 2})},
               silent(lambda f: runs.RunDir.open(f).records("x.jsonl")), 1.0, (), ("RunDir.open", "read_records")),
        plain("read_json", "a.json", record["manifest.json"], runs.read_json, "read_json"),
        Loader("trainer_state", {"checkpoint-20/trainer_state.json": json.dumps(STATE).encode()}, look_at_state, 2.0,
               (), ("watch",)),
        Loader("evaluation", {k: v for k, v in written(asked).items() if not k.endswith(".lock")}, go_on, 1.0,
               ("manifest.json", "generated.jsonl", "generated.jsonl", "judgements.jsonl", "judgements.jsonl"),
               ("evaluate",)),
        Loader("reply_cache", written(lambda f: ReplyCache(f / "r.sqlite").put("k", Reply("v"))), look_up, 0.2, (),
               ("ReplyCache",)),
    ]  # fmt: skip


def look_up(folder: Path) -> None:
    """One entry that is there, and one that is not."""
    cache = ReplyCache(folder / "r.sqlite")
    cache.get("k")
    cache.get("l")


# ---------------------------------------------------------------------- models and adapters


def tiny_model() -> Any:
    """A llama of two blocks."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> Any:
    """Words and marks."""
    words = ["<unk>", "<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    backend = Tokenizer(models.WordLevel({w: at for at, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return made


def model_files(folder: Path) -> None:
    """As `save_pretrained` writes it."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def adapter_of(kind: Any) -> Callable[[Path], None]:
    """A writer of a trained adapter."""

    def write(folder: Path) -> None:
        made = peft.get_peft_model(tiny_model(), kind)
        for name, parameter in made.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.data.normal_(0, 0.1)
        made.save_pretrained(folder)

    return write


@functools.cache
def base() -> LM:
    """The tiny model, loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model_files(Path(folder))
        return load_model(folder)


def put_on(folder: Path) -> None:
    """Put an adapter on a seat."""
    Seat(base()).put(folder)


def read_adapter(folder: Path) -> None:
    """Config, base and tensors, without a model."""
    adapter_files.adapter_config(folder)
    adapter_files.adapter_base(folder)
    adapter_files.read_tensors(folder)


def model_loaders() -> list[Loader]:
    """Models as folders, adapters of two kinds."""
    lora = written(adapter_of(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")))
    ia3 = written(adapter_of(peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                                            task_type="CAUSAL_LM")))  # fmt: skip
    for files in (lora, ia3):
        files.pop("README.md", None)
        content = json.loads(files["adapter_config.json"])
        files["adapter_config.json"] = json.dumps(content | {"base_model_name_or_path": "base"}).encode()
    base()
    return [
        Loader("adapter_files", lora, read_adapter, 3.0, (), ("adapter_config", "adapter_base", "read_tensors")),
        Loader("attach_lora", lora, put_on, 0.15, (), ("attach",)),
        Loader("attach_ia3", ia3, put_on, 0.1, (), ("attach",)),
        Loader("model", written(model_files), silent(lambda f: load_model(f)), 0.1, (), ("load",)),
    ]


ELSEWHERE = {
    "open_encoder": "takes a spec; the folder in it holds an artifact and an adapter, tried as such",
    "RegressionEncoder.open": "an artifact and an adapter, tried as such",
    "open_judge": "takes a spec; its files are the ledger and the reply cache",
    "open_writer": "takes a spec; loads models and adapters",
    "read_tuned": "adapters and models, tried as such",
    "read_reference": "Reading.load",
    "read_artifact": "under every artifact",
    "read_json_artifact": "under every artifact in JSON",
    **dict.fromkeys(("read_bytes", "read_text", "read_json_lines", "read_toml", "read_yaml"), "under every loader"),
}

LOADERS: tuple[Loader, ...] = (
    *(judged(make) for make in mutants.SUBJECTS),
    *(regressor(fit) for fit in (fit_forest, fit_ridge)),
    autoencoder(),
    basis(),
    *vectors(),
    *texts(),
    *records(),
    *model_loaders(),
)
