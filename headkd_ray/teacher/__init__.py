"""Soft targets: a teacher's answers about views, asked in place or kept in a cache beside the shards."""

from headkd_ray.teacher.build import Builder
from headkd_ray.teacher.cache import Cache
from headkd_ray.teacher.open import builder_of, codec_of, open_cache, soft_teacher
from headkd_ray.teacher.soft import SoftTeacher

__all__ = ["Builder", "Cache", "SoftTeacher", "builder_of", "codec_of", "open_cache", "soft_teacher"]
