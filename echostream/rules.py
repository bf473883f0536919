"""What values from a file must be: tables of rules, a key each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echostream.loading import Error, shown


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        kind: its type; ``float`` takes whole numbers too, ``dict`` has text as keys.
        least, most: bounds of a number, or of a text's or list's length.
        choices: the values allowed.
        needed: must the key be there? Others may also be null.
        of: the rule of every item of a list, or value of a mapping.
    """

    kind: type
    least: float | None = None
    most: float | None = None
    choices: tuple[Any, ...] | None = None
    needed: bool = False
    of: Rule | None = None

    def wanted(self) -> str:
        """What would be right, for a message."""
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        name = {
            int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list",
            dict: "key: value lines",
        }[self.kind]  # fmt: skip
        unit = "" if self.kind in (int, float) else " letters" if self.kind is str else " entries"
        if self.least is not None and self.most is not None:
            return f"{name} from {self.least:g} to {self.most:g}{unit}"
        if self.least is not None:
            return f"{name} of at least {self.least:g}{unit}"
        return f"{name} of at most {self.most:g}{unit}" if self.most is not None else name

    def fits(self, value: Any) -> bool:
        kinds: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.kind is dict and not all(isinstance(key, str) for key in value):
            return False
        if self.choices is not None:
            return value in self.choices
        size: Any = value if self.kind in (int, float) else 0 if self.kind is bool else len(value)
        if isinstance(size, float) and not math.isfinite(size):
            return False
        return (self.least is None or size >= self.least) and (self.most is None or size <= self.most)


def check(values: Any, rules: Mapping[str, Rule], where: str, error: Error, others: bool = True) -> None:
    """Compare a mapping with its rules.

    Args:
        where: the file, for the message.
        others: may there be keys without a rule?

    Raises:
        EchoStreamError: (``error``) naming the first key that does not fit.
    """
    if not isinstance(values, dict):
        raise error(f"{where} is {shown(values)}; it must be key: value lines")
    for key in values:
        if not isinstance(key, str) or (key not in rules and not others):
            raise error(f"{where} has the unknown key {shown(key)}; known: {', '.join(rules)}")
    for key, rule in rules.items():
        if key not in values:
            if rule.needed:
                raise error(f"{where} lacks the key {key!r}: {rule.wanted()}")
        elif values[key] is not None or rule.needed:
            _check_value(values[key], rule, f"{where}: {key}", error)


def _check_value(value: Any, rule: Rule, where: str, error: Error) -> None:
    if not rule.fits(value):
        raise error(f"{where} is {shown(value)}; it must be {rule.wanted()}")
    if rule.of is not None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check_value(item, rule.of, f"{where}.{key}", error)
