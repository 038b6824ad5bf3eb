"""What a flag's annotation says beside its type: which values work, and what becomes of it beside a checkpoint.

gamma: Share = 0.99
init_std: Annotated[Positive, FIXED] = 0.2
"""

from typing import Annotated

FREE = "may differ from the run's when that is resumed"
FIXED = "is part of a checkpoint: beside --checkpoint it has that one's value, and no other"
KEPT = "has the checkpoint's value where that is evaluated, unless it is given"

POSITIVE, NONNEGATIVE, SHARE = "positive", "nonnegative", "share"
LIMITS = {  # what a value must do, and whether it does
    POSITIVE: ("be positive", lambda x: x > 0),
    NONNEGATIVE: ("not be negative", lambda x: x >= 0),
    SHARE: ("be in [0, 1]", lambda x: 0 <= x <= 1),
}
Positive, PositiveInt = Annotated[float, POSITIVE], Annotated[int, POSITIVE]
NonNegative, NonNegativeInt = Annotated[float, NONNEGATIVE], Annotated[int, NONNEGATIVE]
Share = Annotated[float, SHARE]
