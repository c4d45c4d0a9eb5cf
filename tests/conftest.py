"""Fixtures that more than one test file needs."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of public data beside the checkout; the test skips where it is absent."""
    if not _SHARED.is_dir():
        pytest.skip("the public data folder beside the checkout is absent")
    return _SHARED


@pytest.fixture(scope="session")
def real_model_dir(shared_dir: Path) -> Path:
    """A small real instruct model (GGUF); the test skips where it is absent."""
    folder = shared_dir / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("the small real model beside the checkout is absent")
    return folder
