"""`tiltmeter judge`: a judge of text that was distilled from activations."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import json_option, show
from tiltmeter.cli.paths import FILE, OUT_FILE
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import Outcome, main


@main.group(short_help="Distill a judge of text, and judge with it.")
def judge() -> None:
    """Distill a judge from models whose activations were read, and judge the answers of others."""


@judge.command("distill", short_help="Fit a judge to labelled answers.")
@click.argument("examples", type=FILE)
@click.option("--calibration", type=FILE, required=True, help="Examples of other models, 19 benign ones at least.")
@click.option("--out", type=OUT_FILE, required=True, help="File for the judge (.safetensors).")
@click.option(
    "--encoder", default="ngrams:1024", show_default=True,
    help="ngrams:WIDTH, hidden:BLOCK:MODEL, sentence:MODEL or regression:FOLDER.",
)  # fmt: skip
@click.option("--false-alarm-rate", default=0.05, show_default=True, help="Per set of answers.")
@json_option
def judge_distill(
    examples: Path, calibration: Path, out: Path, encoder: str, false_alarm_rate: float, as_json: bool
) -> None:
    """Fit a judge to EXAMPLES: JSON lines with question, answer, drift_pct, model, family, style, benign."""
    from tiltmeter.judge_diagnosis import diagnose
    from tiltmeter.judge_distilled import fit_judge
    from tiltmeter.judge_encoders import open_encoder
    from tiltmeter.judge_examples import read_examples

    others, own = read_examples(calibration), read_examples(examples)
    with progress(f"distilling from {len(own)} answers"):
        made = fit_judge(own, open_encoder(encoder), calibration=others, false_alarm_rate=false_alarm_rate)
        found = diagnose(made, others)._asdict()
    made.save(out)
    lines = [f"  {name:<20} {value}" for name, value in found.items()]
    show({"judge": str(out), "diagnosis": found}, as_json, [f"saved to {out}", *lines])


@judge.command("score", short_help="Judge the model that gave some answers.")
@click.argument("answers", type=FILE)
@click.option("--judge", "judge_path", type=FILE, required=True, help="A judge that `judge distill` made.")
@click.option("--seed", default=0, show_default=True, help="Draws from the benign models' answers.")
@json_option
def judge_score(answers: Path, judge_path: Path, seed: int, as_json: bool) -> Outcome:
    """Judge the model that gave ANSWERS: JSON lines with question and answer."""
    from tiltmeter.judge_distilled import DistilledJudge, score_rows
    from tiltmeter.judge_examples import read_pairs

    made, pairs = DistilledJudge.load(judge_path), read_pairs(answers)
    with progress(f"scoring {len(pairs)} answers"):
        verdict, summary, rows = score_rows(made, pairs, seed=seed)
    lines = [f"{verdict.state}  {answers}", f"  {verdict.reason}"]
    if summary is not None:
        lines.append(f"  predicted drift {summary[0]:.1f} % of full ({summary[1]:.1f} to {summary[2]:.1f})")
    show({**verdict.to_dict(), "drift_pct": summary, "answers": rows}, as_json, lines)
    return Outcome((verdict.state,))
