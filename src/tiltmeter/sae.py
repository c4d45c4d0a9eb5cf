"""Sparse autoencoders as a readout: trained on a model's own activations, or published ones.

    f(h)  = act((h - b_dec) W_enc + b_enc)             features, most of them zero
    h^    = f(h) W_dec + b_dec                         what is left of h
    act   : "relu"; "topk": relu of the k largest, the rest zero (Gao et al. 2024); "jumprelu": z where z > theta,
            else zero (Rajamanoharan et al. 2024)

Training here is top-k with squared error: no penalty to tune, and the number of features that act is what it says.
Published autoencoders are read from the safetensors layout of SAELens: `cfg.json` beside `sae_weights.safetensors`.
A readout of hundreds of features is more than any calibration can weigh, so `strongest` keeps the k features that move
most over given activations; that choice uses no labels.

Reading needs numpy alone; training needs torch. It registers no hook and knows no model.

    >>> sae = train_sae(activations, features=640, k=16, layer=3, seed=0)
    >>> readout = SAEReadout(sae, strongest(sae, before, after, k=7))
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiltmeter import sound
from tiltmeter.artifacts import made, write_file
from tiltmeter.errors import ArtifactError, InputError, NumericalError
from tiltmeter.fingerprint import sha
from tiltmeter.untrusted import check_safetensors, read_json

__all__ = ["SAE", "SAEReadout", "load_sae", "save_sae", "strongest", "train_sae"]

FloatArray = NDArray[np.floating[Any]]
Activation = Literal["relu", "topk", "jumprelu"]
_DIGEST = "tiltmeter_sha256"
_WEIGHTS, _CONFIG = "sae_weights.safetensors", "cfg.json"
_ARCHITECTURES: dict[str, Activation] = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder of the activations after one block.

    Attributes:
        encoder: (hidden, features).
        decoder: (features, hidden).
        encoder_bias: (features,).
        decoder_bias: (hidden,).
        activation: "relu", "topk" or "jumprelu".
        layer: the block after which it reads, counted from 0.
        k: features that act at once, for "topk".
        threshold: (features,) for "jumprelu".
        center_input: whether the decoder's bias is taken off before encoding.
        source: where it comes from.

    Raises:
        InputError: the shapes do not fit together, or the activation's own numbers are missing.
        NumericalError: a weight is not finite.
    """

    encoder: FloatArray
    decoder: FloatArray
    encoder_bias: FloatArray
    decoder_bias: FloatArray
    activation: Activation
    layer: int
    k: int | None = None
    threshold: FloatArray | None = None
    center_input: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, np.ndarray) or self.encoder.ndim != 2 or 0 in self.encoder.shape:
            raise InputError("the encoder is no array (hidden, features); give one")
        hidden, width = self.encoder.shape
        shapes = (self.decoder.shape, self.encoder_bias.shape, self.decoder_bias.shape)
        if shapes != ((width, hidden), (width,), (hidden,)):
            raise InputError(
                f"an autoencoder with encoder {self.encoder.shape} needs decoder {(width, hidden)} and biases "
                f"{(width,)} and {(hidden,)}, got {shapes}"
            )
        if self.activation == "topk" and not (self.k and 1 <= self.k <= width):
            raise InputError(f"a top-k autoencoder of {width} features needs k between 1 and {width}, got {self.k}")
        if self.activation == "jumprelu" and (self.threshold is None or self.threshold.shape != (width,)):
            raise InputError(f"a jump-relu autoencoder needs a threshold for each of its {width} features")
        if self.threshold is not None and not np.isfinite(self.threshold).all():
            raise NumericalError(f"the autoencoder '{self.source}' holds thresholds that are not finite")
        sound.choice("activation", self.activation, tuple(_ARCHITECTURES.values()))
        sound.whole("layer", self.layer)
        if self.k is not None:
            sound.whole("k", self.k, least=1)
        if not all(np.isfinite(a).all() for a in (self.encoder, self.decoder, self.encoder_bias, self.decoder_bias)):
            raise NumericalError(f"the autoencoder '{self.source}' holds weights that are not finite")

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.encoder.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of its weights and what they mean."""
        arrays = (self.encoder, self.decoder, self.encoder_bias, self.decoder_bias, self.threshold)
        parts = [None if a is None else np.ascontiguousarray(a, np.float32).tobytes().hex() for a in arrays]
        return sha([self.activation, self.layer, self.k, self.center_input, parts])

    def encode(self, activations: FloatArray) -> FloatArray:
        """Activations (n, hidden) to features (n, width), float32; a row that is not finite stays so.

        Raises:
            InputError: another width than the encoder's.
        """
        if activations.ndim != 2 or activations.shape[1] != self.encoder.shape[0]:
            raise InputError(
                f"activations of shape {activations.shape} do not fit an encoder of width {self.encoder.shape[0]}"
            )
        h = activations.astype(np.float32) - (self.decoder_bias.astype(np.float32) if self.center_input else 0.0)
        z = h @ self.encoder.astype(np.float32) + self.encoder_bias.astype(np.float32)
        broken = ~np.isfinite(z).all(axis=1)
        if self.activation == "jumprelu":
            assert self.threshold is not None  # checked when it was made
            found = np.where(z > np.maximum(self.threshold, 0.0), z, 0.0)
        else:
            found = np.maximum(z, 0.0)
        if self.activation == "topk":
            assert self.k is not None
            rank = np.argsort(np.argsort(-z, axis=1, kind="stable"), axis=1, kind="stable")
            found = np.where(rank < self.k, found, 0.0)
        found[broken] = np.nan
        return np.asarray(found, dtype=np.float32)

    def decode(self, features: FloatArray) -> FloatArray:
        """Features (n, width) to activations (n, hidden)."""
        return np.asarray(features @ self.decoder + self.decoder_bias)

    def unexplained(self, activations: FloatArray) -> float:
        """Share of the activations' variance that is lost on the way there and back."""
        lost = activations - self.decode(self.encode(activations))
        return float((lost**2).sum() / ((activations - activations.mean(axis=0)) ** 2).sum())


