"""Features survive storage in 16 and 8 bits within the promised error."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from headkd_ray.soft_targets import TopLogits, ViewTargets
from headkd_ray.teacher.cache_codec import LEVELS, Codec

FEATURE = st.one_of(st.just(0.0), st.floats(2.0**-20, 6e4, width=32))
"""A ReLU's output, within the range of 16 bits."""
SIGNED = st.one_of(FEATURE, FEATURE.map(lambda feature: -feature))


def view_of(taps: NDArray[np.float32]) -> ViewTargets:
    rois = taps.shape[1]
    nothing = TopLogits(np.zeros((rois, 0), np.float32), np.zeros((rois, 0), np.int64))
    return ViewTargets(np.zeros((rois, 4), np.float32), np.zeros(rois, bool), taps, nothing)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Codec, list[ViewTargets]]:
    """Draw a row group and a codec: views of 0 to 4 RoIs, with some channels that are 0 in all of them."""
    layers, width, signed = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.booleans())
    dead = draw(hnp.arrays(bool, (layers, width)))
    views = []
    for rois in draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)):
        taps = draw(hnp.arrays(np.float32, (layers, rois, width), elements=SIGNED if signed else FEATURE))
        views.append(view_of(np.where(dead[:, None], np.float32(0), taps)))
    return Codec(draw(st.sampled_from(["fp16", "int8"])), layers, width, signed=signed), views


@settings(deadline=None, max_examples=200)
@given(groups())
def test_round_trip(group: tuple[Codec, list[ViewTargets]]) -> None:
    codec, views = group
    scales = codec.scales(views)
    assert scales.shape == (codec.layers, codec.width) and scales.dtype == np.float32 and (scales > 0).all()
    for view in views:
        packed = codec.pack(view, scales)
        assert len(packed) == view.taps.size * (2 if codec.dtype == "fp16" else 1)
        taps = codec.unpack(packed, len(view.boxes), scales)
        assert taps.shape == view.taps.shape and taps.dtype == np.float32 and taps.flags.c_contiguous and taps.flags.writeable
        error = np.abs(taps.astype(np.float64) - view.taps)
        if codec.dtype == "fp16":
            assert (error <= np.maximum(np.abs(view.taps) * 2.0**-11, 2.0**-25)).all()
        else:
            assert (error <= scales[:, None] * 0.5001).all()
        assert (taps[view.taps == 0] == 0).all()


def test_a_channel_s_greatest_feature_takes_the_last_step() -> None:
    """The maximum is taken over all views of the row group, so no feature is clipped."""
    taps = np.array([[[1.0, 0, 2], [3, 0, 0]]], dtype=np.float32)
    codec, views = Codec("int8", 1, 3), [view_of(taps), view_of(taps * 2), view_of(taps[:, :0])]
    scales = codec.scales(views)
    np.testing.assert_allclose(scales, [[6 / LEVELS, 1, 4 / LEVELS]], rtol=1e-6)
    np.testing.assert_allclose(codec.unpack(codec.pack(views[1], scales), 2, scales), taps * 2, rtol=1e-6)
    assert codec.pack(views[1], scales) == bytes([85, LEVELS, 0, 0, LEVELS, 0])  # channel by channel


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_no_rois_at_all(dtype: Literal["fp16", "int8"]) -> None:
    codec, view = Codec(dtype, 2, 3), view_of(np.zeros((2, 0, 3), np.float32))
    scales = codec.scales([view])
    assert (scales == 1).all() and codec.pack(view, scales) == b""
    assert codec.unpack(b"", 0, scales).shape == (2, 0, 3)


def test_features_too_small_for_a_step_are_nothing() -> None:
    codec, view = Codec("int8", 1, 2), view_of(np.array([[[1e-44, 255.0]]], dtype=np.float32))
    scales = codec.scales([view])
    assert (scales > 0).all()
    assert codec.unpack(codec.pack(view, scales), 1, scales).tolist() == [[[0.0, 255.0]]]
