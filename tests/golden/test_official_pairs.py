"""TF-HEAD's official values hold; files of the research branch's other pairs are read, and one wrong number is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headkd_ray.distill import TrainingModel
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.errors import UserError
from headkd_ray.golden.file import Golden
from headkd_ray.golden.pair_jobs import PAIRS
from headkd_ray.golden.quantities import check
from headkd_ray.golden.replay import Replay, replay
from headkd_ray.job import DistillSpec, load_job
from headkd_ray.parity import compare_file, main
from tests.golden.official_files import (
    CASCADE,
    CLASSES,
    FASTER_RCNN,
    FCOS,
    JOBS,
    PLAIN,
    REPPOINTS,
    RETINANET,
    ROI,
    SMALL_FASTER,
    Pair,
    official_file,
)

TF_HEAD = Path(__file__).parent / "official_tf_head_r18.npz"
Arrays = dict[str, np.ndarray[Any, Any]]


def adapted_rows(model: TrainingModel, forward: StepForward, term: int, name: str) -> dict[str, Any]:
    """Return what CKD of a dense student compares with rows."""
    ckd = model.terms[term]
    assert isinstance(ckd, CKD)
    output = forward.assistant(ckd.assistant or "assist")
    rois = output.rois(forward.student)
    assert rois is not None and not isinstance(forward.student.lead, torch.Tensor)
    rows = ckd.rows(forward.student.lead, rois)
    return {f"{name}_indexed": rows, f"{name}_decoupled": ckd.adapter(rows)}


def tf_head_fcos(model: TrainingModel, forward: StepForward) -> dict[str, Any]:
    rcnn, retina, lead = forward.assistant("rcnn"), forward.assistant("retinanet"), forward.student.lead
    adapter = model.terms[3].adapter
    return {
        "fcos_cls": lead,
        "fcos_cls_adapted": [adapter(m) for m in lead],  # type: ignore[operator]
        "retina_cls": retina.features.lead,
        "rcnn_bbox": rcnn.features.lead[:30],
        **adapted_rows(model, forward, 1, "fcos_cls"),
    }


def fcos_alone(model: TrainingModel, forward: StepForward) -> dict[str, Any]:
    adapter, lead = model.terms[1].adapter, forward.student.lead
    return {
        "retina_cls": lead,
        "retina_cls_adapted": [adapter(m) for m in lead],  # type: ignore[operator]
        "fcos_cls": forward.assistant("fcos").features.lead,
    }


def head_fcos(model: TrainingModel, forward: StepForward) -> dict[str, Any]:
    (aux, last), (teacher_aux, teacher) = forward.comparison.assistant.features.taps, forward.comparison.teacher.taps
    adapters = model.terms[1].adapters
    kept = forward.comparison.assistant.stages[0].rois.from_proposal
    return {
        "rcnn_bbox_aux": aux,
        "rcnn_bbox": last,
        "teacher_rcnn_bbox_aux": teacher_aux,
        "teacher_rcnn_bbox": teacher,
        "rcnn_bbox_aux_adapted": adapters[0](aux),  # type: ignore[index, operator]
        "rcnn_bbox_adapted": adapters[1](last),  # type: ignore[index, operator]
        "teacher_rcnn_bbox_filtered": teacher[kept],
        **adapted_rows(model, forward, 2, "fcos_cls"),
    }


def second_conv(model: TrainingModel, forward: StepForward, tower: str) -> list[torch.Tensor]:
    """Return a RetinaNet student's map after the second conv of a tower, found by hooks while the head runs."""
    head, seen = model.student.head, []
    hook = getattr(head, tower)[3].register_forward_hook(lambda module, inputs, output: seen.append(output))  # type: ignore[index]
    head(forward.student.pyramid)  # type: ignore[operator]
    hook.remove()
    return seen


def head_reppoints(model: TrainingModel, forward: StepForward) -> dict[str, Any]:
    names = ("rp_cls", "rp_reg", "rp_pts_init_conv", "rp_cls_conv", "rp_pts_refine_conv")
    own, taught = forward.comparison.assistant.features.taps, forward.comparison.teacher.taps
    found: dict[str, Any] = {f"teacher_{name}": tap for name, tap in zip(names, taught, strict=True)}
    for name, tap, adapter in zip(names, own, model.terms[1].adapters, strict=True):  # type: ignore[arg-type]
        found[name] = [adapter(m) for m in tap]  # in the official configs the adapted feature takes the name over
    found["retina_cls"] = second_conv(model, forward, "cls_tower")
    found["retina_reg"] = [model.terms[3].adapter(m) for m in second_conv(model, forward, "box_tower")]  # type: ignore[operator]
    return found


