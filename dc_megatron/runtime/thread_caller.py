"""Asynchronous saves without a GPU: a thread writes copies of the tensors.

On a GPU megatron-core hands the tensors to a process of its own, which copies them to the host before training goes on.
Tensors that are on the host already would reach it as shared memory, and the next step would change them under its
hands; and that process would have to load everything anew, 15 s on a small CPU. A thread ends with its process, so a
killed run leaves no writer behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


def calling_threads(original: Callable) -> Callable:
    """``AsyncCallsQueue._get_async_caller`` that gives every save a thread."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller

    class ThreadCaller(AsyncCaller):
        """Runs one AsyncRequest. A failure shows as results that are missing, which megatron-core looks for."""

        _thread: threading.Thread | None = None

        def schedule_async_call(self, async_req) -> None:
            if async_req.async_fn is None:
                return
            arguments = list(async_req.async_fn_args)
            if async_req.preload_fn is not None:
                arguments[1] = copied(async_req.preload_fn())
            # A daemon: a run that ends in an error does not wait for a checkpoint that it cannot complete.
            self._thread = threading.Thread(
                target=async_req.async_fn, args=arguments, kwargs=async_req.async_fn_kwargs, daemon=True
            )
            self._thread.start()

        def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
            if blocking:
                self.close()
            alive = self._thread is not None and self._thread.is_alive()
            return not alive if no_dist else self.sync_all_async_calls(int(alive))

        def close(self, abort: bool = False) -> None:
            if self._thread is not None and not abort:
                self._thread.join()

        def __del__(self):
            """A daemon needs no goodbye."""

    return lambda self: ThreadCaller()


def copied(write_buckets: list) -> list:
    """megatron-core's buckets, (file, key, (bytes, [(item, tensor)])), with copies of the tensors."""
    return [
        (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (data, tensors) in write_buckets
    ]
