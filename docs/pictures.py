"""The pictures of the documentation, from runs of the package itself: python docs/pictures.py, half a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from PIL import Image

import pquant_jax as pq
from pquant_jax.report import _style as style

IMAGES = Path(__file__).parent / "images"
TARGET, STEPS = 0.6, 3000


def loss(w: jax.Array) -> jax.Array:
    """The front: what is lost with w of the cost spent, between 0 and 1; concave, so that no mixture has its least inside."""
    return 1 - jnp.square(w)


def between_0_and_1(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, with the parameters put back between two walls."""

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u, p: jnp.clip(p + u, 0, 1) - p, updates, params), state

    return optax.GradientTransformation(tx.init, update)


def fixed_penalties(weights: np.ndarray) -> np.ndarray:
    """Where descent on loss + weight * cost ends, for every weight."""
    slope = jax.grad(lambda w: jnp.sum(loss(w) + jnp.asarray(weights, jnp.float32) * w))
    start = jnp.full(len(weights), TARGET, jnp.float32)
    return np.asarray(jax.lax.fori_loop(0, 2000, lambda _, w: jnp.clip(w - 0.02 * slope(w), 0, 1), start))


def constrained(damping: float) -> tuple[np.ndarray, np.ndarray]:
    """(cost, multiplier) after every step of a training under MDMM."""

    def cost(params: pq.Params, view: pq.View) -> jax.Array:
        del view
        return params.model["w"]

    held = pq.constrain.mdmm(cost, kind="==", target=TARGET, scale=1.0, damping=damping)
    tx = pq.optimizer(held, weights=between_0_and_1(optax.sgd(0.02)), duals=optax.sgd(0.05))
    params = held.attach({"w": jnp.float32(0.3)})
    params, opt_state = pq.boundary(held, params, tx.init(params), event=pq.Event.PRE_EPOCH, stage=pq.Stage.TRAIN)

    def step(carry, _):
        params, opt_state = carry
        state = pq.state_of(opt_state)

        def objective(p):
            return loss(p.model["w"]) + held.penalty(p, state, held.apply(p, state)[0])

        updates, opt_state = tx.update(jax.grad(objective)(params), opt_state, params, stage=jnp.int32(pq.Stage.TRAIN))
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params.model["w"], params.extra["mdmm"]["multiplier"])

    return jax.tree.map(np.asarray, jax.jit(lambda c: jax.lax.scan(step, c, None, STEPS)[1])((params, opt_state)))


def mdmm(figure: Figure) -> None:
    """A fixed penalty misses a concave front, damping 0 oscillates, MDMM settles."""
    weights = np.array([0.1, 0.5, 1.0, 1.19, 1.21, 1.5, 2.0, 5.0])
    ends, runs = fixed_penalties(weights), {damping: constrained(damping) for damping in (0.0, 10.0)}
    front, costs, multipliers = figure.subplots(1, 3)
    w = np.linspace(0, 1, 100)
    front.plot(w, loss(w), color=style.MUTED, linewidth=1.2)
    front.plot(ends, loss(ends), "s", color=style.ORANGE, markersize=9, clip_on=False)
    settled = float(runs[10.0][0][-1])
    front.plot([settled], [loss(settled)], "o", color=style.BLUE, markersize=8)
    front.axvline(TARGET, color=style.INK, linewidth=0.8, linestyle=":")
    front.set(xlabel="cost", ylabel="loss", title="Where training ends", xlim=(-0.05, 1.05), ylim=(-0.05, 1.15))
    for axes, part, title in ((costs, 0, "Cost"), (multipliers, 1, "Multiplier")):
        for damping, colour in ((0.0, style.VERMILION), (10.0, style.BLUE)):
            axes.plot(runs[damping][part], color=colour, linewidth=1.2)
        axes.set(xlabel="step", title=title)
    costs.axhline(TARGET, color=style.INK, linewidth=0.8, linestyle=":")
    multipliers.axhline(2 * TARGET, color=style.INK, linewidth=0.8, linestyle=":")
    points, lines = front.get_lines()[1], costs.get_lines()
    words = ["fixed penalties, 8 weights", "MDMM, damping 0", "MDMM, damping 10", "target"]
    figure.legend([points, *lines], words, loc="outside lower center", ncols=4)


def write(name: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> None:
    """One picture, with a palette of 64 colours."""
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        IMAGES.mkdir(exist_ok=True)
        figure.savefig(IMAGES / name, dpi=110)
    with Image.open(IMAGES / name) as picture:
        smaller = picture.convert("RGB").quantize(64)
    smaller.save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    write("mdmm.png", mdmm, (10, 3.4))
