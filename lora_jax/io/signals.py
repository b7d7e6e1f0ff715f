"""Termination signals and Ctrl-C as exceptions that cannot get lost."""

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
    """A KeyboardInterrupt that accepts weak references, which the built-in class does not."""


@contextlib.contextmanager
def raise_on_signal(error: Callable[[], BaseException]) -> Iterator[None]:
    """Makes SIGTERM raise an exception that ends the `with` block, like Ctrl-C.

    Python can run a signal handler at any point. In a `__del__` method and in callbacks of the garbage collector and of
    weak references it drops the exception of the handler, and the program continues. Here the signal is sent again if
    the exception is dropped before the block ends. The same applies to SIGINT, unless it is ignored or has a handler
    other than Python's. In threads other than the main thread, which cannot set handlers, this does nothing.

    Args:
      error: Returns a new exception for SIGTERM. Its type must accept weak references, as classes defined in Python do.
        It should not be a subclass of `Exception`, so that no caller catches it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, dropped = threading.get_ident(), queue.SimpleQueue()  # its `put` is reentrant
    reference: weakref.ref[BaseException] | None = None
    is_ending, late = False, 0
    errors: dict[int, Callable[[], BaseException]] = {signal.SIGTERM: error}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        errors[signal.SIGINT] = _Interrupt

    def make_error(number: int) -> BaseException:
        nonlocal reference
        raised = errors[number]()
        reference = weakref.ref(raised, lambda _: dropped.put(number))
        return raised

    def handle(number: int, _: object) -> None:
        nonlocal late
        if is_ending:
            late = number
            return
        raise make_error(number)  # no variable of this frame, which its traceback holds, may refer to it

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
        is_ending, reference = True, None
        dropped.put(0)
        thread.join()  # a signal that was to be sent again now counts as late
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        if late:
            raise errors[late]()
