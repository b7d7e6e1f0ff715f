"""Termination signals and Ctrl-C as exceptions that are not lost."""

import contextlib
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

_PAUSE = 0.05  # seconds before the signal is sent again


class _Interrupt(KeyboardInterrupt):
    """One that accepts weak references, which the built-in class does not."""


@contextlib.contextmanager
def raising(error: Callable[[], BaseException]) -> Iterator[None]:
    """Makes SIGTERM raise an exception inside the `with` block, which ends by it, as it does by Ctrl-C.

    Python runs a signal handler wherever it is. In a `__del__`, a callback of the garbage collector or of a weak
    reference it drops what the handler raises, and the program goes on. Here the signal is sent again when the
    exception is dropped before the block has ended. So is SIGINT, unless it is ignored or has a handler other than
    Python's. Outside of the main thread, which alone may set handlers, this does nothing.

    Args:
      error: Returns a new exception for SIGTERM. Its type accepts weak references, as classes defined in Python do, and
        is best no subclass of `Exception`, so that nothing on the way catches it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, dropped = threading.get_ident(), queue.SimpleQueue()  # whose `put` may be called in any such place
    reference: weakref.ref[BaseException] | None = None
    ending, late = False, 0
    errors: dict[int, Callable[[], BaseException]] = {signal.SIGTERM: error}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        errors[signal.SIGINT] = _Interrupt

    def watched(number: int) -> BaseException:
        nonlocal reference
        raised = errors[number]()
        reference = weakref.ref(raised, lambda _: dropped.put(number))
        return raised

    def handle(number: int, _: object) -> None:
        nonlocal late
        if ending:
            late = number
            return
        raise watched(number)  # no variable here refers to it: its traceback holds this frame

    def send_again() -> None:
        while number := dropped.get():
            time.sleep(_PAUSE)
            signal.pthread_kill(main, number)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        if reference is None or args.exc_value is not reference():
            hook(args)

    before, hook = {number: signal.signal(number, handle) for number in errors}, sys.unraisablehook
    sys.unraisablehook = unraisable
    thread = threading.Thread(target=send_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending, reference = True, None
        dropped.put(0)
        thread.join()  # a signal that is still to be sent again is late
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        if late:
            raise errors[late]()
