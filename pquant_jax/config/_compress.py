"""What `pruning`, `constraints` and `quantization` stand for: one chain of transforms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pquant_jax import _tree, constrain, prune, quantize, transforms
from pquant_jax._base import SiteSpec, Transform
from pquant_jax._errors import ConfigError, did_you_mean
from pquant_jax.config._beta import beta_value
from pquant_jax.config._build import loss
from pquant_jax.config._load import parse, read_yaml
from pquant_jax.config._methods import METHODS, METRICS, SEARCHES, Block, Constraint, Groups, Section, arguments_of
from pquant_jax.config._names import named
from pquant_jax.config._quantizers import Bits, formats_of
from pquant_jax.config._schema import Experiment
from pquant_jax.graph import Instrumented
from pquant_jax.train import load_final

Masks = Callable[[Mapping[str, Any]], dict[str, Any]]


def compresses(experiment: Experiment) -> bool:
    """Is the trained model another one than the float baseline's?"""
    return any((experiment.pruning, experiment.constraints, experiment.training.pnorm_decay, quantizes(experiment)))


def quantizes(experiment: Experiment) -> bool:
    """Has the trained model a fixed-point format everywhere?"""
    return experiment.quantization is not None or experiment.search is not None


def compression(experiment: Experiment, inst: Instrumented) -> Transform | None:
    """The chain of pruning, constraints and quantization in the configured order; None if there is nothing of it."""
    held = [_constraint(f"constraints.{n}", section, experiment, inst) for n, section in enumerate(experiment.constraints)]
    held = [transforms.named(t, f"mdmm_{n}") if n > 1 else t for n, t in enumerate(held, 1)]
    first = [t for t in (_pruning(experiment, inst), *held) if t is not None]
    last = _quantization(experiment.quantization, inst)
    links = [*first, *([last] if last is not None else [])]
    if experiment.order == "quantize_then_prune":
        links = [*links[len(first) :], *first]
    return transforms.chain(*links) if links else None


def _pruning(experiment: Experiment, inst: Instrumented) -> Transform | None:
    section = experiment.pruning
    if section is None:
        return None
    made = _called(METHODS[section.method], section, roles=inst.roles, seed=experiment.seed)
    if section.where is None:
        return made
    where = section.where
    _check_where("pruning.where", where, inst)
    return transforms.masked(made, lambda path, leaf: _tree.is_kernel(path, leaf) and _tree.matches(where, path))


def search(experiment: Experiment, inst: Instrumented, params: Any, data: Any, model_state: Any) -> Any:
    """What the search of `search` finds for trained parameters: masks, formats and figures."""
    section: Any = experiment.search
    rules = {"where": section.where} if getattr(section, "where", None) is not None else {}
    given = {"inst": inst, "params": params, "data": data, "model_state": model_state, "loss": loss(experiment)}
    return _called(SEARCHES[section.method], section, **given, seed=experiment.seed, **rules)


def _called(factory: Callable, section: Section, **offered: Any) -> Any:
    """`factory` with the keys of its section, and those of `offered` that it takes."""
    arguments = {name: getattr(section, name) for name in arguments_of(factory) if name != "where"}
    taken = inspect.signature(factory).parameters
    arguments |= {name: value for name, value in offered.items() if name in taken}
    return factory(**{name: _value(v) for name, v in arguments.items()})


def _value(given: Any) -> Any:
    if isinstance(given, Groups):
        return groups_of(given)
    return (given.h, given.w) if isinstance(given, Block) else given


def groups_of(section: Groups) -> transforms.Groups:
    """The value that a `groups` section stands for."""
    name, value = next((name, value) for name, value in section if value is not None)
    if name == "name":
        return value
    made = {"nm": transforms.NM, "block": transforms.Block, "cross": transforms.Cross}.get(name)
    if made is not None:
        return made(**value.model_dump())
    return transforms.Reuse(value) if name == "reuse" else transforms.Heads(value)


def _check_where(key: str, where: str, inst: Instrumented) -> None:
    chosen = _tree.select(inst.model.params, where)
    if not any(_tree.is_kernel(path, leaf) for path, leaf in chosen.items()):
        raise ConfigError(f"{key} is {where!r}, which matches no kernel, only {', '.join(sorted(chosen))}")


def _constraint(key: str, section: Constraint, experiment: Experiment, inst: Instrumented) -> Transform:
    metric, absent = _metric(key, section, experiment, inst)
    prunes = absent if section.prunes is True else section.prunes or None
    fields = section.model_dump(include={"kind", "target", "scale", "damping", "initial", "compat", "rate"})
    return constrain.mdmm(metric, prunes=prunes, **fields)


