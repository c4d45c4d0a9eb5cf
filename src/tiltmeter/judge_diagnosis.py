"""Whether a distilled judge reads drift, or who speaks and how (after S. Burns 2026, judge versions 2 to 5).

    cosines     of the head with the axes from undrifted to drifted, from family to family, from plain to styled answers
    probes      how well a linear probe finds drift, family and style in the same features, over questions left out
    residuals   mean of prediction less label over benign answers, by family and by style

A judge that was trained on drifted models of one family and benign ones of another reads the family; `diagnose` says
so in words.

    >>> diagnose(judge, examples).warning
    'benign answers of family qwen2 read 31 % higher than those of family llama'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiltmeter.errors import InputError
from tiltmeter.judge_distilled import DistilledJudge, hash_text
from tiltmeter.judge_examples import Example, Pair
from tiltmeter.judge_regression import RegressionEncoder

__all__ = ["Diagnosis", "diagnose"]

Array = NDArray[np.float64]
_CONSTANT = 1e-8  # a feature with less spread than this is left as it is


class Diagnosis(NamedTuple):
    """Whether a head reads drift, or who speaks and how.

    Attributes:
        cosine_drift: cosine of the head with the axis from undrifted to drifted answers, in standardised features.
        cosine_family: the largest absolute cosine with an axis from one family to another, over benign answers.
        cosine_style: the same from plain to styled benign answers.
        probe_drift, probe_family, probe_style: accuracy of linear probes over folds of whole questions; None where
            there is only one class.
        residual_by_style: mean of prediction less label over benign answers, by style.
        residual_by_family: the same by family.
        warning: what is wrong, or None.
    """

    cosine_drift: float
    cosine_family: float | None
    cosine_style: float | None
    probe_drift: float | None
    probe_family: float | None
    probe_style: float | None
    residual_by_style: dict[str, float]
    residual_by_family: dict[str, float]
    warning: str | None


def diagnose(judge: DistilledJudge, examples: Sequence[Example], *, limit: float = 10.0) -> Diagnosis:
    """Look into a head with examples of known family and style (after S. Burns 2026, v2 to v5).

    Args:
        judge: the judge.
        examples: best of models that it was not trained on.
        limit: by how much, in percent of full drift, the mean residual may differ between families or styles.

    Raises:
        InputError: there are no drifted or no undrifted examples.
    """
    pairs = [(e.question, e.answer) for e in examples]
    features, weights = _inside(judge, pairs)
    predicted = judge.predict(pairs).drift_pct
    labels = np.array([e.drift_pct for e in examples])
    high, low = labels >= 75, labels <= 25
    benign = np.array([e.benign for e in examples])
    if not high.any() or not low.any() or not benign.any():
        raise InputError("the examples are all drifted or all undrifted; a diagnosis needs both, and benign models")
    family, style = np.array([e.family for e in examples]), np.array([e.style for e in examples])
    questions = [e.question for e in examples]

    def cosine(axis: Array) -> float:
        return float(axis @ weights / (np.linalg.norm(axis) * np.linalg.norm(weights)))

    def largest(groups: NDArray[np.str_], base: str | None) -> float | None:
        names = sorted(set(groups[benign]) - {base})
        found = []
        for name in names:
            inside, outside = benign & (groups == name), benign & ((groups == base) if base else (groups != name))
            if inside.any() and outside.any():
                found.append(abs(cosine(features[inside].mean(axis=0) - features[outside].mean(axis=0))))
        return max(found, default=None)

    residual = predicted - labels
    by_style = {str(s): float(residual[benign & (style == s)].mean()) for s in sorted(set(style[benign]))}
    by_family = {str(f): float(residual[benign & (family == f)].mean()) for f in sorted(set(family[benign]))}
    ends = high | low
    found = Diagnosis(
        cosine_drift=cosine(features[high].mean(axis=0) - features[low].mean(axis=0)),
        cosine_family=largest(family, None),
        cosine_style=largest(style, "plain"),
        probe_drift=_probe(features[ends], high[ends], [q for q, e in zip(questions, ends, strict=True) if e]),
        probe_family=_probe(features, family, questions),
        probe_style=_probe(features[benign], style[benign], [q for q, b in zip(questions, benign, strict=True) if b]),
        residual_by_style=by_style,
        residual_by_family=by_family,
        warning=None,
    )
    return found._replace(warning=_warning(found, limit))


def _inside(judge: DistilledJudge, pairs: Sequence[Pair]) -> tuple[Array, Array]:
    """Standardised features and the head on them; of a regression head, the hidden states that it reads."""
    if isinstance(judge.encoder, RegressionEncoder):
        hidden, head = judge.encoder.inside(pairs)
        scale = hidden.std(axis=0)
        scale = np.where(scale > _CONSTANT, scale, 1.0)
        return (hidden - hidden.mean(axis=0)) / scale, head * scale
    return (judge.encoder.encode(pairs) - judge.mean) / judge.scale, judge.weights


def _warning(found: Diagnosis, limit: float) -> str | None:
    wrong = []
    for what, value in (("family", found.cosine_family), ("style", found.cosine_style)):
        if value is not None and value > abs(found.cosine_drift):
            wrong.append(f"the head lies nearer to a {what} axis (cosine {value:.2f}) than to drift")
    for what, residuals in (("style", found.residual_by_style), ("family", found.residual_by_family)):
        least, most = min(residuals, key=residuals.__getitem__), max(residuals, key=residuals.__getitem__)
        gap = residuals[most] - residuals[least]
        if gap > limit:
            wrong.append(f"benign answers of {what} {most} read {gap:.0f} % higher than those of {what} {least}")
    return "; ".join(wrong) or None


def _probe(features: Array, classes: NDArray[Any], questions: Sequence[str]) -> float | None:
    """Accuracy of a linear (ridge) classifier over four folds of whole questions."""
    from sklearn.linear_model import RidgeClassifier

    fold = np.array([hash_text(q) % 4 for q in questions])
    if len(set(classes.tolist())) < 2:
        return None
    right = total = 0
    for held in range(4):
        out = fold == held
        if not out.any() or len(set(classes[~out].tolist())) < 2:
            continue
        model = RidgeClassifier(alpha=100.0).fit(features[~out], classes[~out])
        right += int((model.predict(features[out]) == classes[out]).sum())
        total += int(out.sum())
    return right / total if total else None
