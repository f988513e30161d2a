"""Every buffer that NumPy allocates for an array, seen through a memory handler (NumPy enhancement proposal 49).

``tracemalloc`` knows what is held, not what was allocated and freed between two looks; a handler is called each time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SET_HANDLER = 304
"""``PyDataMem_SetHandler`` in the table of NumPy's C functions, whose order never changes."""

Malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
Calloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
Realloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Allocation(NamedTuple):
    """One array buffer, and the line of Python that asked for it."""

    nbytes: int
    where: str


class _Handler(ctypes.Structure):
    """NumPy's ``PyDataMem_Handler``, version 1."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", ctypes.c_void_p),
        ("malloc", Malloc),
        ("calloc", Calloc),
        ("realloc", Realloc),
        ("free", Free),
    )


class _Recorder:
    """A handler that gives memory of the C library and writes down each request while ``found`` is a list. It lives as long as the
    process, since arrays are freed by the handler that made them."""

    def __init__(self) -> None:
        self.found: list[Allocation] | None = None
        library = ctypes.CDLL(None)
        library.malloc.restype = library.calloc.restype = library.realloc.restype = ctypes.c_void_p
        library.malloc.argtypes = [ctypes.c_size_t]
        library.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        library.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        library.free.restype = None

        def malloc(context: Any, size: int) -> Any:
            self.note(size)
            return library.malloc(size)

        def calloc(context: Any, count: int, size: int) -> Any:
            self.note(count * size)
            return library.calloc(count, size)

        def realloc(context: Any, memory: Any, size: int) -> Any:
            self.note(size)
            return library.realloc(memory, size)

        def free(context: Any, memory: Any, size: int) -> None:
            library.free(memory)

        handler = _Handler(b"recorder", 1, None, Malloc(malloc), Calloc(calloc), Realloc(realloc), Free(free))
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self._kept = handler
        self._name = ctypes.c_char_p(b"mem_handler")
        self.capsule = make(ctypes.addressof(handler), self._name, None)

    def note(self, nbytes: int) -> None:
        if self.found is not None:
            frame = sys._getframe(2)
            self.found.append(Allocation(nbytes, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"))


_recorder: _Recorder | None = None


@contextmanager
def recorded() -> Iterator[list[Allocation]]:
    """A list that gets an entry for every array buffer that this thread allocates inside the ``with`` block, views excepted. Other
    threads have handlers of their own: compute with one thread to see all."""
    global _recorder
    _recorder = _recorder or _Recorder()
    found: list[Allocation] = []
    before = _set_handler(_recorder.capsule)
    _recorder.found = found
    try:
        yield found
    finally:
        _recorder.found = None
        _set_handler(before)


def _set_handler(capsule: object) -> object:
    """Make ``capsule`` the thread's handler of array memory; the one before."""
    api = np._core._multiarray_umath._ARRAY_API  # type: ignore[attr-defined]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(pointer(api, None), ctypes.POINTER(ctypes.c_void_p))
    call = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[SET_HANDLER])
    return call(capsule)
