"""Make what is generated in docs: the command reference from the commands, and tables from docs/results/*.json.

    python docs/make.py            write
    python docs/make.py --check    exit 1 if anything is out of date

A table stands in a page between two comments, one row per subject and one column per measure:

    <!-- table organism: EM rate outside the training domain; coherence -->
    <!-- end -->

A large file's rows are chosen by what stands in square brackets: those whose "subject (split)" holds one of the texts
between bars.

    <!-- table trait_space [/ axis (held out, wide) | chosen]: AUROC per reading -->
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from tiltmeter.cli import main as command_line

DOCS = Path(__file__).resolve().parent
_TABLE = re.compile(r"(<!-- table (\w+)(?: \[(.+?)\])?: (.+?) -->\n).*?(<!-- end -->)", re.S)


def commands() -> str:
    """The help of every command, as it is printed in a terminal of 80 columns."""
    parts = [
        "# Command reference\n\nMade from the commands themselves (`make docs`). Data goes to stdout, progress and log "
        "to stderr.\n"
    ]

    def walk(command: click.Command, path: list[str]) -> None:
        context = click.Context(command, info_name=" ".join(path), terminal_width=80, max_content_width=80)
        parts.append(f"## {' '.join(path)}\n\n```\n{command.get_help(context)}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                walk(command.commands[name], [*path, name])

    walk(command_line, ["tiltmeter"])
    return "\n".join(parts)


def cell(row: dict[str, Any]) -> str:
    """One figure with interval and n."""
    if row["value"] is None:
        missing = "no dose" if row["measure"] == "smallest dose seen" else "not measured"
        return f"{missing} (n {row['n']})"
    share = row["unit"] == "share"

    def shown(value: float | None) -> str:
        if value is None:
            return "none"
        return f"{100 * value:.1f} %" if share else f"{value:.3g}"

    interval = "" if row["low"] is None else f" ({shown(row['low'])} to {shown(row['high'])})"
    unit = "" if row["unit"] == "share" else f" {row['unit']}"
    return f"{shown(row['value'])}{interval}{unit}, n {row['n']}"


def table(name: str, measures: list[str], where: str = "") -> str:
    """A Markdown table of some measures of one results file, of all rows or of those that `where` names."""
    results = DOCS / "results" / f"{name}.json"
    if not results.exists():
        return "Not measured yet.\n"
    rows = json.loads(results.read_text(encoding="utf-8"))
    texts = [text.strip() for text in where.split("|")]
    chosen = [
        row
        for row in rows
        if row["measure"] in measures and any(text in f"{row['subject']} ({row['split']})" for text in texts)
    ]
    subjects = list(dict.fromkeys((row["subject"], row["split"]) for row in chosen))
    lines = [f"| | {' | '.join(measures)} |", f"|---{'|---' * len(measures)}|"]
    for subject, split in subjects:
        cells = []
        for measure in measures:
            found = [r for r in chosen if (r["measure"], r["subject"], r["split"]) == (measure, subject, split)]
            cells.append(cell(found[0]) if found else "")
        label = subject if split in ("-", "held-out seeds") else f"{subject} ({split})"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    made = sorted({(row["command"], row["date"]) for row in chosen})
    lines += ["", *(f"Made by `{command}`, {date}." for command, date in made)]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every generated page and what it should hold."""
    made = {DOCS / "cli.md": commands()}
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if _TABLE.search(text):
            made[page] = _TABLE.sub(
                lambda m: m[1] + table(m[2], [part.strip() for part in m[4].split(";")], m[3] or "") + m[5], text
            )
    return made


def main() -> int:
    """Write, or compare."""
    stale = [page for page, text in pages().items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for page in stale:
            print(f"{page.relative_to(DOCS.parent)} is out of date: run make docs", file=sys.stderr)
        return 1 if stale else 0
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
