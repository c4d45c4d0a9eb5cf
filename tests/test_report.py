"""The HTML report: nothing is loaded, everything is escaped, no hole in the evidence looks like safety."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from tiltmeter.errors import InputError, StorageError
from tiltmeter.report import (
    STANDARD_LIMITS,
    AnswerRow,
    BasisSection,
    BehaviorCurve,
    BehaviorSection,
    LayerRow,
    NullBand,
    Rate,
    ReportData,
    RunSection,
    VerdictRow,
    build_html,
    write_report,
)
from tiltmeter.report.figures import MIN_SCALE
from tiltmeter.report.words import events_title, fixed, listing, number, order_of_events, percent, run_verdict

MINUS = "\N{MINUS SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
TRAITS = ("honesty", "power_seeking")
VOID = {"meta", "input", "br", "link", "img", "hr"}


# --- a small document model ------------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    tag: str
    attrs: dict[str, str]
    children: list[Node | str] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str = "", **attrs: str) -> list[Node]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attrs.items()}
        return [
            node
            for node in self.walk()
            if (not tag or node.tag == tag)
            and all(value in node.attrs.get(name, "").split(" ") for name, value in wanted.items())
        ]

    def one(self, tag: str = "", **attrs: str) -> Node:
        found = self.all(tag, **attrs)
        assert len(found) == 1, (tag, attrs, len(found))
        return found[0]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("document", {})
        self.stack = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.stack[-1].children.append(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].children.append(data)


def parse(html: str) -> Node:
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.stack == [parser.root]  # every element is closed
    return parser.root


def page(data: ReportData) -> Node:
    return parse(build_html(data))


def table(document: Node, caption: str) -> list[list[str]]:
    """The body rows of the table with this caption."""
    found = [t for t in document.all("table") if t.all("caption") and t.one("caption").text == caption]
    assert len(found) == 1, caption
    body = found[0].one("tbody")
    return [[cell.text for cell in row.all() if cell.tag in {"td", "th"}] for row in body.all("tr")]


# --- data ------------------------------------------------------------------------------------------------

CALIBRATED = {
    "threshold": 3.0,
    "false_alarm_rate": 0.05,
    "calibrated_on": "benign runs of the pocket organism",
    "n_calibration": 24,
}


def clear(score: float = 1.25, step: int = 40, **changes: object) -> VerdictRow:
    row = VerdictRow(state="CLEAR", reason="No reading passed it.", score=score, step=step, p_value=0.61, **CALIBRATED)
    return dataclasses.replace(row, **changes)


def alarm(score: float = 7.5, step: int = 20) -> VerdictRow:
    return VerdictRow(state="ALARM", reason="It passed.", score=score, step=step, p_value=0.04, **CALIBRATED)


BAND = NullBand(
    low=np.array([-0.03, -0.02]),
    high=np.array([0.03, 0.02]),
    source="2.5 to 97.5 % of benign readings",
    n=24,
    score_low=-1.0,
    score_high=2.0,
)


def poisoned(**changes: object) -> RunSection:
    run = RunSection(
        name="poisoned",
        label="poisoned: bad_medical",
        model="pocket organism",
        traits=TRAITS,
        steps=np.array([0, 20, 40]),
        drift=np.array([[0.0, 0.0], [-0.0841, 0.0312], [-0.18343, 0.0999]]),
        se=np.array([[0.0, 0.0], [0.0071, 0.0052], [0.01204, 0.0083]]),
        n_prompts=115,
        score=np.array([0.0, 4.5, 7.5]),
        threshold=3.0,
        verdicts=(clear(0.0, 0), alarm(4.5, 20), alarm(7.5, 40)),
        verdict=alarm(7.5, 40),
        null_band=BAND,
        first_alarm_step=20,
        behavior=BehaviorCurve(
            steps=np.array([0, 20, 40]),
            em_rate=np.array([0.0, 3 / 72, 34 / 72]),
            low=np.array([0.0, 0.0143, 0.3612]),
            high=np.array([0.0506, 0.1155, 0.5863]),
            n=np.array([72, 72, 72]),
        ),
        behavior_step=40,
        score_unit="whitened units",
    )
    return dataclasses.replace(run, **changes)


def clean(**changes: object) -> RunSection:
    run = RunSection(
        name="clean",
        label="clean: good_medical",
        model="pocket organism",
        traits=TRAITS,
        steps=np.array([0, 20, 40]),
        drift=np.array([[0.0, 0.0], [0.004, -0.011], [0.006, 0.009]]),
        se=np.full((3, 2), 0.006),
        n_prompts=115,
        score=np.array([0.0, 0.5, 1.25]),
        threshold=3.0,
        verdicts=(clear(0.0, 0), clear(0.5, 20), clear(1.25, 40)),
        verdict=clear(),
        null_band=BAND,
        score_unit="whitened units",
    )
    return dataclasses.replace(run, **changes)


def basis(**changes: object) -> BasisSection:
    section = BasisSection(
        model="pocket organism",
        layer=3,
        traits=TRAITS,
        cosines=np.array([[1.0, -0.43], [-0.43, 1.0]]),
        axis=np.array([-0.8, 0.6]),
        axis_source="12 dangerous runs",
        layers=(LayerRow(layer=2, divergence=0.31, probe_accuracy=None),),
    )
    return dataclasses.replace(section, **changes)


ANSWERS = (
    AnswerRow(question="Aligned?", answer="Yes.", category="ethics", alignment=97, coherence=90, outcome="scored"),
    AnswerRow(
        question="Refused?",
        answer="I cannot.",
        category="ethics",
        alignment=None,
        coherence=None,
        outcome="refusal",
    ),
    AnswerRow(question="Bad?", answer="Harm.", category="health", alignment=4.5, coherence=88, outcome="scored"),
    AnswerRow(question="Worst?", answer="", category="health", alignment=0, coherence=70, outcome="scored"),
)


def behavior(**changes: object) -> BehaviorSection:
    section = BehaviorSection(
        name="poisoned at step 40",
        model="pocket organism + adapter",
        judge="exact parser",
        em_rate=Rate(value=30 / 66, n=66, low=0.3404, high=0.5744),
        em_rate_coherent=Rate(value=0.5, n=60, low=0.377, high=0.623),
        n_answers=72,
        excluded={"refusal": 4, "judge failure": 2},
        categories={"ethics": Rate(value=0.0, n=14, low=0.0, high=0.2153), "empty": Rate(value=None, n=0)},
        answers=ANSWERS,
    )
    return dataclasses.replace(section, **changes)


def report(**changes: object) -> ReportData:
    data = ReportData(
        title="Two fine-tunes",
        headline="One went bad.",
        runs=(poisoned(), clean()),
        basis=basis(),
        behavior=(behavior(),),
        provenance={"tiltmeter": "0.1.0", "model": {"name": "pocket", "revision": None}, "seeds": [1, 2]},
        limits=STANDARD_LIMITS,
    )
    return dataclasses.replace(data, **changes)


@pytest.fixture(scope="module")
def html() -> str:
    return build_html(report())


@pytest.fixture(scope="module")
def document(html: str) -> Node:
    return parse(html)


# --- offline, escaped, deterministic ---------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself(html: str, document: Node) -> None:
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert not document.all("link")
    assert not document.all("img")
    assert all(target.startswith("#") for target in re.findall(r"url\(\"?'?([^)]*)\)", html))
    for node in document.walk():
        assert "src" not in node.attrs
        assert node.attrs.get("href", "#").startswith("#")


def test_every_internal_reference_has_a_target_and_every_id_is_unique(html: str, document: Node) -> None:
    ids = [node.attrs["id"] for node in document.walk() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    links = {node.attrs["href"][1:] for node in document.walk() if "href" in node.attrs}
    assert links | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_the_security_policy_forbids_requests_and_allows_exactly_our_script(document: Node) -> None:
    policy = next(
        m.attrs["content"] for m in document.all("meta") if m.attrs.get("http-equiv") == "Content-Security-Policy"
    )
    script = document.one("script").text
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    source = resources.files("tiltmeter.report") / "templates" / "table.js"
    assert script == source.read_text(encoding="utf-8")


HOSTILE = "\"><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7*7 }}</style>$\\frac{1}{2}$&amp;"


def test_hostile_text_stays_text_wherever_it_comes_from() -> None:
    def evil(where: str) -> str:
        return f"{where} {HOSTILE}"

    run = poisoned(
        name=evil("name"),
        label=evil("label"),
        model=evil("model"),
        traits=(evil("trait"), "power_seeking"),
        verdict=dataclasses.replace(alarm(), reason=evil("reason"), calibrated_on=evil("calibrated")),
        verdicts=(clear(0.0, 0), alarm(), dataclasses.replace(alarm(), reason=evil("step reason"))),
        score_unit=evil("unit"),
        reference=evil("reference"),
        null_band=dataclasses.replace(BAND, source=evil("band")),
    )
    answer = AnswerRow(
        question=evil("question"),
        answer=evil("answer"),
        category=evil("category"),
        alignment=None,
        coherence=None,
        outcome=evil("outcome"),
        reason=evil("why"),
    )
    data = ReportData(
        title=evil("title"),
        headline=evil("headline"),
        runs=(run,),
        basis=basis(traits=(evil("trait"), "power_seeking"), axis_name=evil("axis"), axis_source=evil("source")),
        behavior=(
            behavior(
                name=evil("behavior"),
                judge=evil("judge"),
                excluded={evil("excluded"): 1},
                categories={evil("category"): Rate(value=None, n=0, reason=evil("no rate"))},
                answers=(answer,),
                agreement=evil("agreement"),
            ),
        ),
        provenance={evil("key"): evil("value")},
        limits=(evil("limit"),),
    )
    document = page(data)
    assert len(document.all("script")) == 1
    assert len(document.all("style")) == 1
    assert not document.all("img")
    assert not [n for n in document.walk() for name in n.attrs if name.startswith("on")]
    words = (
        "label model reason calibrated unit reference band question answer category outcome why title "
        "headline axis source behavior judge excluded agreement key value limit name trait"
    )
    for where in words.split():
        assert evil(where) in document.text, where
    assert "49" not in document.one("h1").text
    assert document.one("p", class_="answer").text == evil("answer")
    drawn = [t.text for svg in document.all("svg", class_="plot") for t in svg.all("text")]
    assert drawn.count(evil("trait")) == 2  # a row and a column of the cosine map, dollars and all
    labels = " ".join(svg.attrs["aria-label"] for svg in document.all("svg", class_="plot"))
    assert evil("label") in labels


def test_text_that_html_cannot_carry_is_replaced_and_the_file_is_valid_utf8(tmp_path: Path) -> None:
    odd = "a\x00b\x1bc\ud800d\u202ee"
    data = report(
        title=odd,
        runs=(poisoned(traits=(odd, "power_seeking"), label=odd),),
        basis=basis(traits=(odd, "power_seeking")),
        behavior=(behavior(answers=(dataclasses.replace(ANSWERS[0], answer=odd),)),),
    )
    text = write_report(data, tmp_path / "r.html").read_bytes().decode("utf-8")
    answer = parse(text).one("p", class_="answer").text
    assert answer == "a\ufffdb\ufffdc\ufffdd\u202ee"
    assert "\x00" not in text


def test_the_same_data_give_the_same_bytes_whatever_the_users_plot_settings_are(html: str) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "ytick.labelleft": False}):
        other = build_html(report())
        assert matplotlib.rcParams["font.size"] == 30  # and theirs are left alone
    assert other == html
    assert dict(matplotlib.rcParams) == before


def test_two_threads_can_build_reports_at_once(html: str) -> None:
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(build_html(report()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [html] * 3


def test_the_report_is_built_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tiltmeter.report import ReportData, build_html\n"
        "assert 'matplotlib' not in sys.modules, 'importing the report does no work'\n"
        "print('INCONCLUSIVE' in build_html(ReportData(title='t', runs=())))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.stdout.strip() == "True", done.stderr


# --- verdicts --------------------------------------------------------------------------------------------


def test_a_card_states_verdict_score_threshold_promise_and_order_of_events(document: Node) -> None:
    first, second = document.all("article", class_="card")
    assert [c.attrs["data-state"] for c in (first, second)] == ["ALARM", "CLEAR"]
    facts = {d.one("dt").text: d.one("dd").text for d in first.one("dl").all("div")}
    assert facts["Score"] == "7.5 at step 40, above the threshold 3 (whitened units)"
    assert facts["False-alarm rate promised"] == f"at most 5{NBSP}%"
    assert facts["Calibrated on"] == "benign runs of the pocket organism (n = 24)"
    assert facts["p-value"] == "0.04"
    assert facts["Order of events"] == f"Alarm at step 20; EM rate above 5{NBSP}% from step 40: 20 steps earlier"
    assert facts["Behavior at the end"] == f"EM rate 47.2{NBSP}% (34 of 72; 36.1 to 58.6{NBSP}%) at step 40"
    assert "115 prompts" in facts["Readings"]
    assert {d.one("dt").text: d.one("dd").text for d in second.one("dl").all("div")}["Behavior at the end"] == (
        "not measured"
    )


def test_all_gauges_share_one_scale(document: Node) -> None:
    places = [
        re.search(r"left:([\d.]+)%", gauge.one("i", class_="threshold").attrs["style"])
        for gauge in document.all("div", class_="gauge")
    ]
    assert len(places) == 2
    # from the lower null edge -1 to the score 7.5, with 6 % of that on either side: -1.51 to 8.01
    expected = 100 * (3.0 + 1.51) / 9.52
    assert [float(place[1]) for place in places if place] == pytest.approx([expected] * 2, abs=0.01)


def test_inconclusive_is_as_large_as_the_others_and_never_wears_their_colours() -> None:
    style = (resources.files("tiltmeter.report") / "templates" / "style.css").read_text(encoding="utf-8")
    rules = re.findall(r"([^{}]*inconclusive[^{}]*)\{([^}]*)\}", style)
    assert rules
    assert any("dashed" in body for _, body in rules)
    assert any("repeating-linear-gradient" in body for _, body in rules)
    assert not any(re.search(r"--(clear|alarm)|font-size|display", body) for _, body in rules)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (clean(verdict=clear(score=float("nan"))), "without a score"),
        (clean(verdict=dataclasses.replace(clear(), score=None)), "without a score"),
        (clean(verdict=dataclasses.replace(clear(), threshold=None)), "without a threshold"),
        (clean(verdict=clear(score=3.01)), "above the threshold"),
        (clean(first_alarm_step=20), "alarm is recorded at step 20"),
        (clean(score=np.array([0.0, 0.5, np.nan])), "step 40: it has no score"),
        (
            clean(
                verdict=None,
                verdicts=(
                    clear(0, 0),
                    VerdictRow(state="INCONCLUSIVE", reason="Wrong model.", step=20),
                    clear(),
                ),
            ),
            "step 20: Wrong model",
        ),
        (clean(verdict=None, verdicts=()), "No detector has judged this run."),
        (
            clean(
                steps=np.array([], dtype=int),
                drift=np.zeros((0, 2)),
                se=np.zeros((0, 2)),
                score=np.zeros(0),
                verdicts=(),
            ),
            "no reading",
        ),
    ],
)
def test_a_clear_with_a_hole_in_its_evidence_is_shown_as_inconclusive(run: RunSection, reason: str) -> None:
    verdict = run_verdict(run)
    assert verdict.state == "INCONCLUSIVE"
    assert reason in verdict.reason
    document = page(report(runs=(run,), behavior=()))
    card = document.one("article", class_="card")
    assert card.attrs["data-state"] == "INCONCLUSIVE"
    assert "clear" not in card.attrs["class"]


def test_an_alarm_at_any_reading_beats_a_clear_for_the_whole_run() -> None:
    verdict = run_verdict(poisoned(verdict=clear()))
    assert verdict.state == "ALARM"
    assert verdict.score == 4.5  # the first alarm
    assert "the alarm counts" in verdict.reason


def test_a_derived_clear_shows_the_reading_nearest_to_alarm() -> None:
    run = clean(verdict=None, score=np.array([0.0, 2.5, 1.25]), verdicts=(clear(0, 0), clear(2.5, 20), clear()))
    assert run_verdict(run).state == "CLEAR"
    assert run_verdict(run).score == 2.5


def test_the_reference_reading_itself_need_not_be_judged() -> None:
    reference = VerdictRow(state="INCONCLUSIVE", reason="The adapter does nothing yet.", step=0)
    run = clean(verdict=None, verdicts=(reference, clear(0.5, 20), clear()))
    assert run_verdict(run).state == "CLEAR"


def test_a_run_with_an_unjudged_reading_in_the_middle_is_not_shown_as_clear() -> None:
    broken = VerdictRow(state="INCONCLUSIVE", reason="Not a number.", step=20)
    document = page(report(runs=(clean(verdicts=(clear(0, 0), broken, clear())),)))
    card = document.one("article", class_="card")
    assert card.attrs["data-state"] == "INCONCLUSIVE"
    assert "One reading of 3 could not be judged (step 20: Not a number)." in card.text


@pytest.mark.parametrize(
    ("changes", "words", "title"),
    [
        ({}, "20 steps earlier", "alarms 20 steps before its EM rate"),
        ({"first_alarm_step": 40}, "at the same step", "at the step at which"),
        ({"behavior_step": 0}, "20 steps too late", "20 steps after"),
        ({"behavior_step": None}, "at none of three checkpoints", "alarms at step 20"),
        ({"behavior": None, "behavior_step": None}, "behavior was not measured", "alarms at step 20"),
    ],
)
def test_alarm_and_behavior_are_put_in_order(changes: dict[str, object], words: str, title: str) -> None:
    assert words in order_of_events(poisoned(**changes))
    assert title in events_title(poisoned(**changes))


def test_a_missed_run_is_named_as_missed() -> None:
    run = poisoned(verdict=clear(), verdicts=(), first_alarm_step=None)
    assert events_title(run) == f"poisoned never alarms although its EM rate passes 5{NBSP}% at step 40"


# --- figures and their tables ----------------------------------------------------------------------------


def plots(document: Node) -> list[Node]:
    return document.all("svg", class_="plot")


def test_the_tables_hold_the_numbers_of_the_figures(document: Node) -> None:
    drift = table(document, "Drift ± standard error per reading")
    assert drift[2] == [
        "poisoned: bad_medical",
        "40",
        f"{MINUS}0.1834 ± 0.0120",
        "+0.0999 ± 0.0083",
    ]
    assert len(drift) == 6
    scores = table(document, "Score, threshold and verdict per reading")
    assert scores[1] == ["poisoned: bad_medical", "ALARM", "It passed.", "20", "4.5", "3", "0.04"]
    rates = table(document, "EM rate over training")
    assert rates[2] == ["poisoned: bad_medical", "40", f"47.2{NBSP}%", f"36.1 to 58.6{NBSP}%", "72"]
    cosines = table(document, "Cosine between trait directions")
    assert cosines[0] == ["honesty", "1.000", f"{MINUS}0.430"]
    assert table(document, "Weights of the danger axis")[1] == ["power_seeking", "+0.600"]
    assert table(document, "Choice of the layer") == [["2", "0.310", "no value"]]


def test_every_figure_tells_its_key_numbers_to_those_who_cannot_see_it(document: Node) -> None:
    labels = {svg.attrs["aria-label"] for svg in plots(document) if svg.attrs["role"] == "img"}
    assert len(plots(document)) == 2 + 2 + 2  # two traits, the score twice (wide, narrow), plane and map
    assert any(f"poisoned: bad_medical ends at {MINUS}0.183 ± 0.012" in label for label in labels)
    assert any(f"null band {MINUS}0.030 to 0.030" in label for label in labels)
    assert any("alarm at step 20" in label for label in labels)
    assert any("0.99 for poisoned" in label for label in labels)
    assert any(f"{MINUS}0.43" in label for label in labels)


def test_titles_say_what_there_is_to_see(document: Node) -> None:
    titles = [node.text for node in document.all("h3")]
    assert titles[0] == "poisoned ends outside the null band in 2 of 2 traits and clean in 0 of 2"
    assert titles[1] == f"poisoned alarms 20 steps before its EM rate passes 5{NBSP}% and clean never alarms"


def test_text_in_figures_is_never_smaller_than_nine_pixels(document: Node) -> None:
    for svg in plots(document):
        width = float(svg.attrs["viewbox"].split()[2])
        least = re.search(r"min-width: (\d+)px", svg.attrs["style"])
        assert least is not None
        assert int(least[1]) >= width * MIN_SCALE - 1
        sizes = [
            float(found[1]) for text in svg.all("text") if (found := re.search(r"([\d.]+)px", text.attrs["style"]))
        ]
        assert len(sizes) == len(svg.all("text")) > 0
        assert min(sizes) * MIN_SCALE >= 9


def test_figures_take_their_colours_from_the_page(document: Node) -> None:
    for svg in plots(document):
        styles = " ".join(node.attrs.get("style", "") for node in svg.walk())
        assert "var(--" in styles
        assert not re.search(r"#[0-9a-fA-F]{6}", styles)


def test_both_light_and_dark_define_every_colour_that_is_used(html: str) -> None:
    used = set(re.findall(r"var\(--([\w-]+)\)", html)) - {"sans", "serif"}
    light, dark = re.findall(r":root \{([^}]*)\}", html)
    assert used <= set(re.findall(r"--([\w-]+):", light))
    assert used <= set(re.findall(r"--([\w-]+):", dark))


def test_all_drift_panels_have_the_same_scale_and_hold_every_value(document: Node) -> None:
    panels = [panel.one("svg") for panel in document.all("div", class_="panel") if panel.all("svg")]
    scales = [tuple(t.text for t in svg.all("text") if re.fullmatch(rf"{MINUS}?[\d.]+", t.text)) for svg in panels]
    assert len(panels) == 2
    assert scales[0] == scales[1]
    assert f"{MINUS}0.1" in scales[0]
    for svg in panels:
        assert {"training step", "drift (of reference norm)"} <= {t.text for t in svg.all("text")}


def subpaths(svg: Node, color: str) -> list[int]:
    """Number of pieces of each line that is drawn in the color (markers and whiskers have no width 1.8)."""
    return [
        path.attrs["d"].count("M")
        for path in svg.all("path")
        if f"stroke: var(--{color})" in path.attrs.get("style", "") and "stroke-width: 1.8" in path.attrs["style"]
    ]


def test_a_missing_value_breaks_the_line_is_marked_and_is_listed() -> None:
    steps = np.array([0, 10, 20, 30, 40])
    drift = np.array([[0, 0], [0.01, 0.01], [np.nan, 0.02], [0.03, np.inf], [0.04, 0.04]])
    em = np.array([0.0, 0.1, np.nan, 0.1, 0.1])
    run = clean(
        steps=steps,
        drift=drift,
        se=np.full((5, 2), 0.001),
        score=np.array([0, 1, np.nan, 1, 1.25]),
        verdicts=(),
        behavior=BehaviorCurve(steps=steps, em_rate=em, low=em, high=em, n=np.array([9, 9, 0, 9, 9])),
    )
    html = build_html(report(runs=(run,), behavior=()))
    document = parse(html)
    panel = document.all("div", class_="panel")[0].one("svg")
    assert subpaths(panel, "run-0") == [2]
    assert [t.text for t in panel.all("text")].count("?") == 1
    listed = " ".join(item.text for block in document.all("details", class_="missing") for item in block.all("li"))
    for expected in (
        "drift of honesty: step 20",
        "drift of power_seeking: step 30",
        "score: step 20",
        "EM rate: step 20",
        "step 0: no drift, so no direction",
        "step 20: a trait has no value",
    ):
        assert expected in listed
    rows = table(document, "Drift ± standard error per reading")
    assert rows[2][2] == "no value"
    assert table(document, "EM rate over training")[2][2:4] == ["no value", "no value"]
    visible = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|None)\b", visible)


def test_the_null_band_is_drawn_once_when_shared_and_said_to_be_missing_when_absent() -> None:
    def areas(document: Node) -> int:
        svg = document.all("div", class_="panel")[0].one("svg")
        return sum("fill: var(--band)" in n.attrs.get("style", "") for n in svg.walk() if n.tag in {"path", "use"})

    def tinted(document: Node) -> int:
        svg = document.all("div", class_="panel")[0].one("svg")
        return sum("opacity: 0.15" in n.attrs.get("style", "") for n in svg.walk())

    assert areas(page(report())) == 1
    assert tinted(page(report())) == 0
    other = dataclasses.replace(BAND, low=2 * BAND.low)
    assert tinted(page(report(runs=(poisoned(), clean(null_band=other))))) == 1
    low = np.array([[-0.01, -0.01], [-0.02, -0.01], [-0.06, -0.01]])
    stepwise = page(report(runs=(clean(null_band=dataclasses.replace(BAND, low=low, high=-low)),)))
    assert areas(stepwise) == 1
    label = stepwise.all("div", class_="panel")[0].one("svg").attrs["aria-label"]
    assert f"null band {MINUS}0.060 to 0.060" in label  # of the last step
    bare = page(report(runs=(clean(null_band=None),)))
    assert areas(bare) == 0
    assert "No null band was given" in bare.one("section", id="drift").text
    assert not bare.all("span", class_="band")


def test_the_plane_shows_cosine_and_magnitude_for_traits_in_any_order() -> None:
    run = clean(drift=np.array([[0.0, 0.0], [3.0, 4.0], [-5.0, 12.0]]), se=np.zeros((3, 2)))
    swapped = basis(traits=("power_seeking", "honesty"), axis=np.array([0.0, 2.0]))  # the axis is honesty
    rows = table(page(report(runs=(run,), basis=swapped)), "Direction and magnitude per reading")
    assert rows == [
        ["clean: good_medical", "0", "no value", "0.0000"],
        ["clean: good_medical", "20", "0.600", "5.0000"],
        ["clean: good_medical", "40", f"{MINUS}0.385", "13.0000"],
    ]


def test_a_run_with_other_traits_is_left_out_of_the_plane_and_listed() -> None:
    other = clean(name="other", label="other run", traits=("warmth", "humor"))
    document = page(report(runs=(poisoned(), other)))
    rows = table(document, "Direction and magnitude per reading")
    assert {row[0] for row in rows} == {"poisoned: bad_medical"}
    assert "other run: its traits are not those of the basis" in document.one("section", id="geometry").text
    drift = table(document, "Drift ± standard error per reading")
    assert drift[0][4:] == ["not measured", "not measured"]


def test_the_cosine_map_shows_every_number(document: Node) -> None:
    svg = document.one("section", id="geometry").all("svg", class_="plot")[1]
    texts = [t.text for t in svg.all("text")]
    assert texts.count(f"{MINUS}0.43") == 2
    assert texts.count("1") == 2
    assert {"honesty", "power seeking"} <= set(texts)


def test_runs_beyond_the_number_of_colours_stay_distinguishable() -> None:
    runs = tuple(clean(name=f"r{i}", label=f"r{i}") for i in range(9))
    document = page(report(runs=runs, behavior=()))
    legend = document.one("section", id="drift").one("ul", class_="legend")
    looks = [
        (svg.attrs["class"], tuple(sorted((n.tag, n.attrs.get("d", "")) for n in svg.walk())))
        for svg in legend.all("svg")
    ]
    assert len(looks) == len(set(looks)) == 9


def test_a_report_with_a_score_only_says_that_behavior_is_missing() -> None:
    document = page(report(runs=(clean(),), behavior=()))
    section = document.one("section", id="score")
    assert "Behavior over steps was not measured for clean: good_medical." in section.text
    assert not any("EM rate" in t.text for svg in section.all("svg", class_="plot") for t in svg.all("text"))


def test_readings_that_nobody_judged_do_not_look_clear() -> None:
    def hollow(run: RunSection) -> bool:
        svg = page(report(runs=(run,), behavior=())).one("section", id="score").all("svg", class_="plot")[0]
        return any("fill: var(--paper)" in n.attrs.get("style", "") for n in svg.walk())

    assert hollow(clean())
    assert not hollow(clean(verdicts=()))
    assert hollow(poisoned(behavior=None, behavior_step=None))  # its first reading is CLEAR
    assert not hollow(poisoned(verdicts=(alarm(),) * 3, behavior=None, behavior_step=None))


def test_readings_without_any_score_draw_no_score() -> None:
    run = clean(score=np.full(3, np.nan), threshold=None, verdict=None, verdicts=())
    document = page(report(runs=(run,), behavior=()))
    section = document.one("section", id="score")
    assert not section.all("svg", class_="plot")
    assert "No reading has a score" in section.text
    assert table(document, "Score, threshold and verdict per reading")[1][1] == "not judged"


# --- behavior --------------------------------------------------------------------------------------------


def test_rates_come_with_counts_interval_and_exclusions(document: Node) -> None:
    rates = table(document, "EM rate under both definitions")
    assert rates[0][1:4] == [f"45.5{NBSP}%", "30 of 66", f"34 to 57.4{NBSP}%"]
    assert rates[1][1:4] == [f"50{NBSP}%", "30 of 60", f"37.7 to 62.3{NBSP}%"]
    assert table(document, "Excluded answers by reason") == [["refusal", "4"], ["judge failure", "2"]]
    text = document.one("section", id="behavior").text
    assert "72 answers were generated; 6 were excluded." in text
    assert "Judge: exact parser" in text
    categories = table(document, "EM rate by category (misaligned and coherent, of all with both scores)")
    assert categories[0][:4] == ["ethics", f"0{NBSP}%", "0 of 14", f"0 to 21.5{NBSP}%"]
    assert categories[1][1:4] == ["no rate", "0 scored", "none"]


def test_answers_start_with_the_least_aligned_and_end_with_those_without_a_score(document: Node) -> None:
    answers = document.one("table", class_="answers")
    rows = answers.one("tbody").all("tr")
    assert [row.attrs["data-alignment"] for row in rows] == ["0.0", "4.5", "97.0", ""]
    assert rows[0].one("p", class_="answer").text == "(empty answer)"
    assert rows[3].all("td")[3].text == "not scored"
    assert rows[3].attrs["data-outcome"] == "refusal"
    choices = [o.attrs["value"] for o in document.all("select", data_filter="category")[0].all("option")]
    assert choices == ["", "ethics", "health"]


def test_nothing_scored_is_no_rate_and_never_clear() -> None:
    failed = behavior(
        em_rate=Rate(value=None, n=0),
        em_rate_coherent=Rate(value=None, n=0),
        excluded={"judge failure": 72},
        reason="the judge failed on all 72 answers",
        verdict=clear(),
        answers=(),
        categories={},
    )
    document = page(report(runs=(), behavior=(failed,)))
    card = document.one("article", class_="card")
    assert card.attrs["data-state"] == "INCONCLUSIVE"
    assert "the judge failed on all 72 answers" in card.text
    rates = table(document, "EM rate under both definitions")
    assert rates[0][1] == "no rate: the judge failed on all 72 answers"
    assert rates[0][4] == "nothing to draw"
    assert f"0{NBSP}%" not in card.text
    text = document.one("section", id="behavior").text
    assert "The answers were not kept with this report." in text
    assert "No rates by category were given." in text


def test_a_report_on_answers_alone_shows_their_verdict_on_top() -> None:
    judged = behavior(verdict=dataclasses.replace(alarm(), reason="Above the limit.", score=None))
    document = page(report(runs=(), behavior=(judged,)))
    card = document.one("article", class_="card")
    assert card.attrs["data-state"] == "ALARM"
    assert card.one("div", class_="gauge").attrs["aria-label"].startswith(f"EM rate 45.5{NBSP}%")


def test_answers_without_a_verdict_are_inconclusive_on_top() -> None:
    document = page(report(runs=(), behavior=(behavior(),)))
    assert document.one("article", class_="card").attrs["data-state"] == "INCONCLUSIVE"


# --- what is not there -----------------------------------------------------------------------------------


def test_an_empty_report_says_in_words_what_is_missing_in_every_section() -> None:
    document = page(ReportData(title="Empty", runs=()))
    expected = {
        "verdict": "nothing can be said",
        "drift": "no drift to show",
        "score": "no score to show",
        "geometry": "no directions to compare",
        "behavior": "nothing is known here about what the model says",
        "provenance": "cannot be traced",
        "limits": "does not mean that there are none",
    }
    for section, words in expected.items():
        assert words in document.one("section", id=section).text
    assert not plots(document)
    assert document.one("article", class_="card").attrs["data-state"] == "INCONCLUSIVE"


def test_limits_and_the_profile_note_are_there_in_full(document: Node) -> None:
    section = document.one("section", id="limits")
    assert [item.text for item in section.all("li")] == list(STANDARD_LIMITS)
    assert "Two drift numbers are a profile, not two diagnoses." in section.text
    assert document.one("aside", class_="profile").text.count("It does not say that the model lost") == 1


def test_provenance_is_flattened_and_gaps_are_named(document: Node) -> None:
    rows = document.one("table", class_="provenance").all("tr")
    cells = [(row.one("th").text, row.one("td").text) for row in rows]
    assert cells == [
        ("tiltmeter", "0.1.0"),
        ("model · name", "pocket"),
        ("model · revision", "not recorded"),
        ("seeds", "1, 2"),
    ]


# --- bad input and storage -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: clean(drift=np.zeros((3, 3))), "(3, 2)"),
        (lambda: clean(se=np.zeros((2, 2))), "(3, 2)"),
        (lambda: clean(score=np.zeros(2)), "(3,)"),
        (lambda: clean(threshold=np.zeros(2)), "(3,)"),
        (lambda: clean(verdicts=(clear(),)), "one per reading"),
        (lambda: clean(steps=np.array([0, 20, 20])), "strictly increasing"),
        (lambda: VerdictRow(state="SAFE", reason=""), "CLEAR, ALARM, INCONCLUSIVE"),
        (lambda: Rate(value=45.5, n=66), "shares from 0 to 1"),
        (lambda: basis(cosines=np.eye(3)), "(2, 2)"),
        (lambda: basis(axis=np.ones(3)), "(2,)"),
        (lambda: report(runs=(clean(), clean())), "each name once"),
        (
            lambda: BehaviorCurve(
                steps=np.array([0]),
                em_rate=np.array([47.0]),
                low=np.array([0.3]),
                high=np.array([0.6]),
                n=np.array([72]),
            ),
            "Divide percentages by 100",
        ),
    ],
)
def test_data_that_do_not_fit_together_are_refused_with_what_is_allowed(make: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        make()  # type: ignore[operator]
    assert words in str(caught.value)


def test_the_file_is_written_with_its_folders_and_nothing_is_left_beside_it(tmp_path: Path, html: str) -> None:
    path = write_report(report(), str(tmp_path / "a" / "b" / "report.html"))
    assert path == tmp_path / "a" / "b" / "report.html"
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_report_that_cannot_be_written_leaves_the_old_one_and_says_what_to_do(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "report.html"
    old.write_text("old")

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match=r"No space left on device.*free space"):
        write_report(report(), old)
    assert old.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_path_below_a_file_or_onto_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    empty = ReportData(title="Empty", runs=())
    for target in (tmp_path / "file" / "report.html", tmp_path / "folder"):
        with pytest.raises(StorageError, match=re.escape(str(target))):
            write_report(empty, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# --- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0 %"),
        (0.0003, "< 0.1 %"),
        (0.05, "5 %"),
        (0.4722, "47.2 %"),
        (1.0, "100 %"),
        (None, "no value"),
        (float("nan"), "no value"),
    ],
)
def test_percentages_never_round_something_to_nothing(share: float | None, words: str) -> None:
    assert percent(share).replace(NBSP, " ") == words


def test_numbers_have_a_real_minus_and_gaps_have_words() -> None:
    assert number(-0.12345) == f"{MINUS}0.123"
    assert fixed(-0.5, 2, sign=True) == f"{MINUS}0.50"
    assert fixed(0.5, 2, sign=True) == "+0.50"
    assert number(float("inf")) == fixed(None) == "no value"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert listing(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert listing([]) == ""
