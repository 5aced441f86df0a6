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

from cranium.config import UserError

STOPPED = (130, 143)


@dataclass
class Outcome:
    """How the command ended; printed by `--json`."""

    code: int
    facts: dict[str, Any]


class Terminated(BaseException):
    """SIGTERM, as an exception: contexts are left in order, Ray is shut down, locks are freed."""


def finish(verb: str, work: Callable[[], Outcome], as_json: bool, debug: bool) -> NoReturn:
    """Run `work`; turn whatever it ends with into one line on stderr and an exit code of the contract."""
    with _signals() as received:
        try:
            outcome = work()
            error = None
        except BaseException as raised:
            if debug:
                traceback.print_exc()
            outcome, error = _explained(raised, received())
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


def _explained(raised: BaseException, received: set[int]) -> tuple[Outcome, str]:
    if signal.SIGTERM in received or isinstance(raised, Terminated):
        return Outcome(143, {"error": "TERMINATED"}), "stopped; the same command goes on from here"
    if signal.SIGINT in received or isinstance(raised, KeyboardInterrupt):
        return Outcome(130, {"error": "INTERRUPTED"}), "stopped; the same command goes on from here"
    error = _user_error(raised)
    if error is None:
        text = next(iter(str(raised).strip().splitlines()), "")
        hint = "the log has the traceback, and --debug shows it"
        error = UserError("FAILED", f"{type(raised).__name__}: {text} ({hint})", 1)
    message = " ".join(str(error).split())
    return Outcome(
        error.exit_code, {"error": error.code, "message": message}
    ), f"error {error.code}: {message}"


def _user_error(raised: BaseException) -> UserError | None:
    """The error a user can mend, found behind what Ray wraps around it."""
    seen: set[int] = set()
    current: BaseException | None = raised
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # Ray's wrapping: it may be a UserError too, with a traceback for its message.
        if isinstance(wrapped := getattr(current, "cause", None), BaseException):
            current = wrapped
            continue
        if isinstance(current, UserError):
            return current
        if isinstance(current, OSError) and current.errno == 28:
            return UserError(
                "NO_SPACE", f"the disk is full ({current.filename}); free some and run the same again", 1
            )
        current = current.__cause__ or current.__context__
    return None


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], set[int]]]:
    """SIGTERM raises; and which signals came is known even where a library swallows them (Ray Train: exit code 0)."""

    def terminate(number: int, frame: object) -> NoReturn:
        raise Terminated

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, terminate)

    def received() -> set[int]:
        with contextlib.suppress(BlockingIOError):
            return set(ours.recv(4096))
        return set()

    try:
        yield received
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        ours.close()
        theirs.close()
