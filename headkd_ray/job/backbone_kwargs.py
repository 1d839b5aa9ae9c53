"""Define which arguments of timm.create_model a job or checkpoint may set: those that shape a network, with their ranges.

Other arguments of timm read files or fetch addresses (``checkpoint_path``, ``pretrained_cfg``, ``cache_dir``), or belong to
the detector (``features_only``, ``out_indices``, ``in_chans``). What is not listed here never reaches timm.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

_MOST_BLOCKS, _LARGEST = 256, 65536
"""Upper bounds that no network reaches, so that a mistyped number is reported before it fills the memory."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _each(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a test for a value that satisfies ``is_right``, or a list of 1 to 64 such values."""
    return lambda value: (
        1 <= len(value) <= 64 and all(map(is_right, value)) if isinstance(value, list | tuple) else is_right(value)
    )


_Kind = tuple[Callable[[Any], bool], str]
_BLOCKS: _Kind = (
    _each(lambda value: _is_whole(value, _MOST_BLOCKS)),
    f"a whole number from 1 to {_MOST_BLOCKS}, or a list of such numbers, one per stage",
)
_SIZES: _Kind = (
    _each(lambda value: _is_whole(value, _LARGEST)),
    f"a whole number from 1 to {_LARGEST}, or a list of such numbers",
)
_FACTORS: _Kind = (
    _each(lambda value: _is_number(value) and 0 <= value <= _LARGEST),
    f"a number from 0 to {_LARGEST}, or a list of such numbers",
)
_RATES: _Kind = (_each(lambda value: _is_number(value) and 0 <= value < 1), "a number from 0 to below 1")
_SWITCHES: _Kind = (lambda value: isinstance(value, bool), "true or false")
_NAMES: _Kind = (
    lambda value: isinstance(value, str) and re.fullmatch(r"\w{1,40}", value, re.ASCII) is not None,
    "a short name of letters, digits and underscores",
)

_KINDS: dict[_Kind, str] = {
    _BLOCKS: "layers depths depth num_blocks",
    _SIZES: "stem_width channels head_width base_width cardinality dims embed_dim embed_dims num_heads head_dim stem_size "
    "stem_chs stem_kernel_size kernel_sizes widths growth_rate num_init_features bn_size group_size down_kernel_size "
    "block_reduce_first img_size window_size patch_size sr_ratios d2_scales focal_levels focal_windows",
    _FACTORS: "mlp_ratio mlp_ratios expand_ratio width_factor stem_expand_ratio norm_eps ls_init_value layer_scale_init_value "
    "init_values layerscale_value window_ratio alpha",
    _RATES: "drop_rate drop_path_rate drop_block_rate attn_drop_rate proj_drop_rate pos_drop_rate",
    _SWITCHES: "strict_img_size dynamic_img_size dynamic_img_pad always_partition avg_down replace_stem_pool conv_mlp "
    "conv_bias use_grn qkv_bias zero_init_last fix_stem fused_conv use_layer_scale",
    _NAMES: "act_layer norm_layer aa_layer attn_layer se_layer stem_type pad_type",
}
KWARGS: dict[str, _Kind] = {name: kind for kind, names in _KINDS.items() for name in names.split()}
"""Argument -> (test of a value, description of the allowed values)."""
_TAKEN = {"features_only", "out_indices", "in_chans", "num_classes", "global_pool", "output_stride"}
_WEIGHTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def check_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` unchanged. Raises ValidationError with every problem at its key."""
    problems = {name: problem for name, value in kwargs.items() if (problem := _problem(name, value)) is not None}
    if problems:
        raise ValidationError.from_exception_data(
            "kwargs",
            [
                {"type": "value_error", "loc": (name,), "input": kwargs[name], "ctx": {"error": ValueError(problem)}}
                for name, problem in problems.items()
            ],
        )
    return kwargs


def _problem(name: str, value: object) -> str | None:
    if name in KWARGS:
        is_right, wanted = KWARGS[name]
        return None if is_right(value) else f"{_short(value)} is not {wanted}"
    if name in _TAKEN:
        return "is set by the detector itself; remove it"
    if name in _WEIGHTS:
        return "is set by the detector itself; remove it (student.backbone.weights chooses the initial weights)"
    near = difflib.get_close_matches(name, KWARGS, n=1)
    hint = f"did you mean {near[0]}?" if near else "headkd_ray/job/backbone_kwargs.py lists them"
    return f"is not one of the arguments that shape a network; {hint}"


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:56] + " ..."
