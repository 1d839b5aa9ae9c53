"""The numbers of job and search files, each with the range outside of which it is a slip of the keyboard.

Bounds are far beyond what anybody trains with. They are there so that a number with three zeros too many is refused with its
key, and not found out by an overflow, an empty memory or a training that never ends.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
"""Of a loss."""
Rate = Annotated[float, Field(gt=0.0, le=1000.0)]
"""A learning rate."""
Factor = Annotated[float, Field(gt=0.0, le=1000.0)]
Limit = Annotated[float, Field(gt=0.0, le=1e9)]
Scale = Annotated[float, Field(gt=0.0, le=1e6)]
"""A factor or a length that is not 0."""
Length = Annotated[float, Field(ge=0.0, le=1e6)]
"""A length or a difference that may be 0."""
Mean = Annotated[float, Field(ge=-1e4, le=1e4)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e4)]
"""Something is divided by it."""
Exponent = Annotated[float, Field(ge=0.0, le=100.0)]

Epochs = Annotated[int, Field(gt=0, le=1_000_000)]
Steps = Annotated[int, Field(gt=0, le=10**9)]
StepsOrNone = Annotated[int, Field(ge=0, le=10**9)]
Restarts = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(gt=0.0, le=1e9)]

Pixels = Annotated[int, Field(gt=0, le=32_768)]
"""A side of an image."""
Multiple = Annotated[int, Field(gt=0, le=4096)]
"""What sides of images are padded to a multiple of."""
Batch = Annotated[int, Field(gt=0, le=65_536)]
"""Images at a time."""
Images = Annotated[int, Field(gt=0, le=10**8)]
Boxes = Annotated[int, Field(gt=0, le=10**7)]
"""Boxes of an image."""
Logits = Annotated[int, Field(ge=0, le=10**6)]
"""Of a box, one for each class."""

Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
"""Height / width."""
Octaves = Annotated[int, Field(gt=0, le=100)]
"""Sizes of anchors an octave."""
Channels = Annotated[int, Field(gt=0, le=16_384)]
Layers = Annotated[int, Field(gt=0, le=100)]
LayersOrNone = Annotated[int, Field(ge=0, le=100)]
Bins = Annotated[int, Field(gt=0, le=256)]
"""A side of a RoI's features."""
Samples = Annotated[int, Field(ge=0, le=256)]
"""Of a bin, along an axis."""

Processes = Annotated[int, Field(gt=0, le=100_000)]
ProcessesOrNone = Annotated[int, Field(ge=0, le=100_000)]
Threads = Annotated[int, Field(gt=0, le=4096)]
Share = Annotated[float, Field(gt=0.0, le=4096.0)]
"""CPUs or GPUs of a process, also parts of one."""
ShareOrNone = Annotated[float, Field(ge=0.0, le=4096.0)]

Trials = Annotated[int, Field(gt=0, le=1_000_000)]
TrialsOrNone = Annotated[int, Field(ge=0, le=1_000_000)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
"""An end of a searched range."""
PositiveNumber = Annotated[float, Field(gt=0.0, le=1e15)]
Whole = Annotated[int, Field(ge=-(10**15), le=10**15)]
PositiveWhole = Annotated[int, Field(gt=0, le=10**15)]
