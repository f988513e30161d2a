"""The torch backend: eager kernels for CPU (and any torch device), and the same operations under ``torch.compile``."""
