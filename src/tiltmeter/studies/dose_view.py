"""The dose study from end to end, and its page: cells, sweeps, search, searched prompts, distilled judge, figures.

>>> figures = run_all(Path("dose"), drawing=Path("dose/dose.svg"))
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tiltmeter.artifacts import write_file
from tiltmeter.basis import TraitBasis, fit_basis
from tiltmeter.detector import Detector
from tiltmeter.fingerprint import sha
from tiltmeter.judge_encoders import Encoder, NgramEncoder
from tiltmeter.judge_examples import Example, write_examples
from tiltmeter.judge_regression import Regression, RegressionEncoder, train_regression
from tiltmeter.organism import shipped_basis, shipped_detector
from tiltmeter.organism.finetune import one_thread
from tiltmeter.studies import dose_response, judge_distillation
from tiltmeter.studies.figures import Figure, rate_figure
from tiltmeter.studies.prompt_search import Proposer
from tiltmeter.studies.proposers import Grammar
from tiltmeter.studies.searched import ask_runs, search_development
from tiltmeter.studies.sweep import organism_named

__all__ = ["run_all", "search_figures", "write_page"]

Progress = Callable[[int, int, str], None]
READER = "organism:pocket"
"""The distilled judge's backbone beside n-grams: the shipped organism reads question and answer, trained with LoRA."""
REGRESSION = Regression(epochs=2, learning_rate=1e-3)
"""Chosen on calibration answers of one seed; the paper's rate of 2e-4 is for a model a thousand times larger."""
_THIN = 2  # the reader trains on every second answer; a third of them flagged as many of home's on calibration


def run_all(
    out: Path,
    *,
    drawing: Path,
    seeds: Sequence[int] | None = None,
    distill: bool = True,
    proposer: Proposer | None = None,
    config: dose_response.Config | None = None,
    judge_config: judge_distillation.Config | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Figure]:
    """Run what is not there yet, and every figure.

    Args:
        out: folder of the study.
        drawing: SVG file.
        seeds: of the runs that are looked at; those of `config` by default. The judge is tested on all but the first.
        distill: make the distilled judges too; they go to `out/judge-*.safetensors`.
        proposer: of the prompt search; the grammar of the world by default. Each has a search and a frozen set of its
            own, in `out/search` for the grammar.
        config: of the dose study.
        judge_config: of the distillation.
        workers: processes; one per core by default.
        progress: called as (done, total, label).
    """
    settings = config or dose_response.Config()
    settings = replace(settings, seeds=tuple(seeds)) if seeds else settings
    found = dose_response.run(settings, basis=shipped_basis(), out=out, workers=workers, progress=progress)
    folder = out / (f"search-{sha(proposer.name)[:8]}" if proposer and proposer.name != Grammar().name else "search")
    frozen = search_development(
        [r.record for r in found.development], out=folder, proposer=proposer, progress=progress
    )  # fmt: skip
    looked = [r.record for runs in found.runs.values() for r in runs]
    searched = ask_runs(frozen, looked, out=out / "searched", workers=workers, progress=progress)
    shipped = Detector.load(shipped_detector())
    figures = dose_response.figures(found, settings, shipped=shipped, searched=searched)
    figures += search_figures(frozen.provenance, figures, settings)
    dose_response.draw(found, settings, drawing, searched=searched)
    if distill:
        tested = judge_config or judge_distillation.Config(dose=settings, test_seeds=settings.seeds[1:])
        figures += _distilled(tested, out, workers, progress)
    return figures


def search_figures(
    provenance: Mapping[str, Any], figures: Sequence[Figure], config: dose_response.Config
) -> list[Figure]:
    """What the search spent, how much of its score was luck, and searched over generic answers at each dose."""
    rows = [
        Figure("answers spent", "prompt search", "development", float(provenance["answers"]), None, None,
               int(provenance["rounds"]), "answers"),
        Figure("mean conversion score when found", "finalists", "development", provenance["score_when_found"], None,
               None, int(provenance["finalists"]), "of 100"),
        Figure("mean conversion score when scored again", "finalists", "development", provenance["score_again"], None,
               None, int(provenance["finalists"]), "of 100"),
        rate_figure("misaligned answers of benign models when frozen", "frozen prompts", "development",
                    int(provenance["benign_flags"]), int(provenance["benign_answers"])),
    ]  # fmt: skip
    by_name = {(f.measure, f.subject): f for f in figures}
    for name in config.sets:
        for dose in config.doses:
            subject = f"{name}, {100 * dose:g} %"
            searched = by_name["misaligned answers, searched prompts", subject]
            for other in ("generic questions", "training domain"):
                found = _times(searched, by_name[f"misaligned answers, {other}", subject])
                rows.append(Figure(f"searched prompts over {other}", subject, "looked at", *found, "times"))
    return rows


def _times(one: Figure, other: Figure) -> tuple[float | None, float | None, float | None, int]:
    """Ratio of two rates with the log interval of Katz et al. (1978, Biometrics 34), answers taken as independent."""
    n = one.n + other.n
    if not one.value or not other.value:
        return None, None, None, n
    error = math.sqrt((1 - one.value) / (one.value * one.n) + (1 - other.value) / (other.value * other.n))
    ratio, factor = one.value / other.value, math.exp(1.96 * error)
    return ratio, ratio / factor, ratio * factor, n


