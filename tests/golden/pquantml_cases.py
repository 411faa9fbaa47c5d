"""The questions of pquantml.json, method by method; `make` is the `Recorder` of make_pquantml.py on the inputs `data`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

Make = Callable[..., Any]
Data = dict[str, Any]
ALL = ("hand", "dense/0", "dense/1", "ties", "conv/0", "conv/1")


def thresholds(shape: list[int], kind: str, low: float, high: float) -> list[float]:
    """Evenly spread over the range, in an order of their own."""
    import numpy as np

    size = {"layerwise": 1, "channelwise": shape[0], "weightwise": int(np.prod(shape))}[kind]
    return np.random.default_rng(size).permutation(np.linspace(low, high, size + 1)[1:]).round(4).tolist()


def shape_of(data: Data, given: str) -> list[int]:
    import numpy as np

    return list(np.shape(data[given]["w"][0]))


def dst_cases(make: Make, data: Data) -> Iterator[Any]:
    kinds = ("layerwise", "channelwise", "weightwise")
    for kind, given in itertools.product(kinds, ALL):
        r = make(kind, "dst", given, threshold_type=kind)
        r.forward(0)
        r.call("post_pretrain")
        r.forward(0)
        hand = given == "hand" and kind == "channelwise"
        r.set(
            threshold=[0.25, 0.15]
            if hand
            else thresholds(shape_of(data, given), kind, -0.1, 0.7 if kind == "weightwise" else 0.4)
        )
        r.forwards(0, 1)
        for name in ("post_epoch", "post_round"):
            r.call(name, *((0, 4) if name == "post_epoch" else ()))
        r.call("pre_finetune")
        r.forward(2)
        yield r
    for kind in kinds:  # threshold_init is not used; a layer at max_pruning_pct gets T = 0 inside the forward
        r = make(f"reset-{kind}", "dst", "dense/0", threshold_type=kind, threshold_init=0.25, max_pruning_pct=0.5, alpha=0.1)
        r.call("post_pretrain")
        r.forward(0)
        r.set(threshold=thresholds(shape_of(data, "dense/0"), kind, 0.9, 1.1))
        r.forwards(0, 1)
        yield r


def autosparse_cases(make: Make, data: Data) -> Iterator[Any]:
    for kind, backward, given in itertools.product(("layerwise", "channelwise", "weightwise"), (False, True), ALL):
        if backward and given in ("hand", "ties"):
            continue
        options = dict(threshold_type=kind, backward_sparsity=backward, threshold_init=-1.0)
        r = make(f"{kind}{'-backward' * backward}", "autosparse", given, **options)
        r.forward(0)
        r.call("post_pretrain")
        r.forward(0)
        r.set(threshold=thresholds(shape_of(data, given), kind, -3.0, 0.0))
        r.forward(0)
        r.call("post_epoch", 6, 10)
        r.forward(1)
        r.call("post_round")
        r.call("pre_finetune")
        r.forward(2)
        yield r
    for reset, epochs in ((90, 10), (7, 10), (90, 1), (3, 100)):
        r = make(f"alpha-reset-{reset}-of-{epochs}", "autosparse", "hand", alpha_reset_epoch=reset)
        for stage in ("pretrain", "train"):
            for epoch in range(min(epochs, 10)):
                r.call("post_epoch", epoch, epochs)
            if stage == "pretrain":
                r.call("post_pretrain")
        yield r


def cs_cases(make: Make, data: Data) -> Iterator[Any]:
    variants = [*itertools.product((0.0,), ALL), *itertools.product((0.1, -0.2), ("dense/0", "conv/0"))]
    for start, given in variants:
        r = make(f"s0={start}", "cs", given, threshold_init=start, threshold_decay=1e-3)
        r.forward(0)
        r.call("post_pretrain")
        r.forward(0)
        r.set(s=thresholds(shape_of(data, given), "weightwise", -0.5, 0.5))
        for epoch in range(3):
            r.forward(epoch)
            r.call("post_epoch", epoch, 3)
        r.forward(2)
        r.call("post_round")
        r.forward(2)
        r.call("post_epoch", 0, 1)
        r.call("pre_finetune")
        r.forward(1)
        yield r
    r = make("beta", "cs", "hand", final_temp=200)
    r.call("post_epoch", 0, 5)  # in pretraining too
    r.call("post_pretrain")
    r.set(beta=1.0, s=[0.5, -0.5] * 4)
    for epoch in range(5):
        r.call("post_epoch", epoch, 5)
    r.forward(0)
    r.call("pre_finetune")
    r.forward(0)
    yield r
    r = make("disabled", "cs", "hand", enable_pruning=False)
    r.call("post_pretrain")
    r.forward(0)
    yield r


def mdmm_variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, input, options): every constraint with every metric and mode on one input, the rest on the others."""
    constraints = ("Equality", "LessThanOrEqual", "GreaterThanOrEqual")
    modes = [dict(l0_mode=l0, scale_mode=scale) for l0, scale in itertools.product(("coarse", "smooth"), ("mean", "sum"))]
    free = dict(metric_type="UnstructuredSparsity", epsilon=0.1, target_sparsity=0.6)
    for constraint, mode, grad in itertools.product(constraints, modes, (False, True)):
        name = f"{constraint}-{mode['l0_mode']}-{mode['scale_mode']}{'-grad' * grad}"
        value = 0.02 if constraint == "GreaterThanOrEqual" else 0.0
        yield name, "dense/0", {**free, **mode, "constraint_type": constraint, "use_grad": grad, "target_value": value}
    for l0, given in itertools.product(("coarse", "smooth"), ("hand", "ties", "dense/1", "conv/0", "conv/1")):
        yield l0, given, {**free, "l0_mode": l0}
    grouped = dict(metric_type="StructuredSparsity", constraint_type="GreaterThanOrEqual", target_value=0.9)
    for rf, given in itertools.product((1, 2, 4, 5), ("dense/0", "dense/1", "conv/0")):
        yield f"rf={rf}", given, {**grouped, "rf": rf, "epsilon": 0.4, "scale": 50.0, "damping": 0.5}
    for constraint in ("Equality", "LessThanOrEqual"):
        yield f"rf=2-{constraint}", "dense/0", {**grouped, "rf": 2, "epsilon": 0.4, "constraint_type": constraint}


