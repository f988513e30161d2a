"""The layer graph of Qwen3 (dense)."""
