"""A basis holds the directions that were planted, chooses its layer by effect, and refuses any other model."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression

from bases import PROMPTS, TRAITS, hidden_states
from tiltmeter import lm as lms
from tiltmeter import selection, steer
from tiltmeter.artifacts import read_artifact, write_artifact
from tiltmeter.basis import TraitBasis, fit_basis
from tiltmeter.directions import METHODS, Method, direction, probe_accuracy
from tiltmeter.drift import measure
from tiltmeter.errors import (
    ArtifactError,
    FingerprintMismatch,
    InputError,
    LayerError,
    NumericalError,
    StorageError,
)
from tiltmeter.testing import planted_activations
from tiltmeter.traits import Prompt, PromptSet, TraitSet, load_traits
from tiny import make_model, make_tokenizer, tiny_lm

LAYER = 2


@pytest.fixture(scope="module")
def basis() -> TraitBasis:
    return fit_basis(tiny_lm(), traits=TRAITS, prompts=PROMPTS, layer=LAYER, seed=3)


def adapted(*, trained: bool) -> lms.LM:
    """The tiny Llama with a LoRA adapter, whose B side is zero unless trained."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(make_model("llama"), config)
        for name, parameter in model.named_parameters():
            if trained and "lora_B" in name:
                parameter.data.normal_()
    return lms.wrap(model, make_tokenizer(), name="adapted")


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_recovered_with_its_sign(method: Method) -> None:
    planted = planted_activations(n=300, gap=20.0, seed=1)
    for t, truth in enumerate(planted.directions):
        assert direction(planted.positive[t], planted.negative[t], method) @ truth > 0.99
        assert direction(planted.negative[t], planted.positive[t], method) @ truth < -0.99


@pytest.mark.parametrize("method", METHODS)
def test_poles_that_do_not_differ_have_no_direction(method: Method) -> None:
    same = np.ones((6, 4))
    with pytest.raises(NumericalError, match="do not differ"):
        direction(same, same, method)


def test_paired_differences_need_pairs() -> None:
    with pytest.raises(InputError, match="equal size, got 3 and 2"):
        direction(np.ones((3, 4)), np.zeros((2, 4)), "pca")


def test_a_probe_separates_planted_poles_and_is_at_chance_on_noise() -> None:
    planted = planted_activations(n=100, gap=8.0)
    groups = [*range(100), *range(100)]

    assert probe_accuracy(planted.positive[0], planted.negative[0], groups=groups) > 0.98
    noise = np.random.default_rng(0).normal(size=(200, 64))
    assert 0.35 < probe_accuracy(noise[:100], noise[100:], groups=groups) < 0.65


def test_a_probe_is_not_tested_on_groups_that_it_was_fitted_on() -> None:
    # Every group is its own far-off cluster, and which pole it is on is drawn: knowing the others does not help.
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(2, 10, 200)) * 10
    rows = centres[:, :, None, :] + 0.1 * rng.normal(size=(2, 10, 8, 200))
    groups = np.repeat(np.arange(10), 8)

    assert probe_accuracy(rows[0].reshape(-1, 200), rows[1].reshape(-1, 200)) > 0.99
    accuracy = probe_accuracy(rows[0].reshape(-1, 200), rows[1].reshape(-1, 200), groups=[*groups, *groups])

    assert accuracy < 0.8


def test_probe_accuracy_equals_that_of_a_plain_logistic_regression() -> None:
    planted = planted_activations(("a",), n=40, hidden=100, gap=1.5, seed=5)
    up, down = planted.positive[0].astype(float), planted.negative[0].astype(float)
    numbers = np.array([*range(40), *range(40)]) % 5
    points, labels = np.concatenate([up, down]), np.repeat([1, 0], 40)
    scaled = (points - points.mean(axis=0)) / (points - points.mean(axis=0)).std()
    right = 0
    for fold in range(5):
        out = numbers == fold
        model = LogisticRegression(max_iter=2000).fit(scaled[~out], labels[~out])
        right += int((model.predict(scaled[out]) == labels[out]).sum())

    assert probe_accuracy(up, down, groups=[*range(40), *range(40)]) == pytest.approx(right / 80, abs=0.013)  # one row
    assert 0.55 < right / 80 < 0.95


