"""Define the number types of job and search files, each with a range outside of which a number must be a typing error.

Bounds are far beyond what anybody trains with. With them, a number with three zeros too many is an error that names its key,
instead of an overflow, exhausted memory or a training run that never ends.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Part = Annotated[float, Field(gt=0.0, le=1.0)]
"""A share that is not 0."""
Portion = Annotated[float, Field(ge=0.05, le=1.0)]
"""A share of a length that leaves something of it."""
Expansion = Annotated[float, Field(ge=1.0, le=16.0)]
"""A factor by which a length grows."""
Turn = Annotated[float, Field(ge=0.0, le=0.5)]
"""An angle as a share of a full turn, in one of two directions."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
"""The weight of a loss."""
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
"""A divisor, and therefore not 0."""
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A decay of a moving average."""
Exponent = Annotated[float, Field(ge=0.0, le=100.0)]

Epochs = Annotated[int, Field(gt=0, le=1_000_000)]
Steps = Annotated[int, Field(gt=0, le=10**9)]
StepsOrNone = Annotated[int, Field(ge=0, le=10**9)]
Restarts = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(gt=0.0, le=1e9)]
SecondsOrNone = Annotated[float, Field(ge=0.0, le=1e9)]

Pixels = Annotated[int, Field(gt=0, le=32_768)]
"""A side of an image."""
Multiple = Annotated[int, Field(gt=0, le=4096)]
"""A number to whose multiples the sides of images are padded."""
Batch = Annotated[int, Field(gt=0, le=65_536)]
"""A number of images in one batch."""
Images = Annotated[int, Field(gt=0, le=10**8)]
Boxes = Annotated[int, Field(gt=0, le=10**7)]
"""A number of boxes in one image."""
Logits = Annotated[int, Field(ge=0, le=10**6)]
"""A number of logits of one box, at most one for each class."""

Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
"""An aspect ratio, height / width."""
Octaves = Annotated[int, Field(gt=0, le=100)]
"""A number of anchor sizes per octave."""
Channels = Annotated[int, Field(gt=0, le=16_384)]
Layers = Annotated[int, Field(gt=0, le=100)]
LayersOrNone = Annotated[int, Field(ge=0, le=100)]
Bins = Annotated[int, Field(gt=0, le=256)]
"""A side of a RoI's features, in bins."""
Samples = Annotated[int, Field(ge=0, le=256)]
"""A number of samples in a bin along one axis."""

Processes = Annotated[int, Field(gt=0, le=100_000)]
ProcessesOrNone = Annotated[int, Field(ge=0, le=100_000)]
Threads = Annotated[int, Field(gt=0, le=4096)]
Share = Annotated[float, Field(gt=0.0, le=4096.0)]
"""CPUs or GPUs of a process, possibly a fraction of one."""
ShareOrNone = Annotated[float, Field(ge=0.0, le=4096.0)]

Trials = Annotated[int, Field(gt=0, le=1_000_000)]
TrialsOrNone = Annotated[int, Field(ge=0, le=1_000_000)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
"""An end of a search range."""
PositiveNumber = Annotated[float, Field(gt=0.0, le=1e15)]
Whole = Annotated[int, Field(ge=-(10**15), le=10**15)]
PositiveWhole = Annotated[int, Field(gt=0, le=10**15)]
