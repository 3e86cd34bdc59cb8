"""Runs an attack in a process of its own, so that its memory is its own, and counts the processes that it starts."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

from tests.torture.command import peak

_context = multiprocessing.get_context("forkserver")
#: Forked from a process that has loaded what attacks need, since that takes seconds.
PRELOADED = ["tests.torture.opened"]


def run_alone(attack: Callable[..., str], *arguments: object) -> tuple[str, int]:
    """What an attack returns, or how its process ended, and the memory that it and the largest of its children took, in bytes.

    Arguments:
        attack: a function of a module, which returns what went wrong.
        arguments: its arguments, which are pickled.
    """
    _context.set_forkserver_preload(PRELOADED)
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(theirs, attack, *arguments))
    process.start()
    theirs.close()
    try:
        found: tuple[str, int] = ours.recv()
    except EOFError:
        process.join()
        return f"its process ended with {process.exitcode}", 0
    process.join()
    return found


def _run(answer: Connection, attack: Callable[..., str], *arguments: object) -> None:
    from bridgekit.decoding import isolation

    before = peak()
    wrong = attack(*arguments)
    isolation._pool.close()  # waits for the decoders, which are counted then
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    answer.send((wrong, peak() - before + children))