def head_cascade(model: TrainingModel, forward: StepForward) -> dict[str, Any]:
    own, taught = forward.comparison.assistant.features.taps, forward.comparison.teacher.taps
    names = [f"rcnn_bbox{part}{stage}" for stage in range(3) for part in ("_aux", "")]
    found = {"rcnn_bbox": forward.student.lead, "rcnn_bbox_adapted": model.terms[2].adapter(forward.student.lead)}  # type: ignore[operator]
    for i, name in enumerate(names):
        adapted = model.terms[1].adapters[i](own[i])  # type: ignore[index, operator]
        found |= {name: own[i], f"teacher_{name}": taught[i], f"{name}_adapted": adapted}
    return found


ONE = {"loss_cls": "loss_cls_rpn", "loss_box": "loss_bbox_rpn"}
PAIRS_OF_FILES: dict[str, Pair] = {
    "tf_head_fcos": Pair(
        job="tf_head_fcos",
        student=FCOS,
        keys={
            "assistants": {
                "retinanet": {"gt_weight": 1.0, "ckd_weight": 1.0, "head": {"channels": 48}},
                "rcnn": {"gt_weight": 1.0, "ckd_weight": 1.3, "decouple": False, "head": ROI},
            }
        },
        losses={
            **ONE,
            "loss_centerness": "loss_centerness_rpn",
            "loss_retinanet_cls": "loss_cls_retina",
            "loss_retinanet_box": "loss_bbox_retina",
            "loss_retinanet_ckd": "loss_self_retina",
            "loss_rcnn_cls": "loss_cls",
            "loss_rcnn_box": "loss_bbox",
            "loss_rcnn_ckd": "loss_self_rcnn",
        },
        helpers={"retinanet": "rpn_head._extra_heads.retina", "rcnn": "roi_head.bbox_head"},
        adapters={"terms.3.adapter": "_distiller._adapts.0._adapt", "terms.1.adapter": "_distiller._adapts.6._adapt"},
        features=tf_head_fcos,
    ),
    "tf_head_only_fcos": Pair(
        job="tf_head_only_fcos",
        student=RETINANET,
        keys={
            "assistants": {
                "fcos": {"gt_weight": 1.0, "ckd_weight": 1.0, "head": {"channels": 32, "box_loss": "giou", **PLAIN}},
            }
        },
        losses={
            **ONE,
            "loss_fcos_cls": "loss_cls_fcos",
            "loss_fcos_box": "loss_bbox_fcos",
            "loss_fcos_centerness": "loss_centerness_fcos",
            "loss_fcos_ckd": "loss_self_fcos",
        },
        helpers={"fcos": "bbox_head._extra_heads.fcos"},
        adapters={"terms.1.adapter": "_distiller._adapts.0._adapt"},
        prefix="bbox_head",
        features=fcos_alone,
    ),
    "head_fcos": Pair(
        job="head_fcos",
        student=FCOS,
        teacher=FASTER_RCNN,
        losses={
            **ONE,
            "loss_centerness": "loss_centerness_rpn",
            "loss_assist_cls": "loss_cls",
            "loss_assist_box": "loss_bbox",
            "loss_akd_1": "loss_mimic_rcnn_aux",
            "loss_akd_2": "loss_mimic_rcnn",
            "loss_ckd": "loss_cross",
        },
        helpers={"assist": "roi_head.bbox_head"},
        adapters={
            "terms.2.adapter": "_distiller._adapts.3._adapt._layer",
            "terms.1.adapters.0": "_distiller._adapts.4._adapt",
            "terms.1.adapters.1": "_distiller._adapts.5._adapt",
        },
        anchors=9,
        features=head_fcos,
    ),
    "head_reppoints": Pair(
        job="head_reppoints",
        student=RETINANET,
        teacher=REPPOINTS,
        losses={
            **ONE,
            "loss_assist_cls": "loss_cls_reppoints",
            "loss_assist_init": "loss_pts_init_reppoints",
            "loss_assist_refine": "loss_pts_refine_reppoints",
            "loss_akd_1": "loss_rp_cls",
            "loss_akd_2": "loss_rp_reg",
            "loss_akd_3": "loss_rp_pts_init_conv",
            "loss_akd_4": "loss_rp_cls_conv",
            "loss_akd_5": "loss_rp_pts_refine_conv",
            "loss_ckd": "loss_cross_cls",
            "loss_ckd_box": "loss_cross_reg",
        },
        helpers={"assist": "bbox_head._extra_heads.reppoints"},
        adapters={
            "terms.2.adapter": "_distiller._adapts.0._adapt",
            "terms.3.adapter": "_distiller._adapts.1._adapt",
            **{f"terms.1.adapters.{i}": f"_distiller._adapts.{i + 2}._adapt" for i in range(5)},
        },
        prefix="bbox_head",
        features=head_reppoints,
    ),
    "head_cascade": Pair(
        job="head_cascade",
        student=SMALL_FASTER,
        teacher=CASCADE,
        losses={
            "loss_rpn_cls": "loss_rpn_cls",
            "loss_rpn_box": "loss_rpn_bbox",
            "loss_roi_cls": "loss_cls",
            "loss_roi_box": "loss_bbox",
            **{f"loss_assist_s{i}_cls": f"s{i}.loss_cls_roi" for i in range(3)},
            **{f"loss_assist_s{i}_box": f"s{i}.loss_bbox_roi" for i in range(3)},
            **{f"loss_akd_{2 * i + 1}": f"loss_mimic_rcnn_aux{i}" for i in range(3)},
            **{f"loss_akd_{2 * i + 2}": f"loss_mimic_rcnn{i}" for i in range(3)},
            "loss_ckd": "loss_cross",
        },
        helpers={"assist": "cascade_roi_head.bbox_head"},
        adapters={
            "terms.2.adapter": "_distiller._adapts.0._adapt",
            **{f"terms.1.adapters.{i}": f"_distiller._adapts.{i + 1}._adapt" for i in range(6)},
        },
        features=head_cascade,
    ),
}


