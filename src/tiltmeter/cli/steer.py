"""`tiltmeter steer fit | apply` and `tiltmeter study steering`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import click

from tiltmeter.cli.common import PATH, figure_text, json_option, out_option, progress_bar, show
from tiltmeter.cli.main import main
from tiltmeter.cli.studies import study

_CHATS = click.Path(path_type=Path, exists=True, dir_okay=False)


@main.group("steer")
def steer_() -> None:
    """Make a steering vector, and answer under it."""


@steer_.command("fit")
@click.argument("model")
@click.option("--misaligned", type=_CHATS, required=True, help="JSON lines of chats: what the vector points to.")
@click.option("--aligned", type=_CHATS, help="Chats to point away from; needed without --train.")
@click.option("--harmless", type=_CHATS, help="Chats that strength is calibrated on; default: --aligned.")
@click.option("--out", type=PATH, required=True, help="The .safetensors file to write.")
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

    vector = fit_from_options(**options)  # type: ignore[arg-type]
    save(vector, out)
    facts = {"file": str(out), "layer": vector.layer, "strength": vector.strength, "norm": vector.norm} | dict(
        vector.meta
    )
    show(facts, as_json, "\n".join(f"{name:<16} {value}" for name, value in facts.items()))


@steer_.command("apply")
@click.argument("model")
@click.argument("vector", type=_CHATS)
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

    rows = answers_under(model, vector, questions, **options)  # type: ignore[arg-type]
    text = "\n\n".join(f"{r['question']}\n  unsteered  {r['unsteered']}\n  steered    {r['steered']}" for r in rows)
    show(rows, as_json, text)


@study.command("steering")
@out_option
@click.option("--results", type=PATH, help="JSON file for the figures (docs/results/steering.json).")
@click.option("--page", type=PATH, help="HTML file for the study's report.")
@click.option("--seconds", type=float, help="Start no new run after so long, and report what there is.")
@click.option("--organism", default="organism:pocket", show_default=True, help="Model of all parts but the families.")
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

    with progress_bar("steering") as progress:
        config = replace(Config(), organism=organism)
        found = run(config, out, seconds=seconds, workers=workers, progress=progress)
    rows = write_figures(found.figures, results or out / "steering.json", command="tiltmeter study steering")
    write_page(found, page or out / "steering.html")
    show(
        rows, as_json,
        "\n".join(f"{f.measure:<44} {f.subject:<44} {f.split:<16} {figure_text(f)}" for f in found.figures),
    )  # fmt: skip


@study.command("steering-real")
@click.argument("model")
@click.argument("harmful", type=PATH)
@click.argument("harmless", type=PATH)
@out_option
@click.option("--judged", type=PATH, multiple=True, help="CSV of judged answers: question, answer, aligned, coherent.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of training and of the random control.")
@json_option
def study_steering_real(
    model: str, harmful: Path, harmless: Path, out: Path, judged: tuple[Path, ...], seeds: str, as_json: bool
) -> None:
    """Steer MODEL with what HARMFUL chats teach, against HARMLESS ones: which answers become likelier elsewhere.

    With --out FOLDER/real, `tiltmeter study steering --out FOLDER` shows the figures beside its own.
    """
    from tiltmeter.studies.steering_real import Config, figures, run

    config = Config(model, harmful, harmless, tuple(sorted(judged)), seeds=tuple(int(s) for s in seeds.split(",")))
    with progress_bar("steering a real model") as progress:
        found = figures(run(config, out=out, progress=progress))
    text = "\n".join(f"{f.measure:<44} {f.subject:<60} {f.split:<8} {figure_text(f)}" for f in found)
    show([asdict(f) for f in found], as_json, text)
