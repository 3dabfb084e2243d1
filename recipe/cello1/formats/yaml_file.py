"""YAML of whoever wrote it: of bounded length, not too deep, with few aliases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MOST_ALIASES = 20  # aliases of aliases make gigabytes of a few hundred bytes
_DEEPEST = 50  # lists and mappings in each other; PyYAML takes longer for each, and no end with many
_LONGEST = 1 << 18  # bytes


def read_yaml(path: str | Path, name: str) -> Any:
    """Read plain values; ``name`` is the parameter that named the file."""
    import yaml

    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST + 1).decode("utf-8")
        if len(text) > _LONGEST:
            reason = f"is longer than {_LONGEST:,} bytes; give the right file"
        else:
            n_aliases, depth = _count(text)
            if depth > _DEEPEST:
                reason = f"is nested more than {_DEEPEST} deep; write it flatter"
            elif n_aliases > _MOST_ALIASES:
                reason = f"has {n_aliases} aliases, and {_MOST_ALIASES} may be; write the values out"
            else:
                return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = f"is not YAML: {' '.join(str(error).split())}"
    msg = f"{name}: {path} {reason}"
    raise ValueError(msg)


def _count(text: str) -> tuple[int, int]:
    """Count the aliases, and how deep it goes, to a level too many."""
    import yaml

    n_aliases = depth = deepest = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        n_aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        deepest = max(deepest, depth)
        if deepest > _DEEPEST:
            break
    return n_aliases, deepest


def read_config(path: str | Path, name: str) -> DictConfig:
    """Read a configuration as Hydra does."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(found := read_yaml(path, name), dict):
        msg = f"{name}: {path} must give settings their values, got {type(found).__name__}"
        raise ValueError(msg)
    try:
        return OmegaConf.load(path)
    except OmegaConfBaseException as error:
        msg = f"{name}: {path} is no configuration: {' '.join(str(error).split())}"
        raise ValueError(msg) from None
