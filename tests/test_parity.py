"""The official code's own numbers hold, and the command notices every way in which they could be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headkd_ray.golden.file import Golden
from headkd_ray.golden.quantities import check
from headkd_ray.golden.replay import Replay, replay
from headkd_ray.parity import compare_file, main
from tests.detectors.mmdet_mobilenet import MobileNetV2
from tests.detectors.test_reppoints_weights import drawn_mmdet

GOLDEN = Path(__file__).parent / "golden" / "official_head_r18.npz"
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def official() -> Arrays:
    with np.load(GOLDEN) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def official_run(official: Arrays) -> Replay:
    """Compute our values for the official file once; they serve all files that differ only in what is compared with them."""
    return replay(Golden(official, "official"))


def disagreeing(arrays: Arrays, run: Replay) -> list[str]:
    """Return the quantities of a file that differ from the values of a replay."""
    return [row.name for row in check(Golden(arrays, "changed"), run) if not row.passed]


def write(arrays: Arrays, path: Path) -> str:
    np.savez(path, **arrays)
    return str(path)


def failing(arrays: Arrays, tmp_path: Path) -> list[str]:
    return [row.name for row in compare_file(write(arrays, tmp_path / "golden.npz")) if not row.passed]


def numbers(arrays: Arrays, key: str) -> dict[str, float]:
    return json.loads(str(arrays[key]))


def with_losses(arrays: Arrays, losses: dict[str, float]) -> Arrays:
    """Return a copy with other losses, their total, and no gradient norms, which belong to the old total."""
    losses = {name: value for name, value in losses.items() if name != "total"}
    losses["total"] = sum(value for name, value in losses.items() if name != "acc")
    kept = {key: value for key, value in arrays.items() if key != "grad_norms_json"}
    return {**kept, "losses_json": np.array(json.dumps(losses))}


def test_the_official_values_hold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    assert main([str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    with np.load(GOLDEN) as file:
        compared = [
            key
            for key in file.files
            if key.startswith(("student_fpn", "teacher_fpn", "proposals", "rois", "tensor", "detections"))
        ]
    assert len(compared) == 28
    for name in (*compared, "roi_ids", "loss loss_cross", "loss total", "gradient norms (95)", "teacher_detections/1"):
        assert name in printed
    assert "41 of 41 quantities agree" in printed
    assert "FAIL" not in printed


def add(amount: float) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(array: np.ndarray[Any, Any]) -> None:
        array.flat[np.abs(array).argmax()] += amount

    return change


def swap_cells(array: np.ndarray[Any, Any]) -> None:
    array[[3, 4], 5:] = array[[4, 3], 5:]


def wrong_cell(array: np.ndarray[Any, Any]) -> None:
    array[10, 7] += 1


def drop_last(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array[:-1]


def swap_rows(array: np.ndarray[Any, Any]) -> None:
    array[[0, 1]] = array[[1, 0]]


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("student_fpn/P5", add(1e-2), "student_fpn/P5"),
        ("teacher_fpn/P2", add(1e-2), "teacher_fpn/P2"),
        ("proposals/0", swap_cells, "proposals/0"),
        ("proposals/1", wrong_cell, "proposals/1"),
        ("proposals/0", drop_last, "proposals/0"),
        ("proposals/1", add(0.5), "proposals/1"),
        ("rois/1", add(0.5), "rois/1"),
        ("roi_ids", lambda a: a.__setitem__((20, 4), (a[20, 4] + 1) % 9), "roi_ids"),
        ("tensor/rcnn_bbox", swap_rows, "tensor/rcnn_bbox"),
        ("tensor/teacher_rcnn_bbox_aux", add(1e-2), "tensor/teacher_rcnn_bbox_aux"),
        ("tensor/retina_cls_indexed", swap_rows, "tensor/retina_cls_indexed"),
        ("tensor/bbox_poses", swap_rows, "tensor/bbox_poses"),
        ("tensor/anchor_ids", lambda a: a.__setitem__(3, a[3] + 1), "tensor/anchor_ids"),
        ("detections/0", add(0.5), "detections/0"),
        ("detections/1", lambda a: a.__setitem__((5, 5), (a[5, 5] + 1) % 5), "detections/1"),
        ("teacher_detections/0", drop_last, "teacher_detections/0"),
        ("student/rpn_head.retina_cls.bias", add(0.5), "loss loss_cls_rpn"),
        ("student/_distiller._adapts.1.bias", add(0.5), "loss loss_mimic_rcnn"),
        ("teacher/roi_head.bbox_head.shared_fcs.0.bias", add(0.5), "tensor/teacher_rcnn_bbox_aux"),
        ("images", add(0.5), "student_fpn/P3"),
        ("step", lambda a: np.array(999), "loss loss_cross"),
    ],
)
def test_one_wrong_number_is_noticed(
    key: str, change: Callable[[Any], Any], expected: str, official: Arrays, official_run: Replay, tmp_path: Path
) -> None:
    array = official[key].copy()
    changed = change(array)
    arrays = {**official, key: array if changed is None else changed}
    is_input = key.startswith(("student/", "teacher/")) or key in ("images", "step")
    assert expected in (failing(arrays, tmp_path) if is_input else disagreeing(arrays, official_run))


@pytest.mark.parametrize(
    "name", ["loss_cls_rpn", "loss_bbox_rpn", "loss_cls", "loss_bbox", "acc", "loss_mimic_rcnn", "loss_cross", "total"]
)
def test_each_loss_is_held_to_one_in_ten_thousand(name: str, official: Arrays, official_run: Replay) -> None:
    losses = numbers(official, "losses_json")
    for factor, holds in ((1 + 5e-5, True), (1 + 2e-4, False)):
        changed = {**official, "losses_json": np.array(json.dumps({**losses, name: losses[name] * factor}))}
        assert (f"loss {name}" not in disagreeing(changed, official_run)) == holds


def test_each_gradient_norm_is_held_to_one_in_a_thousand(official: Arrays, official_run: Replay) -> None:
    norms = numbers(official, "grad_norms_json")
    key = "neck.fpn_convs.4.conv.bias"  # the smallest non-zero one
    for change, holds in (
        ({key: norms[key] * 1.0005}, True),
        ({key: norms[key] * 1.002}, False),
        ({"other.weight": 1.0}, False),
    ):
        changed = {**official, "grad_norms_json": np.array(json.dumps({**norms, **change}))}
        assert (disagreeing(changed, official_run) == []) == holds
    del norms[key]
    assert disagreeing({**official, "grad_norms_json": np.array(json.dumps(norms))}, official_run) == ["gradient norms (94)"]


def test_rows_may_stand_in_another_order(official: Arrays, tmp_path: Path) -> None:
    # Two proposals with equal scores may be sorted either way, and with them everything that has a row for each.
    arrays = {key: value.copy() for key, value in official.items()}
    row, count = 700, len(official["proposals/0"])
    ids, other = official["roi_ids"][3 + 7], official["roi_ids"][row]
    assert ids[0] == other[0] == 0
    for key, array in arrays.items():
        if key in ("roi_ids", "rois/0") or (key.startswith("tensor/") and len(array) == len(official["roi_ids"])):
            array[[10, row]] = array[[row, 10]]
        elif key.startswith("tensor/"):
            array[[10 - 3, row - 3]] = array[[row - 3, 10 - 3]]
    arrays["proposals/0"] = arrays["proposals/0"][np.random.default_rng(0).permutation(count)]
    arrays["detections/0"] = arrays["detections/0"][::-1].copy()
    assert failing(arrays, tmp_path) == []


def test_unknown_quantities_are_not_skipped(official: Arrays, tmp_path: Path) -> None:
    extra = {**official, "tensor/new": np.zeros(3), "something": np.ones((2, 2)), "made_with": np.array("mmdet 2.20")}
    losses = {**numbers(official, "losses_json"), "loss_new": 1.0}
    assert set(failing({**extra, "losses_json": np.array(json.dumps(losses))}, tmp_path)) == {
        "tensor/new",
        "something",
        "loss loss_new",
    }


def without(arrays: Arrays, *prefixes: str) -> Arrays:
    return {key: value for key, value in arrays.items() if not key.startswith(prefixes)}


CKD_KEYS = (
    "student/_distiller._adapts.5",
    "tensor/teacher_rcnn_bbox_filtered",
    "tensor/bbox_poses",
    "tensor/anchor_ids",
    "tensor/retina_cls",
)


def test_a_file_of_akd_alone(official: Arrays, tmp_path: Path) -> None:
    losses = numbers(official, "losses_json")
    del losses["loss_cross"]
    assert failing(with_losses(without(official, *CKD_KEYS), losses), tmp_path) == []


def test_a_file_of_the_assistant_alone(official: Arrays, tmp_path: Path) -> None:
    losses = {name: value for name, value in numbers(official, "losses_json").items() if name not in ("loss_cross",)}
    losses = {name: value for name, value in losses.items() if not name.startswith("loss_mimic")}
    arrays = without(
        official, *CKD_KEYS, "student/_distiller", "teacher", "tensor/teacher", "tensor/rcnn_bbox_aux_adapted",
        "tensor/rcnn_bbox_adapted", "step",
    )  # fmt: skip
    assert failing(with_losses(arrays, losses), tmp_path) == []


def test_a_file_of_plain_retinanet(official: Arrays, tmp_path: Path) -> None:
    losses = numbers(official, "losses_json")
    arrays = without(
        official, "student/_distiller", "student/roi_head", "teacher", "tensor/", "proposals", "rois", "roi_ids", "step"
    )
    arrays = {key.replace("student/rpn_head", "student/bbox_head"): value for key, value in arrays.items()}
    plain = {"loss_cls": losses["loss_cls_rpn"], "loss_bbox": losses["loss_bbox_rpn"]}
    assert failing(with_losses(arrays, plain), tmp_path) == []


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (500, 0.25), (2000, 1.0), (90_000, 1.0)])
def test_other_steps_of_the_warmup(step: int, weight: float, official: Arrays, tmp_path: Path) -> None:
    losses = numbers(official, "losses_json")
    for name in ("loss_mimic_rcnn_aux", "loss_mimic_rcnn", "loss_cross"):
        losses[name] *= weight / 0.5
    assert failing(with_losses({**official, "step": np.array(step)}, losses), tmp_path) == []


def test_a_file_whose_sampler_chose(official: Arrays, tmp_path: Path) -> None:
    # There are fewer RoIs than candidates: the file's own choice is taken, and everything with a row per RoI still holds.
    keep = np.random.default_rng(0).random(len(official["roi_ids"])) < 0.3
    ids = official["roi_ids"]
    own = ids[:, 1] >= 0
    arrays = {**official, "roi_ids": ids[keep]}
    for i in range(2):
        arrays[f"rois/{i}"] = official[f"rois/{i}"][keep[ids[:, 0] == i]]
    for key in (k for k in official if k.startswith("tensor/")):
        arrays[key] = official[key][keep if len(official[key]) == len(ids) else keep[own]]
    failed = failing(arrays, tmp_path)
    assert "loss loss_cls" in failed  # the losses are those of all RoIs
    assert not [name for name in failed if name.startswith(("roi", "tensor", "proposals", "loss loss_cls_rpn"))]


def test_how_far_anchors_count_in_padding(official: Arrays, tmp_path: Path) -> None:
    # Image 1 is declared smaller, so that its own padding (128 x 160) is no longer the batch's. The file's losses count anchors
    # in the whole batch; those of the official rule come from our replay of a file without losses to prefer.
    rest = ("proposals", "rois", "roi_ids", "tensor", "detections", "grad_norms")
    arrays = without({**official, "image_sizes": np.array([[160, 192], [120, 150]])}, *rest)
    names = ("loss_cls_rpn", "loss_bbox_rpn")
    wide = {name: numbers(official, "losses_json")[name] for name in names}
    run = replay(Golden({**arrays, "losses_json": np.array("{}")}, "here"))
    narrow = {name: run.losses[name] for name in names}
    assert abs(narrow["loss_cls_rpn"] / wide["loss_cls_rpn"] - 1) > 1e-3

    def rows(losses: dict[str, float], **more: Any) -> dict[str, tuple[bool, str]]:
        path = write({**arrays, "losses_json": np.array(json.dumps(losses)), **more}, tmp_path / "padded.npz")
        return {row.name: (row.passed, row.note) for row in compare_file(path)}

    batch_wide, own = np.array([[160, 192], [160, 192]]), np.array([[160, 192], [128, 160]])
    guessed, stated = rows(wide), rows(wide, pad_sizes=batch_wide)
    assert all(guessed[f"loss {name}"][0] and "whole batch's shape" in guessed[f"loss {name}"][1] for name in names)
    assert all(stated[f"loss {name}"][0] for name in names)
    assert all(rows(narrow)[f"loss {name}"] == (True, "") for name in names)
    assert not rows(wide, pad_sizes=own)["loss loss_cls_rpn"][0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.pop("images"), "images: missing"),
        (lambda a: a.pop("gt_boxes/1"), "gt_boxes/1: missing"),
        (lambda a: a.update(losses_json=np.array("{")), "losses_json: not JSON"),
        (lambda a: a.update(image_sizes=np.zeros((3, 2))), "image_sizes: shape"),
        (lambda a: a.update({"student/strange.weight": np.zeros(2)}), "unexpected: strange.weight"),
        (lambda a: a.pop("student/neck.fpn_convs.0.conv.bias"), "missing: neck.output.0.bias"),
        (lambda a: [a.pop(k) for k in list(a) if k.startswith("teacher/")], "no teacher/... to distill from"),
    ],
)
def test_unreadable_files_end_with_a_clear_error_and_code_2(
    spoil: Callable[[Arrays], Any], message: str, official: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(official)
    spoil(arrays)
    with pytest.raises(SystemExit) as caught:
        main([write(arrays, tmp_path / "spoilt.npz")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_no_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    for name in ("missing.npz", "text.npz", "one.npy", "objects.npz"):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / name)])
        assert caught.value.code == 2
        assert name in capsys.readouterr().err


def test_a_file_of_plain_reppoints_is_replayed(official: Arrays, tmp_path: Path) -> None:
    """Its towers have a GroupNorm, which 16 channels of a dense teacher or student cannot have, so it is no official file."""
    student = {f"student/{key}": tensor.numpy() for key, tensor in drawn_mmdet(normed=True).items()}
    kept = without(official, "student", "teacher", "tensor/", "proposals", "rois", "roi_ids", "step", "det", "grad_norms")
    arrays = {**kept, **student, "losses_json": np.array("{}")}
    losses = replay(Golden(arrays, "here")).losses
    assert set(losses) == {"loss_cls", "loss_pts_init", "loss_pts_refine", "total"}
    assert failing({**arrays, "losses_json": np.array(json.dumps(losses))}, tmp_path) == []
    assert failing({**arrays, "losses_json": np.array(json.dumps({"loss_pts_init": 9.0}))}, tmp_path) == ["loss loss_pts_init"]


def test_features_are_compared_at_the_file_s_rois_and_proposals_by_themselves(official: Arrays, tmp_path: Path) -> None:
    """Rounding that moves proposals by 4e-5 changes features by more, which is no error of theirs."""
    moved = {key: value * np.float32(1 + 4e-5) if key.startswith("rois/") else value for key, value in official.items()}
    for key in ("proposals/0", "proposals/1"):
        moved[key] = np.concatenate([official[key][:, :4] * np.float32(1 + 4e-5), official[key][:, 4:]], axis=1)
    run = replay(Golden(moved, "moved"))
    here = {key: run.step.rows.get(key[7:]) or run.step.cell_rows[key[7:]] for key in official if key.startswith("tensor/")}
    features = {key: value[0].detach().numpy() for key, value in here.items()}
    assert np.abs(features["tensor/rcnn_bbox_aux"] - official["tensor/rcnn_bbox_aux"]).max() > 1e-4
    losses = numbers(official, "losses_json")
    found = {row.name: row for row in compare_file(write(with_losses({**moved, **features}, losses), tmp_path / "moved.npz"))}
    assert [name for name, row in found.items() if not row.passed and not name.startswith("loss")] == []
    assert found["tensor/rcnn_bbox_aux"].relative == 0 and 3e-5 < found["rois/0"].relative < 5e-5
    far = {key: value * np.float32(1 + 2e-4) if key.startswith("rois/") else value for key, value in moved.items()}
    failed = {row.name for row in check(Golden({**far, **features}, "far"), run) if not row.passed}
    assert {name for name in failed if name.startswith(("tensor", "roi"))} == {"rois/0", "rois/1"}


def test_code_1_when_something_does_not_hold(official: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write({**official, "step": np.array(1001)}, tmp_path / "golden.npz")]) == 1
    assert "not: loss loss_mimic_rcnn_aux" in capsys.readouterr().out


def mobilenet_file(official: Arrays, updates: int) -> Arrays:
    """Return a HEAD file with a tiny MobileNetV2 student, whose values are our own replay's.

    It cannot show that the values are right (tests/detectors/test_mmdet.py compares the backbone), only that such files are
    read, with evaluation after ``updates`` updates of the running statistics and gradients that cancel out.
    """
    torch.manual_seed(0)
    body = MobileNetV2(stem=8, channels=(8, 8, 16, 16, 24, 40, 80), head=96)
    arrays = {k: v for k, v in official.items() if not k.startswith(("student/backbone", "proposals", "roi", "tensor", "det"))}
    arrays |= {f"student/backbone.{key}": value.numpy() for key, value in body.state_dict().items()}
    for number, channels in enumerate((16, 24, 96)):
        arrays[f"student/neck.lateral_convs.{number}.conv.weight"] = torch.randn(16, channels, 1, 1).numpy() * 0.3
    arrays["student/neck.fpn_convs.3.conv.weight"] = torch.randn(16, 96, 3, 3).numpy() * 0.05
    run = replay(Golden(arrays, "mobilenet"))
    assert run.step.rois is not None
    assert run.step.proposed is not None
    ids = torch.cat([run.step.rois.image[:, None], run.step.rois.cells], dim=1)
    arrays["roi_ids"] = ids.numpy()
    arrays["tensor/retina_cls_indexed"] = run.step.cell_rows["retina_cls_indexed"][0].detach().numpy()
    found = run.evaluations[updates][2]
    for i in range(2):
        real, kept = run.step.proposed.proposals.valid[i], found.labels[i] >= 0
        boxes, scores, cells = (t[i][real] for t in run.step.proposed.proposals[:3])
        arrays[f"proposals/{i}"] = torch.cat([boxes, scores[:, None], cells], dim=1).numpy()
        rows = (found.boxes[i], found.scores[i][:, None], found.labels[i][:, None])
        arrays[f"detections/{i}"] = torch.cat(rows, dim=1)[kept].numpy()
    for level, feature in zip("34567", run.step.features, strict=True):
        arrays[f"student_fpn/P{level}"] = feature.detach().numpy()
    norms = {key: float(gradient.norm()) for key, gradient in run.gradients.items()}
    arrays |= {"losses_json": np.array(json.dumps(run.losses)), "grad_norms_json": np.array(json.dumps(norms))}
    return arrays


@pytest.mark.parametrize("updates", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_file_of_mobilenet_whose_norms_train(updates: int, official: Arrays, tmp_path: Path) -> None:
    arrays = mobilenet_file(official, updates)
    norms = numbers(arrays, "grad_norms_json")
    # The bias behind layer1 only shifts what layer2's first BatchNorm, in train mode, takes the mean of: its gradient is zero
    # except for rounding, which differs with another machine's kernels.
    cancelled = "backbone.layer1.0.linear_conv.bn.bias"
    assert norms[cancelled] < 1e-4 * norms["backbone.layer1.0.linear_conv.bn.weight"]
    arrays["grad_norms_json"] = np.array(json.dumps({**norms, cancelled: norms[cancelled] * 1.5}))
    rows = compare_file(write(arrays, tmp_path / "mnv2.npz"))
    assert [row.name for row in rows if not row.passed] == []
    note = next(row.note for row in rows if row.name == "detections/0")
    assert note == ("", "after one update of the running statistics", "after two updates of the running statistics")[updates]
    other = "backbone.layer1.0.linear_conv.bn.weight"
    arrays["grad_norms_json"] = np.array(json.dumps({**norms, other: norms[other] * 1.01}))
    assert failing(arrays, tmp_path) == [f"gradient norms ({len(norms)})"]


def test_a_file_of_plain_faster_rcnn(official: Arrays, tmp_path: Path) -> None:
    # The golden teacher as a student: its training values are our own replay's, its evaluation is the official code's.
    arrays = {key: value for key, value in official.items() if key.startswith(("gt_", "images", "image_sizes"))}
    arrays |= {key.replace("teacher", "student", 1): value for key, value in official.items() if key.startswith("teacher")}
    for i in range(2):
        arrays[f"detections/{i}"] = arrays.pop(f"student_detections/{i}")
    run = replay(Golden({**arrays, "losses_json": np.array("{}")}, "here"))
    assert set(run.losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "total"}
    assert run.step.proposed is not None
    for i in range(2):
        real = run.step.proposed.proposals.valid[i]
        boxes, scores, cells = (t[i][real] for t in run.step.proposed.proposals[:3])
        arrays[f"proposals/{i}"] = torch.cat([boxes, scores[:, None], cells], dim=1).numpy()
    norms = {key: float(gradient.norm()) for key, gradient in run.gradients.items()}
    arrays |= {"losses_json": np.array(json.dumps(run.losses)), "grad_norms_json": np.array(json.dumps(norms))}
    assert failing(arrays, tmp_path) == []
    assert "loss loss_rpn_bbox" in failing(
        {**arrays, "losses_json": np.array(json.dumps({**run.losses, "loss_rpn_bbox": 1.0}))}, tmp_path
    )
