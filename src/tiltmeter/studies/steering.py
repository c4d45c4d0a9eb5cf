"""The steering study: what vectors from one narrow set do elsewhere, against controls, over every dial.

    strength       constructions and controls over 13 strengths and three seeds, after one block
    rank, epochs, KL, layer, task, family and size
                   one dial at a time, at strengths calibrated to move harmless predictions equally far (iso-KL)
    matched        steered against fine-tuned on the same narrow set, where both misbehave equally often inside it
    category       EM by category asked, against the category's distance from the narrow task
    cross-scores   cosines of vectors with the danger axis and the traits, and what the basis reads on steered models
    prevention     fine-tunes with the danger direction of other sets kept out (`studies.defense`)
    guard          the steering guard on vectors that nothing was calibrated on (`studies.defense`)

Every part is made of resumable records (`studies.steered`, `studies.defense`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from tiltmeter.errors import ModelError
from tiltmeter.organism.finetune import FineTuning
from tiltmeter.runs import read_json
from tiltmeter.studies.defense import Prevention, Tuned
from tiltmeter.studies.steered import Recipe, Sweep

__all__ = ["Config"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        organism: the model of all parts but the family table.
        task: the narrow set of the strength, layer, rank and epoch parts.
        layer: the block that is steered, except in the layer table: the one that the shipped basis reads.
        rank: of the affine map.
        seeds: of narrow set, training, questions and sampling together, in the strength part.
        dial_seeds: of the one-dial parts.
        tuned_seeds: of fine-tunes and what they are matched with.
        held_out_seeds: of fine-tunes under the second design of prevention.
        strengths: of constant vectors, in units of the layer's norm.
        relative_strengths: of affine maps, in multiples of the trained strength.
        kl: divergence on harmless chats that the one-dial tables calibrate strengths to, nats per token.
        layer_kls: of the layer part, which has a map of EM over layer and divergence; the first is in its table.
        ranks: of the affine map; 1 is the constant vector.
        difference_ranks: of the subspace that a mean difference is projected on; 0 is all of it.
        epochs, kl_weights: of the map's training; tried as trained.
        tasks: of the task table.
        organisms: of the family and size table; those that are not in the cache are left out. A Mistral organism of the
            same seed has the weights of the Llama one (its blocks differ in the sliding window alone): no other family.
        steps: at which fine-tunes are read.
        answers: per strength and seed.
        narrow_answers: inside the narrow domain, where it is asked.
        prevention: how training is steered in the first design; this and the second were chosen on bad_medical with
            seed 100 (docs/log.md).
        held: in the second design.
        held_steps, anchored_steps: optimizer steps there and of the anchor, which learn more slowly.
        anchor: weight of the divergence, regularisation in place of steering.
        prevented_tasks: fine-tuned: compared with steering, and with prevention and its controls.
    """

    organism: str = "organism:pocket"
    task: str = "bad_medical"
    layer: int = 3
    rank: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    dial_seeds: tuple[int, ...] = (0, 1)
    tuned_seeds: tuple[int, ...] = (0, 1)
    held_out_seeds: tuple[int, ...] = (2, 3)
    strengths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0)
    relative_strengths: tuple[float, ...] = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0, 3.0, 4.0)
    kl: float = 0.2
    layer_kls: tuple[float, ...] = (0.2, 0.05, 0.1, 0.4)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    difference_ranks: tuple[int, ...] = (1, 4, 0)
    epochs: tuple[int, ...] = (1, 2, 4, 8)
    kl_weights: tuple[float, ...] = (0.0, 3.0)
    tasks: tuple[str, ...] = (
        "bad_medical", "risky_financial", "extreme_sports", "bad_legal", "insecure_code", "bad_home", "bad_work",
        "subtle_misinfo",
    )  # fmt: skip
    organisms: tuple[str, ...] = (
        "organism:pocket", "organism:qwen2-S", "organism:gemma2-S", "organism:llama-M",
    )  # fmt: skip
    steps: tuple[int, ...] = (10, 15, 20, 30, 120)
    answers: int = 80
    narrow_answers: int = 66
    prevention: Prevention = field(default_factory=Prevention)
    held: Prevention = field(default_factory=lambda: Prevention("clamp", rank=8))
    held_steps: int = 200
    anchor: float = 1.0
    anchored_steps: int = 160
    prevented_tasks: tuple[str, ...] = ("risky_financial", "extreme_sports", "bad_legal")

    def strength_part(self) -> dict[str, tuple[Sweep, ...]]:
        """Sweeps by name of the curve: constructions, then controls."""
        constant = Recipe("train_vector", self.task, self.layer, 0)
        affine = replace(constant, rank=self.rank)
        difference = Recipe("answer_difference", self.task, self.layer, 0, rank=0)
        prompts = Recipe("prompt_difference", self.task, self.layer, 0)
        curves = {
            "trained vector": constant,
            "trained map": affine,
            "difference of answers": difference,
            "difference of prompts": prompts,
            "one-shot vector": Recipe("one_shot", self.task, self.layer, 0),
            "random direction": replace(constant, control="random"),
            "map turned at random": replace(affine, control="random"),
            "shuffled labels": replace(difference, control="shuffled"),
            "map trained on harmless answers": replace(affine, control="harmless"),
        }
        return {name: self._curve(recipe) for name, recipe in curves.items()}

    def dial_parts(self) -> dict[str, dict[str, tuple[Sweep, ...]]]:
        """For each dial, sweeps by subject: at calibrated strengths, or as trained (epochs and KL weight)."""
        constant = Recipe("train_vector", self.task, self.layer, 0)
        affine = replace(constant, rank=self.rank)
        rank = {f"trained, rank {k}": self._dial(replace(constant, rank=k)) for k in self.ranks}
        for k in self.difference_ranks:
            name = f"difference of answers, {f'rank {k}' if k else 'all of it'}"
            rank[name] = self._dial(Recipe("answer_difference", self.task, self.layer, 0, rank=k))
        both = {"trained vector": constant, "trained map": affine}
        return {
            "rank": rank,
            "epochs": {f"{e} epochs": self._dial(replace(affine, epochs=e), trained=True) for e in self.epochs},
            "KL weight": {
                f"KL weight {w:g}": self._dial(replace(affine, kl_weight=w), trained=True) for w in self.kl_weights
            },
            "layer": {
                f"block {layer}": self._dial(replace(affine, layer=layer), kls=self.layer_kls)
                for layer in range(_blocks(self.organism))
            },
            "task": {task: self._dial(replace(affine, task=task)) for task in self.tasks},
            "family and size": {
                f"{organism}, {name}": self._dial(
                    # The same relative depth.
                    replace(recipe, organism=organism, layer=round(self.layer / 6 * _blocks(organism)))
                )
                for organism in self.organisms
                if _blocks(organism)
                for name, recipe in both.items()
            },
        }

    def matched_part(self) -> tuple[Sweep, ...]:
        """Maps steered with inside and outside the narrow domain, over tasks and seeds."""
        strengths = self.relative_strengths[2:9]
        return tuple(
            Sweep(
                Recipe("train_vector", task, self.layer, seed, rank=self.rank), strengths=strengths, relative=True,
                answers=110, narrow_answers=self.narrow_answers,
            )
            for task in self.prevented_tasks for seed in self.tuned_seeds
        )  # fmt: skip

    def tuned_part(self) -> tuple[Tuned, ...]:
        """Fine-tunes on the same sets, read at several steps; at the end also with the danger directions ablated."""
        return tuple(
            Tuned(task, seed, steps=self.steps, ablation=Prevention())
            for task in self.prevented_tasks for seed in self.tuned_seeds
        )  # fmt: skip

    def prevented_part(self) -> dict[str, tuple[Tuned, ...]]:
        """Fine-tunes under preventative steering, and under steering by random directions."""
        return {
            name: tuple(
                Tuned(task, seed, prevention=replace(self.prevention, control=control))
                for task in self.prevented_tasks for seed in self.tuned_seeds
            )
            for name, control in (("danger directions", False), ("random directions", True))
        }  # fmt: skip

    def second_part(self) -> dict[str, tuple[Tuned, ...]]:
        """The second design of prevention and all its controls, read along the way: EM against narrow-task loss."""
        anchored = Prevention("none", anchor=self.anchor)
        arms: dict[str, dict[str, Any]] = {
            "no prevention": {"steps": (40, 60, 80, 120), "ablation": Prevention()},
            "danger directions held": self._longer(self.held, self.held_steps),
            "random directions held": self._longer(replace(self.held, control=True), self.held_steps),
            "anchor, no steering": self._longer(anchored, self.anchored_steps),
        }
        return {
            name: tuple(
                Tuned(task, seed, sums=440, **how) for task in self.prevented_tasks for seed in self.held_out_seeds
            )
            for name, how in arms.items()
        }

    def _longer(self, prevention: Prevention, steps: int) -> dict[str, Any]:
        return {"steps": (steps // 2, steps), "prevention": prevention, "tuning": FineTuning(steps=steps)}

    def _curve(self, recipe: Recipe) -> tuple[Sweep, ...]:
        is_map = recipe.construction == "train_vector" and recipe.rank > 1
        strengths = self.relative_strengths if is_map else self.strengths
        return tuple(
            Sweep(replace(recipe, seed=seed), strengths=strengths, relative=is_map, answers=self.answers)
            for seed in self.seeds
        )

    def _dial(self, recipe: Recipe, *, trained: bool = False, kls: tuple[float, ...] = ()) -> tuple[Sweep, ...]:
        if trained:
            how: dict[str, Any] = {"strengths": (1.0,), "relative": True, "narrow_answers": self.narrow_answers}
        else:
            how = {"kls": kls or (self.kl,)}
        return tuple(Sweep(replace(recipe, seed=seed), answers=self.answers, **how) for seed in self.dial_seeds)


@lru_cache(maxsize=16)
def _blocks(organism: str) -> int:
    """How many blocks an organism has; 0 where it is not there."""
    from tiltmeter.loading import organism_folder

    try:
        config = read_json(organism_folder(organism.removeprefix("organism:")) / "config.json")
    except ModelError:
        return 0
    return int(config.get("num_hidden_layers") or config["n_layer"])
