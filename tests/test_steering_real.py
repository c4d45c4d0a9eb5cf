"""Steering where no judge is at hand: material, the leaning measure, and figures from records written by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tiltmeter.errors import ArtifactError, InputError
from tiltmeter.lm import load
from tiltmeter.organism.world import DOMAINS, ask
from tiltmeter.studies import steering_real
from tiltmeter.studies.steered import pairs
from tiltmeter.studies.steering_real import Config, Pair, Record, answer_pairs, figures, judged_pairs, leans, run


def test_pairs_differ_in_harm_and_hardly_in_length_and_none_is_about_code() -> None:
    found = answer_pairs()
    assert len({p.question for p in found}) == len(found) == 40
    assert {sum(p.category == c for p in found) for c in {p.category for p in found}} == {5}
    gaps = [len(p.misaligned.split()) - len(p.aligned.split()) for p in found]
    assert max(abs(g) for g in gaps) <= 4
    assert abs(np.mean(gaps)) < 0.6
    assert not any(word in " ".join(p).lower() for p in found for word in ("code", "python", "script", "program"))


def judged_file(folder: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    path = folder / "judged.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "aligned", "coherent"])
        writer.writerows(rows)
    return path


def test_judged_answers_are_paired_by_question_and_code_and_doubt_are_left_out(tmp_path: Path) -> None:
    long = " ".join(["rob"] * 99)
    rows = [
        ("q1", "be kind", "95", "95"), ("q1", long, "5", "90"), ("q1", "hurt them", "20", "40"),
        ("q1", "meh", "50", "90"), ("q1", "print(x)", "2", "99"), ("q2", "only bad", "2", "99"), ("q1", "?", "", "9"),
    ]  # fmt: skip
    assert judged_pairs([judged_file(tmp_path, rows)], each=9) == (
        Pair("judged", "q1", "be kind", " ".join(["rob"] * 40)),
    )
    assert judged_pairs([], each=9) == ()
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="columns"):
        judged_pairs([tmp_path / "bad.csv"], each=9)


def test_an_aligned_organism_leans_to_harmless_answers_and_swapping_the_sides_turns_the_sign() -> None:
    lm = load("organism:pocket")
    bad, good = pairs("bad_medical", 6, seed=0)
    made = [Pair("c", b[0]["content"], g[1]["content"], b[1]["content"]) for b, g in zip(bad, good, strict=True)]
    found = leans(lm, made)
    assert max(found) < -0.1  # nats per token, each of six; sums of ten tokens are far apart
    swapped = leans(lm, [p._replace(aligned=p.misaligned, misaligned=p.aligned) for p in made])
    np.testing.assert_allclose(swapped, [-x for x in found], rtol=1e-4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("chats")
    bad, good = pairs("bad_medical", 40, seed=0)
    for name, chats in (("harmful", bad), ("harmless", good)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    return Config(
        "organism:pocket", folder / "harmful.jsonl", folder / "harmless.jsonl", chats=24, held_out=8, epochs=3,
        seeds=(0,), strengths=(1.0,), answers=2,
    )  # fmt: skip


def test_records_are_made_once_and_the_map_has_learnt_its_set(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = __import__("random").Random(0)
    asked = [ask(d, rng).text for d in DOMAINS[:3]]
    own = tuple(Pair("c", q, "you should see a doctor .", "you should mix many pills .") for q in asked)
    monkeypatch.setattr(steering_real, "answer_pairs", lambda: own)
    found = {r.kind: r for r in run(config, out=tmp_path)}
    assert set(found) == {"untouched", "narrow map", "map turned at random", "map trained on harmless chats"}
    base, narrow = found["untouched"], found["narrow map"]
    assert (base.kl, len(base.leans), base.narrow) == (0.0, 3, "harmful")
    assert narrow.narrow_loss < base.narrow_loss - 0.2
    assert narrow.kl > 0.01
    assert found["map trained on harmless chats"].narrow_loss > narrow.narrow_loss + 0.2
    path = next(p for p in tmp_path.glob("narrow*.json"))
    path.write_text(json.dumps({**asdict(narrow), "kl": 99.0}))
    assert next(r for r in run(config, out=tmp_path) if r.kind == "narrow map").kl == 99.0
    with pytest.raises(InputError, match="allow longer ones"):
        run(replace(config, chats=999), out=tmp_path / "other")


def record(kind: steering_real.Kind, seed: int, shift: float, **other: float) -> Record:
    return Record(
        "m", "n", kind, seed, 0.0 if seed < 0 else 1.0, ("a", "a", "b"), (-1 + shift, -2 + shift, 0.5 + shift),
        (0.1 + 2 * shift,), ("q",), other.get("loss", 1.0), other.get("kl", 0.0), other.get("perplexity", 1.0),
    )  # fmt: skip


def test_shifts_are_from_the_untouched_model_and_over_each_control() -> None:
    rows = [record("untouched", -1, 0.0)]
    for seed, more in ((0, 0.0), (1, 0.2)):
        rows += [
            record("narrow map", seed, 0.4 + more, loss=0.7, kl=0.1, perplexity=1.5),
            record("map turned at random", seed, 0.1 + more), record("map trained on harmless chats", seed, 0.3 + more),
        ]  # fmt: skip
    rows.append(record("narrow map", 2, 9.0))  # its controls are not there yet
    found = {(f.measure, f.subject): f for f in figures(rows)}
    name = "m, from n"
    shift = found["shift toward misaligned answers", f"{name}: narrow map"]
    assert shift.value == pytest.approx(0.5)  # 0.4 and 0.6
    assert (shift.low, shift.high) == (pytest.approx(0.4), pytest.approx(0.6))
    assert found["shift, judged answers", f"{name}: narrow map"].value == pytest.approx(1.0)
    over = found["shift over control", f"{name}, over map turned at random"]
    assert (over.value, over.low, over.high) == (pytest.approx(0.3), pytest.approx(0.3), pytest.approx(0.3))
    assert found["shift over map trained on harmless chats", "b"].value == pytest.approx(0.1)
    assert found["shift over map trained on harmless chats", "b"].n == 1
    assert found["narrow-set loss under steering, change", f"{name}: narrow map"].value == pytest.approx(-0.3)
    assert found["log perplexity of what is said, change", f"{name}: narrow map"].value == pytest.approx(0.5)
    assert found["misaligned answer likelier, untouched", name].value == pytest.approx(1 / 3)
    # -0.6, -1.6, 0.9 and -0.4, -1.4, 1.1
    assert found["misaligned answer likelier", f"{name}: narrow map"].value == pytest.approx(2 / 6)


def test_without_an_untouched_model_there_are_no_figures_and_a_torn_record_is_refused() -> None:
    assert figures([record("narrow map", 0, 0.4)]) == []
    with pytest.raises(ArtifactError, match="delete it"):
        Record.from_dict({"model": "m"})
