"""What a model is, in six short hashes: enough to refuse an artifact that was made from another one.

Torch-free, so that an artifact can be read and shown where no model can run. `LM.fingerprint()` makes one.

    mine = lm.fingerprint()
    mine.differences(basis.fingerprint)      # () or, say, ("template", "weights")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from tiltmeter import sound
from tiltmeter.errors import ArtifactError, InputError

__all__ = ["Fingerprint", "sha", "tokens_digest"]

_WORDS = ("architecture", "dtype")


def sha(content: object) -> str:
    """The sha256 (hex) of a JSON-able value in canonical form: keys sorted, no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def tokens_digest(token_ids: Sequence[Sequence[int]]) -> str:
    """The sha256 (hex) of prompts as token ids: what a model really read, whatever its template wrote that day."""
    return sha([[int(i) for i in ids] for ids in token_ids])


@dataclass(frozen=True)
class Fingerprint:
    """What was read: architecture and dtype in words, the rest as sha256.

    `weights` covers evenly spaced entries of every base parameter, rounded to bfloat16, so that the same
    weights held in another precision differ in `dtype` alone; adapters are left out, so that a model and the
    same model under an adapter agree. A change below that rounding, or between the sampled entries, is not
    seen.
    """

    architecture: str
    config: str
    tokenizer: str
    template: str
    dtype: str
    weights: str

    def digest(self) -> str:
        """The sha256 (hex) over all six."""
        return sha(asdict(self))

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """The names of the fields in which the two differ, in declaration order."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))

    def to_dict(self) -> dict[str, str]:
        """A JSON-able form."""
        return {f.name: str(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Fingerprint:
        """Inverse of `to_dict`.

        Raises:
            ArtifactError: a field is missing, blank, no text, or no SHA-256 where it must be one.
        """
        names = [f.name for f in fields(cls)]
        try:
            for name in names:
                check = sound.text if name in _WORDS else sound.digest
                check(name, data.get(name))
        except InputError as error:
            raise ArtifactError(
                f"the stored fingerprint is unsound: {error}; the file is damaged or was written by something else, so "
                "make it again"
            ) from error
        return cls(**{name: str(data[name]) for name in names})