def test_one_group_cannot_be_cross_validated() -> None:
    with pytest.raises(InputError, match="two groups"):
        probe_accuracy(np.ones((2, 3)), np.zeros((2, 3)), groups=[0, 0, 0, 0])


# ---------------------------------------------------------------- fitting


def poles_by_hand(lm: lms.LM, layer: int) -> list[tuple[Any, Any]]:
    """Per trait, activations of the positive and the negative pole, each (systems x questions, hidden)."""
    found = []
    for trait in TRAITS.traits:
        up, down = (
            hidden_states(lm, tuple(Prompt(q, "", s) for s in side for q in TRAITS.questions), layer)
            for side in (trait.positive, trait.negative)
        )
        found.append((up, down))
    return found


def test_the_basis_is_the_unit_mean_difference_of_the_librarys_own_hidden_states(basis: TraitBasis) -> None:
    lm = tiny_lm()
    neutral = hidden_states(lm, PROMPTS.prompts, LAYER)
    for t, (up, down) in enumerate(poles_by_hand(lm, LAYER)):
        difference = up.mean(axis=0) - down.mean(axis=0)
        unit = difference / np.linalg.norm(difference)
        np.testing.assert_allclose(basis.directions[t], unit, atol=1e-4)
        np.testing.assert_allclose(basis.poles[t], [down.mean(axis=0) @ unit, up.mean(axis=0) @ unit], atol=1e-3)

    assert basis.reference_norm == pytest.approx(np.linalg.norm(neutral, axis=1).mean(), rel=1e-5)
    assert basis.traits == basis.names == ("truth", "care")
    assert basis.layer == LAYER


def test_the_pca_basis_is_the_main_axis_of_paired_differences() -> None:
    found = fit_basis(tiny_lm(), traits=TRAITS, prompts=PROMPTS, layer=LAYER, method="pca")

    for t, (up, down) in enumerate(poles_by_hand(tiny_lm(), LAYER)):
        values, vectors = np.linalg.eigh((up - down).T @ (up - down))
        axis = vectors[:, values.argmax()]
        assert found.directions[t] @ axis * np.sign(axis @ (up - down).mean(axis=0)) == pytest.approx(1, abs=1e-4)


def test_the_mean_of_a_prompts_tokens_can_be_read_instead_of_the_last() -> None:
    lm = tiny_lm()
    found = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=LAYER, pooling="mean")
    rows = []
    for ids in lm.encode_prompts(PROMPTS.prompts):
        with torch.no_grad():
            states = lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        rows.append(states[LAYER + 1][0].double().numpy().mean(axis=0))

    np.testing.assert_allclose(measure(lm, found).values, np.stack(rows) @ found.directions.T, atol=1e-4)


def test_candidates_are_scored_by_how_far_steering_changes_greedy_answers() -> None:
    lm = tiny_lm()
    found = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layers=[0, 1, 3])
    asked = [PROMPTS.prompts[at] for at in (0, 2, 4)]  # three, evenly spaced over six
    turns = [
        [
            *([{"role": "system", "content": p.system}] if p.system else []),
            {"role": "user", "content": p.text},
        ]
        for p in asked
    ]
    plain = lm.generate(turns, max_new_tokens=32, temperature=0.0)
    expected = []
    for layer in (0, 1, 3):
        alone = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=layer)
        changes = []
        for vector in alone.directions:
            for sign in (1.0, -1.0):
                steering = steer.SteeringVector(
                    layer, sign * vector[None], strength=selection.STRENGTH, norm=alone.reference_norm, meta={}
                )
                with steer.apply(lm, steering):
                    answers = lm.generate(turns, max_new_tokens=32, temperature=0.0)
                changes += [
                    1 - difflib.SequenceMatcher(None, a.split(), b.split(), autojunk=False).ratio()
                    for a, b in zip(plain, answers, strict=True)
                ]
        expected.append(np.mean(changes))

    scores = found.selection.scores
    assert [score.layer for score in scores] == [0, 1, 3]
    most = max(score.answers for score in scores)
    assert most == 12
    for score, mean in zip(scores, expected, strict=True):
        if score.answers == most:  # the others were left behind
            assert score.divergence == pytest.approx(mean, abs=1e-6)
    assert len({round(float(value), 3) for value in expected}) > 1
    assert f"after block {found.layer}" in found.selection.reason
    assert found.selection.strength == selection.STRENGTH


