"""YAML and `key=value` settings -> experiments and machine facts; what is wrong is said with its key and a near one."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cranium.config import MACHINE_KEYS, Experiment, Frozen, Machine, UserError

MAX_YAML_BYTES = 1 << 20
T = TypeVar("T", bound=Frozen)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises `UserError` for a file that is absent, too large, unsafe or no mapping."""
    if not path.is_file():
        raise UserError(
            "NO_FILE", f"{path} does not exist; give the path of a YAML file, e.g. experiments/demo.yaml"
        )
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UserError("YAML_SIZE", f"{path} is larger than {MAX_YAML_BYTES} bytes, which no config is")
    text = path.read_text(encoding="utf-8-sig")
    if re.search(r"(?m)(^|[\s:\[{,-])[&*][A-Za-z0-9_]", re.sub(r"(?m)#.*$|\"[^\"]*\"|'[^']*'", "", text)):
        raise UserError("YAML_ALIAS", f"{path} uses YAML anchors or aliases; write the values out")
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError("YAML", f"{path}: {' '.join(str(error).split())}") from error
    except (RecursionError, ValueError) as error:  # nested a thousand deep; a number of thousands of digits
        raise UserError("YAML", f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError("YAML", f"{path} holds no mapping; the first line should read `name: ...`")
    return content


def share(start: Path | None = None) -> Path:
    """The folder that holds `datasets/` and `experiments/`.

    The nearest folder above a given YAML that has cohort cards, else what the wheel installed, else this clone.
    """
    for folder in start.absolute().parents if start else ():
        if any((folder / "datasets").glob("*.yaml")):
            return folder
    installed = Path(__file__).parent / "share"
    return installed if installed.is_dir() else Path(__file__).parents[2]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def with_base(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if base := content.pop("base", None):
        below = read_yaml(path.parent / str(base))
        if "base" in below:
            raise UserError(
                "BASE", f"{path.parent / str(base)} has a `base:` of its own; one level is allowed"
            )
        content = _merge(below, content)
    return content


def validated(model: type[T], content: Mapping[str, Any], where: str) -> T:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(
            "CONFIG", "; ".join(f"{where}: {_explain(model, e)}" for e in error.errors())
        ) from None


def _explain(model: type[Frozen], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = sorted(_keys(model))
        near = difflib.get_close_matches(key, known, 1) or difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], 1
        )
        return f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    return f"`{key}`: {message}" if key else message


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in _kinds(field.annotation):
            yield from _keys(kind, f"{prefix}{name}.")


def _kinds(annotation: Any) -> Iterable[type[BaseModel]]:
    """The models that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def nested(overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b=1 a.c=x` as a tree of values read as YAML."""
    tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError("USAGE", f"`{item}` is no setting; write key=value, e.g. pretrain.steps=100")
        try:
            value = yaml.load(text, _Loader) if text else None
        except (yaml.YAMLError, RecursionError, ValueError):
            value = text
        branch: Any = value
        for part in reversed(key.split(".")):
            branch = {part: branch}
        tree = _merge(tree, branch)
    return tree


def load_experiment(path: Path, overrides: Iterable[str] = ()) -> Experiment:
    """An experiment from YAML, its `base:` below it and `key=value` overrides on top."""
    return validated(Experiment, _merge(with_base(path), nested(overrides)), str(path))


def experiment_of(cohort: str, overrides: Iterable[str] = ()) -> Experiment:
    """The smallest experiment on one cohort: `cranium ingest datasets/adni.yaml`."""
    small = {"name": cohort, "ingest": {"cohorts": [cohort]}}
    return validated(Experiment, _merge(small, nested(overrides)), cohort)


def load_machine(overrides: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> Machine:
    """Machine facts: `key=value` first, then `CRANIUM_<KEY>` (`CRANIUM_RAW_<COHORT>`), then defaults."""
    content: dict[str, Any] = {}
    for key in MACHINE_KEYS:
        if key != "raw" and (value := environ.get(f"CRANIUM_{key.upper()}")):
            content[key] = value
    prefix = "CRANIUM_RAW_"
    content["raw"] = {k.removeprefix(prefix).lower(): v for k, v in environ.items() if k.startswith(prefix)}
    return validated(Machine, _merge(content, nested(overrides)), "machine")


def is_machine_key(item: str) -> bool:
    return item.partition("=")[0].split(".")[0] in MACHINE_KEYS