def mdmm_cases(make: Make, data: Data) -> Iterator[Any]:
    for name, given, options in mdmm_variants():
        r = make(name, "mdmm", given, **options)
        if given == "hand":  # straight into the training stage
            r.call("post_pretrain")
            r.forwards(0, 0, 0, 0)
        else:
            r.forward(0)  # in train mode lambda grows in pretraining
            r.call("post_pretrain")
            r.forwards(0, 1)
            r.call("eval")
            r.forward(2)
            r.call("train")
            r.forward(2)
        r.call("pre_finetune")
        r.forwards(0, 1)
        yield r


def pdp_cases(make: Make, data: Data) -> Iterator[Any]:
    for structured, temperature, given in itertools.product((False, True), (0.1, 1e-5), (*ALL, "conv1d")):
        if given == "ties" and not structured:
            continue  # which of equal weights carries the gradient is torch.topk's affair
        options = dict(structured_pruning=structured, temperature=temperature, sparsity=0.5, epsilon=0.5)
        r = make(f"{'structured' if structured else 'weight'}-t={temperature}", "pdp", given, **options)
        r.call("pre_epoch", 0, 1)
        r.forward(0)
        r.call("post_epoch", 0, 1)
        r.call("update_mask", 0)
        r.call("post_pretrain")
        for epoch in range(3):
            r.call("pre_epoch", epoch, 3)
            r.forward(epoch)
            r.call("post_epoch", epoch, 3)
            r.call("update_mask", epoch)
        r.call("post_round")
        r.call("pre_finetune")
        r.call("pre_epoch", 0, 2)
        r.forward(0)
        yield r
    for sparsity, given in (
        (0.8, "hundred"),
        (0.9, "hundred"),
        (0.75, "dense/0"),
        (0.3, "dense/1"),
        (0.0, "dense/0"),
        (1.0, "dense/0"),
    ):
        r = make(f"count-s={sparsity}", "pdp", given, sparsity=sparsity, epsilon=1.0)
        r.call("post_pretrain")
        r.call("pre_epoch", 0, 1)
        r.forward(0)
        yield r
    r = make("ramp", "pdp", "hand", sparsity=0.8, epsilon=0.3)
    r.call("post_pretrain")
    for _ in range(2):  # a second round starts again
        for epoch in range(5):
            r.call("pre_epoch", epoch, 5)
    r.set(init_r=0.4)  # what a layer's budget does
    r.call("pre_epoch", 4, 5)
    yield r
    r = make("hand-structured-s=0.5", "pdp", "hand", structured_pruning=True, sparsity=0.5, temperature=0.1, epsilon=1.0)
    r.call("post_pretrain")
    r.call("pre_epoch", 0, 1)
    r.forward(0)
    yield r
    r = make("hand-weight-s=0.5", "pdp", "hand", sparsity=0.5, temperature=0.1, epsilon=1.0)
    r.call("post_pretrain")
    r.call("pre_epoch", 0, 1)
    r.forward(0)
    yield r


