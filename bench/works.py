"""The works by name; each is a function from a `Subject` to figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from machine_works import growth, memory, startup
from reading_works import candidates, extraction, reading, selection, strengths
from run_works import adapters, callback, generation, upper_adapters
from subject import Subject

from tiltmeter.studies.figures import Figure

__all__ = ["WORKS"]

WORKS: Mapping[str, Callable[[Subject], Iterator[Figure]]] = {
    "startup": startup,
    "reading": reading,
    "extraction": extraction,
    "candidates": candidates,
    "selection": selection,
    "strengths": strengths,
    "adapters": adapters,
    "upper": upper_adapters,
    "callback": callback,
    "generation": generation,
    "memory": memory,
    "growth": growth,
}
