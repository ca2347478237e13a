"""The Triton kernels, run in Python by Triton's interpreter, as one more backend.

tests/conftest.py sets TRITON_INTERPRET where there is no GPU; where there is one,
helpers/on_device.py has them. An operation takes some 50 microseconds whatever its size, so that
tests give this backend smaller sizes and fewer examples.
"""

from __future__ import annotations

from types import SimpleNamespace

from crrcd_ext import triton

INTERPRETED = ["triton"] if triton.INTERPRETED and triton.why_not() is None else []
"""To be added to the backends of tests of operators that have Triton kernels."""


def _patch_once() -> None:
    """For every launch and every call of a function in a kernel the interpreter looks through all
    of triton.language and puts its own operations there: most of the time of small kernels. Once
    for each module is enough where nothing else is to be done with Triton."""
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()
    nothing = SimpleNamespace(restore=lambda: None)

    def patch_once(fn):
        if fn.__module__ not in done:
            patch(fn)
            # Triton 3.6 asks int() for the number in an array of one, which numpy 2.5 refuses.
            interpreter.tl.core.tensor.__index__ = lambda self: self.handle.data.item()
            done.add(fn.__module__)
        return nothing

    interpreter._patch_lang = patch_once


if INTERPRETED:
    _patch_once()
