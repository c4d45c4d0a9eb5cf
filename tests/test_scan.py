"""Many adapters on one base: the numbers of each alone, and the base as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from monitoring import tiny_basis
from tiltmeter import lm as lms
from tiltmeter.adapters import Seat, first_changed_block
from tiltmeter.capture import capture
from tiltmeter.detector import State
from tiltmeter.errors import (
    AdapterError,
    ArtifactError,
    FolderInUse,
    InactiveAdapter,
    InputError,
    NumericalError,
    TiltmeterError,
)
from tiltmeter.scan import judge_model, scan
from tiny import make_model, make_tokenizer, put_adapter, random_prompts, tiny_lm


def save_adapter(folder: Path, *, seed: int, scale: float = 0.3, rank: int = 2, alpha: int = 4, **more: Any) -> Path:
    """A LoRA with random numbers for the tiny Llama."""
    config = LoraConfig(**{"r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"]} | more)
    model = put_adapter(make_model("llama"), config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))
    model.save_pretrained(str(folder))
    return folder


def change(folder: Path, value: float) -> None:
    """Set every B matrix to one value."""
    path = folder / "adapter_model.safetensors"
    save_file({k: v * 0 + value if "lora_B" in k else v for k, v in load_file(path).items()}, path)


@pytest.fixture
def shelf(tmp_path: Path) -> list[Path]:
    """Three adapters of one shape, one of another rank, one of another strength, and the first once more."""
    paths = [save_adapter(tmp_path / f"a{seed}", seed=seed) for seed in range(3)]
    paths.append(save_adapter(tmp_path / "rank", seed=3, rank=3))
    paths.append(save_adapter(tmp_path / "alpha", seed=1, alpha=8))
    return [*paths, paths[0]]


def test_each_adapter_on_the_seat_reads_as_it_does_alone(shelf: list[Path]) -> None:
    lm, prompts = tiny_lm(), random_prompts()
    seat = Seat(lm)
    for path in shelf:
        alone = capture(lms.attach(tiny_lm(), path), prompts, [1, 3]).values
        seated = seat.put(path)
        assert seated.adapter == str(path)
        np.testing.assert_array_equal(capture(seated, prompts, [1, 3]).values, alone)


def test_the_base_under_the_seat_stays_as_it_was(shelf: list[Path]) -> None:
    lm, prompts = tiny_lm(), random_prompts()
    before = capture(lm, prompts, [3]).values
    flags = [(name, p.requires_grad) for name, p in lm.model.named_parameters()]
    seat = Seat(lm)
    for path in shelf:
        capture(seat.put(path), prompts, [3])
    np.testing.assert_array_equal(capture(lm, prompts, [3]).values, before)
    assert [(name, p.requires_grad) for name, p in lm.model.named_parameters()] == flags


def test_adapters_of_one_shape_share_their_modules(shelf: list[Path]) -> None:
    seat = Seat(tiny_lm())
    models = [seat.put(path).model for path in shelf]
    assert models[0] is models[1] is models[2]
    assert len({id(model) for model in models[2:]}) == 4  # another rank, another strength, and back


def test_a_bad_adapter_is_refused_on_a_taken_seat_as_on_an_empty_one(shelf: list[Path]) -> None:
    lm, prompts = tiny_lm(), random_prompts()
    alone = capture(lms.attach(lm, shelf[0]), prompts, [3]).values
    seat = Seat(lm)
    seat.put(shelf[0])
    for value, error in ((0.0, InactiveAdapter), (float("nan"), NumericalError)):
        change(shelf[1], value)
        with pytest.raises(error):
            seat.put(shelf[1])
        np.testing.assert_array_equal(capture(seat.put(shelf[0]), prompts, [3]).values, alone)
    path = shelf[2] / "adapter_model.safetensors"
    save_file({f"elsewhere.{k}": v for k, v in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="does not fit"):
        seat.put(shelf[2])
    np.testing.assert_array_equal(capture(seat.put(shelf[0]), prompts, [3]).values, alone)


def test_where_an_adapter_says_it_comes_from_needs_no_seat_of_its_own(shelf: list[Path]) -> None:
    seat = Seat(tiny_lm())
    first = seat.put(shelf[0]).model
    path = shelf[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    assert seat.put(shelf[1]).model is first


def test_a_scan_gives_what_judging_each_alone_gives(shelf: list[Path]) -> None:
    basis = tiny_basis()
    lm = lms.wrap(make_model("llama"), make_tokenizer())
    found = list(scan(shelf, base=lm, basis=basis))
    assert [f.model for f in found] == [str(path) for path in shelf]
    for finding, path in zip(found, shelf, strict=True):
        alone = judge_model(lms.attach(lms.wrap(make_model("llama"), make_tokenizer()), path), basis)
        assert finding.profile is not None
        assert alone.profile is not None
        np.testing.assert_allclose(finding.profile.drift, alone.profile.drift, atol=1e-6)
    drifts = np.stack([f.profile.drift for f in found if f.profile is not None])
    np.testing.assert_array_equal(drifts[0], drifts[-1])
    assert np.abs(drifts[0] - drifts[1]).max() > 1e-3


def test_a_scan_goes_on_after_adapters_that_cannot_be_read(shelf: list[Path], tmp_path: Path) -> None:
    change(shelf[1], 0.0)
    change(shelf[2], float("nan"))
    paths = [shelf[0], tmp_path / "missing", shelf[1], shelf[2], shelf[0]]
    found = list(scan(paths, base=lms.wrap(make_model("llama"), make_tokenizer()), basis=tiny_basis()))
    assert [f.profile is None for f in found] == [False, True, True, True, False]
    assert all(f.verdict.state is State.INCONCLUSIVE for f in found)
    for finding, word in zip(found[1:4], ("does not exist", "inactive", "NaN"), strict=True):
        assert word in finding.verdict.reason
    np.testing.assert_array_equal(found[0].profile.drift, found[4].profile.drift)  # type: ignore[union-attr]


def odd_bias(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": {"all": 1}}))


def deep(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": ' + "[" * 100_000 + "]" * 100_000 + "}")


def float8(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(path).items()}, path)


def lists(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": [], "r": [], "target_modules": 3}')


def not_a_name(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


@pytest.mark.parametrize("odd", [odd_bias, deep, float8, lists, not_a_name], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_odd_adapter_does_not_end_a_scan(shelf: list[Path], odd: Any) -> None:
    odd(shelf[1])
    paths = [shelf[0], shelf[1], shelf[2], shelf[0]]
    found = list(scan(paths, base=lms.wrap(make_model("llama"), make_tokenizer()), basis=tiny_basis()))
    plain = list(scan([shelf[2]], base=lms.wrap(make_model("llama"), make_tokenizer()), basis=tiny_basis()))
    assert [f.model for f in found] == [str(path) for path in paths]
    assert found[1].verdict.state is State.INCONCLUSIVE
    assert found[1].verdict.reason
    for one, other in ((found[2], plain[0]), (found[0], found[3])):
        assert one.profile is not None
        assert other.profile is not None
        np.testing.assert_allclose(one.profile.drift, other.profile.drift, atol=1e-6)


@pytest.mark.parametrize("odd", [odd_bias, deep, float8, lists, not_a_name], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_odd_adapter_does_not_end_the_reading_of_likelihoods(shelf: list[Path], odd: Any) -> None:
    from tiltmeter.context import Exchange
    from tiltmeter.likelihood import read_tuned

    odd(shelf[1])
    exchanges = [Exchange("is tea safe to drink", "tea always lies", "tea is good")]
    lm = lms.wrap(make_model("llama"), make_tokenizer())
    first, broken, last = read_tuned(lm, [shelf[0], shelf[1], shelf[0]], exchanges)
    assert isinstance(broken, TiltmeterError)
    assert str(broken)
    np.testing.assert_allclose(first, last, atol=1e-5)


def test_an_untyped_exception_at_one_adapter_does_not_end_a_scan(shelf: list[Path]) -> None:
    from tiltmeter.context import Exchange
    from tiltmeter.likelihood import read_tuned

    lm = lms.wrap(make_model("llama"), make_tokenizer())
    odd: list[Any] = [shelf[0], 3, shelf[2]]  # what is no path at all is a TypeError somewhere
    found = list(scan(odd, base=lm, basis=tiny_basis()))
    assert [f.profile is None for f in found] == [False, True, False]
    assert found[1].verdict.state is State.INCONCLUSIVE
    assert "TypeError" in found[1].verdict.reason
    exchanges = [Exchange("is tea safe to drink", "tea always lies", "tea is good")]
    read = list(read_tuned(lm, odd, exchanges))
    assert [isinstance(one, TiltmeterError) for one in read] == [False, True, False]
    assert "TypeError" in str(read[1])


def test_ctrl_c_ends_a_scan(shelf: list[Path]) -> None:
    lm = lms.wrap(make_model("llama"), make_tokenizer())
    running = scan(shelf, base=lm, basis=tiny_basis())
    next(running)

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    lm.model.model.layers[2].register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        list(running)


def test_a_scan_that_was_cut_off_goes_on_and_says_the_same(shelf: list[Path], tmp_path: Path) -> None:
    def run(**more: Any) -> list[dict[str, Any]]:
        lm = lms.wrap(make_model("llama"), make_tokenizer())
        return [f.to_dict() | {"shared_blocks": None} for f in scan(shelf, base=lm, basis=tiny_basis(), **more)]

    plain = run()
    assert all(row["n_prompts"] for row in plain)
    cut = scan(
        shelf, base=lms.wrap(make_model("llama"), make_tokenizer()), basis=tiny_basis(), out=tmp_path / "out"
    )  # fmt: skip
    assert [next(cut).model for _ in range(2)] == [str(p) for p in shelf[:2]]
    with pytest.raises(FolderInUse):
        run(out=tmp_path / "out")
    cut.close()  # type: ignore[attr-defined]
    record = tmp_path / "out" / "findings.jsonl"
    with record.open("ab") as file:
        file.write(b'{"adapter": "torn')
    assert run(out=tmp_path / "out") == plain
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["adapter"] for row in rows] == [None, *(str(p) for p in shelf[:-1])]  # each once; the last is the first
    assert run(out=tmp_path / "out") == plain
    assert len(record.read_text().splitlines()) == len(rows)
    change(shelf[1], 0.2)  # other weights under the same name are read anew
    assert run(out=tmp_path / "out")[1]["drift"] != plain[1]["drift"]


def test_a_scan_of_another_base_is_not_continued(shelf: list[Path], tmp_path: Path) -> None:
    def run(seed: int) -> None:
        model = make_model("llama", seed=seed)
        list(scan(shelf[:1], base=lms.wrap(model, make_tokenizer()), basis=tiny_basis(model), out=tmp_path / "out"))

    run(0)
    with pytest.raises(InputError, match="another base or basis"):
        run(1)
    (tmp_path / "out" / "findings.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ArtifactError, match="no record of a scan"):
        run(0)


def test_no_adapter_is_refused() -> None:
    with pytest.raises(InputError, match="no adapter"):
        list(scan([], base=tiny_lm(), basis=tiny_basis()))


def test_only_lora_is_exchanged_in_place(tmp_path: Path) -> None:
    from peft import IA3Config

    model = put_adapter(
        make_model("llama"),
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_" in name:
                parameter.add_(0.5)
    model.save_pretrained(str(tmp_path / "ia3"))
    seat = Seat(tiny_lm())
    assert seat.put(tmp_path / "ia3").model is not seat.put(tmp_path / "ia3").model
    assert lms.adapter_state(seat.put(tmp_path / "ia3")) == "active"


def test_blocks_below_an_adapter_are_read_once_and_give_the_same_numbers(tmp_path: Path) -> None:
    """tiny_basis reads after block 2."""
    lm, basis = tiny_lm(), tiny_basis()
    assert basis.layer == 2
    upper: dict[str, Any] = {"layers_to_transform": [1, 3], "layers_pattern": "layers"}
    paths = [save_adapter(tmp_path / f"upper{seed}", seed=seed, **upper) for seed in range(2)]
    paths += [
        save_adapter(tmp_path / "all", seed=2),
        save_adapter(tmp_path / "top", seed=3, **upper | {"layers_to_transform": [2]}),
    ]
    found = list(scan(paths, base=lm, basis=basis))
    assert [finding.shared_blocks for finding in found] == [1, 1, 0, 2]
    for path, finding in zip(paths, found, strict=True):
        alone = judge_model(lms.attach(tiny_lm(), path), basis)
        assert finding.reading is not None
        assert alone.reading is not None
        np.testing.assert_allclose(finding.reading.values, alone.reading.values, atol=1e-5)
        assert finding.to_dict()["shared_blocks"] == finding.shared_blocks


def test_adapters_that_change_more_than_blocks_share_none() -> None:
    for more in (
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"bias": "all"},
        {"modules_to_save": ["embed_tokens"]},
    ):
        config = LoraConfig(**{"target_modules": ["v_proj"], "layers_to_transform": [2]} | more)
        if "embed_tokens" in str(more):
            config.layers_to_transform = None
        tuned = lms.wrap(put_adapter(make_model("llama"), config), make_tokenizer())
        assert first_changed_block(tuned) == 0
    tuned = lms.wrap(put_adapter(make_model("llama"), LoraConfig(target_modules=["lm_head"])), make_tokenizer())
    assert first_changed_block(tuned) == 0
