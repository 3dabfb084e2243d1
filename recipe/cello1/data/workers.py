"""The same function over many files: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from recipe.cello1.data.extract import FileResult, Job, process_file
from recipe.cello1.formats.provenance import worker_variables

_POLL = 0.5  # seconds between two looks at the cell counter
_counter: Any = None  # shared by the processes of one run


def cpu_count() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job], *, workers: int = 1, ray_address: str | None = None, progress: bool = True, done: int = 0
) -> Iterator[tuple[Job, FileResult]]:
    """Work on all files."""
    files = tqdm(total=len(jobs) + done, initial=done, desc="files", unit="file", disable=not progress)
    cells = tqdm(desc="cells", unit="cell", unit_scale=True, disable=not progress, mininterval=1.0)
    try:
        if ray_address is not None:
            results = _on_ray(jobs, ray_address, cells)
        elif workers > 1 and len(jobs) > 1:
            results = _in_processes(jobs, min(workers, len(jobs)), cells)
        else:
            results = ((job, process_file(job, cells.update)) for job in jobs)
        for job, result in results:
            files.update()
            yield job, result
    finally:
        cells.close()
        files.close()


def _start_worker(counter: Any) -> None:
    """Share the counter, and end with the parent, however that ends."""
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _count(cells: int) -> None:
    with _counter.get_lock():
        _counter.value += cells


def _process_and_count(job: Job) -> FileResult:
    return process_file(job, _count)


def _in_processes(jobs: Sequence[Job], workers: int, cells: tqdm) -> Iterator[tuple[Job, FileResult]]:
    """Work on files in processes. Where one is killed, each file that it may have been at is tried again alone."""
    # Spawned, not forked: a fork inherits the locks of HDF5 and of any thread.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    left = list(jobs)
    while left:
        try:
            for job, result in _in_pool(left, workers, cells, context, counter):
                left = [other for other in left if other is not job]
                yield job, result
        except BrokenProcessPool:
            # Files are handed out in order, one in work and at most one more waiting for each process, and one beyond.
            suspects, left = left[: 2 * workers + 1], left[2 * workers + 1 :]
            names = ", ".join(job.name for job in suspects)
            cells.write(f"a worker process was killed; each of these is tried again alone: {names}", file=sys.stderr)
            for job in suspects:
                yield job, _alone(job, cells, context, counter)


def _alone(job: Job, cells: tqdm, context: Any, counter: Any) -> FileResult:
    try:
        return next(result for _, result in _in_pool([job], 1, cells, context, counter))
    except BrokenProcessPool:
        return _killed(job, "the process that worked on it alone was killed")


def _killed(job: Job, what: str) -> FileResult:
    return FileResult(
        job.name,
        reason=f"{what}, usually because memory ran out or the file is damaged",
        remedy="give it more memory; if that does not help, write it again with anndata",
    )


def _in_pool(
    jobs: Sequence[Job], workers: int, cells: tqdm, context: Any, counter: Any
) -> Iterator[tuple[Job, FileResult]]:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    try:
        # Ctrl-C reaches the whole process group; the workers are started deaf to it, and are ended by this process.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures: dict[Future[FileResult], Job] = {pool.submit(_process_and_count, job): job for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            cells.update(counter.value - cells.n)
            for future in finished:
                yield futures.pop(future), future.result()
    except (KeyboardInterrupt, GeneratorExit):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _on_ray(jobs: Sequence[Job], address: str, cells: tqdm) -> Iterator[tuple[Job, FileResult]]:
    import ray

    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": worker_variables()})
        except (ConnectionError, RuntimeError, ValueError) as error:
            msg = f"ray_address={address}: no Ray cluster can be reached there ({' '.join(str(error).split())})"
            raise RuntimeError(msg) from error
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
    work: Any = ray.remote(process_file)
    try:
        waiting = {work.options(num_cpus=job.threads).remote(job): job for job in jobs}
        while waiting:
            finished, _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(finished[0])
            try:
                result = ray.get(finished[0])
            except lost:  # the process or its machine, again and again: Ray has tried several
                result = _killed(job, "each process of the Ray cluster that worked on it was killed")
            except ray.exceptions.RayError as error:
                msg = f"{job.name}: the Ray cluster lost the task ({' '.join(str(error).split())[-300:]})"
                raise RuntimeError(msg) from error
            cells.update(result.n_pool)
            yield job, result
    finally:
        if started:
            ray.shutdown()


def default_workers(n_jobs: int) -> int:
    """Return how many processes to use where the user does not say."""
    return max(1, min(n_jobs, cpu_count()))
