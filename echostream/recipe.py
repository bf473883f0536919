"""Recipes: YAML files of fairseq-train's flags, for whichever language pair.

``{pair}`` in a recipe's texts is the pair it is run for: what was said on the command line, the recipe's own key
``pair``, or that of the file ``pair.yaml`` beside the recipe or one folder above.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echostream.errors import ConfigError
from echostream.loading import read_mapping

PAIR = "{pair}"
PAIR_FILE = "pair.yaml"
_SHIPPED = (Path(__file__).parent / "configs", Path(__file__).resolve().parents[1] / "configs")  # installed; a clone


def find_recipe(name: str | Path) -> Path:
    """The file of that name, or, where there is none, the package's own: ``configs/scratch/asr.yaml`` from anywhere."""
    path = Path(name)
    if not path.exists() and not path.is_absolute():
        inside = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
        for folder in _SHIPPED:
            if inside and (folder / Path(*inside)).is_file():
                return folder / Path(*inside)
    return path


def read_flags(path: str | Path, pair: str | None = None) -> dict[str, Any]:
    """The flat ``key: value`` pairs of a recipe, keys with hyphens, without ``pair``, which is filled in.

    Args:
        pair: instead of the recipe's or ``pair.yaml``'s, such as ``fr-en``.

    Raises:
        ConfigError: the file is missing, is not YAML, holds nested values, or nothing tells the pair that it asks for.
    """
    path = find_recipe(path)
    values = read_mapping(path)
    for key, value in values.items():
        if isinstance(value, dict):
            raise ConfigError(f"configuration file {path}: {key} is nested; every key is one flag of fairseq-train")
    own = values.pop("pair", None)
    return fill({str(key).replace("_", "-"): value for key, value in values.items()}, path, pair or own)


def fill(value: Any, path: Path, pair: str | None = None) -> Any:
    """``value`` (of the recipe ``path``: text, list, mapping ...) with the pair in place of every ``{pair}``.

    Raises:
        ConfigError: nothing tells the pair.
    """
    if isinstance(value, dict):
        return {key: fill(item, path, pair) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, path, pair) for item in value]
    if not isinstance(value, str) or PAIR not in value:
        return value
    return value.replace(PAIR, _checked(pair, "the pair") if pair else pair_of(path))


def pair_of(path: Path) -> str:
    """What ``pair.yaml`` beside a recipe, or one folder above, says.

    Raises:
        ConfigError: there is none, or it says nothing.
    """
    for folder in (path.parent, path.parent.parent):
        if (folder / PAIR_FILE).is_file():
            return _checked(read_mapping(folder / PAIR_FILE).get("pair"), f"pair in {folder / PAIR_FILE}")
    raise ConfigError(f"configuration file {path} is for any language pair; say which: --pair fr-en")


def _checked(pair: Any, what: str) -> str:
    if not isinstance(pair, str) or not pair or "/" in pair or pair.startswith((".", "-")) or PAIR in pair:
        raise ConfigError(f"{what} is {pair!r}; it names folders under data/ and runs/, such as fr-en")
    return pair


__all__ = ["fill", "find_recipe", "pair_of", "read_flags"]
