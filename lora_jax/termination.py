"""A termination signal as an exception that is not lost."""

import contextlib
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

_PAUSE = 0.05  # seconds before the signal is sent again


@contextlib.contextmanager
def raising(error: Callable[[], BaseException]) -> Iterator[None]:
    """Makes SIGTERM raise an exception inside the `with` block, which ends by it.

    Python runs a signal handler wherever it is. In a `__del__`, a callback of the garbage collector or of a weak
    reference it drops what the handler raises, and the program goes on. Here the signal is sent again when the
    exception is dropped before the block has ended. Outside of the main thread, which alone may set handlers, this
    does nothing.

    Args:
      error: Returns a new exception. Its type accepts weak references, as classes defined in Python do, and is best no
        subclass of `Exception`, so that nothing on the way catches it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, dropped = threading.get_ident(), queue.SimpleQueue()  # whose `put` may be called in any such place
    reference: weakref.ref[BaseException] | None = None
    ending = late = False

    def watched() -> BaseException:
        nonlocal reference
        raised = error()
        reference = weakref.ref(raised, lambda _: dropped.put(True))
        return raised

    def handle(*_) -> None:
        nonlocal late
        if ending:
            late = True
            return
        raise watched()  # no variable of this frame, which the exception's traceback holds, refers to the exception

    def send_again() -> None:
        while dropped.get():
            time.sleep(_PAUSE)
            signal.pthread_kill(main, signal.SIGTERM)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        if reference is None or args.exc_value is not reference():
            hook(args)

    before, hook = signal.signal(signal.SIGTERM, handle), sys.unraisablehook
    sys.unraisablehook = unraisable
    thread = threading.Thread(target=send_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending, reference = True, None
        dropped.put(False)
        thread.join()  # a signal that is still to be sent again is late
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)
        if late:
            raise error()
