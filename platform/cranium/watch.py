"""Something done again and again in the background, while the body of a `with` works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeatedly(work: Callable[[], object], every: float) -> Iterator[None]:
    """Call `work()` every `every` seconds in a thread until the body ends.

    What `work` raises ends the calls, and is raised once the body has ended; an error of the body itself goes before.
    """
    stop = threading.Event()
    failed: list[Exception] = []

    def loop() -> None:
        try:
            while not stop.wait(every):
                work()
        except Exception as error:  # raised below, where somebody hears it
            failed.append(error)

    thread = threading.Thread(target=loop, daemon=True, name="repeatedly")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