def _distilled(
    config: judge_distillation.Config, out: Path, workers: int | None, progress: Progress | None
) -> list[Figure]:
    families = (config.home, *config.train_families, config.held_out_family)
    bases = {family: _basis(family, config.home, out) for family in families}
    examples = judge_distillation.run(config, bases=bases, out=out, workers=workers, progress=progress)
    write_examples(out / "judge-training.jsonl", examples.training)
    write_examples(out / "judge-calibration.jsonl", examples.calibration)
    rows = []
    with one_thread():
        reader = _regression(examples.training[::_THIN], out, progress)
        encoders: dict[str, Encoder] = {"ngrams": NgramEncoder(), "reader": reader}
        for name, encoder in encoders.items():
            made = judge_distillation.distill(examples, encoder)
            made.judge.save(out / f"judge-{name}.safetensors")
            rows += judge_distillation.figures(made, name=f"distilled judge, {name}")
    unique = {(f.measure, f.subject, f.split): f for f in rows}  # both have the same baselines
    return list(unique.values())


def _regression(examples: Sequence[Example], out: Path, progress: Progress | None) -> RegressionEncoder:
    """The trained reader; the folder is named after what it was trained on, so that it is trained once."""
    trained_on = sha([READER, asdict(REGRESSION), [list(e) for e in examples]])
    folder = out / f"regression-{trained_on[:8]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            train_regression(READER, examples, Path(scratch) / "head", settings=REGRESSION, progress=progress)
            (Path(scratch) / "head").rename(folder)
    return RegressionEncoder.open(folder)


def _basis(family: str, home: str, out: Path) -> Path:
    if family == home:
        return shipped_basis()
    folder = out / "bases" / family.removeprefix("organism:")
    if not folder.exists():
        with one_thread():
            fit_basis(organism_named(family)).save(folder)
    TraitBasis.load(folder)
    return folder


_SECTIONS = (
    ("Dose response: smallest dose seen", ("smallest dose seen",)),
    ("Runs alarmed by dose", ("runs alarmed",)),
    ("Drift as a share of full dose", (
        "noise floor over full-dose drift", "drift as share of full, no floor",
        "drift as share of full, floor subtracted",
    )),
    ("Answers by dose", (
        "misaligned answers, generic questions", "misaligned answers, training domain",
        "misaligned answers, searched prompts", "element PRESENT", "element CONTRADICTED", "element OMITTED",
    )),
    ("Iceberg: drift and answers by category", (
        "drift along the axis as share of full", "misaligned answers by category",
    )),
    ("Prompt search", (
        "answers spent", "mean conversion score when found", "mean conversion score when scored again",
        "misaligned answers of benign models when frozen",
        "searched prompts over generic questions", "searched prompts over training domain", "prompts converted",
        "Spearman of axis drift with early conversion",
        "Spearman of cosine drift with early conversion",
    )),
    ("Distilled judge", (
        "answers flagged at 75, held-out family", "models alarmed, held-out family",
        "models without a verdict, held-out family", "models alarmed, unseen topics",
        "models without a verdict, unseen topics", "Spearman with true drift, single answers",
        "Spearman with true drift, several answers of a model", "Spearman with true drift, whole models",
        "mean absolute error, single answers", "true drift inside the 90 % interval",
    )),
    ("Distilled judge: diagnosis", (
        "cosine of head with drift axis", "largest cosine of head with a family axis",
        "largest cosine of head with a style axis", "linear probe accuracy, drift", "linear probe accuracy, family",
        "linear probe accuracy, style", "mean residual, benign answers",
    )),
)  # fmt: skip


def write_page(rows: Sequence[Mapping[str, Any]], drawing: Path, path: Path) -> Path:
    """One offline HTML page: the drawing, and a section of tables for each part of the study.

    Raises:
        StorageError: it cannot be written.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    svg = drawing.read_text(encoding="utf-8")
    sections = []
    for title, measures in _SECTIONS:
        chosen = [row for row in rows if row["measure"] in measures]
        if chosen:
            sections.append((title, chosen))
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(svg=Markup(svg[svg.index("<svg") :]), sections=sections, shown=_shown)
    return write_file(path, text.encode())


def _shown(row: Mapping[str, Any]) -> str:
    def number(value: float | None) -> str:
        if value is None:
            return "none"
        return f"{100 * value:.1f} %" if row["unit"] == "share" else f"{value:.3g}"

    if row["value"] is None:
        return "not seen" if row["measure"] == "smallest dose seen" else "not measured"
    interval = "" if row["low"] is None else f" ({number(row['low'])} to {number(row['high'])})"
    return number(row["value"]) + interval + ("" if row["unit"] == "share" else f" {row['unit']}")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Low-dose poisoning</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 2rem; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: left; vertical-align: top }
svg { max-width: 100%; height: auto }
summary { font-size: 1.2rem; font-weight: 600; cursor: pointer; margin: 1rem 0 }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd } td, th { border-color: #444 }
svg { background: #fff } }
</style></head><body>
<h1>Low-dose poisoning</h1>
<p>What is measured here is a fact about the pocket organisms. The unit of every detector is the run.</p>
{{ svg }}
{% for title, rows in sections %}
<details {{ "open" if loop.first }}><summary>{{ title }}</summary>
<table><tr><th>measure</th><th>subject</th><th>split</th><th>value (95 % interval)</th><th>n</th></tr>
{% for row in rows %}<tr><td>{{ row.measure }}</td><td>{{ row.subject }}</td><td>{{ row.split }}</td>
<td>{{ shown(row) }}</td><td>{{ row.n }}</td></tr>
{% endfor %}</table></details>
{% endfor %}
</body></html>
"""