def _metric(key: str, section: Constraint, experiment: Experiment, inst: Instrumented) -> tuple[Any, Masks | None]:
    """The metric, and the masks of what it counts as absent; None where it is not about weights."""
    chosen = section.metric
    if chosen.name == "own":
        return named(chosen.function, f"{key}.metric"), None
    factory = METRICS[chosen.name]
    if chosen.name == "ebops":
        if experiment.quantization is None:
            raise ConfigError(f"{key}.metric is 'ebops', which needs bit-widths: give a quantization section")
        return factory(inst.ebops, unit=chosen.unit or inst.reference8), None
    if chosen.where is not None:
        _check_where(f"{key}.metric.where", chosen.where, inst)
    rules = {} if chosen.where is None else {"where": chosen.where}
    made = _called(factory, chosen, roles=inst.roles, **rules)
    if isinstance(made, constrain.Patterns):
        return made.metric, made.masks
    masks = constrain.metrics.group_masks(_absent(chosen), epsilon=chosen.epsilon, roles=inst.roles)
    return made, lambda kernels: masks({p: w for p, w in kernels.items() if not rules or _tree.matches(chosen.where, p, w)})


def _absent(metric: Any) -> transforms.Groups:
    """The groups that the metric counts."""
    if metric.name == "group_sparsity":
        return groups_of(metric.groups)
    if metric.name == "dsp_sparsity":
        return transforms.Reuse(metric.reuse)
    if metric.name == "bram_sparsity":
        together = constrain.metrics.bram_group(precision=metric.precision, bram_width=metric.bram_width)
        return transforms.Reuse(metric.reuse * together)
    return "weight"


def _quantization(section: Any, inst: Instrumented) -> Transform | None:
    if section is None:
        return None
    if section.method == "frozen":
        return _frozen(section.of, inst)
    factory = getattr(quantize, section.method)
    formats = {name: format_of(bits) for name in formats_of(section.method) if (bits := getattr(section, name)) is not None}
    given = section.model_dump(exclude={"method", "rules", *formats_of(section.method)})
    given |= {"beta": beta_value(given["beta"])} if "beta" in given else {}
    offered = {"cost": inst.ebops} if "cost" in inspect.signature(factory).parameters else {}
    return factory(inst.sites, rules=_rules(section, inst.sites), **formats, **given, **offered)


def _frozen(path: str, inst: Instrumented) -> Transform:
    """Formats and masks of a final.npz, or of the run that holds it."""
    where = Path(path) / "final.npz" if Path(path).is_dir() else Path(path)
    view, _ = load_final(where, inst)
    if missing := sorted(inst.sites.keys() - view.sites.keys()):
        raise ConfigError(f"quantization.of is {path!r}, which has no format for {missing[0]}; give a run that was quantized")
    return transforms.chain(prune.frozen(view.masks), quantize.frozen(inst.sites, view.sites))


def quantizer(text: str | Mapping[str, Any], inst: Instrumented) -> Transform:
    """The quantizer of a `quantization` section: YAML such as `pq.template` writes, or a mapping.

    Raises: ConfigError, one line, as for a configuration file.

    >>> import jax.numpy as jnp, pquant_jax as pq
    >>> inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 1))}), jnp.ones((1, 2)))
    >>> quantizer("{method: fixed, weights: {i: 1, f: 3}}", inst).formats["w"].format.f
    3.0
    """
    section = read_yaml(text, "the quantizer") if isinstance(text, str) else text
    made = _quantization(parse({"quantization": section}).quantization, inst)
    if made is None:
        raise ConfigError("the quantizer's section is empty, expected at least 'method: fixed'")
    return made


def format_of(section: Bits) -> quantize.Format:
    """The `pq.quantize.Format` of a `weights` or `activations` section."""
    return quantize.Format(**section.model_dump())


def _rules(section: Any, sites: Mapping[str, SiteSpec]) -> list[tuple[_tree.Where, Mapping[str, Any]]]:
    """The rules of a section, each with the fields that it gives."""
    made: list[tuple[_tree.Where, Mapping[str, Any]]] = []
    for n, rule in enumerate(section.rules):
        where = rule.where if rule.kind is None else quantize.of_kind(rule.kind, where=rule.where or ".*")
        if not any(_tree.matches(where, name, spec) for name, spec in sites.items()):
            key, value = ("where", rule.where) if rule.where is not None else ("kind", rule.kind)
            known = sites if rule.where is not None else {spec.kind for spec in sites.values()}
            raise ConfigError(
                f"quantization.rules.{n}.{key} is {value!r}, which matches no site; {did_you_mean(str(value), known)}"
            )
        made.append((where, {k: v for k, v in rule.model_dump(exclude={"where", "kind"}).items() if v is not None}))
    return made
