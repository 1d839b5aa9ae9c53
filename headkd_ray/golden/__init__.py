"""Comparison of this implementation with values that the official code computed; see ``python -m headkd_ray.parity``."""
