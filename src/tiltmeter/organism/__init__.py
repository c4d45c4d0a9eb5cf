"""The pocket organism: a small closed world, a small real transformer that lives in it, and its fine-tuning sets.

The package ships one organism, `load("organism:pocket")`, with a basis and a calibrated detector. What it shows is a
fact about the organism.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["shipped_basis", "shipped_detector"]


def shipped_basis() -> Path:
    """Folder of the shipped organism's basis."""
    return Path(str(files("tiltmeter.organism"))) / "models" / "pocket" / "basis"


def shipped_detector() -> Path:
    """File of the detector that was calibrated on the shipped organism."""
    return Path(str(files("tiltmeter.organism"))) / "models" / "pocket" / "detector.safetensors"
