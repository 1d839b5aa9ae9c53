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
    """One trained Linear from the width of the student's last classification conv to the teacher's last fc."""

    def __init__(self, adapter: nn.Linear) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, taps: Sequence[Tensor], rois: RoIs) -> Tensor:
        """S (R', student_width): the student's ``taps`` at the anchor cells of the ``rois`` that came from one."""
        own = rois.from_proposal
        return read_cells(taps, rois.image[own], rois.cells[own])

    def loss(self, rows: Tensor, taught: Tensor, rois: RoIs) -> Tensor:
        """MSE of the adapted ``rows`` (R', student_width) with the teacher's last fc ``taught`` (R, teacher_width) there."""
        return mean_squared_error(self.adapter(rows), taught[rois.from_proposal])
