"""What a world makes before any training, as its demonstrations, in processes as clean as its workers."""

import contextlib
import multiprocessing
import traceback
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

from common import UserError, forkserver
from common.envs.vector import START_METHOD
from common.memory import available_cores


def in_parallel(function, seeds, num_workers, *rest, parts=None):
    """The items, in the order of the `seeds`, of the lists that `function((some of them, *rest))` gives.

    num_workers: processes, None for one a core; fewer than 2 are this one. function: of a module, which they
    import. parts: how many calls there are, which the progress bar counts; default four a process. Raises the
    UserErrors that it raises, and RuntimeError with a traceback for anything else."""
    num_workers = available_cores() if num_workers is None else num_workers
    parts = np.array_split(seeds, parts or max(num_workers, 1) * 4)
    jobs = [(part.tolist(), *rest) for part in parts if len(part)]
    bar = tqdm(total=len(jobs), desc=function.__name__.strip("_"), leave=False, disable=None)
    with bar, contextlib.ExitStack() as stack:
        if num_workers < 2:
            found = []
            for job in jobs:
                found += function(job)
                bar.update()
            return found
        workers = dict(_start(stack, function) for _ in range(min(num_workers, len(jobs))))
        waiting, found = list(enumerate(jobs)), {}
        for conn in workers:
            conn.send(waiting.pop(0))
        while len(found) < len(jobs):
            for conn in wait(list(workers)):
                try:
                    number, items, error = conn.recv()
                except (EOFError, OSError):
                    raise RuntimeError(f"a process that made {bar.desc} died") from None
                if error:
                    sentence, trace = error
                    raise UserError(sentence) if sentence else RuntimeError(trace)
                found[number] = items
                bar.update()
                if waiting:
                    conn.send(waiting.pop(0))
    return [item for number in range(len(jobs)) for item in found[number]]


def _start(stack, function):
    """-> the way to a new process and the process, which ends with the stack."""
    conn, theirs = multiprocessing.Pipe()
    if START_METHOD == "forkserver":
        process = forkserver.Process(function.__module__, theirs, _work, (function,))
    else:
        process = multiprocessing.get_context(START_METHOD).Process(
            target=_work, args=(theirs, function), daemon=True
        )
        process.start()
    theirs.close()
    stack.callback(process.kill)
    stack.callback(conn.close)
    return conn, process


def _work(conn, function):
    with contextlib.suppress(EOFError, OSError):  # nobody listens any more
        while True:
            number, job = conn.recv()
            try:
                answer = (number, function(job), None)
            except Exception as error:  # noqa: BLE001 (it travels to the parent)
                sentence = str(error) if isinstance(error, UserError) else None
                answer = (number, None, (sentence, traceback.format_exc()))
            conn.send(answer)
