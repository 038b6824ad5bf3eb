"""What the scripts share: weights, pixels, files and processes. Nothing here decides what is learned."""


class UserError(ValueError):
    """A wrong input, in one sentence that says what was wrong and what to do; a script ends with exit code
    2."""