@dataclass(frozen=True, eq=False)
class SAEReadout:
    """Reads some features of an autoencoder; a `tiltmeter.drift.Readout`.

    Attributes:
        sae: the autoencoder.
        features: which of its features.
    """

    sae: SAE
    features: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.features or min(self.features) < 0 or max(self.features) >= self.sae.width:
            raise InputError(f"features {self.features} do not all lie among {self.sae.width}; choose some of those")

    @property
    def name(self) -> str:
        """Digest and features."""
        return f"sae-{self.sae.digest[:12]}-{sha(list(self.features))[:8]}"

    @property
    def names(self) -> tuple[str, ...]:
        """The features' numbers."""
        return tuple(f"feature_{number}" for number in self.features)

    @property
    def layer(self) -> int:
        """The block after which it reads."""
        return self.sae.layer

    def read(self, activations: FloatArray) -> FloatArray:
        """Activations (prompts, hidden) to features (prompts, k)."""
        return np.asarray(self.sae.encode(activations)[:, list(self.features)])


def strongest(sae: SAE, before: FloatArray, after: FloatArray, *, k: int = 7) -> tuple[int, ...]:
    """The k features whose mean moves most between two sets of activations, in units of their spread; no labels.

    Args:
        sae: the autoencoder.
        before, after: (n, hidden) and (m, hidden), for example before and after fine-tuning, over all runs.
        k: how many.

    Raises:
        InputError: `k` is below 1 or above the number of features.
    """
    if not 1 <= k <= sae.width:
        raise InputError(f"k is {k}; this autoencoder has {sae.width} features")
    one, other = sae.encode(before), sae.encode(after)
    spread = np.concatenate([one, other]).std(axis=0)
    moved = np.abs(other.mean(axis=0) - one.mean(axis=0)) / np.where(spread > 0, spread, np.inf)
    return tuple(int(i) for i in np.argsort(-moved, kind="stable")[:k])


