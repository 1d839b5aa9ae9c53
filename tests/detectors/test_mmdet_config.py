"""mmdet's training configs are read as text, without running them, for what matters here."""

from typing import Any

import pytest

from headkd_ray.detectors.weights.config_text import read_config, section
from headkd_ray.detectors.weights.mmdet_config import MMDetConfig
from headkd_ray.errors import CheckpointError
from headkd_ray.job import PixelSpec, PostprocessSpec, ProposalSpec, RoIPostprocessSpec
from headkd_ray.job.module_specs import RPNTestProposalSpec


def test_values_of_a_config_text() -> None:
    text = """
# a comment with (brackets and an apostrophe's quote
base = dict(a=1, b=[1.5, -2, (3, 'x')], c={'d e': True, ('k', 'l'): 1, **{'f': None}})
model = dict(base, g=base, **dict(a=2), ratio=1.0 / 3, run=print('no'), path=data_root + 'x')
first = second = 7
base.c = 5
train = [model, *base]
import os
"""
    values = read_config(text)
    base = {"a": 1, "b": [1.5, -2, [3, "x"]], "c": {"d e": True, "f": None}}
    model = {**base, "g": base, "a": 2, "ratio": None, "run": None, "path": None}
    assert values == {"base": base, "model": model, "first": 7, "second": 7, "train": [model, None]}
    assert section(values, "model", "g", "c") == {"d e": True, "f": None}
    assert section(values, "model", "a") == section(values, "model", "nothing", "more") == section(None) == {}


def test_windows_paths_are_no_escapes() -> None:
    # mmcv writes strings without escaping: \\U is an error in Python, \\d a warning.
    values = read_config("model = dict(type='FCOS')\nwork_dir = 'C:\\Users\\data'\n")
    assert values == {"model": {"type": "FCOS"}, "work_dir": "C:\\Users\\data"}


