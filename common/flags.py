"""What a flag's annotation says beside its type: which values work, and what it means beside other flags.

gamma: Share = 0.99
init_std: Annotated[Positive, FIXED, Only("head", "gaussian")] = 0.2
"""

import dataclasses
from typing import Annotated, get_type_hints

FREE = "may differ from the run's when that is resumed, and stands in no data set that it writes"
FIXED = "is part of a checkpoint: beside --checkpoint it has that one's value, and no other"
KEPT = "has the checkpoint's value where that is evaluated, unless it is given"


class Only:
    """Has an effect only where another flag has one of these values, or, without one, any: given elsewhere,
    it is an error."""

    def __init__(self, flag, *values):
        self.flag, self.values = flag, values

    def forbids(self, found):
        return found not in self.values if self.values else found is None


class Unless:
    """Has no effect where another flag has this value, or, without one, any: given there, it is an error."""

    def __init__(self, flag, value=None):
        self.flag, self.value = flag, value

    def forbids(self, found):
        return found is not None if self.value is None else found == self.value


class Layers:
    """So many layers, each as wide as another flag says: an error where memory cannot hold them."""

    def __init__(self, width):
        self.width = width


POSITIVE, NONNEGATIVE, SHARE = "positive", "nonnegative", "share"
LIMITS = {  # what a value must do, and whether it does
    POSITIVE: ("be positive", lambda x: x > 0),
    NONNEGATIVE: ("not be negative", lambda x: x >= 0),
    SHARE: ("be in [0, 1]", lambda x: 0 <= x <= 1),
}
Positive, PositiveInt = Annotated[float, POSITIVE], Annotated[int, POSITIVE]
NonNegative, NonNegativeInt = Annotated[float, NONNEGATIVE], Annotated[int, NONNEGATIVE]
Share = Annotated[float, SHARE]


def marks(Args):
    """What the annotations of a dataclass say of its fields: {name: marks}."""
    hints = get_type_hints(Args, include_extras=True)
    return {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(Args)}
