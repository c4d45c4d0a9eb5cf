"""The yardstick: the same answers, made the plain way.

One prompt at a time, through all blocks and the output head, with transformers' own `output_hidden_states` and
`generate`, and nothing of tiltmeter's reading, steering or generating. It is not meant to be fast. It is also the
reference for equal answers: what the benchmark times is compared with this first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tiltmeter.lm import LM

FloatArray = npt.NDArray[np.float32]


def activations(lm: LM, prompts: Sequence[Sequence[int]], layers: Sequence[int]) -> FloatArray:
    """The last token's activations after blocks `layers`, (layers, prompts, hidden) float32; all blocks are run."""
    model: Any = lm.model
    found = []
    with torch.no_grad():
        for ids in prompts:
            output = model(input_ids=torch.tensor([list(ids)], device=lm.device), output_hidden_states=True)
            # Entry 0 is the embedding, so that entry k + 1 is what leaves block k (of the last block: after the norm).
            found.append(
                torch.stack([output.hidden_states[layer + 1][0, -1].float() for layer in layers]).cpu().numpy()
            )
    return np.stack(found, axis=1)


def directions(up: FloatArray, down: FloatArray) -> FloatArray:
    """The unit mean difference of two poles, (n, hidden) and (m, hidden)."""
    lead = up.astype(np.float64).mean(axis=0) - down.astype(np.float64).mean(axis=0)
    return np.asarray(lead / np.linalg.norm(lead), dtype=np.float32)


def answer(
    lm: LM, conversation: Sequence[Any], *, tokens: int, layer: int | None = None, vector: FloatArray | None = None
) -> str:
    """The greedy answer to one conversation, with a vector added after a block where one is given."""
    model: Any = lm.model
    ids = torch.tensor([lm.encode(conversation)], device=lm.device)
    hook = None
    if layer is not None and vector is not None:
        added = torch.from_numpy(vector).to(lm.device, lm.dtype)

        def steer(module: Any, args: Any, output: Any) -> Any:
            return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

        hook = lm.blocks[layer].register_forward_hook(steer)
    try:
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(lm.stop_ids),
                pad_token_id=lm.pad_id,
            )
    finally:
        if hook is not None:
            hook.remove()
    text: str = lm.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()
