"""The layer graph of Qwen3-MoE."""