def test_one_pass_over_all_layers_gives_what_each_layer_alone_gives() -> None:
    lm = tiny_lm()
    several = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layers=[1, 2, 3])
    alone = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=several.layer)

    np.testing.assert_allclose(several.directions, alone.directions, atol=1e-5)
    assert several.reference_norm == pytest.approx(alone.reference_norm)


def test_a_given_layer_is_not_steered_for(basis: TraitBasis) -> None:
    (score,) = basis.selection.scores

    assert (score.layer, score.divergence, basis.selection.strength) == (LAYER, None, None)
    assert "block 2 was asked for" in basis.selection.reason
    assert all(0 <= accuracy <= 1 for accuracy in score.probe_accuracy + score.transfer_accuracy)
    assert len(score.probe_accuracy) == len(score.transfer_accuracy) == 2


def test_candidates_lie_between_two_fifths_and_three_quarters_of_the_depth() -> None:
    prompts, few = PromptSet("one", PROMPTS.prompts[:1]), replace(TRAITS, traits=TRAITS.traits[:1])
    for depth, expected in ((4, (1, 2)), (6, (2, 3, 4)), (1, (0,)), (16, (6, 7, 8, 10, 11))):
        lm = tiny_lm(num_hidden_layers=depth)
        found = fit_basis(lm, traits=few, prompts=prompts)
        assert tuple(score.layer for score in found.selection.scores) == expected


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"layer": 4}, LayerError, "blocks are 0 to 3"),
        ({"layer": -1}, LayerError, "blocks are 0 to 3"),
        ({"layers": [1, 9]}, LayerError, "candidate layers 1, 9"),
        ({"layers": []}, InputError, "is empty"),
        ({"layer": 1, "layers": [1]}, InputError, "both layer= and layers="),
        ({"method": "median"}, InputError, "mean_difference, pca, logistic"),
        ({"traits": "none"}, InputError, "alignment, organism, semantic"),
        ({"prompts": "none"}, InputError, "neutral, organism"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_any_pass(
    given: dict[str, Any], error: type[InputError], said: str
) -> None:
    with pytest.raises(error, match=said):
        fit_basis(tiny_lm(), **({"traits": TRAITS, "prompts": PROMPTS} | given))


def test_pca_refuses_poles_of_different_size_by_the_traits_name() -> None:
    uneven = replace(TRAITS.traits[1], positive=TRAITS.traits[1].positive[:2])
    traits = TraitSet("two", (TRAITS.traits[0], uneven), TRAITS.questions)
    with pytest.raises(InputError, match="care"):
        fit_basis(tiny_lm(), traits=traits, prompts=PROMPTS, layer=1, method="pca")

    assert fit_basis(tiny_lm(), traits=traits, prompts=PROMPTS, layer=1).names == ("truth", "care")


def test_a_pole_of_one_prompt_is_probed_over_unseen_questions() -> None:
    single = tuple(replace(t, positive=t.positive[:1], negative=t.negative[:1]) for t in TRAITS.traits)
    found = fit_basis(tiny_lm(), traits=TraitSet("s", single, TRAITS.questions), prompts=PROMPTS, layer=1)

    (score,) = found.selection.scores
    up, down = poles_by_hand(tiny_lm(), 1)[0]
    numbers = [*range(5), *range(5)]
    assert score.transfer_accuracy[0] == pytest.approx(probe_accuracy(up[:5], down[:5], groups=numbers), abs=0.11)


def test_poles_that_the_model_cannot_tell_apart_are_named() -> None:
    twins = replace(TRAITS.traits[0], positive=("unseen",), negative=("unknown",))  # both are <unk> to this tokenizer
    with pytest.raises(NumericalError, match="trait 'truth' after block 1"):
        fit_basis(tiny_lm(), traits=TraitSet("t", (twins,), TRAITS.questions), prompts=PROMPTS, layer=1)


def test_an_organism_is_read_with_the_organisms_traits_and_prompts() -> None:
    lm = tiny_lm(tiltmeter_organism="pocket")
    found = fit_basis(lm, layer=1)

    assert found.name == found.prompts.name == "organism"
    assert found.traits_digest == load_traits("organism").digest


def test_an_adapter_is_switched_off_while_fitting(basis: TraitBasis) -> None:
    lm = adapted(trained=True)

    found = fit_basis(lm, traits=TRAITS, prompts=PROMPTS, layer=LAYER)

    np.testing.assert_allclose(found.directions, basis.directions, atol=1e-5)
    assert found.fingerprint == basis.fingerprint
    assert lms.adapter_state(lm) == "active"


def test_progress_is_told_for_reading_and_steering() -> None:
    told: list[tuple[int, int, str]] = []
    fit_basis(tiny_lm(), traits=TRAITS, prompts=PROMPTS, layers=[1, 2], progress=lambda *said: told.append(said))

    finished = {label for done, total, label in told if done == total}
    assert "steering candidate layers" in finished
    assert len(finished) >= 2
    assert all(0 <= done <= total for done, total, _ in told)


# ---------------------------------------------------------------- identity and drift


def test_a_basis_refuses_another_model_and_says_what_differs(basis: TraitBasis) -> None:
    with pytest.raises(FingerprintMismatch, match=r"differ in weights.*weights_may_differ"):
        basis.check(tiny_lm(seed=1))
    with pytest.raises(FingerprintMismatch, match="architecture") as caught:
        basis.check(tiny_lm("qwen2"))
    assert "weights_may_differ" not in str(caught.value)


def test_the_dtype_belongs_to_the_model(basis: TraitBasis) -> None:
    half = tiny_lm()
    half.model.to(torch.bfloat16)
    with pytest.raises(FingerprintMismatch, match="differ in dtype;"):
        basis.check(half, weights_may_differ=True)


def test_drift_from_the_base_switches_the_adapter_off(basis: TraitBasis) -> None:
    lm = adapted(trained=True)

    found = basis.drift(lm, reference="base")

    tuned, base = (hidden_states(x, PROMPTS.prompts, LAYER) for x in (lm, tiny_lm()))
    expected = (tuned - base).mean(axis=0) @ basis.directions.T / np.linalg.norm(base, axis=1).mean()
    assert found.drift == pytest.approx(expected, abs=1e-5)
    assert np.abs(expected).max() > 0.01
    assert (found.reference, found.problem) == ("base", None)


def test_drift_takes_models_and_readings_alike(basis: TraitBasis) -> None:
    lm, base = adapted(trained=True), tiny_lm()

    profiles = [
        basis.drift(lm, reference=base),
        basis.drift(lm, reference=measure(base, basis)),
        basis.drift(measure(lm, basis), reference=base),
    ]

    for found in profiles:
        assert found.drift == pytest.approx(basis.drift(lm, "base").drift, abs=1e-6)
        assert found.reference == "base"  # the model that the basis was fitted on, by whatever name it goes


def test_an_adapter_that_does_nothing_cannot_be_judged(basis: TraitBasis) -> None:
    assert "does nothing" in str(basis.drift(adapted(trained=False), reference="base").problem)


def test_an_adapter_above_the_layer_cannot_be_judged(basis: TraitBasis) -> None:
    lm = adapted(trained=True)
    for name, parameter in lm.model.named_parameters():
        if "lora_B" in name and "layers.3" not in name:
            parameter.data.zero_()

    assert "does not reach this layer" in str(basis.drift(lm, reference="base").problem)


def test_the_base_of_a_model_without_adapter_or_of_a_reading_is_refused(basis: TraitBasis) -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="there is none here"):
        basis.drift(lm, reference="base")
    with pytest.raises(InputError, match="there is none here"):
        basis.drift(measure(lm, basis), reference="base")
    with pytest.raises(InputError, match="'base', a model and a reading"):
        basis.drift(lm, reference="step0")  # type: ignore[arg-type]


