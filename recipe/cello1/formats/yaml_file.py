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

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which PyYAML keeps the last value without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"the key {twice[0]!r} stands twice in one mapping; remove the wrong one")
            return super().construct_mapping(node, deep)

    n_aliases = depth = 0
    reason = f"is longer than {_LONGEST:,} bytes; give the right file"
    try:
        with open(path, "rb") as file:
            if len(content := file.read(_LONGEST + 1)) <= _LONGEST:
                for event in yaml.parse(text := content.decode(), Loader=yaml.SafeLoader):
                    n_aliases += isinstance(event, yaml.AliasEvent)
                    depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                    if depth > _DEEPEST:
                        break
                else:
                    if n_aliases <= _MOST_ALIASES:
                        return yaml.load(text, Loader)
                    reason = f"has {n_aliases} aliases, and {_MOST_ALIASES} may be; write the values out"
    except (yaml.YAMLError, ValueError) as error:
        reason = f"is not YAML: {' '.join(str(error).split())}"
    if depth > _DEEPEST:
        reason = f"is nested more than {_DEEPEST} deep; write it flatter"
    raise ValueError(f"{name}: {path} {reason}")


def read_config(path: str | Path, name: str) -> DictConfig:
    """Read a configuration as Hydra does."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(found := read_yaml(path, name), dict):
        raise ValueError(f"{name}: {path} must give settings their values, got {type(found).__name__}")
    try:
        return OmegaConf.load(path)
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}: {path} is no configuration: {' '.join(str(error).split())}") from None
