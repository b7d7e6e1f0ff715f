"""What the user can put right: shown as one sentence with exit status 2, never as a traceback."""


class UserError(ValueError):
    """A missing file, an unknown name or malformed data; its message is one clear sentence."""