def wanda_variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for sparsity, given in itertools.product((0.5, 0.3, 0.9), ALL):
        yield f"s={sparsity}", given, dict(sparsity=sparsity)
    for sparsity, given in ((0.5, "conv1d"), (0.5, "depthwise"), (0.1, "ties")):  # the last has more zeros than it shall prune
        yield f"s={sparsity}", given, dict(sparsity=sparsity)
    for (n, m), given in itertools.product(((1, 2), (1, 4), (2, 4), (3, 4)), ("hand", "dense/0", "ties", "conv/0")):
        yield f"{n}:{m}", given, dict(N=n, M=m)
    for (n, m), given in itertools.product(((1, 2), (1, 3), (1, 6)), ("dense/1", "conv/1")):
        yield f"{n}:{m}", given, dict(N=n, M=m)


def wanda_cases(make: Make, data: Data) -> Iterator[Any]:
    for name, given, options in wanda_variants():
        hand = given == "hand"
        collected = dict(t_delta=1 if hand else 2, t_start_collecting_batch=0 if hand else 1)
        r = make(name, "wanda", given, **options, **collected)
        if hand:
            r.call("post_pretrain")
            r.collect(0)
            r.forward(0)
        else:
            r.call("post_epoch", 0, 1)
            r.collect(0)  # not in pretraining
            r.call("post_pretrain")
            r.collect(0)  # not in the first epoch
            r.call("post_epoch", 0, 3)
            r.collect(0)
            r.collect(1, 1, training=False)
            r.forward(0)
            r.collect(1, 1)
            r.forward(1)
            r.collect(2, 2)  # it has made its mask
            r.call("post_epoch", 1, 3)
            r.call("pre_finetune")
            r.forward(2)
        yield r


def activation_cases(make: Make, data: Data) -> Iterator[Any]:
    for threshold, given in itertools.product((0.2, 0.5), ("dense/0", "dense/1", "conv/0", "conv/1", "conv1d", "depthwise")):
        r = make(
            f"threshold={threshold}", "activation_pruning", given, threshold=threshold, t_delta=2, t_start_collecting_batch=1
        )
        r.forward(0)
        r.call("post_epoch", 0, 1)
        r.call("post_pretrain")
        r.collect(0)  # the wait counts epochs
        r.call("post_epoch", 0, 3)
        for batch in (0, 1):
            r.collect(batch)
            r.forward(0)
        r.collect(2)  # and starts again after every mask
        r.call("post_epoch", 1, 3)
        r.forward(1)
        r.collect(2)
        r.call("post_epoch", 2, 3)  # one batch is left over
        r.collect(1)
        r.call("post_epoch", 0, 3)
        r.call("post_round")
        r.call("pre_finetune")
        r.collect(0)
        r.forward(2)
        yield r


def fitcompress_cases(make: Make, data: Data) -> Iterator[Any]:
    r = make("mask", "fitcompress", "dense/0")
    r.forward(0)
    r.set(mask=[1, 0, 1, 1] * 8)
    for call in ("post_pretrain", "post_round", "pre_finetune"):
        r.call(call)
        r.forward(1)
    yield r


METHODS = (dst_cases, autosparse_cases, cs_cases, mdmm_cases, pdp_cases, wanda_cases, activation_cases, fitcompress_cases)
