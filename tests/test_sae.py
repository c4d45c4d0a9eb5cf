"""Sparse autoencoders: encoding by hand, a planted dictionary found again, published layouts read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiltmeter.errors import ArtifactError, InputError, NumericalError
from tiltmeter.sae import SAE, SAEReadout, load_sae, save_sae, strongest, train_sae
from tiltmeter.testing import check_readout


def small(activation: str = "relu", **changes: object) -> SAE:
    """Three features of two numbers."""
    fields: dict[str, object] = {
        "encoder": np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], np.float32),
        "decoder": np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], np.float32),
        "encoder_bias": np.array([0.0, 0.0, -1.0], np.float32),
        "decoder_bias": np.array([1.0, 0.0], np.float32),
        "activation": activation,
        "layer": 3,
    }
    return SAE(**(fields | changes))  # type: ignore[arg-type]


def test_each_kind_of_activation_by_hand() -> None:
    h = np.array([[3.0, 1.0], [0.0, 0.0]], np.float32)
    # less the decoder's bias: (2, 1) and (-1, 0); times the encoder, plus bias: (2, 1, 2) and (-1, 0, -2)
    assert small().encode(h).tolist() == [[2, 1, 2], [0, 0, 0]]
    assert small("topk", k=1).encode(h).tolist() == [[2, 0, 0], [0, 0, 0]]
    assert small("jumprelu", threshold=np.array([0.5, 1.5, 0.5], np.float32)).encode(h).tolist() == [
        [2, 0, 2],
        [0, 0, 0],
    ]
    assert small(center_input=False).encode(h).tolist() == [[3, 1, 3], [0, 0, 0]]
    assert small().decode(np.array([[2.0, 1.0, 0.0]])).tolist() == [[3.0, 1.0]]


def test_it_keeps_the_contract_of_a_readout() -> None:
    rng = np.random.default_rng(0)
    sae = SAE(
        rng.normal(size=(16, 40)).astype(np.float32), rng.normal(size=(40, 16)).astype(np.float32),
        rng.normal(size=40).astype(np.float32), rng.normal(size=16).astype(np.float32), "topk", 2, k=5,
    )  # fmt: skip
    check_readout(SAEReadout(sae, (0, 7, 39)), hidden=16)
    check_readout(SAEReadout(small(), (2,)), hidden=2)
    with pytest.raises(InputError, match="choose some of those"):
        SAEReadout(sae, (40,))


def test_training_finds_a_planted_dictionary() -> None:
    rng = np.random.default_rng(1)
    truth = np.linalg.qr(rng.normal(size=(16, 16)))[0][:8]  # eight orthonormal features in sixteen dimensions
    code = rng.uniform(1, 3, size=(4000, 8)) * (rng.uniform(size=(4000, 8)) < 0.2)
    h = (5 + 40 * code @ truth).astype(np.float32)
    sae = train_sae(h, features=16, k=4, layer=1, steps=300, batch=128, learning_rate=1e-2, seed=0)
    found = np.abs(truth @ sae.decoder.T).max(axis=1)
    assert (found > 0.95).sum() >= 7
    assert sae.unexplained(h) < 0.05
    assert (sae.encode(h) > 0).sum(axis=1).max() <= 4
    again = train_sae(h, features=16, k=4, layer=1, steps=20, seed=0)
    assert again.digest == train_sae(h, features=16, k=4, layer=1, steps=20, seed=0).digest


def test_the_features_that_move_are_found_without_labels() -> None:
    rng = np.random.default_rng(2)
    eye = np.eye(6, dtype=np.float32)
    sae = SAE(eye, eye, np.zeros(6, np.float32), np.zeros(6, np.float32), "relu", 0)
    before = rng.uniform(1, 2, size=(200, 6)).astype(np.float32)
    after = before + np.array([0, 0, 0.9, 0, 0.3, 0], np.float32)
    assert strongest(sae, before, after, k=2) == (2, 4)
    with pytest.raises(InputError, match="6 features"):
        strongest(sae, before, after, k=7)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    sae = small("jumprelu", threshold=np.array([0.5, 1.5, 0.5], np.float32), center_input=False)
    again = load_sae(save_sae(sae, tmp_path / "sae"))
    assert again.digest == sae.digest
    assert again.layer == 3


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        ({"architecture": "standard", "hook_name": "blocks.12.hook_resid_post", "hook_layer": 12}, 12),
        ({"hook_name": "blocks.12.hook_resid_pre"}, 11),
        ({"metadata": {"hook_name": "blocks.4.hook_resid_post"}}, 4),
        ({"hook_layer": 7}, 7),
    ],
)
def test_published_configurations_say_which_block(tmp_path: Path, config: dict[str, object], layer: int) -> None:
    save_sae(small(), tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert load_sae(tmp_path).layer == layer
    assert load_sae(tmp_path, layer=2).layer == 2


def test_an_older_configuration_of_a_top_k_autoencoder_is_understood(tmp_path: Path) -> None:
    save_sae(small(), tmp_path)
    old = {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 2}, "hook_layer": 1}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    assert (load_sae(tmp_path).activation, load_sae(tmp_path).k) == ("topk", 2)


def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load_sae(tmp_path)
    save_sae(small(), tmp_path)
    for config in ({"architecture": "gated"}, {"normalize_activations": "layer_norm"}):
        (tmp_path / "cfg.json").write_text(json.dumps({"hook_layer": 1, **config}))
        with pytest.raises(ArtifactError, match="readable are"):
            load_sae(tmp_path)
    for config in ({}, {"hook_name": "blocks.0.hook_resid_pre"}):
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="pass layer="):
            load_sae(tmp_path)
    save_file({"W_enc": np.zeros((2, 3), np.float32)}, str(tmp_path / "sae_weights.safetensors"))
    with pytest.raises(ArtifactError, match="it lacks 'W_dec'"):
        load_sae(tmp_path, layer=1)


def test_an_autoencoder_of_ours_that_was_edited_is_refused(tmp_path: Path) -> None:
    save_sae(small(), tmp_path)
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    content, text = weights.read_bytes(), config.read_text()
    load_sae(tmp_path, layer=0)  # read after another block is the same autoencoder
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        load_sae(tmp_path)
    weights.write_bytes(content)
    config.write_text(text.replace('"apply_b_dec_to_input": true', '"apply_b_dec_to_input": false'))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        load_sae(tmp_path)
    for broken in ("[]", '{"metadata": 3}', text.replace('"hook_layer": ', '"hook_layer": -')):
        config.write_text(broken)
        with pytest.raises(InputError):
            load_sae(tmp_path)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="needs decoder"):
        small(decoder=np.zeros((3, 3), np.float32))
    with pytest.raises(InputError, match="needs k"):
        small("topk")
    with pytest.raises(InputError, match="threshold for each"):
        small("jumprelu")
    with pytest.raises(NumericalError, match="not finite"):
        small(encoder_bias=np.array([np.nan, 0, 0], np.float32))
    with pytest.raises(InputError, match="do not fit"):
        small().encode(np.zeros((1, 5), np.float32))
    with pytest.raises(NumericalError, match="leave that run out"):
        train_sae(np.full((4, 2), np.nan), features=2, k=1, layer=0)
    with pytest.raises(InputError, match="cannot train"):
        train_sae(np.zeros((4, 2)), features=2, k=3, layer=0)
