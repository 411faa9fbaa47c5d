"""Record hgq2.json: what HGQ2 and `quantizers` answer to fixed questions.

Run it in an environment of its own (HGQ2 is not a dependency of this project, and nothing of it is copied here):

    pip install hgq2==0.2.0 quantizers==1.2.2 keras==3.15.1 jax==0.10.2
    KERAS_BACKEND=jax JAX_PLATFORMS=cpu python tests/golden/record_hgq2.py tests/golden/hgq2.json
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

X = [-5, -4, -3.96875, -1.3, -0.75, -0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.375, 0.5, 0.6, 1.3, 3.7, 3.75, 3.9, 4, 5.3]
NARROW = [-2, -0.3, 0, 0.3, 2]
WEIGHTS = [[-1.7, 0.33, 0.05], [2.6, -0.9, 0.5]]
BATCH = [[0.3, -1.0, 2.9, 0.0], [0.9, 0.5, -3.1, 0.02], [-0.2, -0.75, 1.0, -0.01]]


def plain(tree: Any) -> Any:
    """Arrays as nested lists of the float64 that equals each float32."""
    import numpy as np

    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64).tolist()


def plain_float32(xs: list) -> list:
    import numpy as np

    return plain(np.asarray(xs, np.float32))


def stateless(xs: list[float], k: int, i: float, f: float, rounding: str, overflow: str, training: bool) -> dict[str, Any]:
    """Value, and the gradient of the sum to x, i and f of the stateless quantizer, each operand one value per element."""
    import jax
    import jax.numpy as jnp
    from quantizers import get_fixed_quantizer

    quantizer, x = get_fixed_quantizer(rounding, overflow), jnp.float32(xs)
    k, i, f = (jnp.full_like(x, v) for v in (k, i, f))
    q, pull = jax.vjp(lambda x, i, f: quantizer(x, k, i, f, training), x, i, f)
    return plain(dict(zip(("q", "dq_dx", "dq_di", "dq_df"), (q, *pull(jnp.ones_like(q))), strict=True)))


def stateless_cases() -> list[dict[str, Any]]:
    cases = []
    modes = itertools.product(("SAT", "SAT_SYM", "WRAP"), ("RND", "TRN", "RND_CONV"), (1, 0), (True, False))
    for overflow, rounding, k, training in modes:
        case = dict(round=rounding, overflow=overflow, k=k, i=2, f=2, training=training)
        cases.append({**case, **stateless(X, k, 2, 2, rounding, overflow, training)})
    for rounding in ("TRN_ZERO", "RND_ZERO", "RND_MIN_INF", "RND_INF"):
        case = dict(round=rounding, overflow="SAT", k=1, i=2, f=2, training=False)
        cases.append({**case, **stateless(X, 1, 2, 2, rounding, "SAT", False)})
    for rounding in ("RND", "RND_CONV"):  # signed only: without a sign bit theirs leaves the range, and ap_ufixed refuses
        case = dict(round=rounding, overflow="WRAP_SM", k=1, i=2, f=2, training=False)
        cases.append({**case, **stateless(X, 1, 2, 2, rounding, "WRAP_SM", False)})
    return cases


def zero_bit_cases() -> list[dict[str, Any]]:
    cases = []
    widths = ((2, -2), (-1, 1), (2, -3), (-2, 5))
    for overflow, (i, f), training in itertools.product(("SAT", "SAT_SYM", "WRAP"), widths, (True, False)):
        case = dict(round="RND", overflow=overflow, k=1, i=i, f=f, training=training)
        cases.append({**case, **stateless(NARROW, 1, i, f, "RND", overflow, training)})
    return cases


def layer_cases() -> list[dict[str, Any]]:
    """Weight quantizers with a fractional raw width per weight: value and the gradients of the sum."""
    import jax
    import jax.numpy as jnp
    from hgq.quantizer import Quantizer, QuantizerConfig

    i = [[1.0, -0.6, 0.0], [1.5, 0.0, -1.0]]
    raws = {"kbi": {"b": [[4.4, 3.5, 0.0], [2.5, 5.0, 3.0]], "i": i}, "kif": {"f": [[3.4, 3.5, 0.0], [0.5, 5.0, 4.0]], "i": i}}
    x, cases = jnp.float32(WEIGHTS), []
    for (kind, raw), overflow in itertools.product(raws.items(), ("SAT", "SAT_SYM")):
        layer = Quantizer(QuantizerConfig(kind, "weight", overflow_mode=overflow, round_mode="RND"))
        layer.build(x.shape)
        names = [v.name for v in layer.trainable_variables]
        trained = [jnp.float32(raw[name]) for name in names]
        fixed = [v.value for v in layer.non_trainable_variables]

        def value(x, trained, layer=layer, fixed=fixed):
            return layer.stateless_call(trained, fixed, x, training=True)[0]

        q, pull = jax.vjp(value, x, trained)
        dx, grads = pull(jnp.ones_like(q))
        for variable, array in zip(layer.trainable_variables, trained, strict=True):
            variable.assign(array)
        case = {"type": kind.upper(), "round": "RND", "overflow": overflow, **raw, "bits": plain(layer.bits)}
        cases.append({**case, "q": plain(q), "dx": plain(dx), "grads": plain(dict(zip(names, grads, strict=True)))})
    return cases


def wrap_cases() -> list[dict[str, Any]]:
    """Activation quantizers that wrap: one training step, then a reset and a trace of the ranges, then twice the data."""
    import jax.numpy as jnp
    from hgq.quantizer import Quantizer, QuantizerConfig
    from hgq.utils.minmax_trace import TrainingFlagWrapper

    x, cases = jnp.float32(BATCH), []
    for axes in ((0,), (0, 1)):
        config = QuantizerConfig("kif", "datalane", i0=2, f0=3, overflow_mode="WRAP", round_mode="RND", homogeneous_axis=axes)
        layer = Quantizer(config)
        layer.build(x.shape)
        inner = layer.quantizer
        trained = layer(x, training=True)
        case = {"homogeneous_axis": list(axes), "k0": 1, "i0": 2, "f": 3, "decay": 0.01}
        case["train"] = {"q": plain(trained), "i": plain(inner._i.value)}
        inner._i.assign(jnp.full_like(inner._i.value, -1e9))
        inner._k.assign(jnp.zeros_like(inner._k.value))
        layer(x, training=TrainingFlagWrapper("tracing"))
        case["trace"] = {"k": plain(inner._k.value), "i": plain(inner._i.value)}
        cases.append({**case, "eval_on_2x": plain(layer(2 * x, training=False))})
    return cases


def main(path: str) -> None:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    versions = {name: importlib.metadata.version(name) for name in ("hgq2", "quantizers", "keras", "jax")}
    golden = {
        "versions": versions,
        "stateless": {"x": plain_float32(X), "cases": stateless_cases()},
        "zero_bits": {"x": plain_float32(NARROW), "cases": zero_bit_cases()},
        "weights": {"x": plain_float32(WEIGHTS), "cases": layer_cases()},
        "wrap_bookkeeping": {"x": plain_float32(BATCH), "cases": wrap_cases()},
    }
    Path(path).write_text(json.dumps(golden, indent=None, separators=(",", ":")).replace('{"', '\n{"') + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
