"""Frozen: the given masks, in every stage and after every event."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import Event, Stage
from pquant_jax._errors import TransformError
from pquant_jax.prune import frozen

MASK = np.array([[1, 0, 1, 0], [0, 1, 0, 1]])


def test_the_mask_is_the_same_in_every_stage_and_takes_the_gradient(w, tell):
    t = frozen({"kernel": MASK})
    params = t.attach({"kernel": w, "bias": w[0]})
    state = t.init(params)
    for stage in Stage:
        for event in Event:
            _, state = tell(t, params, state, event, stage)
        _, state = t.step(params, state, stage=jnp.int32(stage), stats={})
        view, _ = t.apply(params, state)
        np.testing.assert_array_equal(view.model["kernel"], w * MASK)
        np.testing.assert_array_equal(view.model["bias"], w[0])
        np.testing.assert_array_equal(view.masks["kernel"], MASK)
    grads = jax.grad(lambda p: jnp.sum(t.apply(p, state)[0].model["kernel"]))(params)
    np.testing.assert_array_equal(grads.model["kernel"], MASK)


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ({"kernal": MASK}, "did you mean 'kernel'"),
        ({"kernel": MASK.T}, r"shape \(4, 2\), expected the parameter's \(2, 4\)"),
        ({"kernel": MASK * 2}, r"outside \[0, 1\]"),
        ({"kernel": MASK * np.nan}, r"outside \[0, 1\]"),
    ],
    ids=["path", "shape", "two", "nan"],
)
def test_masks_that_do_not_fit(masks, text, w):
    with pytest.raises(TransformError, match=text):
        frozen(masks).attach({"kernel": w})
