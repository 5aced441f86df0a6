"""How a command ends: one line on stderr, one last line of JSON if asked, and an exit code of the contract.

0 all done, 1 our failure, 2 usage or config, 3 some inputs were rejected, 130 and 143 on SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from cranium import errors
from cranium.config import UserError

STOPPED = (130, 143)
STOPPING = b"stopping, with what can be kept; a second signal waits no longer\n"


@dataclass
class Outcome:
    """How the command ended; printed by `--json`."""

    code: int
    facts: dict[str, Any]


class Terminated(BaseException):
    """SIGTERM, as an exception: contexts are left in order, Ray is shut down, locks are freed."""


def finish(verb: str, work: Callable[[], Outcome], as_json: bool, debug: bool) -> NoReturn:
    """Run `work`; turn whatever it ends with into one line on stderr and an exit code of the contract."""
    with _terminal() as stderr, _signals(stderr) as signals:
        try:
            try:
                outcome = work()
            finally:
                signals.heard = True  # from here on another one would cut the last words short
            error = None
        except BaseException as raised:
            if debug:
                traceback.print_exc()
            outcome, error = _explained(raised, signals.received())
    if error:
        print(error, file=sys.stderr)
    if as_json:
        print(json.dumps({"verb": verb, "exit_code": outcome.code, **outcome.facts}, default=str))
    sys.stdout.flush()
    # Everything is shut down; Ray's threads, stopped half-way, may abort a normal exit.
    if outcome.code in STOPPED:
        sys.stderr.flush()
        os._exit(outcome.code)
    raise SystemExit(outcome.code)


@contextlib.contextmanager
def _terminal() -> Iterator[int]:
    """Another descriptor of stderr; at the end 1 and 2 are again what they were, also where something was torn away."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        yield kept[1]
    finally:
        for number, one in enumerate(kept, 1):
            os.dup2(one, number)
            os.close(one)


def _explained(raised: BaseException, received: set[int]) -> tuple[Outcome, str]:
    if signal.SIGTERM in received or isinstance(raised, Terminated):
        return Outcome(143, {"error": "TERMINATED"}), "stopped; the same command goes on from here"
    if signal.SIGINT in received or isinstance(raised, KeyboardInterrupt):
        return Outcome(130, {"error": "INTERRUPTED"}), "stopped; the same command goes on from here"
    error = errors.mendable(raised)
    if error is None:
        text = next(iter(str(raised).strip().splitlines()), "")
        hint = "the log has the traceback, and --debug shows it"
        error = UserError("FAILED", f"{type(raised).__name__}: {text} ({hint})", 1)
    message = " ".join(str(error).split())
    return Outcome(
        error.exit_code, {"error": error.code, "message": message}
    ), f"error {error.code}: {message}"


class _Signals:
    """Raises on a signal, the first time with a word at once: what is left to do may take a while, or never end.

    A second one raises again, so that nothing is waited for; more of them are ignored, and so is any once `heard`.
    Which ones came is known even where a library swallows them (Ray Train: exit code 0).
    """

    def __init__(self, stderr: int, wakeup: socket.socket) -> None:
        self.heard, self.raised = False, 0
        self.came: set[int] = set()
        self._stderr, self._wakeup = stderr, wakeup

    def handle(self, number: int, frame: object) -> None:
        if self.heard or self.raised == 2:
            return
        self.raised += 1
        if self.raised == 1:
            with contextlib.suppress(OSError):
                os.write(self._stderr, STOPPING)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def received(self) -> set[int]:
        with contextlib.suppress(BlockingIOError):
            self.came |= set(self._wakeup.recv(4096))
        return self.came


@contextlib.contextmanager
def _signals(stderr: int) -> Iterator[_Signals]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals = _Signals(stderr, ours)
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:  # as those of a script's background jobs are
            signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(before)
        if not signals.received():  # else the process is about to end, and says so in peace
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)
        ours.close()
        theirs.close()
