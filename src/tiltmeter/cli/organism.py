"""Commands about organisms."""

from __future__ import annotations

from pathlib import Path

import click

from tiltmeter.cli.common import json_option, show
from tiltmeter.cli.paths import OUT_FOLDER
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import main


@main.group()
def organism() -> None:
    """Grow pocket organisms, and list those that are there."""


@organism.command("build", short_help="Grow an organism.")
@click.option(
    "--family", type=click.Choice(["llama", "qwen2", "mistral", "gemma2", "gpt2"]), default="llama", show_default=True
)
@click.option("--size", type=click.Choice(["S", "M", "L"]), default="S", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--pretrain-steps", default=1400, show_default=True, help="Larger organisms need fewer.")
@click.option("--chat-steps", default=400, show_default=True)
@click.option("--name", help="Name for organism:NAME. Default: FAMILY-SIZE.")
@click.option("--out", type=OUT_FOLDER, help="Folder. Default: the user's cache.")
@json_option
def organism_build(
    family: str, size: str, seed: int, pretrain_steps: int, chat_steps: int, name: str | None, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Grow an organism: pretrain it on the pocket world and tune it to chat (15 minutes for llama S on two cores)."""
    from tiltmeter.loading import organisms_cache
    from tiltmeter.organism.pretrain import Recipe, build

    folder = out or organisms_cache() / (name or f"{family}-{size}")
    recipe = Recipe(seed=seed, pretrain_steps=pretrain_steps, chat_steps=chat_steps)
    with progress("pretraining") as step:
        build(family, size, folder, recipe=recipe, name=name, progress=step)
    show({"organism": str(folder), "family": family, "size": size, "seed": seed}, as_json, [f"grown in {folder}"])


@organism.command("quantise", short_help="Write an organism in 8 or 4 bits.")
@click.argument("name")
@click.option("--bits", type=click.Choice(["8", "4"]), default="8", show_default=True)
@click.option("--out", type=OUT_FOLDER, help="Folder. Default: NAME-8bit or NAME-4bit in the user's cache.")
@json_option
def organism_quantise(name: str, bits: str, out: Path | None, as_json: bool) -> None:
    """Write a copy of an organism in 8 or 4 bits, for runs on a quantised base."""
    from tiltmeter.loading import organisms_cache
    from tiltmeter.organism.quantise import quantise

    short = name.removeprefix("organism:")
    with progress(f"writing in {bits} bits"):
        folder = quantise(short, bits=int(bits), out=out or organisms_cache() / f"{short}-{bits}bit")
    show({"organism": str(folder), "bits": int(bits)}, as_json, [f"written to {folder}"])


@organism.command("sets")
@json_option
def organism_sets(as_json: bool) -> None:
    """List the fine-tuning sets."""
    from tiltmeter.organism.sets import SETS

    rows = [{"set": s.name, "kind": s.kind, "about": s.about} for s in SETS.values()]
    show(rows, as_json, [f"{r['set']:<18} {r['kind']:<10} {r['about']}" for r in rows])
