"""Compiling with numba, and where the machine code is kept from one start to the next.

Numba's own places for its cache are the folder of the source file, which an installation may not let us write, and a folder that is
shared by all packages. What it reads there it unpickles, that is, executes. So ours lies in a folder that only this user can get
at, beside deltaloom's compile cache. Who sets ``NUMBA_CACHE_DIR`` decides otherwise.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numba.core.config
import numpy as np
from numba import types
from numba.np.numpy_support import as_dtype

from deltaloom.passes.cache import CacheWarning, default_folder, folder_fault

F = TypeVar("F", bound=Callable[..., Any])

FAST = {"reassoc", "contract", "nsz"}
"""Sums may be done in any order, so that they use whole registers; infinities and NaN keep their meaning."""

UNREADABLE = (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ImportError)
"""What a file that is no pickle, or half of one, may raise."""

OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": FAST, "boundscheck": False, "error_model": "numpy"}


def compiled(signature: Any) -> Callable[[F], F]:
    """A function compiled for one ``signature`` as soon as it is defined: neither the first token nor a thread of the pool waits
    for the compiler. It runs without the interpreter's lock."""

    def compile_now(function: F) -> F:
        with _cache_folder() as kept:
            try:
                made: F = numba.njit(signature, cache=kept, **OPTIONS)(function)
            except UNREADABLE as error:
                _warn(f"numba's cache of {function.__name__} cannot be read: {error}; it is compiled, and not kept, at every start")
                made = numba.njit(signature, **OPTIONS)(function)
        _call_on_nothing(made, signature)
        return made

    return compile_now


def _call_on_nothing(function: Callable[..., Any], signature: Any) -> None:
    """A call of ``start`` and ``stop`` 0, on one thread. At the first call numba looks up which conversions an array that may be
    written needs to be taken as one that is only read; if two threads make that call at once, the later one finds nothing new and
    raises ``TypeError``."""
    values: list[Any] = []
    for given in signature.args:
        if isinstance(given, types.Array):
            values.append(np.zeros((1,) * given.ndim, as_dtype(given.dtype)))
        else:
            values.append((0.0,) * given.count if isinstance(given, types.UniTuple) else 0)
    function(*values)


def inlined(function: F) -> F:
    """A function that compiled ones call; it is not cached by itself, because their machine code contains it."""
    made: F = numba.njit(**OPTIONS)(function)
    return made


@contextmanager
def _cache_folder() -> Iterator[bool]:
    """While a function is defined, numba's cache is in our folder; False where there is no place for it. The setting is one of the
    process, so it is given back for other users of numba."""
    config: Any = numba.core.config
    before = config.CACHE_DIR
    folder = before or private_folder()
    if folder is None:
        yield False
        return
    config.CACHE_DIR = str(folder)
    try:
        yield True
    finally:
        config.CACHE_DIR = before


@cache
def private_folder() -> Path | None:
    """The folder for machine code, made if it is missing; None, with a warning, where there can be none."""
    folder = default_folder() / "numba"
    try:
        # One by one: what mkdir makes on the way has the usual mode, and deltaloom refuses a cache that is open to others.
        for one in (folder.parent, folder):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
        fault = folder_fault(folder)
        if fault is None:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except OSError as error:
        fault = f"the folder {folder} cannot be written: {os.strerror(error.errno or 0)}"
    _warn(f"{fault}; numba compiles at every start, which takes seconds. NUMBA_CACHE_DIR can name a folder of yours")
    return None


def _warn(text: str) -> None:
    warnings.warn(text, CacheWarning, stacklevel=3)
