"""The layer graphs of Qwen3-Next."""
