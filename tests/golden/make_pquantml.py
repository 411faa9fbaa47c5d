"""Write pquantml.json: what PQuantML's pruning methods (torch backend) answer to fixed questions.

Run it in an environment of its own (PQuantML is not a dependency of this project, and nothing of it is copied here):

    python -m venv golden && golden/bin/pip install pquant-ml==0.1.0 torch
    KERAS_BACKEND=torch golden/bin/python tests/golden/make_pquantml.py tests/golden/pquantml.json

A case is a pruning layer and the calls made on it, in order.  Each step has the name of the call (`calls` says the Python of
it), its arguments, what it answered, and in `state` those buffers, parameters and numbers that it changed.  Weights are
(out, in) or (out, in, kh, kw); `w` counts the moments of the case's input: inputs[case.input].w[w].  Where an answer equals
the weight, the upstream gradient or the stored mask, the name "w", "u" or "mask" stands for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

CALLS = {
    "build": "layer = get_pruning_layer(PQConfig.load_from_config(default | options), layer_type); layer.build(w.shape)",
    "set": "getattr(layer, name).data.copy_(value) for tensors, setattr(layer, name, value) for numbers",
    "train": "layer.train()",
    "eval": "layer.eval()",
    "post_pretrain": "layer.post_pre_train_function()",
    "pre_epoch": "layer.pre_epoch_function(epoch, epochs)",
    "forward": "out = layer(w); dw, d[parameter] = grad((u * out).sum()); loss = layer.calculate_additional_loss() and its "
    "gradients; hard_mask = layer.get_hard_mask(); keep = layer.get_layer_sparsity(w), a keep ratio",
    "collect_input": "layer.collect_input(x, w, training)",
    "collect_output": "layer.collect_output(y, training)",
    "post_epoch": "layer.post_epoch_function(epoch, epochs)",
    "update_mask": "layer.update_mask(w)",
    "post_round": "layer.post_round_function()",
    "pre_finetune": "layer.pre_finetune_function()",
}
FILES = {"activation_pruning": "ap"}
NUMBERS = ("_init_r", "_sparsity")
HAND = [[0.5, -0.2, 0.05, -0.9], [0.3, 0.1, -0.7, 0.02]]
ROLE = {"dense": "linear", "hand": "linear", "ties": "linear", "hundred": "linear"}
ROLE |= {"conv": "conv", "conv1d": "conv", "depthwise": "depthwise_conv"}


def plain(value: Any) -> Any:
    """Tensors and arrays as nested lists with the fewest digits that give the same float32 (float64 where it is one)."""
    import numpy as np

    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    array = np.asarray(value.detach() if hasattr(value, "detach") else value)
    if array.ndim:
        return [plain(v) for v in array]
    if array.dtype.kind in "bi":
        return array.item()
    number = float(str(array[()]))
    return int(number) if number == int(number) else number


def tensor(value: Any) -> Any:
    import torch

    return torch.tensor(value, dtype=torch.float32)


def inputs() -> dict[str, Any]:
    """Weights at three moments, an upstream gradient, and data in and out of the layer, two batches each."""
    import numpy as np

    rng = np.random.default_rng(2603)
    shapes = {
        "hand": (2, 4),
        "dense/0": (4, 8),
        "dense/1": (3, 8),
        "ties": (4, 4),
        "conv/0": (4, 2, 2, 3),
        "conv/1": (3, 2, 3, 2),
        "conv1d": (4, 2, 3),
        "depthwise": (4, 1, 2, 3),
    }
    found = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        grid = np.round(
            0.02 + 1.2 * ((np.arange(size) + 0.5) / size) ** 1.5, 3
        )  # magnitudes apart: gradients of ties are arbitrary
        drift = np.cumsum(rng.normal(0, [[0.5], [0.1], [0.1]], (3, size)), 0)
        ranked = [np.sign(v) * grid[np.argsort(np.argsort(np.abs(v)))] for v in drift]
        w = [(v * scale).round(4).reshape(shape) for v, scale in zip(ranked, (1, 0.9, 0.8), strict=True)]
        u = np.round(rng.normal(0, 1, shape), 3)
        if name == "hand":
            w[0], u = np.array(HAND), np.arange(1.0, 9).reshape(shape)
        if name == "ties":
            w, u = [np.round(4 * v) / 4 for v in w], np.round(4 * u) / 4
        positions = {2: (4,), 3: (2, 3), 4: (2, 2, 2)}[len(shape)]
        channels = (shape[0] if name == "depthwise" else shape[1], shape[0])
        x, y = (np.round(rng.normal(0, 1, (3, positions[0], n, *positions[1:])), 2) for n in channels)
        offset = np.linspace(-1.2, 1.2, shape[0]).reshape((-1,) + (1,) * (len(positions) - 1))
        found[name] = {"w": w, "u": u, "x": x, "y": np.round(y + offset, 2)}
    hundred = rng.permutation(np.arange(1, 101)).reshape(10, 10) / 100
    found["hundred"] = {"w": [hundred] * 3, "u": np.ones((10, 10)), "x": np.ones((1, 4, 10)), "y": np.ones((1, 4, 10))}
    x = [[[1, 2, 3, 0.5], [0, 1, 1, 0.5]]]
    found["hand"]["x"] = np.array(x)
    return plain({k: {n: np.asarray(a, np.float32) for n, a in v.items()} for k, v in found.items()})


class Recorder:
    """One pruning layer, asked one call after the other."""

    def __init__(self, data: dict[str, Any], name: str, method: str, given: str, **options: Any):
        from pquant import PQConfig
        from pquant.core.torch.utils import get_pruning_layer
        from pquant.core.utils import get_pruning_config

        self.data, self.layer_type = data[given], ROLE[given.partition("/")[0]]
        defaults = importlib.resources.files("pquant.configs") / f"config_{FILES.get(method, method)}.yaml"
        config = get_pruning_config(str(defaults))
        config["pruning_parameters"] |= options
        self.config = PQConfig.load_from_config(config)
        self.layer = get_pruning_layer(self.config, self.layer_type)
        self.weight = tensor(self.data["w"][0])
        self.seen: dict[str, Any] = {}
        head = {"name": f"{method}/{name}/{given}", "method": method, "input": given, "layer_type": self.layer_type}
        parameters = self.config.pruning_parameters.model_dump(mode="json")
        self.case = {**head, "options": options, "parameters": parameters, "steps": []}
        self.layer.build(self.weight.shape)
        self.layer.train()
        self.add("build")

    def add(self, call: str, **fields: Any) -> None:
        """A step, with what it changed."""
        named = itertools.chain(self.layer.named_parameters(), self.layer.named_buffers())
        now = {name: plain(value.clone()) for name, value in named}
        now |= {name: getattr(self.layer, name) for name in NUMBERS if hasattr(self.layer, name)}
        changed = {name: value for name, value in now.items() if name not in self.seen or self.seen[name] != value}
        self.seen = now
        self.case["steps"].append({"call": call, **plain(fields), **({"state": changed} if changed else {})})

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            if name in dict(self.layer.named_parameters()) or name in dict(self.layer.named_buffers()):
                getattr(self.layer, name).data.copy_(tensor(value).reshape(getattr(self.layer, name).shape))
            else:
                setattr(self.layer, name, value)
        self.add("set", names=list(values))

    def forward(self, moment: int) -> None:
        import torch

        w, layer = tensor(self.data["w"][moment]).requires_grad_(), self.layer
        trained = dict(layer.named_parameters())

        def gradients(of: Any) -> dict[str, Any]:
            if not (torch.is_tensor(of) and of.requires_grad):
                return {}
            found = torch.autograd.grad(of, [w, *trained.values()], retain_graph=True, allow_unused=True)
            return {f"d{name}": g for name, g in zip(("w", *trained), found, strict=True) if g is not None}

        out = layer(w)
        answer = {"out": out, **gradients((tensor(self.data["u"]) * out).sum())}
        loss = layer.calculate_additional_loss()
        answer |= {"loss": loss, "loss_grads": gradients(loss), "hard_mask": layer.get_hard_mask()}
        if hasattr(layer, "get_layer_sparsity"):
            answer["keep"] = layer.get_layer_sparsity(w)
        same = {"out": ("w", w), "dw": ("u", tensor(self.data["u"])), "hard_mask": ("mask", layer.mask)}
        for name, (other, value) in same.items():
            if torch.equal(answer[name], value):
                answer[name] = other
        self.add("forward", w=moment, **answer)

    def forwards(self, *moments: int) -> None:
        for moment in moments:
            self.forward(moment)

    def call(self, name: str, *args: Any) -> None:
        """One of the functions between epochs, or a switch of the module's mode."""
        if name in ("train", "eval"):
            getattr(self.layer, name)()
            self.add(name)
        elif name == "update_mask":
            self.layer.update_mask(tensor(self.data["w"][args[0]]))
            self.add(name, w=args[0])
        else:
            getattr(self.layer, {"post_pretrain": "post_pre_train"}.get(name, name) + "_function")(*args)
            self.add(name, **dict(zip(("epoch", "epochs"), args, strict=False)))

    def collect(self, batch: int, moment: int = 0, training: bool = True) -> None:
        if hasattr(self.layer, "collect_input"):
            self.layer.collect_input(tensor(self.data["x"][batch]), tensor(self.data["w"][moment]), training)
            self.add("collect_input", x=batch, w=moment, training=training)
        else:
            self.layer.collect_output(tensor(self.data["y"][batch]), training)
            self.add("collect_output", y=batch, training=training)


def main(path: str) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    import torch
    from pquantml_cases import METHODS  # beside this file, which is a script: not importable while the tests are collected
    from pquantml_others import others

    torch.set_num_threads(1)
    data = inputs()
    make = functools.partial(Recorder, data)
    golden = {
        "versions": {name: importlib.metadata.version(name) for name in ("pquant-ml", "torch", "numpy")},
        "calls": CALLS,
        "inputs": data,
        "cases": [r.case for cases in METHODS for r in cases(make, data)],
        **others(plain),
    }
    Path(path).write_text(json.dumps(golden, indent=None, separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
