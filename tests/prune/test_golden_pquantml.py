"""PQuantML's pruning layers, played call by call through our methods (golden/pquantml.json).

`pquantml` is golden/pquantml_player.py, whose METHODS say what of ours answers what of theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = json.loads((Path(__file__).parents[1] / "golden" / "pquantml.json").read_text())["cases"]
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-5)
DIFFERS = {  # {case: (number of the step, answer)}; test_golden_defects.py shows both sides
    "cs/disabled/hand": (2, "hard_mask"),
    "pdp/structured-t=0.1/dense/0": (11, "dw"),
    "pdp/structured-t=0.1/ties": (11, "dw"),
}
NAMES = {case["name"] for case in CASES}


def asked(case: dict[str, Any]) -> Any:
    """A case; the second input of a kind is slow."""
    first, _, number = case["name"].rpartition("/")
    marks = [pytest.mark.slow] if number == "1" and f"{first}/0" in NAMES else []
    return pytest.param(case, id=case["name"], marks=marks)


@pytest.mark.parametrize("case", [asked(case) for case in CASES])
def test_equal(case, pquantml):
    player, steps, compared = pquantml.Player(case), case["steps"], 0
    for n, step in enumerate(steps):
        found = {name: (value, player.answer(step, name)) for name, value in player.step(step).items()}
        found.pop(DIFFERS[case["name"]][1] if DIFFERS.get(case["name"], (-1,))[0] == n else "", None)
        if step["call"] in player.method.settled and [later["call"] for later in steps[n + 1 : n + 2]] != ["update_mask"]:
            ours = {name: read(player) for name, read in player.method.stored.items() if name in player.theirs}
            found |= {f"stored {k}": (v, player.turned(player.theirs[k])) for k, v in ours.items() if v is not None}
        for name, (ours, theirs) in found.items():
            said = f"step {n}, {step['call']} in {player.stage.name}: {name}"
            np.testing.assert_allclose(ours, np.broadcast_to(theirs, np.shape(ours)), **CLOSE, err_msg=said)
        compared += len(found)
    assert compared


def test_every_method_is_played(pquantml):
    played = {case["method"] for case in CASES}
    assert played == set(pquantml.METHODS) and len(CASES) == 206
