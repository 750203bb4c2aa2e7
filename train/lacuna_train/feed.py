"""Data workers: processes that write batches into shared memory.

A batch depends only on (seed, rank, step, kind, length, progress), not on which
worker makes it or when. A worker that fails sends its traceback and the trainer
stops with it; a worker that dies or hangs is noticed by a time limit.
"""
import ctypes
import multiprocessing
import queue
import traceback

import numpy as np

from .books import Books
from .mixture import LOOK_SLOTS, LOOK_TOKENS, Mixture, REPLY_TOKENS
from .tasks import TaskMaker

WAIT_SECONDS = 30


def slot_arrays(tokens, buffer=None):
    """The arrays of one batch, as views of `buffer` (or fresh). Replies: one row per 1024 tokens at most."""
    rows = max(1, tokens // 1024)
    fields = {"ids": ((tokens,), np.int32), "targets": ((tokens,), np.int32), "classes": ((tokens,), np.int32),
              "weights": ((tokens,), np.float32),
              "look_at": ((LOOK_SLOTS,), np.int32), "look_ids": ((LOOK_SLOTS, LOOK_TOKENS), np.int32),
              "look_weights": ((LOOK_SLOTS, LOOK_TOKENS), np.float32),
              "reply_ids": ((rows, REPLY_TOKENS), np.int32), "reply_targets": ((rows, REPLY_TOKENS), np.int32),
              "reply_weights": ((rows, REPLY_TOKENS), np.float32)}
    size = sum(4 * int(np.prod(shape)) for shape, _ in fields.values())
    if buffer is None:
        buffer = bytearray(size)
    arrays, offset = {}, 0
    for name, (shape, dtype) in fields.items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
        offset += 4 * count
    return arrays, size


def batch_rng(seed, rank, step):
    return np.random.default_rng([seed, rank, step])


def _work(buffers, tokens, data, spec, seed, rank, requests, ready):
    try:
        books = Books(data / "train")
        mixture = Mixture(TaskMaker(spec, data / "tokenizer", books), books)
        slots = [slot_arrays(tokens, b)[0] for b in buffers]
        while True:
            request = requests.get()
            if request is None:
                return
            slot, step, kind, length, progress = request
            mixture.fill(slots[slot], batch_rng(seed, rank, step), kind, length, progress)
            ready.put((slot, step, None))
    except Exception:
        ready.put((-1, -1, traceback.format_exc()))


class Feed:
    """Hands out batches in the order of the requests."""

    def __init__(self, data, spec, tokens, seed, rank, workers):
        self.depth = 3 * workers
        context = multiprocessing.get_context("spawn")
        _, size = slot_arrays(tokens)
        buffers = [context.RawArray(ctypes.c_uint8, size) for _ in range(self.depth)]
        self.slots = [slot_arrays(tokens, b)[0] for b in buffers]
        self.free = list(range(self.depth))
        self.requests, self.ready = context.Queue(), context.Queue()
        self.pending, self.done = [], {}
        self.processes = [context.Process(
            target=_work, args=(buffers, tokens, data, spec, seed, rank, self.requests, self.ready), daemon=True)
            for _ in range(workers)]
        for process in self.processes:
            process.start()

    def wants(self):
        return bool(self.free)

    def request(self, step, kind, length, progress):
        slot = self.free.pop()
        self.pending.append((step, kind, length))
        self.requests.put((slot, step, kind, length, progress))

    def next(self):
        """(step, kind, length, arrays, release): the oldest request's batch; call release() when copied."""
        step, kind, length = self.pending.pop(0)
        while step not in self.done:
            try:
                slot, finished, error = self.ready.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                alive = sum(p.is_alive() for p in self.processes)
                raise RuntimeError(f"no batch within {WAIT_SECONDS} s for step {step}; {alive} of "
                                   f"{len(self.processes)} data workers are alive") from None
            if error:
                raise RuntimeError(f"a data worker failed:\n{error}")
            self.done[finished] = slot
        slot = self.done.pop(step)
        return step, kind, length, self.slots[slot], lambda: self.free.append(slot)

    def close(self):
        for _ in self.processes:
            self.requests.put(None)
        for process in self.processes:
            process.join(timeout=2)
            if process.is_alive():
                process.terminate()
