"""NMS, proposals, detections and RoI features on the GPU equal the CPU's."""

from __future__ import annotations

import pytest
import torch

from headkd_ray.detectors import DenseDetector, TwoStageDetector
from headkd_ray.detectors.ops.nms import grouped_nms, nms_mask
from tests.detectors.micro import batch
from tests.gpu.models import KINDS, model_of

pytestmark = pytest.mark.gpu
HERE = torch.device("cpu")


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (500, 1), (3000, 160), (45_000, 7)])
def test_nms_keeps_the_boxes_that_the_cpu_keeps(count: int, groups: int, device: torch.device) -> None:
    """45,000 boxes are more than a single call on a GPU takes."""
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 1300
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 90], dim=1)
    scores, group = torch.rand(count, generator=generator), torch.randint(0, groups, (count,), generator=generator)
    kept = grouped_nms(boxes.to(device), scores.to(device), group.to(device), 0.5)
    assert kept.device == device
    assert kept.tolist() == grouped_nms(boxes, scores, group, 0.5).tolist()


@pytest.mark.parametrize("counts", [[1], [1000, 1000, 700, 175, 48], [2000, 2000, 2000]])
@pytest.mark.parametrize("whole", [True, False])
def test_the_mask_keeps_the_boxes_that_the_cpu_keeps(counts: list[int], whole: bool, device: torch.device) -> None:
    """Whole coordinates make many IoUs equal the threshold."""
    generator = torch.Generator().manual_seed(sum(counts))
    corner = torch.rand(16, sum(counts), 2, generator=generator) * 600
    boxes = torch.cat([corner, corner + torch.rand(16, sum(counts), 2, generator=generator) * 200], dim=2)
    boxes = boxes.round() if whole else boxes
    kept = nms_mask(boxes.to(device), counts, 0.6)
    assert kept.device == device
    assert torch.equal(kept.cpu(), nms_mask(boxes, counts, 0.6))


def test_nms_of_nothing(device: torch.device) -> None:
    nothing = torch.zeros(0, device=device)
    assert grouped_nms(nothing.view(0, 4), nothing, nothing.long(), 0.5).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_proposals_and_detections_are_the_cpu_s(kind: str, device: torch.device) -> None:
    detector = model_of("supervised", kind, None).student.eval()
    data = batch()
    found = []
    for place in (HERE, device):
        detector.to(place)
        sizes = data["sizes"].to(place)
        x = detector.normalise(data["images"].to(place), sizes)
        with torch.no_grad():
            features = detector.features(x)
            if isinstance(detector, TwoStageDetector):
                proposals = detector.rpn.proposals(detector.rpn(features), sizes)
            else:
                assert isinstance(detector, DenseDetector)
                proposals = detector.head.proposals(detector.head(features), sizes)
            found.append((proposals, detector.detect(x, sizes)))
    (wanted, wanted_detections), (proposals, detections) = found
    assert wanted.valid.any() and (wanted_detections.labels >= 0).any(), "nothing was compared"
    count = wanted.valid.shape[1]  # more is padding on the GPU
    assert torch.equal(proposals.valid[:, :count].cpu(), wanted.valid) and not proposals.valid[:, count:].any()
    assert torch.equal(proposals.cells[:, :count].cpu(), wanted.cells)
    torch.testing.assert_close(proposals.boxes[:, :count].cpu(), wanted.boxes, rtol=1e-4, atol=1e-2)
    assert torch.equal(detections.labels.cpu(), wanted_detections.labels)
    torch.testing.assert_close(detections.boxes.cpu(), wanted_detections.boxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(detections.scores.cpu(), wanted_detections.scores, rtol=1e-4, atol=1e-5)
