"""Messages on their way whose buffers the program has already freed: each is kept until its own end, and no longer.

gloo's messages can be waited for but not asked whether they have ended, so a thread of its own waits for them in turn;
the step's thread drops what has landed when it comes by. (It alone lets go of tensors: what another thread frees, the
profiler's count of memory would miss.) On CUDA the allocator knows which streams still use a block: nothing is kept.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol


class Handle(Protocol):
    def wait(self) -> Any: ...


class Once:
    """A handle that is waited for once, however many wait: a scattered sum of gloo's copies its result at every wait,
    also over what has been made of it since. The handle stays: it may hold its operands."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.over, self.lock = handle, False, threading.Lock()

    def wait(self) -> None:
        with self.lock:
            if not self.over:
                self.handle.wait()
                self.over = True


@dataclass
class Message:
    """One message in flight: its buffer's value, and when it landed (seconds of `perf_counter`) or why it failed."""

    handle: Handle
    position: int
    value: Any
    landed: float = 0.0
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Flying:
    """The messages of one rank. The thread starts with the first and ends when nobody has this any more."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.waiting: queue.SimpleQueue[Message | None] | None = None

    def keep(self, handle: Handle, position: int, value: Any) -> None:
        """Keeps `value` until `handle` has been waited for."""
        if self.waiting is None:
            self.waiting = queue.SimpleQueue()
            threading.Thread(target=_wait, args=(self.waiting,), daemon=True, name="flying").start()
            weakref.finalize(self, self.waiting.put, None)
        message = Message(handle, position, value)
        self.messages.append(message)
        self.waiting.put(message)

    def drop(self, waited: dict[int, float], all_of_them: bool = False) -> None:
        """Lets go of what has landed, or waits for everything; `waited` is told when each did, by position.

        Raises what a message failed with.
        """
        left = []
        for message in self.messages:
            if all_of_them:
                message.done.wait()
            if not message.done.is_set():
                left.append(message)
                continue
            if message.error is not None:
                raise message.error
            waited[message.position] = message.landed
        self.messages = left


def _wait(waiting: queue.SimpleQueue[Message | None]) -> None:
    while (message := waiting.get()) is not None:
        try:
            message.handle.wait()
        except BaseException as error:  # the step's thread raises it
            message.error = error
        message.landed = time.perf_counter()
        message.done.set()
        del message  # the step's thread is to be the last that holds the value