def test_a_fully_fine_tuned_model_is_measured_when_that_is_said(basis: TraitBasis) -> None:
    tuned = tiny_lm(seed=1)
    with pytest.raises(FingerprintMismatch):
        basis.drift(tuned, reference=tiny_lm())

    assert basis.drift(tuned, reference=tiny_lm(), weights_may_differ=True).problem is None
    assert basis.drift(tuned, reference=tuned, weights_may_differ=True).reference == "tiny-llama"


# ---------------------------------------------------------------- storage


def rewritten(path: Path, *, format: int = 2, kind: str = "basis", **changes: Any) -> None:
    """Change keys of the stored header, and write the file with a digest that fits."""
    header, arrays = read_artifact(path, "basis", 2, remedy="")
    write_artifact(path, kind, format, header | changes, arrays)


@pytest.fixture
def stored(basis: TraitBasis, tmp_path: Path) -> Path:
    basis.save(tmp_path / "new" / "basis")
    return tmp_path / "new" / "basis" / "basis.safetensors"


def test_a_stored_basis_comes_back_whole(basis: TraitBasis, stored: Path) -> None:
    found = TraitBasis.load(stored.parent)

    np.testing.assert_array_equal(found.directions, basis.directions)
    np.testing.assert_array_equal(found.poles, basis.poles)
    rest = [{k: v for k, v in vars(x).items() if k not in ("directions", "poles")} for x in (found, basis)]
    assert rest[0] == rest[1]
    assert found.digest == basis.digest
    assert (found.seed, found.version) == (3, basis.provenance["tiltmeter"])
    assert TraitBasis.load(stored).digest == basis.digest
    assert sorted(path.name for path in stored.parent.iterdir()) == ["basis.safetensors"]


