"""Cross knowledge distillation: the student's dense head, at the cell that proposed a RoI, imitates what the teacher sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headkd_ray.detectors import RoIs
from headkd_ray.detectors.losses import mean_squared_error


def read_cells(maps: Sequence[Tensor], image: Tensor, cells: Tensor) -> Tensor:
    """(R, C) features of ``maps`` (B, C, H_l, W_l) at ``cells`` (R, 4: level, y, x, anchor) of the images ``image`` (R,).

    Several RoIs may read one cell. The lookup is an embedding because its backward adds up repeated rows in a fixed order on
    CPU and GPU, which indexing does not.
    """
    rows = [m.flatten(2).transpose(1, 2) for m in maps]
    table = torch.cat(rows, dim=1)
    counts = torch.tensor([r.shape[1] for r in rows], device=cells.device)
    widths = torch.tensor([m.shape[3] for m in maps], device=cells.device)
    level, y, x, _ = cells.unbind(1)
    index = image * table.shape[1] + (counts.cumsum(0) - counts)[level] + y * widths[level] + x
    return F.embedding(index, table.flatten(0, 1))


class CKD(nn.Module):
    """A trained Linear from the width of the student's last classification conv to the teacher's last fc.

    With ``anchors`` > 1 ("decouple"): one Linear for each anchor of a cell, side by side in ``adapter``, whose outputs are
    anchors times as many. All are computed and one a row is kept, which needs no sorting of the rows by anchor.
    """

    def __init__(self, adapter: nn.Linear, anchors: int = 1) -> None:
        super().__init__()
        self.adapter = adapter
        self.anchors = anchors

    def forward(self, taps: Sequence[Tensor], rois: RoIs) -> Tensor:
        """S (R', student_width): the student's ``taps`` at the anchor cells of the ``rois`` that came from one."""
        own = rois.from_proposal
        return read_cells(taps, rois.image[own], rois.cells[own])

    def loss(self, rows: Tensor, taught: Tensor, rois: RoIs) -> Tensor:
        """MSE of the adapted ``rows`` (R', student_width) with the teacher's last fc ``taught`` (R, teacher_width) there."""
        own = rois.from_proposal
        return mean_squared_error(self.adapt(rows, rois.cells[own, 3]), taught[own])

    def adapt(self, rows: Tensor, anchor: Tensor) -> Tensor:
        """(R', teacher_width) of ``rows`` (R', student_width) whose RoIs came from ``anchor`` (R',) of their cells."""
        adapted = self.adapter(rows).unflatten(1, (self.anchors, -1))
        if self.anchors == 1:
            return adapted.squeeze(1)
        return adapted.gather(1, anchor[:, None, None].expand(-1, 1, adapted.shape[2])).squeeze(1)


def level_errors(adapter: nn.Module, own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Sum over levels of the MSE of adapted maps ``own`` (B, C, H, W) with ``theirs`` (B, C', H, W), which get no gradient."""
    return torch.stack([mean_squared_error(adapter(o), t) for o, t in zip(own, theirs, strict=True)]).sum()