@pytest.mark.parametrize("text", ["model = dict(", "a\0", f"a = {'(' * 500}", f"a = {'-' * 100_000}1"])
def test_what_is_not_python(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_config(text)


def config(text: str) -> MMDetConfig:
    return MMDetConfig.of({"cfg": text}, "f.pth")


def test_a_config_that_cannot_be_read_is_refused() -> None:
    assert not MMDetConfig.of({}, "f.pth")
    assert not MMDetConfig.of({"config": "", "cfg": None}, "f.pth")
    assert MMDetConfig.of({"config": {"model": {"backbone": {"style": "caffe"}}}}, "f.pth").is_caffe
    with pytest.raises(CheckpointError, match=r"f\.pth: the training config in the file's meta is not Python"):
        config("model = dict(")
    for text in ("fcos_r50.py", "model = build()", "_base_ = 'fcos.py'"):
        with pytest.raises(CheckpointError, match=r"f\.pth: .* has no model = dict"):
            config(text)


NORM, OTHER = "mean=[1, 2, 3], std=[4, 5, 6]", "mean=[7, 7, 7], std=[7, 7, 7]"


@pytest.mark.parametrize(
    ("text", "is_bgr"),
    [
        (f"model = dict(data_preprocessor=dict({NORM}))", True),
        (f"model = dict(data_preprocessor=dict({NORM}, bgr_to_rgb=True))", False),
        (f"model = dict(data_preprocessor=dict({NORM}, rgb_to_bgr=True))", False),
        (f"model = dict(a=1)\ndata_preprocessor = dict({NORM}, bgr_to_rgb=True)", False),
        (f"model = dict(data_preprocessor=dict({NORM}))\ntest_pipeline = [dict(type='Normalize', {OTHER})]", True),
        (f"model = dict(a=1)\nimg_norm_cfg = dict({NORM})", False),
        (f"model = dict(a=1)\nimg_norm_cfg = dict({NORM}, to_rgb=False)", True),
        # The test pipeline decides, not a variable that its values may have come from.
        (f"model = dict(a=1)\ntest_pipeline = [dict(type='Normalize', {NORM})]\nimg_norm_cfg = dict({OTHER})", False),
        (
            f"model = dict(a=1)\nimg_norm_cfg = dict({NORM}, to_rgb=False)\ntest_pipeline = [dict(t=[dict(**img_norm_cfg)])]",
            True,
        ),
        (
            f"model = dict(a=1)\ntest_pipeline = [dict({OTHER})]\ndata = dict(train=dict({OTHER}),"
            f" test=dict(pipeline=[dict(type='Flip', transforms=[dict(type='Normalize', to_rgb=False, {NORM})])]))",
            True,
        ),
        (f"model = dict(a=1)\ntest_dataloader = dict(dataset=dict(pipeline=[dict(type='Normalize', {NORM})]))", False),
        # mmdet 1.0
        (f"model = dict(a=1)\nnorm = dict({NORM})\ndata = dict(test=dict(img_norm_cfg=norm, a=range(4)))", False),
    ],
)
def test_input_normalisation(text: str, is_bgr: bool) -> None:
    spec = PixelSpec(mean=(3, 2, 1), std=(6, 5, 4)) if is_bgr else PixelSpec(mean=(1, 2, 3), std=(4, 5, 6))
    assert config(text).pixels() == (spec, is_bgr)


def test_input_normalisation_that_is_not_said() -> None:
    assert MMDetConfig.of({}, "f.pth").pixels() == (PixelSpec(), False)
    assert config("model = dict(backbone=dict(style='pytorch'))").pixels() == (PixelSpec(), False)
    for text in ("backbone=dict(style='caffe')", "data_preprocessor=dict(type='DetDataPreprocessor')"):
        with pytest.raises(CheckpointError, match="does not say how the input is normalised"):
            config(f"model = dict({text})").pixels()
    for norm in ("mean=[1, 2], std=[1, 2]", "mean=[1, 2, 3], std=[1, 2, 0]", "mean='abc', std=[1, 2, 3]", "mean=[1, 2, 3]"):
        with pytest.raises(CheckpointError, match=r"f\.pth: .* three numbers each are needed"):
            config(f"model = dict(data_preprocessor=dict({norm}))").pixels()


NEW = (
    "model = dict(test_cfg=dict(rpn=dict(nms_pre=800, max_per_img=300, nms=dict(type='nms', iou_threshold=0.8)),"
    " rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.4), max_per_img=50)))"
)
OLD = (
    "model = dict(a=1)\ntest_cfg = dict(rpn=dict(nms_pre=800, nms_post=800, max_num=300, nms_thr=0.8, min_bbox_size=0),"
    " rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_thr=0.4), max_per_img=50))"
)


@pytest.mark.parametrize("text", [NEW, OLD])
def test_rules_at_test_time(text: str) -> None:
    read = config(text)
    proposals = RPNTestProposalSpec(pre_nms=800, post_nms=300, nms_iou=0.8)
    assert read.rules(RPNTestProposalSpec(), "rpn") == proposals
    assert read.rules(RoIPostprocessSpec(), "rcnn") == RoIPostprocessSpec(score=0.01, nms_iou=0.4, max_detections=50)


@pytest.mark.parametrize("spec", [PostprocessSpec(), ProposalSpec()])
@pytest.mark.parametrize("text", ["model = dict(a=1)", "model = dict(test_cfg=dict(nms_pre=-1, max_per_img=-1, nms=None))"])
def test_rules_that_are_not_said_stay(text: str, spec: Any) -> None:
    assert config(text).rules(spec, "rpn") == spec


def test_a_head_students_rules_are_under_rpn() -> None:
    text = "model = dict(test_cfg=dict(rpn=dict(nms_pre=900, score_thr=0.1, max_per_img=80), rcnn=dict(score_thr=0.9)))"
    assert config(text).rules(PostprocessSpec(), "rpn") == PostprocessSpec(pre_nms=900, score=0.1, max_detections=80)
