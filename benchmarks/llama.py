"""llama.cpp through the C functions that llama-cpp-python binds: token ids in, logits out."""

import ctypes
from pathlib import Path

import llama_cpp as api
import numpy as np
from numpy.typing import NDArray

BATCH = 512
"""Tokens that llama.cpp computes at once, its own default."""


class Llama:
    """One sequence of a model. ``state``: the type of the cache of keys and values."""

    def __init__(self, path: Path, *, threads: int, context: int, vocabulary: int, exact_cache: bool = False) -> None:
        self._quiet = api.llama_log_callback(lambda *_: None)  # kept: the library calls it until the process ends
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.vocabulary = vocabulary
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, max(BATCH, context), BATCH
        options.n_threads = options.n_threads_batch = threads
        if exact_cache:
            options.type_k = options.type_v = api.GGML_TYPE_F32
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"llama.cpp has no room for {context} tokens of {path}")

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Add tokens to the sequence; a copy of the logits of the last one."""
        flat = ids.reshape(-1)
        tokens = (ctypes.c_int * flat.size)(*flat.tolist())
        if api.llama_decode(self._context, api.llama_batch_get_one(tokens, flat.size)):
            raise SystemExit(f"llama.cpp failed on {flat.size} tokens")
        api.llama_synchronize(self._context)
        return np.array(np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, -1), (self.vocabulary,)))

    def clear(self) -> None:
        """Forget the sequence."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
