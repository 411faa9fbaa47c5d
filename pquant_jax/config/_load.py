"""YAML to `Experiment`: overrides, and every mistake as one line that names the key."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from pquant_jax._errors import ConfigError, did_you_mean
from pquant_jax.config._names import find_file
from pquant_jax.config._quantizers import Frozen
from pquant_jax.config._schema import SHORT, Experiment

Loc = tuple[str | int, ...]
TAGS: Final = {"method", "name"}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a YAML file, paths of data and checkpoints made absolute.

    overrides: "training.epochs.train=5", applied in order; values are YAML.  The file's folder joins `folders`, and its
    name is the experiment's where it gives none.
    Raises: ConfigError, one line, for a missing file, bad YAML, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ConfigError(f"configuration file {str(path)!r} {what}; expected a YAML file such as configs/jets_hgq.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} can't be read: {error}") from error
    raw = read_yaml(text, str(path))
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {_shown(raw)}, expected 'key: value' lines; `pquant-jax schema` lists the keys")
    raw = dict(raw or {})
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "_", path.stem).lstrip("._-") or "run")
    experiment = parse(raw, overrides)
    here = str(path.absolute().parent)
    folders = [str(path.absolute().parent / f) for f in experiment.folders]
    experiment = experiment.model_copy(update={"folders": list(dict.fromkeys([here, *folders]))})
    return _absolute(experiment)


def parse(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a mapping; errors as for `load`.

    >>> parse({"training": {"epochs": 3}}, ["training.learning_rate=1e-4"]).training.learning_rate.start
    0.0001
    >>> parse({"training": {"batchsize": 3}})
    Traceback (most recent call last):
    pquant_jax._errors.ConfigError: unknown key 'training.batchsize'; did you mean 'batch_size'?
    """
    merged: dict[str, Any] = dict(raw)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set got {text!r}, expected KEY=VALUE such as training.epochs.train=5")
        merged = _set(merged, key.strip().split("."), read_yaml(value, f"--set {key.strip()}"), "")
    try:
        experiment = Experiment.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_message(error)) from None
    loss, metric = ("cross_entropy", "accuracy") if experiment.task == "classification" else ("squared_error", "mse")
    return experiment.model_copy(update={"loss": experiment.loss or loss, "metric": experiment.metric or metric})


