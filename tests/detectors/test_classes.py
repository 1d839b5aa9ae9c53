import pytest
import torch

from headkd_ray.detectors import DenseDetector, build_detector
from headkd_ray.detectors.weights import LoadedDetector, drop_unused_classes, with_classes
from headkd_ray.job import DetectorSpec, RetinaNetSpec
from tests.detectors.micro import batch, cascade_spec, faster_rcnn_spec, fcos_spec, liven, reppoints_spec, retinanet_spec

NAMES = ("ant", "N/A", "bee", "N/A", "cat")
DENSE = [retinanet_spec(), fcos_spec(), reppoints_spec()]
TWO_STAGE = [
    faster_rcnn_spec(),
    faster_rcnn_spec(class_agnostic=True),
    cascade_spec(),
    cascade_spec(class_agnostic=False),
]


@pytest.mark.parametrize("spec", [*DENSE, *TWO_STAGE])
def test_the_other_outputs_stay_as_they_are(spec: DetectorSpec) -> None:
    torch.manual_seed(0)
    whole = build_detector(spec, 5).eval()
    liven(whole)
    loaded = drop_unused_classes(LoadedDetector(whole, NAMES, "torchvision"))
    assert loaded.classes == ("ant", "bee", "cat")
    data, fewer = batch(), loaded.detector.eval()
    features = whole.features(whole.normalise(data["images"], data["sizes"]))
    if isinstance(whole, DenseDetector):
        for mine, theirs in zip(fewer.head(features).logits, whole.head(features).logits, strict=True):
            torch.testing.assert_close(mine.unflatten(1, (-1, 3)), theirs.unflatten(1, (-1, 5))[:, :, [0, 2, 4]])
    else:
        boxes, image = torch.tensor([[4.0, 4, 40, 36], [8, 8, 30, 44]]), torch.tensor([0, 2])
        for heads in zip(fewer.roi.stages, whole.roi.stages, strict=True):  # type: ignore[union-attr]
            mine, theirs = (head(features, boxes, image) for head in heads)
            torch.testing.assert_close(mine.logits, theirs.logits[:, [0, 2, 4, 5]])
            torch.testing.assert_close(mine.deltas, theirs.deltas if spec.roi.class_agnostic else theirs.deltas[:, [0, 2, 4]])


def test_nothing_to_drop() -> None:
    detector = build_detector(retinanet_spec(), 2)
    for classes in (None, ("ant", "bee")):
        loaded = LoadedDetector(detector, classes, "mmdet")
        assert drop_unused_classes(loaded) is loaded


@pytest.mark.parametrize(
    ("spec", "layer"),
    [
        (retinanet_spec(), "head.cls_out"),
        (fcos_spec(), "head.cls_out"),
        (reppoints_spec(), "head.cls_out"),
        (faster_rcnn_spec(), "roi.cls_out"),
        *((cascade_spec(), f"roi.stages.{i}.cls_out") for i in range(3)),
    ],
)
def test_classes_are_found_by_name_and_new_ones_are_fresh(spec: DetectorSpec, layer: str) -> None:
    torch.manual_seed(0)
    whole = build_detector(spec, 3)
    liven(whole)
    torch.manual_seed(5)
    other = with_classes(LoadedDetector(whole, ("ant", "bee", "cat"), "mmdet"), ["cat", "dog", "ant"]).detector
    torch.manual_seed(5)
    fresh = build_detector(spec, 3)
    groups = 9 if isinstance(spec, RetinaNetSpec) else 1
    for tensor in ("weight", "bias"):
        mine, theirs, new = (net.get_submodule(layer).get_parameter(tensor) for net in (other, whole, fresh))
        mine, theirs, new = (t.unflatten(0, (groups, -1)) for t in (mine, theirs, new))
        assert torch.equal(mine[:, 0], theirs[:, 2]) and torch.equal(mine[:, 2], theirs[:, 0])
        assert torch.equal(mine[:, 1], new[:, 1])
        if layer.startswith("roi."):
            assert torch.equal(mine[:, 3], theirs[:, 3]), "background"
    mine, theirs = other.neck.state_dict(), whole.neck.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
