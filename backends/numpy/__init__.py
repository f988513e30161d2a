"""The NumPy backend: the reference made fast where it pays, with an own two-level thread schedule above a single-threaded BLAS."""
