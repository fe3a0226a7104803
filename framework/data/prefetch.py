"""Making batches beside the training thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int
) -> Generator[Result]:
    """Results of `function`, in the order of `items`, computed ahead of their use by threads.

    Threads and not processes, because what takes long in making a batch leaves Python's lock: page faults of a mapped
    token cache, copies of arrays, decoding of images, pinning. They start in no time where a process imports torch for
    seconds, share the mapped pages, need neither a copy nor room in `/dev/shm` for what they hand over, may pin memory
    themselves, and get no signals, so an interrupted run has nothing of theirs to print.

    An exception of `function` is raised in its item's turn. Closing the generator drops what was computed ahead.

    Args:
        function: Safe to call from several threads; what it returns depends on its item alone.
        items: May be endless; iterated on the calling thread.
        workers: Threads; 0 computes each result when it is asked for, on the calling thread.
        ahead: Items that are begun before the first result is asked for, and kept begun.
    """
    if not workers:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
