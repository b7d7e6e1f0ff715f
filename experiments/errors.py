"""How a run ends where it does not reach its end: in one sentence, never a traceback."""


class UserError(ValueError):
    """A missing file, an unknown name or malformed data; its message is one clear sentence. Exit status 2."""


class Preempted(Exception):
    """The process was told to end (SIGTERM), and saved its state before; the same command resumes. Exit status 75."""
