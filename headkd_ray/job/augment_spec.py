"""Define the keys of ``data.augment``: random changes of training views."""

from __future__ import annotations

from headkd_ray.job.module_specs import Spec
from headkd_ray.job.numbers import Epochs, Expansion, Fraction, Portion, Turn


class AugmentSpec(Spec):
    """Random changes of training views besides data.short_side and data.flip; without any of them the views are the paper's.

    A view is a mosaic, or else a crop, or else zoomed out, or else the whole image; then come colour and flips. None changes
    the view's size."""

    mosaic: Fraction = 0.0
    """Probability that a view shows four images, one in each quarter around a random centre: the image itself and three others
    of a row group of the shards, another one for each view. Decoding takes four times as long."""
    mosaic_epochs: Epochs | None = None
    """Epochs with mosaics, counted from the first; later ones show single images, as evaluation does. null = all."""
    crop: Fraction = 0.0
    """Probability that a view that is no mosaic shows a random window of the image, with the image's aspect, in which some box
    is visible."""
    crop_side: tuple[Portion, Portion] = (0.3, 1.0)
    """Sides of that window as a share of the image's, drawn uniformly from this closed range."""
    zoom_out: Fraction = 0.0
    """Probability that a view that is neither mosaic nor crop shows the image made smaller, at a random place on grey."""
    zoom_out_side: tuple[Expansion, Expansion] = (1.0, 4.0)
    """Sides of the view in sides of the image on it, drawn uniformly from this closed range."""
    min_visible: Fraction = 0.3
    """A box that a mosaic or a crop cuts is clipped, and left out if less than this share of its area is visible."""
    brightness: Fraction = 0.0
    """Brightness is multiplied by a factor that is drawn uniformly from 1 - this to 1 + this."""
    contrast: Fraction = 0.0
    """The distance of all pixels from the view's mean grey is multiplied by a factor from 1 - this to 1 + this."""
    saturation: Fraction = 0.0
    """The distance of each pixel from its own grey is multiplied by a factor from 1 - this to 1 + this."""
    hue: Turn = 0.0
    """Hues are turned by up to this share of a full turn, in either direction."""
    flip_vertical: Fraction = 0.0
    """Probability of a vertical flip, for images that have no upside, such as aerial ones."""
