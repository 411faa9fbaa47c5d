"""What make_pquantml.py asks besides the pruning layers: the budget of every layer, p-norm decay, FITCompress' search."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from typing import Any

SHAPES = ((5, 4), (3, 5))  # two dense layers, (out, in)


def config_of(method: str, **sections: dict[str, Any]) -> Any:
    """The packaged configuration without quantization, with changes."""
    from pquant import PQConfig
    from pquant.core.utils import get_pruning_config

    config = get_pruning_config(str(importlib.resources.files("pquant.configs") / f"config_{method}.yaml"))
    for section, values in sections.items():
        config[section] |= values
    config["quantization_parameters"] |= {"enable_quantization": False}
    return PQConfig.load_from_config(config)


def network(config: Any, seed: int) -> tuple[Any, list[Any]]:
    """dense, relu, dense of PQuantML, without biases, and its weights."""
    import numpy as np
    import torch
    from pquant.layers import PQDense

    rng = np.random.default_rng(seed)
    layers = [PQDense(config, n_in, n_out, bias=False) for n_out, n_in in SHAPES]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
    weights = [np.round(rng.normal(0, s, shape), 3).astype(np.float32) for s, shape in zip((0.8, 0.4), SHAPES, strict=True)]
    for layer, w in zip(layers, weights, strict=True):
        layer._weight.data.copy_(torch.tensor(w))
    model(torch.zeros(1, SHAPES[0][1]))  # layers make their quantizers in the first forward, and the search trips over new ones
    return model, weights


def budgets() -> list[dict[str, Any]]:
    from pquant.core.torch.layers import _pdp_setup

    cases = []
    for method, sparsity, seed in (("pdp", 0.5, 0), ("pdp", 0.8, 1), ("wanda", 0.5, 0), ("wanda", 0.9, 1)):
        config = config_of(method, pruning_parameters={"sparsity": sparsity})
        model, weights = network(config, seed)
        _pdp_setup(model, config)
        layers = [model[0].pruning_layer, model[2].pruning_layer]
        own = [layer.init_r if method == "pdp" else layer._sparsity for layer in layers]
        call = "_pdp_setup(model, config)"
        cases.append({"method": method, "call": call, "sparsity": sparsity, "weights": weights, "budget": own})
    return cases


def optimizers() -> list[dict[str, Any]]:
    import numpy as np
    import torch
    from pquant.optimizers import pAdam, pSGD

    rng = np.random.default_rng(7)
    start = {"a": [0.5, -0.2, 0.05, -0.9, 0.0, 1e-3], "b": [0.3, -0.1]}
    gradients = [{name: np.round(rng.normal(0, 1, len(v)), 3) for name, v in start.items()} for _ in range(4)]
    cases = []
    for kind, p_norm, lambda_p in [(c, p, 0.1) for c in (pAdam, pSGD) for p in (0.5, 0.8, 1, 1.5, 2)] + [(pAdam, 1, 0.0)]:
        params = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start.items()}
        groups = [{"params": [params["a"]]}, {"params": [params["b"]], "lambda_p": 0.5}]
        optimizer, steps = kind(groups, lr=0.01, p_norm=p_norm, lambda_p=lambda_p), []
        for gradient in gradients:
            for name, g in gradient.items():
                params[name].grad = torch.tensor(g, dtype=torch.float32)
            optimizer.step()
            steps.append({name: v.detach().clone() for name, v in params.items()})
        call = f"{kind.__name__}([a, b with lambda_p=0.5], lr=0.01, p_norm={p_norm}, lambda_p={lambda_p})"
        cases.append({"optimizer": kind.__name__, "call": call, "p_norm": p_norm, "lambda_p": lambda_p, "steps": steps})
    return [{"start": start, "gradients": gradients, "lr": 0.01, "lambda_p_of_b": 0.5, "cases": cases}]


def a_search(optimize: dict[str, Any], seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """FITCompress on a small network and one hundred times the same batch."""
    import numpy as np
    import torch
    from pquant.core.torch.fit_compress import FITcompress

    config = config_of("fitcompress", fitcompress_parameters={"enable_fitcompress": True, **optimize})
    model, weights = network(config, seed)
    rng = np.random.default_rng(seed + 100)
    x, y = np.round(rng.normal(0, 1, (6, SHAPES[0][1])), 2).astype(np.float32), rng.integers(0, SHAPES[1][0], 6)
    batch, loss = [(torch.tensor(x), torch.tensor(y))], torch.nn.CrossEntropyLoss()
    search = FITcompress(model, "cpu", batch, loss, config, input_shape=(SHAPES[0][1],))
    return search, config, {"weights": weights, "x": x, "y": y, "options": optimize, "loss": "cross entropy, the batch's mean"}


def pieces() -> dict[str, Any]:
    """The parts of the search that can be asked alone, at its first node."""
    import numpy as np
    import torch

    search, _, given = a_search({"pruning_schedule": {"start": 0, "end": -2, "steps": 5}}, 3)
    start, fit = search.initial_node, search.fit_computer
    node = {"FeM": start.FeM, "pruning_schedule": search.pruning_schedule}
    quantized, i, f = search.add_quantization(search.model, start.unquantized_weights, [4, 3])
    total, own = fit.get_FIT_old(FeM=start.FeM, params_after=start.parameters, same_theta=True)
    pruned, _ = search.add_pruning(start, start.parameters, own, 0.4)
    trace = [float(torch.sum(v)) for v in start.FeM]
    costs = {}
    for name, (params, bits) in {"quantized": (quantized, [4, 3]), "pruned": (pruned, [31, 31])}.items():
        g, h, distance, rate = search.calculate_path_cost(start, params, start.FeM, bits)
        costs[name] = {"bits": bits, "params": params, "g": g, "f": h, "distance": distance, "rate": rate}
        costs[name]["FIT"] = fit.get_FIT_old(start.parameters, start.FeM, params)
        costs[name]["FIT_of_traces"] = fit.get_FIT_real_values(start.parameters, trace, params)
    squared = fit.squared_step_width_quantization(np.array([1.5, 2.0]), np.array([4, 3]))
    numbers = {"FIT_of_itself": total, "importance": own, "squared_step": {"range": [1.5, 2.0], "bits": [4, 3], "step2": squared}}
    goal = {"compression_goal": search.compression_goal, "integer_bits": i, "fractional_bits": f, "pruned_part": 0.4}
    return {**given, **node, **numbers, **goal, "costs": costs}


def searches() -> list[dict[str, Any]]:
    """Whole searches: the nodes in the order in which they were expanded, and the answer."""
    cases = []
    few = {"start": 0, "end": -2, "steps": 12}
    for optimize in (
        {"optimize_quantization": True, "optimize_pruning": True, "pruning_schedule": few, "compression_goal": 0.05},
        {"optimize_quantization": True, "optimize_pruning": False, "compression_goal": 0.12},
        {"optimize_quantization": False, "optimize_pruning": True, "pruning_schedule": few, "compression_goal": 0.3},
        {
            "optimize_quantization": True,
            "optimize_pruning": True,
            "pruning_schedule": few,
            "compression_goal": 0.08,
            "greedy_astar": False,
        },
    ):
        search, config, given = a_search(optimize, 5)
        path, expand = [], search.create_neighbours

        def follow(node: Any, expand: Callable = expand, path: list = path) -> None:
            expand(node)
            path.append(describe(node))

        search.create_neighbours = follow
        goal, answer, _, masks = search.astar(config)
        settings = config.fitcompress_parameters.model_dump(mode="json")
        found = {**describe(goal), "params": goal.parameters, "masks": masks, **answer}
        cases.append({**given, "parameters": settings, "path": path, "found": found})
    return cases


def describe(node: Any) -> dict[str, Any]:
    finite = {name: v if v < 1e30 else None for name, v in (("f", node.fscore), ("distance", node.full_dist))}
    rate, part = node.curr_compression_rate, node.pruning_metrics["percentage"]
    return {"bits": node.quant_config, "pruned_part": part, "state": node.state, "g": node.gscore, **finite, "rate": rate}


def others(plain: Callable[[Any], Any]) -> dict[str, Any]:
    return plain(
        {"budgets": budgets(), "optimizers": optimizers()[0], "fitcompress": {"pieces": pieces(), "searches": searches()}}
    )
