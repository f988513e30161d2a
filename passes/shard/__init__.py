"""Partitioning: one graph becomes the graph that every rank of a mesh runs, with collectives as ordinary nodes."""
