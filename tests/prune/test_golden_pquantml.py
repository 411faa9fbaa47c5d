"""PQuantML's pruning layers, played call by call through our methods (golden/pquantml.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = json.loads((Path(__file__).parents[1] / "golden" / "pquantml.json").read_text())["cases"]
DIFFERS: tuple[str, ...] = ()
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c["name"] not in DIFFERS], ids=lambda c: c["name"])
def test_equal(case, pquantml):
    player, steps, compared = pquantml.Player(case), case["steps"], 0
    for n, step in enumerate(steps):
        said = f"step {n}, {step['call']} in {player.stage.name}"
        for name, value in player.step(step).items():
            theirs = np.broadcast_to(player.answer(step, name), value.shape)
            np.testing.assert_allclose(value, theirs, **CLOSE, err_msg=f"{said}: {name}")
            compared += 1
        if step["call"] not in player.method.settled or [later["call"] for later in steps[n + 1 : n + 2]] == ["update_mask"]:
            continue
        for name, read in player.method.stored.items():
            ours = read(player)
            if ours is not None and name in player.theirs:
                theirs = np.broadcast_to(player.turned(player.theirs[name]), np.shape(ours))
                np.testing.assert_allclose(ours, theirs, **CLOSE, err_msg=f"{said}: stored {name}")
                compared += 1
    assert compared
