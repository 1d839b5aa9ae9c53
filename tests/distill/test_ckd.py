import torch
from torch import nn

from headkd_ray.detectors import RoIs
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.ckd import CKD, read_cells
from headkd_ray.distill.distances import adapted_distance

SHAPES = [(6, 9), (3, 5), (2, 3), (1, 2), (1, 1)]
CHANNELS = 4


def maps() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, CHANNELS, h, w, requires_grad=True) for h, w in SHAPES]


def all_cells() -> tuple[torch.Tensor, torch.Tensor]:
    """Return every cell of both images with two of its anchors, shuffled: (image (R,), cells (R, 4))."""
    rows = [
        (image, level, y, x, anchor)
        for image in range(2)
        for level, (h, w) in enumerate(SHAPES)
        for y in range(h)
        for x in range(w)
        for anchor in (0, 7)
    ]
    table = torch.tensor(rows)[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    return table[:, 0], table[:, 1:]


def test_read_cells_reads_level_y_x_of_the_right_image() -> None:
    features = maps()
    image, cells = all_cells()
    rows = read_cells(features, image, cells)
    for n in range(len(rows)):
        level, y, x, _ = cells[n].tolist()
        assert torch.equal(rows[n], features[level][int(image[n]), :, y, x])


def test_a_cell_that_several_rois_read_gets_all_their_gradients() -> None:
    features = maps()
    image, cells = torch.tensor([1, 1, 0]), torch.tensor([[0, 2, 3, 0], [0, 2, 3, 8], [1, 1, 4, 2]])
    read_cells(features, image, cells).sum().backward()
    expected = [torch.zeros_like(f) for f in features]
    expected[0][1, :, 2, 3] = 2
    expected[1][0, :, 1, 4] = 1
    for feature, wanted in zip(features, expected, strict=True):
        assert feature.grad is not None
        assert torch.equal(feature.grad, wanted)


def rois(cells: torch.Tensor, image: torch.Tensor) -> RoIs:
    count = len(cells)
    labels = torch.zeros(count, dtype=torch.int64)
    return RoIs(torch.zeros(count, 4), image, cells, labels, torch.zeros(count, 4), torch.ones(count))


def test_ckd_drops_ground_truth_rows_from_both_sides() -> None:
    cells = torch.tensor([[-1, -1, -1, 0], [0, 1, 2, 3], [-1, -1, -1, 1], [2, 1, 1, 0]])
    image = torch.tensor([0, 0, 1, 1])
    features, taught = maps(), torch.randn(4, 6)
    ckd = CKD(nn.Linear(CHANNELS, 6))
    rows = ckd.rows(features, rois(cells, image))
    assert torch.equal(rows, torch.stack([features[0][0, :, 1, 2], features[2][1, :, 1, 1]]))
    loss = ckd.compare(features, taught, rois(cells, image)).double()
    exact = rows.double() @ ckd.adapter.weight.double().T + ckd.adapter.bias.double()
    torch.testing.assert_close(loss, ((exact - taught[[1, 3]].double()) ** 2).sum() / 12, rtol=1e-5, atol=1e-8)


def test_ckd_of_a_roi_student_reads_a_dense_target_at_half_the_cell() -> None:
    """The RPN's P2 to P6 have cells half as wide as those of P3 to P7; ground-truth rows are dropped."""
    cells = torch.tensor([[-1, -1, -1, 0], [0, 11, 4, 2], [1, 5, 9, 0], [4, 1, 0, 1]])
    image = torch.tensor([0, 0, 1, 1])
    own, target, ckd = torch.randn(4, 6), maps(), CKD(nn.Linear(6, CHANNELS))
    seen = torch.stack([target[0][0, :, 5, 2], target[1][1, :, 2, 4], target[4][1, :, 0, 0]]).double()
    exact = own[1:].double() @ ckd.adapter.weight.double().T + ckd.adapter.bias.double()
    loss = ckd.compare(own, target, rois(cells, image))
    torch.testing.assert_close(loss.double(), ((exact - seen) ** 2).mean(), rtol=1e-5, atol=1e-8)
    loss.backward()
    assert all(f.grad is None for f in target)


def test_ckd_of_a_roi_student_and_a_roi_target_counts_all_rows() -> None:
    cells, image = torch.tensor([[-1, -1, -1, 0], [0, 1, 4, 2]]), torch.tensor([0, 0])
    own, target, ckd = torch.randn(2, 6), torch.randn(2, 5), CKD(nn.Linear(6, 5))
    exact = own.double() @ ckd.adapter.weight.double().T + ckd.adapter.bias.double()
    loss = ckd.compare(own, target, rois(cells, image)).double()
    torch.testing.assert_close(loss, ((exact - target.double()) ** 2).mean(), rtol=1e-5, atol=1e-8)


def test_only_ground_truth_rows_cost_nothing_and_give_zero_gradients() -> None:
    cells, image = torch.tensor([[-1, -1, -1, 0]]), torch.tensor([0])
    features, ckd = maps(), CKD(nn.Linear(CHANNELS, 6))
    loss = ckd.compare(features, torch.randn(1, 6), rois(cells, image))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in (*ckd.parameters(), *features))


def test_akd_is_one_mean_squared_error_a_layer() -> None:
    torch.manual_seed(2)
    akd = AKD([nn.Linear(3, 5), nn.Linear(3, 5)])
    taps, taught = [torch.randn(7, 3) for _ in range(2)], [torch.randn(7, 5, requires_grad=True) for _ in range(2)]
    pairs = zip(akd.adapters, taps, taught, strict=True)
    losses = [adapted_distance(akd.distance, *pair) for pair in pairs]
    for i, loss in enumerate(losses):
        adapter = akd.adapters[i]
        exact = taps[i].double() @ adapter.weight.double().T + adapter.bias.double()
        torch.testing.assert_close(loss.double(), ((exact - taught[i].double()) ** 2).mean(), rtol=1e-5, atol=1e-8)
    sum(losses).backward()  # type: ignore[union-attr]
    assert all(t.grad is None for t in taught)