@pytest.fixture(scope="module", params=PAIRS_OF_FILES)
def written(request: pytest.FixtureRequest) -> tuple[Arrays, Replay]:
    """Return a file of each pair and its replay."""
    arrays = official_file(PAIRS_OF_FILES[request.param])
    return arrays, replay(Golden(arrays, request.param))


def failing(arrays: Arrays, run: Replay | None = None) -> dict[str, str]:
    golden = Golden(arrays, "written")
    return {row.name: row.note for row in check(golden, run or replay(golden)) if not row.passed}


def test_a_file_of_each_pair_holds(written: tuple[Arrays, Replay]) -> None:
    assert failing(*written) == {}


def test_wrong_numbers_are_noticed(written: tuple[Arrays, Replay]) -> None:
    """One number of each array is changed, and each loss, and one of the initial weights and of the frozen parameters."""
    arrays, run = written
    wrong, expected = {**arrays}, []
    for key in (key for key in arrays if key.startswith(("tensor/", "student_fpn/", "teacher_fpn/", "rois/", "proposals/"))):
        wrong[key] = arrays[key].copy()
        wrong[key].flat[np.abs(wrong[key]).argmax()] += 1
        expected.append(key)
    wrong["detections/0"] = arrays["detections/0"].copy()
    wrong["detections/0"][0, 5] = (wrong["detections/0"][0, 5] + 1) % CLASSES
    losses, initial, frozen = (json.loads(str(arrays[f"{name}_json"])) for name in ("losses", "init", "frozen"))
    initial[next(key for key in initial if "cls_convs.0.conv.weight" in key or "rpn_conv.weight" in key)][1] *= 1.3
    texts = {"losses": {name: value * 1.001 for name, value in losses.items()}, "init": initial, "frozen": frozen[1:]}
    wrong |= {f"{name}_json": np.array(json.dumps(value)) for name, value in texts.items()}
    expected += ["detections/0", *(f"loss {name}" for name in losses)]
    expected += [f"initial weights ({len(initial)})", f"frozen parameters ({len(frozen) - 1})"]
    found = failing(wrong, run)
    assert sorted(found) == sorted(expected)
    assert found[f"frozen parameters ({len(frozen) - 1})"] == f"1 are frozen on one side only: {frozen[0]}"


