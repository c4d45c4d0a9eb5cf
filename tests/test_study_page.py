"""The page of a study: opens offline, escapes what it is given, and names what has no value."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tiltmeter.report.study import Dot, Line, Point, Section, dots, lines, points, study_html, write_study
from tiltmeter.studies.contest import Design, boundary, cross_validate, held_out_scores
from tiltmeter.studies.geometry import component
from tiltmeter.studies.trait_run import PAPER, Outcome, behavior_figures
from tiltmeter.studies.trait_space import OtherReadouts, bench
from tiltmeter.studies.trait_tables import Entry, contest_figures, geometry_figures
from tiltmeter.studies.trait_view import sections, write_page
from trait_runs import CONFIG, planted_runs


class Balanced(HTMLParser):
    """Fails where a tag is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br", "link"}:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert "@import" not in page


def test_a_value_that_is_missing_is_named_and_not_drawn_as_zero() -> None:
    rows = [Dot("there", 0.5, 0.4, 0.6), Dot("gone", None), Dot("broken", float("nan"))]
    svg = dots(rows, axis="AUROC", limits=(0, 1), line=0.9, key="d")
    assert svg.count("not measured") == 2
    assert "there" in svg
    assert "gone" in svg


def test_values_of_one_name_share_a_row_and_others_do_not() -> None:
    rows = [Dot("alpha", 0.2), Dot("beta", 0.5), Dot("alpha", 0.7, group=1)]
    svg = dots(rows, axis="rate", limits=(0, 1), line=None, key="d")
    first, beta, again = (float(y) for y in re.findall(r'y="([\d.]+)" style="fill: var\(--run-', svg)[:3])
    assert first == again < beta
    assert svg.count(">alpha</text>") == svg.count(">beta</text>") == 1


def test_points_and_lines_without_a_number_are_left_out() -> None:
    drawn = points(
        [Point(0.1, 0.2, 0, True), Point(np.nan, 1.0, 1, False)], x="x", y="y", key="p", lines_at=(None, 0.0)
    )
    assert "var(--run-0)" in drawn
    assert "var(--run-1)" not in drawn
    steps = np.array([10.0, 20.0])
    assert "<svg" in lines([Line(steps, np.array([0.1, np.nan]), 0)], y="score", line=None, key="l")


def test_text_is_escaped_and_the_page_is_whole(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & more"
    svg = points([Point(0, 0, 0, True)], x="x", y="y", key="p", lines_at=(0.0, 0.0))
    section = Section(evil, evil, svg, ("a", "b"), ((evil, "1"),))
    page = study_html(evil, evil, [section, Section("empty", "nothing")])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    check(page)
    assert (
        write_study(tmp_path / "deep" / "s.html", "t", "h", [section]).read_text(encoding="utf-8").startswith("<!doc")
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    runs = planted_runs(tmp_path_factory.mktemp("tracks"))
    design = Design("traits, five blocks", "step0", "axis")
    benches = {o: bench(CONFIG, runs, o, wide=True, others=OtherReadouts()) for o in CONFIG.organisms}
    validated = {o: cross_validate(b, design, by="set") for o, b in benches.items()}
    entry = Entry(
        design, "wide", tuple(s for v in validated.values() for s in v), (),
        {o: boundary(v) for o, v in validated.items()},
        tuple(s for b in benches.values() for s in held_out_scores(b, design)),
    )  # fmt: skip
    rows = [
        *behavior_figures(runs, look=True),
        *geometry_figures(CONFIG, runs),
        *contest_figures([entry], CONFIG),
        *PAPER,
    ]
    return Outcome(tuple(rows), runs, (entry,), {"wide": entry}, (), True)


def test_the_trait_space_page_shows_each_part_and_says_what_the_figures_are_of(
    outcome: Outcome, tmp_path: Path
) -> None:
    page = write_page(outcome, tmp_path / "t.html").read_text(encoding="utf-8")
    check(page)
    titles = {section.title for section in sections(outcome)}
    assert {"Behavior", "Direction and magnitude of final drift", "Published figures"} <= titles
    assert "Designs: held out, wide" in titles
    assert "fact about these organisms" in page
    assert page.count("<svg") >= 5


def test_a_look_not_taken_is_said(outcome: Outcome, tmp_path: Path) -> None:
    blind = Outcome(outcome.figures, outcome.runs, (), {}, (), False)
    assert "Held-out runs were not scored" in write_page(blind, tmp_path / "t.html").read_text(encoding="utf-8")


def test_the_plane_is_that_of_the_pooled_component(outcome: Outcome) -> None:
    runs = outcome.runs
    tracks = [t for t in runs.tracks if t.part == "calibration"]
    ends = np.stack([t.drift(runs.frames[t.cell.organism])[-1] for t in tracks])
    assert component(ends, np.array([t.em[-1] for t in tracks]), draws=5).n == len(tracks) == 16
