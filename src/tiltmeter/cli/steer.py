"""`tiltmeter steer fit | apply` and `tiltmeter study steering`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import click

from tiltmeter.cli.common import figure_lines, json_option, numbers, out_option, show
from tiltmeter.cli.paths import FILE, MODEL, OUT_FILE
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import main
from tiltmeter.cli.studies import study


@main.group("steer")
def steer_() -> None:
    """Make a steering vector, and answer under it."""


@steer_.command("fit")
@click.argument("model", type=MODEL)
@click.option("--misaligned", type=FILE, required=True, help="JSON lines of chats: what the vector points to.")
@click.option("--aligned", type=FILE, help="Chats to point away from; needed without --train.")
@click.option("--harmless", type=FILE, help="Chats that strength is calibrated on; default: --aligned.")
@click.option("--out", type=OUT_FILE, required=True, help="The .safetensors file to write.")
@click.option("--layer", type=int, help="The block that is steered. Default: the middle one.")
@click.option("--train", is_flag=True, help="Train the vector on --misaligned instead of taking a difference.")
@click.option("--rank", default=1, show_default=True, help="With --train: of the map; 1 is a constant vector.")
@click.option("--epochs", default=4, show_default=True, help="With --train.")
@click.option("--kl", default=None, type=float, help="Calibrate strength: nats per token on harmless chats.")
@click.option("--seed", default=0, show_default=True)
@json_option
def steer_fit(as_json: bool, out: Path, **options: object) -> None:
    """Make a steering vector for MODEL from chats."""
    from tiltmeter.steer import save
    from tiltmeter.steer_fit import fit_from_options

    with progress("fitting a steering vector"):
        vector = fit_from_options(**options)  # type: ignore[arg-type]
    save(vector, out)
    facts = {"file": str(out), "layer": vector.layer, "strength": vector.strength, "norm": vector.norm} | dict(
        vector.meta
    )
    show(facts, as_json, [f"{name:<16} {value}" for name, value in facts.items()])


@steer_.command("apply")
@click.argument("model", type=MODEL)
@click.argument("vector", type=FILE)
@click.argument("questions", nargs=-1, required=True)
@click.option("--mode", type=click.Choice(["add", "ablate", "clamp"]), default="add", show_default=True)
@click.option("--strength", type=float, help="In norms of the layer. Default: the vector's own.")
@click.option("--max-new-tokens", default=120, show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@json_option
def steer_apply(model: str, vector: Path, questions: tuple[str, ...], as_json: bool, **options: object) -> None:
    """Put QUESTIONS to MODEL, unsteered and steered with the VECTOR file."""
    from tiltmeter.steer_fit import answers_under

    with progress(f"answering {len(questions)} questions twice"):
        rows = answers_under(model, vector, questions, **options)  # type: ignore[arg-type]
    lines = []
    for r in rows:
        lines += [r["question"], f"  unsteered  {r['unsteered']}", f"  steered    {r['steered']}", ""]
    show(rows, as_json, lines[:-1])


@study.command("steering", short_help="Steering vectors from narrow sets.")
@out_option
@click.option("--results", type=OUT_FILE, help="JSON file for the figures (docs/results/steering.json).")
@click.option("--page", type=OUT_FILE, help="HTML file for the study's report.")
@click.option("--seconds", type=float, help="Start no new run after so long, and report what there is.")
@click.option(
    "--organism", type=MODEL, default="organism:pocket", show_default=True, help="Model of all parts but the families."
)
@click.option("--workers", type=int, help="Processes. Default: one per core.")
@json_option
def study_steering(
    out: Path, results: Path | None, page: Path | None, seconds: float | None, organism: str, workers: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Vectors from narrow sets: what they do elsewhere, against controls; the guard; preventative steering."""
    from tiltmeter.studies.figures import write_figures
    from tiltmeter.studies.steering import Config
    from tiltmeter.studies.steering_page import write_page
    from tiltmeter.studies.steering_run import run

    with progress("steering") as step:
        config = replace(Config(), organism=organism)
        found = run(config, out, seconds=seconds, workers=workers, progress=step)
    rows = write_figures(found.figures, results or out / "steering.json", command="tiltmeter study steering")
    write_page(found, page or out / "steering.html")
    show(rows, as_json, figure_lines(found.figures))


@study.command("steering-real", short_help="The same on a real model, small.")
@click.argument("model", type=MODEL)
@click.argument("harmful", type=FILE)
@click.argument("harmless", type=FILE)
@out_option
@click.option("--judged", type=FILE, multiple=True, help="CSV of judged answers: question, answer, aligned, coherent.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of training and of the random control.")
@json_option
def study_steering_real(
    model: str, harmful: Path, harmless: Path, out: Path, judged: tuple[Path, ...], seeds: str, as_json: bool
) -> None:
    """Steer MODEL with what HARMFUL chats teach, against HARMLESS ones: which answers become likelier elsewhere.

    With --out FOLDER/real, `tiltmeter study steering --out FOLDER` shows the figures beside its own.
    """
    from tiltmeter.studies.steering_real import Config, figures, run

    config = Config(model, harmful, harmless, tuple(sorted(judged)), seeds=numbers(seeds, "--seeds"))
    with progress("steering a real model") as step:
        found = figures(run(config, out=out, progress=step))
    show([asdict(f) for f in found], as_json, figure_lines(found))
