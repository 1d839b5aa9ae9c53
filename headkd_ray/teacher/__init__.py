"""Teachers and their soft targets for views, computed in place or kept in a cache beside the shards."""

from headkd_ray.teacher.cache_builder import Builder
from headkd_ray.teacher.from_job import builder_of, codec_of, open_cache, soft_teacher
from headkd_ray.teacher.soft_teacher import SoftTeacher
from headkd_ray.teacher.source import AnyTeacher, TeacherSource
from headkd_ray.teacher.target_cache import Cache

__all__ = [
    "AnyTeacher",
    "Builder",
    "Cache",
    "SoftTeacher",
    "TeacherSource",
    "builder_of",
    "codec_of",
    "open_cache",
    "soft_teacher",
]
