"""What a format of an activation costs in loss, without a gradient to it: the change of the output, in the loss's own metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from pquant_jax._base import KIF, SiteSpec, View
from pquant_jax.graph import Instrumented
from pquant_jax.quantize import Format
from pquant_jax.search._formats import fitted, narrower
from pquant_jax.search._problem import Problem
from pquant_jax.search._traces import Batches

_EXACT = (1.0, 23.0, 24.0)  # k, i, f: to float32 this rounds nothing


def sites_of(inst: Instrumented) -> list[str]:
    """Sites that are no parameter: activations, and BatchNorm's fused scale and offset."""
    return [name for name, spec in inst.sites.items() if spec.kind not in ("kernel", "bias")]


def disturbance(p: Problem) -> Callable[[Mapping[str, Format]], float]:
    """E[d^T H d] as a function of the formats of some sites, all else unquantized; one compilation.

    d is what the formats change of the output, H the Hessian of a sample's loss with respect to its output: the
    Gauss-Newton form of the loss's second order, along the error that is really made.
    """
    names, inst = sites_of(p.inst), p.inst

    def of_batch(kifs: Mapping[str, KIF], batch: Batches) -> jax.Array:
        exact, _ = inst.forward(View(p.params, {}, {}), p.state, batch.x, train=False)
        rounded, _ = inst.forward(View(p.params, dict(kifs), {}), p.state, batch.x, train=False)
        change = jax.tree.map(jnp.subtract, rounded, exact)
        slope = jax.grad(lambda y: jnp.mean(batch.weight * p.loss(y, batch.y)))
        bent = jax.jvp(slope, (exact,), (change,))[1]
        return sum((jnp.vdot(c, b) for c, b in zip(jax.tree.leaves(change), jax.tree.leaves(bent), strict=True)), jnp.float32(0))

    @jax.jit
    def measured(kifs: Mapping[str, KIF]) -> jax.Array:
        return jnp.mean(jax.lax.map(lambda batch: of_batch(kifs, batch), p.data))

    def kif_of(name: str, fmt: Format | None) -> KIF:
        bits = _EXACT if fmt is None else (fmt.k, fmt.i, fmt.f)
        ones = jnp.ones((1,) * len(inst.sites[name].shape), jnp.float32)
        return KIF(*(ones * jnp.float32(v) for v in bits))

    return lambda formats: float(measured({name: kif_of(name, formats.get(name)) for name in names}))


Choice = dict[int, tuple[Format, float]]


def open_widths(spec: SiteSpec, widths: Sequence[int], biases: int) -> tuple[int, ...]:
    """The widths that a site other than a kernel may take.

    In front of a table it keeps the widest that the table allows: a table costs 2^bits, which is no sum of products of
    widths, and a narrow one saves what the layers behind it do not notice.
    """
    if spec.kind != "input":
        return (biases,)
    return (min(max(widths), spec.max_bits),) if spec.max_bits else tuple(widths)


def choices(p: Problem, widths: Iterable[int], biases: int, spans: Mapping[str, tuple[float, float]]) -> dict[str, Choice]:
    """{site: {width: (format, disturbance)}} of every site that is no kernel; the format of a width that disturbs least.

    widths: of activations; everything else has the width `biases`.  A bias keeps its range.
    """
    disturbed, sites = disturbance(p), p.inst.sites

    def best(name: str, width: int) -> tuple[Format, float]:
        measured = [(fmt, disturbed({name: fmt})) for fmt in narrower(fitted(sites[name], spans[name], width))]
        return min(measured, key=lambda pair: pair[1])

    wanted = tuple(widths)
    found = {n: {w: best(n, w) for w in open_widths(sites[n], wanted, biases)} for n in sites_of(p.inst)}
    return found | {n: {biases: (fitted(spec, spans[n], biases), 0.0)} for n, spec in sites.items() if spec.kind == "bias"}
