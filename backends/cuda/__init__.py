"""The cuda backend: Triton kernels for what a step of a model spends its time on, torch for the rest."""
