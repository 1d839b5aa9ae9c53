"""A trained detector outside training: exported files, the proof that they detect the same, and :func:`headkd_ray.load`."""