def test_the_layer_is_stored_as_after_which_block(stored: Path) -> None:
    from safetensors import safe_open

    with safe_open(stored, framework="numpy") as file:
        header = json.loads(file.metadata()["tiltmeter"])

    assert (header["after_block"], header["format"], header["kind"]) == (LAYER, 2, "basis")
    assert header["fingerprint"]["architecture"] == "llama"
    assert header["pooling"] == "last_token"


def test_the_digest_is_of_what_a_reading_depends_on(basis: TraitBasis) -> None:
    flipped = replace(basis, directions=-basis.directions)
    for other in (
        flipped,
        replace(basis, layer=1),
        replace(basis, prompts=replace(PROMPTS, prompts=PROMPTS.prompts[::-1])),
    ):
        assert other.digest != basis.digest
    assert replace(basis, provenance={}, model="renamed").digest == basis.digest


def test_a_stored_basis_is_read_without_torch(stored: Path) -> None:
    code = (
        "import sys; from tiltmeter.basis import TraitBasis; "
        "TraitBasis.load(sys.argv[1]).digest; sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code, str(stored)], check=False).returncode == 0


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_truncated_file_is_refused(stored: Path, kept: int) -> None:
    stored.write_bytes(stored.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="truncated or no safetensors"):
        TraitBasis.load(stored)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 3}, "needed is a basis of format 2"),
        ({"kind": "detector"}, "holds a detector"),
        ({"fingerprint": {}}, "is no sound basis"),
        ({"plan": {}}, "is no sound basis"),
        ({"traits": ["truth"]}, "is no sound basis"),
        ({"reference_norm": 0.0}, "is no sound basis"),
        ({"reference_norm": None}, "is no sound basis"),
        ({"prompts": {"name": "x", "prompts": []}}, "is no sound basis"),
        ({"selection": None}, "is no sound basis"),
        ({"after_block": -1}, "is no sound basis"),
        ({"after_block": 1.0}, "is no sound basis"),
        ({"after_block": "1"}, "is no sound basis"),
        ({"reference_norm": "1.0"}, "is no sound basis"),
        ({"reference_norm": True}, "is no sound basis"),
        ({"pooling": "max"}, "is no sound basis"),
        ({"method": None}, "is no sound basis"),
        ({"aligned_poles": ["good", "bad"]}, "is no sound basis"),
        ({"traits_digest": "x"}, "is no sound basis"),
        ({"tokens": ""}, "is no sound basis"),
        ({"plan": {"method": "tree", "max_tokens": 9, "rows": [[0]], "reason": ""}}, "is no sound basis"),
        ({"plan": {"method": "tree", "max_tokens": 9, "rows": [[0.0]], "reason": ""}}, "is no sound basis"),
        ({"plan": {"method": "tree", "max_tokens": True, "rows": [[0]], "reason": ""}}, "is no sound basis"),
        ({"model": ""}, "is no sound basis"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(stored: Path, changes: dict[str, Any], said: str) -> None:
    rewritten(stored, **changes)
    with pytest.raises(ArtifactError, match=said):
        TraitBasis.load(stored)


def test_a_basis_stored_without_transfer_accuracies_is_read(basis: TraitBasis, stored: Path) -> None:
    (score,) = basis.selection.scores
    old = {key: value for key, value in score._asdict().items() if key != "transfer_accuracy"}
    rewritten(stored, selection={"scores": [old], "strength": None, "probes_pass": True, "reason": "old"})

    found = TraitBasis.load(stored)

    assert found.selection.scores == (score._replace(transfer_accuracy=()),)
    assert found.digest == basis.digest


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "basis.safetensors")
    with pytest.raises(ArtifactError, match="not written by tiltmeter"):
        TraitBasis.load(tmp_path)


