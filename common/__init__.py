"""What the scripts share: weights, pixels, files and processes. Nothing here decides what is learned."""

import contextlib
import sys

from tqdm import tqdm


class UserError(ValueError):
    """A wrong input, in one sentence that says what was wrong and what to do; a script ends with exit code
    2."""


def say(text, file=None):
    """Print, beside a progress bar, also where nobody can read it any more: words are no reason to end."""
    with contextlib.suppress(OSError):
        tqdm.write(text, file or sys.stdout)
        (file or sys.stdout).flush()
