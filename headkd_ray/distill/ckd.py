"""Cross knowledge distillation: the student's own head imitates what a head of another kind sees.

student  target   compared
maps     rows     the student's map at the anchor cell that proposed a RoI, with the RoI's row (the paper's pair)
maps     maps     level by level
rows     rows     RoI by RoI
rows     maps     a RoI's row, with the target's map at the cell that proposed the RoI
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headkd_ray.detectors import RoIs
from headkd_ray.detectors.losses import mean_squared_error
from headkd_ray.distill.akd import distance
from headkd_ray.distill.scene import Tap


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
    """A trained ``adapter`` from the width of the student's tap to the target's: a 1x1 conv between maps, else a Linear.

    With ``anchors`` > 1 ("decouple"): one Linear for each anchor of a cell, side by side in ``adapter``, whose outputs are
    anchors times as many. All are computed and one a row is kept, which needs no sorting of the rows by anchor.
    """

    def __init__(self, adapter: nn.Module, anchors: int = 1) -> None:
        super().__init__()
        self.adapter = adapter
        self.anchors = anchors

    def forward(self, own: Tap, target: Tap, rois: RoIs | None) -> Tensor:
        """Distance of the student's tap ``own``, adapted, from ``target``, which gets no gradient.

        ``rois`` are those whose rows either side has; None if both are maps. Where cells are read, RoIs that came from none
        (the ground-truth boxes) are left out on both sides.
        """
        if isinstance(own, Tensor) == isinstance(target, Tensor):
            return distance(self.adapter, own, target)
        assert rois is not None
        kept = rois.from_proposal
        if isinstance(target, Tensor):
            assert not isinstance(own, Tensor)
            return mean_squared_error(self.adapt(self.rows(own, rois), rois.cells[kept, 3]), target[kept])
        assert isinstance(own, Tensor)
        # A cell of the RPN's level i (P2 to P6) lies in one, twice as wide, of the dense head's level i (P3 to P7), whose
        # anchors are as large: 8 cells of the one are 4 of the other.
        level, y, x, anchor = rois.cells[kept].unbind(1)
        cells = torch.stack([level, y // 2, x // 2, anchor], dim=1)
        return mean_squared_error(self.adapter(own[kept]), read_cells(target, rois.image[kept], cells))

    def rows(self, taps: Sequence[Tensor], rois: RoIs) -> Tensor:
        """S (R', width): the student's maps ``taps`` at the anchor cells of the ``rois`` that came from one."""
        kept = rois.from_proposal
        return read_cells(taps, rois.image[kept], rois.cells[kept])

    def adapt(self, rows: Tensor, anchor: Tensor) -> Tensor:
        """(R', target_width) of ``rows`` (R', width) whose RoIs came from ``anchor`` (R',) of their cells."""
        adapted = self.adapter(rows).unflatten(1, (self.anchors, -1))
        if self.anchors == 1:
            return adapted.squeeze(1)
        return adapted.gather(1, anchor[:, None, None].expand(-1, 1, adapted.shape[2])).squeeze(1)
