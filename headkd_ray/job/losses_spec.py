"""Define the keys of ``losses``: what the classification losses make of each class."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from headkd_ray.job.module_specs import Spec, Text
from headkd_ray.job.numbers import Momentum, Weight

RULE, MAP = "<rule>", "<map>"


def _rule_or_map(value: Any) -> str:
    return MAP if isinstance(value, dict) else RULE


ClassWeights = Annotated[
    Annotated[Literal["balanced", "effective_number"], Tag(RULE)] | Annotated[dict[Text, Weight], Tag(MAP)],
    Discriminator(_rule_or_map),  # so that errors are about the form that the user wrote
]


class LossesSpec(Spec):
    """What the classification losses of the student's head and of the assistants make of each class."""

    class_weights: ClassWeights | None = None
    """Weight of each class: the classification loss of an anchor, point or RoI is multiplied by the weight of the class of its
    object, background by 1. A map of class names to weights, in which other classes have 1; or computed from the boxes of
    data.train, with a mean of 1 over them: balanced = inversely to a class's number of boxes, effective_number = inversely
    to its effective number (Cui et al., 2019), which is gentler; null = all classes alike (the paper)."""
    effective_beta: Momentum = 0.999
    """With effective_number: n boxes count as (1 - beta^n) / (1 - beta); the closer to 1, the more like balanced."""
