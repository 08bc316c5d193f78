"""YAML files of the launcher: read quickly, checked key by key, every mistake of a file reported at once.

:func:`read_yaml` refuses what PyYAML accepts in silence (a key given twice). A :class:`Table` hands out the keys of one mapping with
their types; what is wrong goes to a shared list of problems, which :func:`raise_problems` turns into one :class:`ConfigError`.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from berth.errors import BerthError, ConfigError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it: ten times faster


class _StrictLoader(_Loader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value if isinstance(key.value, str) else id(key))
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises :class:`ConfigError` naming file and line."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 - a subclass of the safe loader
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or error}") from error


def suggestion(wrong: object, valid: Iterable[object]) -> str:
    """``; did you mean A or B? Valid: ...``, to end a message about a name that is not known."""
    names = [str(name) for name in valid]
    close = difflib.get_close_matches(str(wrong), names, n=2)
    meant = f"; did you mean {' or '.join(close)}?" if close else ";"
    return f"{meant} valid: {', '.join(names)}"


def raise_problems(problems: Collection[str], title: str = "") -> None:
    """Raise all ``problems`` as one :class:`ConfigError`, one a line; nothing happens if there are none."""
    if problems:
        lines = [*([title] if title else []), *problems]
        raise ConfigError("\n  ".join(lines))


@contextlib.contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """An error for the user that the body raises becomes one more of ``problems``."""
    try:
        yield
    except BerthError as error:
        problems.append(str(error))


class Table:
    """One mapping of a YAML file. :meth:`take` its keys, then :meth:`close` it: keys nobody took are unknown.

    ``where`` names the mapping in messages; ``problems`` is filled. A value that is missing or wrong is noted and the type's
    empty value returned, so that reading goes on to the next mistake.
    """

    def __init__(self, value: Any, where: str, problems: list[str]) -> None:
        self.where, self.problems = where, problems
        if not isinstance(value, dict):
            problems.append(f"{where} must be a mapping of keys to values, not {_kind(value)}")
            value = {}
            self._broken = True
        else:
            self._broken = False
        self._values: dict[Any, Any] = value
        self._taken: list[str] = []

    def take(self, key: str, kind: type, default: Any = ..., *, least: float | None = None, choices: Collection[Any] | None = None) -> Any:
        """The value of ``key`` as ``kind``: str, int, float, bool, dict, list, or tuple (a list of strings).

        Without ``default`` the key is required. ``least`` is the smallest number allowed, ``choices`` the values allowed. Numbers
        may be written as text (PyYAML reads ``6e-3`` as text).
        """
        self._taken.append(key)
        if key not in self._values:
            if default is ... and not self._broken:
                self.problems.append(f"{self.where} lacks the key {key}")
            return kind() if default is ... else default
        value = self._values[key]
        converted = _convert(value, kind)
        if converted is None:
            self.problems.append(f"{self.where}: {key} must be {_NAMES[kind]}, not {_kind(value)}")
            return kind() if default is ... else default
        if least is not None and not converted >= least:
            self.problems.append(f"{self.where}: {key} must be at least {least}, not {value}")
        if choices is not None:
            for one in converted if kind is tuple else (converted,):
                if one not in choices:
                    self.problems.append(f"{self.where}: {key} {one!r} is not known{suggestion(one, choices)}")
        return converted

    def close(self) -> None:
        """Note every key that was not taken, with the valid ones."""
        for key in self._values:
            if key not in self._taken:
                self.problems.append(f"{self.where}: unknown key {key!r}{suggestion(key, self._taken)}")


_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping of keys to values",
    tuple: "a list of texts",
    list: "a list",
}


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value!r}" if not isinstance(value, (dict, list)) else f"a {'mapping' if isinstance(value, dict) else 'list'}"


def _convert(value: Any, kind: type) -> Any:
    """``value`` as ``kind``, or ``None`` if it is none."""
    if kind is tuple:
        items = [value] if isinstance(value, str) else value
        return tuple(items) if isinstance(items, list) and all(isinstance(item, str) for item in items) else None
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if abs(number) < float("inf") else None  # neither infinite nor NaN
    if kind is int and isinstance(value, bool):
        return None
    return value if isinstance(value, kind) else None
