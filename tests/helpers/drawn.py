"""Which tests are run where all of them would take too long: always the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def draw_evenly(names: Iterable[str], count: int) -> set[str]:
    """So many of the tests with these node ids: one of every function, then a second one, and so
    on; of each file as large a part of its functions as of the others."""
    names = list(names)
    in_function = _places(names, _function, _luck)
    in_file = _places(names, lambda n: (_file(n), in_function[n]), lambda n: _luck(_function(n)))
    sizes: dict = {}
    for name in names:
        group = _file(name), in_function[name]
        sizes[group] = sizes.get(group, 0) + 1

    def turn(name: str) -> tuple:
        part = (in_file[name] + 0.5) / sizes[_file(name), in_function[name]]
        return in_function[name], part, _luck(name)

    return set(sorted(names, key=turn)[:count])


def _places(names, group, order) -> dict[str, int]:
    """The place of each name in its group, which is put in order."""
    places, taken = {}, {}
    for name in sorted(names, key=order):
        places[name] = taken.get(group(name), 0)
        taken[group(name)] = places[name] + 1
    return places


def _luck(name: str) -> bytes:
    """Drawn by the name alone, so that it is the same in every process."""
    return hashlib.sha256(name.encode()).digest()


def _function(name: str) -> str:
    return name.split("[")[0]


def _file(name: str) -> str:
    return name.split("::")[0]
