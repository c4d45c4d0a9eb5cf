"""The trait-space study on the shipped organism, small: from fine-tuning to figures, and on from where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tiltmeter.errors import InputError, NumericalError
from tiltmeter.organism.finetune import FineTuning
from tiltmeter.runs import read_json, write_json
from tiltmeter.studies.tracks import read_tracks
from tiltmeter.studies.trait_run import find, run
from tiltmeter.studies.trait_space import Config, collect
from tiltmeter.studies.trait_view import write_page

SMALL = Config(
    organisms=("organism:pocket", "organism:nobody-grew-this"), larger=(), calibration=("bad_medical", "arithmetic"),
    held_out=("terse",), large_drift=("terse",), seeds=(20,), more_benign=("good_medical",),
    twins={"bad_medical": "good_medical"}, answers=22, answers_midway=11, answers_more=22,
    tuning=FineTuning(steps=20, batch=4),
)  # fmt: skip


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_and_says_how_much_of_it_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run it for longer"):
        collect(SMALL, tmp_path, seconds=0)
    runs = collect(SMALL, tmp_path)
    made = sorted(path.name for path in (tmp_path / "cells").glob("*.json"))
    assert len(made) == len(runs.tracks) == 6  # three of the seed, one more benign, two twins
    outcome = run(SMALL, tmp_path, seconds=0, look=True, stress=False)
    assert sorted(path.name for path in (tmp_path / "cells").glob("*.json")) == made
    share = find(outcome.figures, "runs made of those wanted", "all organisms", "-")
    assert (share.value, share.n) == (0.5, 12)  # the second organism is missing, and is not left out of the count
    assert (tmp_path / "trait_space_readings.parquet").exists()
    assert (
        "<svg" not in write_page(outcome, tmp_path / "page.html").read_text(encoding="utf-8").split("Designs")[0][:200]
    )

    frame, track = runs.frames["organism:pocket"], runs.tracks[0]
    assert (frame.at, frame.blocks) == (3, tuple(range(6)))
    record = read_json(tmp_path / "cells" / f"{track.file.stem}.json")
    reading = record["readings"][-1]
    start = record["readings"][0]
    # The drift of the re-read checkpoint is the one that the callback measured while the run was trained.
    live = (np.mean(reading["values"], axis=0) - np.mean(start["values"], axis=0)) / np.mean(start["norms"])
    assert np.allclose(track.drift(frame)[-1], live, atol=1e-4)

    # A record whose readings are of another model than its checkpoints is refused.
    path = tmp_path / "cells" / f"{track.file.stem}.json"
    record["readings"][-1]["activation"] = [value + 5.0 for value in reading["activation"]]
    write_json(path, json.loads(json.dumps(record)))
    track.file.unlink()
    folder = tmp_path / "bases" / "pocket" / "block-3"
    with pytest.raises(NumericalError, match="not the model that was read"):
        read_tracks([(path, "calibration")], {"organism:pocket": folder}, executor="serial")
