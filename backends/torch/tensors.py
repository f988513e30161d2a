"""Host arrays as torch tensors, for callers that speak torch (``return_tensors="pt"``)."""

import numpy as np
import torch
from numpy.typing import NDArray


def from_array(array: NDArray[np.integer]) -> torch.Tensor:
    """A CPU tensor with the array's own copy of the data."""
    return torch.tensor(array)


def cuda_available() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()