def test_a_missing_basis_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="fit_basis"):
        TraitBasis.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="fit_basis"):
        TraitBasis.load(tmp_path)


def test_a_basis_that_cannot_be_written_leaves_nothing_behind(basis: TraitBasis, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="choose another folder"):
        basis.save(blocked)
    (tmp_path / "basis.safetensors").mkdir()
    with pytest.raises(StorageError, match="choose another folder"):
        basis.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["basis.safetensors", "file"]


def test_a_basis_file_that_was_edited_is_refused_by_name(stored: Path) -> None:
    content = stored.read_bytes()
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"basis\.safetensors' was changed after it was written"):
        TraitBasis.load(stored)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"poles": np.zeros((1, 2))}, InputError),
        ({"directions": np.zeros(32)}, InputError),
        ({"aligned_poles": ("positive",)}, InputError),
        ({"directions": np.zeros((2, 32))}, NumericalError),
        ({"directions": np.full((2, 32), np.nan)}, NumericalError),
        ({"poles": np.full((2, 2), np.inf)}, NumericalError),
        ({"reference_norm": float("nan")}, NumericalError),
        ({"reference_norm": -1.0}, NumericalError),
    ],
)
def test_a_basis_with_impossible_numbers_cannot_be_made(
    basis: TraitBasis, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="fit the basis again"):
        replace(basis, **changes)


def test_the_cosines_are_between_the_directions(basis: TraitBasis) -> None:
    one, other = basis.directions

    assert basis.cosines == pytest.approx(np.array([[1.0, one @ other], [one @ other, 1.0]]), abs=1e-5)


# ---------------------------------------------------------------- a real model


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_on_a_real_model_our_prompts_and_the_papers_give_directions_of_one_sign(
    shared_dir: Path, real_model_dir: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    source = shared_dir / "data" / "em_trait_monitor" / "traits.yaml"
    if not source.is_file():
        pytest.skip("the reference implementation's trait prompts are absent")
    stored = yaml.safe_load(source.read_text())["traits"]
    alignment = load_traits("alignment")
    ours = replace(alignment, questions=alignment.questions[::5])
    theirs = replace(
        ours,
        traits=tuple(
            replace(
                trait,
                positive=tuple(stored[trait.name]["positive_system_prompts"]),
                negative=tuple(stored[trait.name]["negative_system_prompts"]),
            )
            for trait in ours.traits
        ),
    )
    lm = lms.load(real_model_dir, dtype="float32")

    one, other = (fit_basis(lm, traits=traits, layer=16) for traits in (ours, theirs))

    cosines = one.directions @ other.directions.T  # (ours, theirs)
    own = np.diag(cosines)
    assert own.mean() > cosines[~np.eye(7, dtype=bool)].mean() + 0.1
    assert (own > 0).sum() >= 6