def test_a_wrong_weight_is_noticed(written: tuple[Arrays, Replay]) -> None:
    arrays = {key: value for key, value in written[0].items() if key != "grad_norms_json"}
    adapter = next(key for key in arrays if "_adapts" in key and key.endswith("weight"))
    weight = arrays[adapter].copy()
    weight[0] += 0.5
    assert "loss total" in failing({**arrays, adapter: weight})


def test_the_official_tf_head_values_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(TF_HEAD)]) == 0
    printed = capsys.readouterr().out
    assert "43 of 43 quantities agree" in printed and "FAIL" not in printed
    for name in ("initial weights (151)", "frozen parameters (15)", "loss loss_self_rcnn", "gradient norms (136)"):
        assert name in printed


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("student/rpn_head._extra_heads.fcos.cls_convs.3.gn.bias", 0.5, "tensor/fcos_cls/1"),
        ("step", 1, "loss loss_cls_fcos"),
    ],
)
def test_a_wrong_input_of_the_official_tf_head_file_is_noticed(key: str, change: float, expected: str) -> None:
    with np.load(TF_HEAD) as file:
        arrays = {name: file[name] for name in file.files if name != "grad_norms_json"}
    arrays[key] = arrays[key] + arrays[key].dtype.type(change)
    assert expected in failing(arrays)


def without(*parts: str) -> Callable[[Arrays], Any]:
    return lambda arrays: [arrays.pop(key) for key in list(arrays) if any(part in key for part in parts)]


def with_teacher(arrays: Arrays) -> None:
    """Add the teacher of the other official file."""
    with np.load(TF_HEAD.with_name("official_head_r18.npz")) as file:
        arrays |= {key: file[key] for key in file.files if key.startswith("teacher/")}


def narrow_adapter(arrays: Arrays) -> None:
    for last in ("weight", "bias"):
        arrays[f"student/_distiller._adapts.0._adapt.{last}"] = arrays[f"student/_distiller._adapts.0._adapt.{last}"][:60]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without("_adapts.6"),
            "has 1 adapters in .* for 2 assistants, which is not TF-HEAD, and no teacher/... to distill from",
        ),
        (narrow_adapter, r"the adapters in .* do not fit its heads \(0: 60x32x1x1; 6: 432x32\)"),
        (with_teacher, "has a teacher, but 2 assistants in student/...; HEAD has 1"),
        (
            lambda arrays: [with_teacher(arrays), without("student/roi_head")(arrays)],
            "the assistant fcos in student/... is not a head like that of the faster_rcnn in teacher/...",
        ),
        (without("fcos.conv_cls.weight"), "(?s)the architecture cannot be read.*assistant fcos: missing: head.cls_out.weight"),
        (lambda arrays: arrays.update(frozen_json=np.array("{}")), "frozen_json: not a JSON list"),
    ],
)
def test_files_of_no_method_end_with_a_clear_error(spoil: Callable[[Arrays], Any], message: str, tmp_path: Path) -> None:
    with np.load(TF_HEAD) as file:
        arrays = {key: file[key] for key in file.files}
    spoil(arrays)
    np.savez(tmp_path / "spoilt.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        compare_file(str(tmp_path / "spoilt.npz"))
    assert "spoilt.npz: " in str(caught.value)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_promised_jobs_have_the_official_configs_keys(pair: tuple[str, str]) -> None:
    """What parity takes for a pair's official config is what its job has, but for how long CKD lasts."""
    jobs = {
        ("fcos", "faster_rcnn"): "head_fcos",
        ("retinanet", "reppoints"): "head_reppoints",
        ("fcos", "reppoints"): "akd_fcos_reppoints",
        ("faster_rcnn", "cascade_rcnn"): "head_cascade",
    }
    job = load_job(JOBS / f"{jobs[pair]}.yaml")
    assert job.student.kind == pair[0]
    assert job.distill.replace({"ckd_epochs": None}) == DistillSpec.model_validate(PAIRS[pair])