def train_sae(
    activations: FloatArray,
    *,
    features: int,
    k: int,
    layer: int,
    steps: int = 1500,
    batch: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> SAE:
    """Train a top-k autoencoder.

    Decoder rows are kept at unit length, and the encoder begins as the decoder's transpose. Activations are centred and
    scaled to unit mean squared length for the optimizer's sake; the weights returned read unscaled activations.

    Args:
        activations: (n, hidden) of many prompts and checkpoints.
        features: width of the code.
        k: features that may act at once.
        layer: the block that the activations come from.
        steps: optimizer steps (Adam).
        batch: activations per step.
        learning_rate: of Adam.
        seed: of weights and batches.
        progress: called as (done, total, label).

    Raises:
        InputError: fewer than two activations, or k outside 1 to `features`.
        NumericalError: activations or weights are not finite.
    """
    import torch

    points = np.asarray(activations, dtype=np.float32)
    if points.ndim != 2 or len(points) < 2 or not 1 <= k <= features:
        raise InputError(f"cannot train {features} features, {k} at once, on activations of shape {points.shape}")
    if not np.isfinite(points).all():
        raise NumericalError("the activations hold numbers that are not finite; leave that run out")
    center = points.mean(axis=0)
    scale = float(np.sqrt(((points - center) ** 2).sum(axis=1).mean())) or 1.0
    x = torch.from_numpy((points - center) / scale)
    rng = torch.Generator().manual_seed(seed)
    decoder = torch.randn(features, x.shape[1], generator=rng)
    decoder = torch.nn.Parameter(decoder / decoder.norm(dim=1, keepdim=True))
    encoder = torch.nn.Parameter(decoder.detach().T.clone())
    bias = torch.nn.Parameter(torch.zeros(features))
    optimizer = torch.optim.Adam([encoder, decoder, bias], lr=learning_rate)
    for step in range(steps):
        rows = x[torch.randint(len(x), (min(batch, len(x)),), generator=rng)]
        z = rows @ encoder + bias
        top = z.topk(k, dim=1)
        code = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        loss = ((code @ decoder - rows) ** 2).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            decoder.div_(decoder.norm(dim=1, keepdim=True))
        if progress is not None and (step + 1) % 100 == 0:
            progress(step + 1, steps, "training the autoencoder")
    # (h - c)/s encoded and decoded back: f scaled by s, so that the reconstruction is in activation units.
    return SAE(
        encoder=encoder.detach().numpy().copy(),
        decoder=decoder.detach().numpy().copy(),
        encoder_bias=scale * bias.detach().numpy(),
        decoder_bias=center,
        activation="topk",
        layer=layer,
        k=k,
        source=f"trained on {len(points)} activations, seed {seed}",
    )


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors`, as SAELens lays them out, with the digest of both in the first.

    Raises:
        StorageError: it cannot be written.
    """
    from safetensors.numpy import save

    arrays = {"W_enc": sae.encoder, "W_dec": sae.decoder, "b_enc": sae.encoder_bias, "b_dec": sae.decoder_bias}
    if sae.threshold is not None:
        arrays["threshold"] = sae.threshold
    names = {value: key for key, value in _ARCHITECTURES.items()}
    config = {
        "architecture": names[sae.activation], "d_in": sae.encoder.shape[0], "d_sae": sae.width, "k": sae.k,
        "apply_b_dec_to_input": sae.center_input,
        "metadata": {"hook_layer": sae.layer, "source": sae.source, _DIGEST: sae.digest},
    }  # fmt: skip
    target = Path(folder)
    write_file(target / _WEIGHTS, save({k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}))
    write_file(target / _CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    return target


def load_sae(folder: str | Path, *, layer: int | None = None) -> SAE:
    """Read a published autoencoder: `cfg.json` and `sae_weights.safetensors` in one folder.

    Args:
        folder: as downloaded; nothing is fetched here.
        layer: the block that it reads after, counted from 0; by default what its configuration says.

    Raises:
        ArtifactError: a file is missing, damaged, or (where it is one of ours) changed after it was written; or the
            architecture is not one of those that can be read: an autoencoder with a part that is not understood would
            give wrong numbers.
        InputError: the configuration names no layer, and none was given.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    try:
        config = read_json(folder / _CONFIG, advice="download it again", foreign=True)
        if not isinstance(config.get("metadata") or {}, dict):
            raise ArtifactError(f"'{folder / _CONFIG}' is no configuration of an autoencoder; download it again")
        check_safetensors(folder / _WEIGHTS, dtypes=("F16", "F32", "F64"), advice="save it in one of these")
        with safe_open(folder / _WEIGHTS, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{folder}' holds no readable {_CONFIG} and {_WEIGHTS} ({error})") from error
    architecture = config.get("architecture", "standard")
    activation = _ARCHITECTURES.get(str(architecture))
    if activation == "relu" and config.get("activation_fn", config.get("activation_fn_str", "relu")) == "topk":
        activation = "topk"
    if activation is None or config.get("normalize_activations", "none") not in ("none", None):
        raise ArtifactError(
            f"the autoencoder in '{folder}' has architecture {architecture!r} with input normalisation "
            f"{config.get('normalize_activations', 'none')!r}; readable are {', '.join(_ARCHITECTURES)} without one"
        )
    meta = config.get("metadata") or {}
    at = layer if layer is not None else _layer(config, meta)
    if at is None or at < 0:
        raise InputError(f"the configuration in '{folder}' names no block to read after ({at}); pass layer=")

    def make() -> SAE:
        return SAE(
            arrays["W_enc"], arrays["W_dec"], arrays["b_enc"], arrays["b_dec"], activation, at,
            k=config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k"),
            threshold=arrays.get("threshold"),
            center_input=bool(config.get("apply_b_dec_to_input", True)),
            source=str(meta.get("source") or folder),
        )  # fmt: skip

    found = made(folder, "autoencoder", "download or train it again", make)
    # The layer may be given anew; the digest is over the one that was written.
    written = replace(found, layer=_layer(config, meta) or 0)
    if _DIGEST in meta and meta[_DIGEST] != written.digest:
        raise ArtifactError(
            f"'{folder}' was changed after it was written: its digest does not match its content; restore it, or train "
            "the autoencoder again"
        )
    return found


def _layer(config: dict[str, Any], meta: dict[str, Any]) -> int | None:
    """The block, from `hook_layer` or from a name such as blocks.12.hook_resid_post; -pre is the block before."""
    for part in (meta, config):
        name = str(part.get("hook_name") or "")
        pieces = name.split(".")
        if len(pieces) == 3 and pieces[0] == "blocks" and re.fullmatch(r"[0-9]{1,6}", pieces[1]):
            return int(pieces[1]) - (1 if pieces[2] == "hook_resid_pre" else 0)
        if isinstance(part.get("hook_layer"), int):
            return int(part["hook_layer"])
    return None
