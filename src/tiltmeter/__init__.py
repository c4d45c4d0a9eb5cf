"""tiltmeter: reads a model's activations while it is fine-tuned and says whether the run tilts toward misalignment.

    import tiltmeter as tm

    lm = tm.load("organism:pocket")                      # or a hub id, a folder, a .gguf file
    basis = tm.fit_basis(lm)
    profile = basis.drift(tm.load("organism:pocket", adapter="runs/a/checkpoint-60"), reference=lm)
    verdict = tm.Detector.load("detector.safetensors").predict(profile)

Names are imported when they are first used, so that `import tiltmeter` needs neither torch nor time. The functions
`tiltmeter.drift.drift` and `tiltmeter.watch.watch` are named like their modules and stay there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiltmeter.basis import TraitBasis, fit_basis
    from tiltmeter.behavior import BehaviorReport, evaluate
    from tiltmeter.detector import CalibrationRun, Detector, State, Verdict, fit_detector
    from tiltmeter.drift import DriftProfile, Reading, measure, trajectory
    from tiltmeter.errors import TiltmeterError
    from tiltmeter.guard import SteeringGuard, fit_guard
    from tiltmeter.lm import LM, attach, load, wrap
    from tiltmeter.mitigate import PreventativeSteering
    from tiltmeter.steer import SteeringVector
    from tiltmeter.traits import PromptSet, Trait, TraitSet, load_prompts, load_traits
    from tiltmeter.watch import TiltmeterCallback

_HOME = {
    "BehaviorReport": "behavior",
    "CalibrationRun": "detector",
    "Detector": "detector",
    "DriftProfile": "drift",
    "LM": "lm",
    "PreventativeSteering": "mitigate",
    "PromptSet": "traits",
    "Reading": "drift",
    "State": "detector",
    "SteeringGuard": "guard",
    "SteeringVector": "steer",
    "TiltmeterCallback": "watch",
    "TiltmeterError": "errors",
    "Trait": "traits",
    "TraitBasis": "basis",
    "TraitSet": "traits",
    "Verdict": "detector",
    "attach": "lm",
    "evaluate": "behavior",
    "fit_basis": "basis",
    "fit_detector": "detector",
    "fit_guard": "guard",
    "load": "lm",
    "load_prompts": "traits",
    "load_traits": "traits",
    "measure": "drift",
    "trajectory": "drift",
    "wrap": "lm",
}

__all__ = [  # noqa: RUF022 - sorted by name, constants last
    "BehaviorReport",
    "CalibrationRun",
    "Detector",
    "DriftProfile",
    "LM",
    "PreventativeSteering",
    "PromptSet",
    "Reading",
    "State",
    "SteeringGuard",
    "SteeringVector",
    "TiltmeterCallback",
    "TiltmeterError",
    "Trait",
    "TraitBasis",
    "TraitSet",
    "Verdict",
    "attach",
    "evaluate",
    "fit_basis",
    "fit_detector",
    "fit_guard",
    "load",
    "load_prompts",
    "load_traits",
    "measure",
    "trajectory",
    "wrap",
    "__version__",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tiltmeter' has no attribute '{name}'")
    return getattr(import_module(f"tiltmeter.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
