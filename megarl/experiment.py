"""From an experiment's file and ``key=value`` overrides to a checked ``RunConfig``, and to YAML and back.

An experiment is a Python file that defines ``config`` (a ``RunConfig``, or a function that returns one). Dotted
overrides are applied on top, checked against the dataclass types.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from megarl.aliases import VALUE_ALIASES, translate
from megarl.config import AlgorithmConfig, RunConfig
from megarl.registry import load_file
from megarl.utils.checks import check_choice


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key of a tree of dictionaries that holds a value."""
    keys = []
    for name, value in tree.items():
        keys += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + str(name)]
    return keys


def _unknown(key: str, tree: DictConfig) -> str:
    known = _leaves(OmegaConf.to_container(tree, resolve=False))
    last = {k.rpartition(".")[2]: k for k in reversed(known)}
    near = difflib.get_close_matches(key, known, n=1) or [
        last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
    ]
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _override(tree: DictConfig, key: str, value: str) -> DictConfig:
    """Return ``tree`` with ``key`` set; a single value becomes a list where one is expected, ``{}`` empties a dict."""
    try:
        node = OmegaConf.select(tree, key)
        if isinstance(node, ListConfig) and not value.startswith("["):
            value = f"[{value}]"
        if value == "{}" and OmegaConf.get_type(node) is dict:  # merging it would leave everything as it is
            OmegaConf.update(tree, key, {}, merge=False)
            return tree
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{key}={value}"]))
    except ConfigKeyError as error:
        raise ValueError(_unknown(key, tree)) from error
    except (OmegaConfBaseException, TypeError, YAMLError) as error:
        raise ValueError(f"{key}={value}: {str(error).splitlines()[0]}") from error


def _to_object(tree: DictConfig) -> RunConfig:
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


Presets = Mapping[str, Mapping[str, Any]]  # name -> fields of AlgorithmConfig, for ``algorithm=name``
# Knobs of how a step is run rather than of what it computes; a preset leaves them alone unless it has them.
STEP_KNOBS = ("plugins", "num_minibatches", "num_epochs")


def _take_preset(tree: DictConfig, name: str, presets: Presets) -> None:
    """Put a preset in the place of ``tree.algorithm``."""
    check_choice("algorithm", name, presets)
    kept = {knob: getattr(OmegaConf.to_object(tree.algorithm), knob) for knob in STEP_KNOBS}
    tree.algorithm = OmegaConf.structured(AlgorithmConfig(**(kept | presets[name])))


def apply_overrides(config: RunConfig, overrides: list[str], presets: Presets | None = None) -> RunConfig:
    """Return a copy of ``config`` with ``dotted.key=value`` overrides applied, every field checked against its type.

    ``algorithm=name`` puts the whole algorithm of that name in ``presets`` in the place of the present one; overrides
    behind it change it. Raises ``ValueError`` that names the key: unknown (with the nearest known one), of the wrong
    type, or impossible.
    """
    tree = OmegaConf.structured(config)
    for override in overrides:
        typed, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not an override: write key=value")
        if typed == "algorithm" and presets is not None and not value.startswith("{"):
            _take_preset(tree, value, presets)
            continue
        for key in translate(typed):
            translated = VALUE_ALIASES.get(key, {}).get(value, value)
            if (key, translated) != (typed, value):
                print(f"{override} is {key}={translated} in megarl", file=sys.stderr)
            tree = _override(tree, key, translated)
    return _to_object(tree)


def load_experiment(path: str | Path, overrides: list[str] | None = None, presets: Presets | None = None) -> RunConfig:
    """Run an experiment file (or read a run's config.yaml) and return its configuration with ``overrides`` applied."""
    if Path(path).suffix in (".yaml", ".yml"):
        try:
            config = _to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
        except OmegaConfBaseException as error:
            raise ValueError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from error
        except (ValueError, TypeError, YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error
    else:
        module = load_file(path)
        if not hasattr(module, "config"):
            raise ValueError(f"{path} defines no `config`: an experiment is a file with config = RunConfig(...)")
        config = module.config() if callable(module.config) else module.config
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path}: `config` is a {type(config).__name__}, not a RunConfig")
    return apply_overrides(config, overrides or [], presets)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, every key present."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