def dump(experiment: Experiment) -> str:
    """The experiment as YAML with every default written out; `load` reads it back."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _absolute(experiment: Experiment) -> Experiment:
    data, training = experiment.data, experiment.training
    if data.source.endswith(".npz"):
        data = data.model_copy(update={"source": str(find_file(data.source, experiment.folders))})
    if training.init is not None:
        training = training.model_copy(update={"init": str(find_file(training.init, experiment.folders))})
    quantization = experiment.quantization
    if isinstance(quantization, Frozen):
        quantization = quantization.model_copy(update={"of": str(find_file(quantization.of, experiment.folders))})
    return experiment.model_copy(update={"data": data, "training": training, "quantization": quantization})


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.  where: file or option, for the error.  Raises: ConfigError, with line and column."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeats(node, where)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}{place}: not YAML: {problem}") from error


def _refuse_repeats(node: Any, where: str) -> None:
    """YAML readers keep the last of two equal keys without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(f"{where}, line {key.start_mark.line + 1}: the key {key.value!r} appears twice; keep one")
            seen.add(str(key.value))
            _refuse_repeats(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeats(value, where)


def _set(tree: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    """`tree` with the value at `keys` replaced; short forms on the way are spelled out, missing sections made."""
    if not keys:
        return value
    section = re.sub(r"\.\d+", "", path)
    if section in SHORT and not isinstance(tree, dict) and tree is not None:
        tree = SHORT[section](tree)
    if isinstance(tree, list) and keys[0].isdigit() and int(keys[0]) < len(tree):
        n, inside = int(keys[0]), f"{path}.{keys[0]}"
        return [_set(v, keys[1:], value, inside) if j == n else v for j, v in enumerate(tree)]
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"--set {path}.{'.'.join(keys)}: {path} is {_shown(tree)}, which has no parts; set {path} itself")
    inside = f"{path}.{keys[0]}".lstrip(".")
    return {**(tree or {}), keys[0]: _set((tree or {}).get(keys[0]), keys[1:], value, inside)}


def _message(error: ValidationError) -> str:
    """One line for the first mistake, unknown keys before wrong values."""
    found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    first, more = found[0], len(found) - 1
    loc: Loc = tuple(first["loc"])
    path = ".".join(str(p) for p in _without_tags(loc)) or "the configuration"
    rest = f" (and {more} more mistake{'s' * (more > 1)})" if more else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {path!r}; {_suggest(loc)}{rest}"
    if first["type"] == "union_tag_not_found":
        return f"{path}.{_discriminator(first)} is missing, expected {_tags(loc)}{rest}"
    if first["type"] == "union_tag_invalid":
        tag = first.get("ctx", {})["tag"]
        hint = did_you_mean(str(tag), _known(loc))
        hint = f"; {hint}" if hint.startswith("did") else ""  # the others stand there already
        return f"{path}.{_discriminator(first)}: received {tag!r}, expected {_tags(loc)}{hint}{rest}"
    if first["type"] == "missing":
        return f"{path} is missing{rest}"
    return f"{path}: received {_shown(first['input'])}, expected {_expected(first)}{rest}"


def _expected(error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    words = {
        "value_error": lambda: str(context["error"]),
        "literal_error": lambda: str(context["expected"]),
        "bool_type": lambda: "true or false",
        "bool_parsing": lambda: "true or false",
        "float_type": lambda: "a number",
        "finite_number": lambda: "a finite number",
        "int_type": lambda: "a whole number",
        "string_type": lambda: "a text; put it in quotes",
        "list_type": lambda: "a list",
        "dict_type": lambda: "a section of 'key: value' lines",
        "model_type": lambda: "a section of 'key: value' lines",
        "model_attributes_type": lambda: "a section of 'key: value' lines",
        "greater_than": lambda: f"a number above {context['gt']:g}",
        "greater_than_equal": lambda: f"a number of {context['ge']:g} or more",
        "less_than": lambda: f"a number below {context['lt']:g}",
        "less_than_equal": lambda: f"a number of {context['le']:g} or less",
        "string_pattern_mismatch": lambda: "letters, digits, '.', '_' and '-', beginning with a letter or digit",
    }
    return words[error["type"]]() if error["type"] in words else error["msg"]


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section models inside an annotation: of `HGQ | Fixed | None`, the first two."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in typing.get_args(annotation) for m in _sections(part)]


def _tag(section: type[BaseModel]) -> str | None:
    """The one value of the key that says which of several sections this is."""
    for name in TAGS & section.model_fields.keys():
        values = typing.get_args(section.model_fields[name].annotation)
        if len(values) == 1:
            return str(values[0])
    return None


def _discriminator(error: Mapping[str, Any]) -> str:
    return str(error["ctx"]["discriminator"]).strip("'")


def _known(loc: Loc) -> list[str]:
    _, sections = _walk((*loc, ""))
    return [str(_tag(s)) for s in sections]


def _tags(loc: Loc) -> str:
    *others, last = map(repr, _known(loc))
    return f"{', '.join(others)} or {last}"


def _walk(loc: Loc) -> tuple[list[str | int], list[type[BaseModel]]]:
    """The keys of `loc` without the tags that pydantic adds for a union, and the sections that hold the last one."""
    keys: list[str | int] = []
    sections: list[type[BaseModel]] = [Experiment]
    for n, part in enumerate(loc):
        tagged = [s for s in sections if _tag(s) == part]
        if tagged and len(sections) > 1:
            sections = tagged
            continue
        keys.append(part)
        if n == len(loc) - 1:
            break
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        if not isinstance(part, int):
            sections = [m for field in fields for m in _sections(field.annotation)]
    return keys, sections


def _without_tags(loc: Loc) -> list[str | int]:
    return _walk(loc)[0]


def _suggest(loc: Loc) -> str:
    """Where the key belongs if it exists elsewhere, else the nearest names beside it."""
    keys, sections = _walk(loc)
    name, own = keys[-1], ".".join(k for k in keys if isinstance(k, str))
    elsewhere = list(dict.fromkeys(p for p in _paths(Experiment, "") if p.rpartition(".")[2] == name))
    if own in elsewhere:
        methods = [s for s in _walk(tuple(keys))[1] if name in s.model_fields]
        kind = "method" if "method" in methods[0].model_fields else "metric"
        owners, this = (" or ".join(repr(_tag(s)) for s in found) for found in (methods, sections))
        return f"it belongs to {kind} {owners}, this is {this}"
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return did_you_mean(str(name), {n for section in sections for n in section.model_fields})


def _paths(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _sections(field.annotation):
            yield from _paths(inner, f"{prefix}{name}.")
