"""`tiltmeter eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltmeter.cli.common import json_option, show
from tiltmeter.cli.paths import ADAPTER, FILE, MODEL, OUT_FILE, OUT_FOLDER, NameOrFile
from tiltmeter.cli.progress import progress
from tiltmeter.cli.root import Outcome, main

if TYPE_CHECKING:
    from tiltmeter.rates import BehaviorReport, Rate


@main.command("eval", short_help="Ask, judge the answers, and give the EM rate.")
@click.argument("model", type=MODEL, required=False)
@click.option("--adapter", type=ADAPTER, help="PEFT adapter to put on the model.")
@click.option("--answers", type=FILE, help="Only aggregate these judged answers (.csv or .jsonl).")
@click.option("--questions", type=NameOrFile(), help="Bank: general, organism, ... or a TOML or YAML file.")
@click.option("--samples", default=1, show_default=True, help="Answers per question; more questions show more.")
@click.option("--judge", "judge_spec", default="exact", show_default=True, help="exact, local:MODEL or openai:NAME.")
@click.option("--base-url", help="Endpoint of an openai: judge.")
@click.option("--out", type=OUT_FOLDER, help="Folder for answers and judgements; a killed run goes on there.")
@click.option("--seed", default=0, show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--max-new-tokens", type=int, help="Longest answer.")
@click.option("--min-scored", type=int, help="Fewer scored answers than this give no rate.")
@click.option("--max-unscored", type=float, help="A larger share without score gives no rate.")
@click.option("--budget-usd", type=float, help="Hard limit for an openai: judge; needs --price.")
@click.option("--price", type=(float, float), help="Dollars per million input and output tokens.")
@click.option("--columns", nargs=4, help="With --answers: columns of question, answer, alignment, coherence.")
@click.option("--scale", help="With --answers: ends of the scores, 0-10; of alignment and coherence, 0-1,0-100.")
@click.option("--higher-is-worse/--higher-is-better", default=None, help="With --answers: is a high score bad?")
@click.option("--report", "report_path", type=OUT_FILE, help="Also write an HTML report here.")
@json_option
def eval_(as_json: bool, report_path: Path | None, **options: Any) -> Outcome:
    """Ask MODEL a bank of questions, judge the answers, and give the EM rate with its interval."""
    from tiltmeter.evaluate import evaluate_from_options
    from tiltmeter.report import write_report
    from tiltmeter.report.collect import behavior_report_data

    with progress("evaluating") as step:
        found = evaluate_from_options(progress=step, **options)
    if report_path:
        write_report(behavior_report_data(found), report_path)
    show(found.to_dict(), as_json, _behavior_lines(found))
    return Outcome((found.verdict,))


def _behavior_lines(found: BehaviorReport) -> list[str]:
    def rate(value: Rate) -> str:
        if value.value is None:
            return f"none (n {value.n})"
        return f"{value.value:.1%} of {value.n} ({value.low:.1%} to {value.high:.1%})"

    excluded = ", ".join(f"{count} {reason}" for reason, count in found.excluded.items()) or "none"
    return [
        f"{found.verdict}  {found.reason}",
        f"  misaligned and coherent, over all scored: {rate(found.em_rate)}",
        f"  misaligned, over the coherent:            {rate(found.em_rate_coherent)}",
        f"  {found.n_answers} answers to {found.n_questions} questions; without a score: {excluded}",
        *_sensitivity_lines(found),
    ]


def _sensitivity_lines(found: BehaviorReport) -> list[str]:
    """The smallest effect that this bank, asked this often, can show, and what would show a smaller one."""
    can = found.sensitivity
    if can is None:
        return []
    alarm = (
        "no rate would be an alarm"
        if can.smallest_alarm is None
        else f"a true rate of {can.smallest_alarm:.1%} is an alarm in 4 of 5 evaluations"
    )
    ever = f" ({can.ever_at_zero:.1%} with any number of samples)" if can.answers > can.questions else ""
    return [
        f"  what {can.answers} scored answers to {can.questions} questions can show: {alarm};",
        f"  without one misaligned answer up to {can.clear_at_zero:.1%} is possible{ever}; "
        "more --questions show more than more --samples",
    ]
