"""Where independent pieces of work run: here, in processes of this machine, or on the workers of a Dask cluster.

Workers need the same code and packages, or are refused: start them in a checkout, `python -m dask worker ADDRESS
--nworkers=-1 --nthreads=1`. Files reach them on a shared disk, where their checkout has the same path, or through a
folder that fsspec opens: the engine is then ADDRESS?folder=s3://bucket/prefix. Whoever reaches a scheduler can run code
on its workers: keep it in a network of your own.
"""

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import MadeBy, other_here
from fine_tuning.common.shared_folder import START_IT, Call, folder_of_a_run, other_worker, tasks, unpack

Worker = Callable[[Any], Any]
Map = Callable[[Worker, Iterable[Any]], Iterator[Any]]
TIMEOUT = 10  # seconds for a scheduler to answer
AHEAD = 4  # pieces a worker may be ahead of what was taken


def cores() -> int:
    """Processors that this process may use: of the machine where the system does not say, as on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_engine(engine: str | None, stage: str, processes: int = 1, packages: Iterable[str] = ()) -> Iterator[Map]:
    """A `map` whose results come in order, few of them at a time, whoever works.

    Args:
        engine: address of a Dask scheduler, such as tcp://10.0.0.1:8786; None: this machine.
        stage: whose work it is.
        processes: on this machine; 1: no other process.
        packages: whose versions a worker must have too, besides those that compute.

    Raises:
        UserError: no scheduler answers there, it has no worker or one with other code or packages, or a worker or
            process was lost for good.
    """
    if engine is None and processes <= 1:
        yield map
    elif engine is None:
        try:
            with ProcessPoolExecutor(processes) as pool:

                def hand_out(function: Worker, items: list[Any]) -> list[Any]:
                    return [pool.submit(function, item) for item in items]

                yield lambda function, items: chain.from_iterable(_in_order(hand_out, function, items, processes))
        except BrokenProcessPool:
            raise UserError(
                "one of the processes was killed (memory full?): close other programs, then run the same again"
            ) from None
    else:
        address, _, folder = engine.partition("?folder=")
        with _dask_client(address) as client:
            _refuse_others(client, made_by := MadeBy.here(stage, packages))
            workers = sum(worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
            with folder_of_a_run(folder, client) if folder else nullcontext(None) as run:

                def submit(function: Worker, items: list[Any]) -> list[Any]:
                    made = tasks(run, function, items, made_by)
                    return [client.submit(pickle.loads, one, pure=False) for one in made]

                yield lambda function, items: _unpacked(_in_order(submit, function, items, workers), run)


def _refuse_others(client: Any, made_by: MadeBy) -> None:
    """Raise UserError if a worker has other code or packages; one that comes later refuses its first piece."""
    question = pickle.dumps(Call(other_here, made_by))
    for address, answer in client.run(pickle.loads, question, on_error="return").items():
        if isinstance(answer, Exception):
            raise other_worker(address, f"does not say which code it has ({answer})")
        if answer:
            raise other_worker(address, f"has {answer}")


def _unpacked(results: Iterator[list[bytes]], run: str | None) -> Iterator[Any]:
    try:
        yield from chain.from_iterable(unpack(run, some) for some in results)
    except FileNotFoundError as error:
        if not (error.filename and Path(error.filename).exists()):
            raise
        raise UserError(
            f"a Dask worker has no {error.filename}: workers need this folder at the same path, or an engine with "
            "?folder=, see docs/scale.md"
        ) from None
    except ModuleNotFoundError as error:  # of one that came late
        raise UserError(f"a Dask worker has no module {error.name}: {START_IT}") from None


def _in_order(
    submit: Callable[[Worker, list[Any]], list[Any]], function: Worker, items: Iterable[Any], workers: int
) -> Iterator[list[Any]]:
    """Results in order; together those that are there, at most half of what is waited for. Items are submitted together
    too: a shared folder that answers late then costs its delay once."""
    items, waiting = iter(items), deque[Any]()
    while some := [*islice(items, AHEAD * workers - len(waiting))]:
        waiting.extend(submit(function, some))
        if len(waiting) == AHEAD * workers:
            yield _ready(waiting, AHEAD * workers // 2)
    while waiting:
        yield _ready(waiting, AHEAD * workers // 2)


def _ready(waiting: deque[Any], most: int) -> list[Any]:
    results = [waiting.popleft().result()]
    while len(results) < most and waiting and waiting[0].done() and waiting[0].exception() is None:
        results.append(waiting.popleft().result())
    return results


@contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    from distributed import Client, KilledWorker

    try:
        client = Client(address, timeout=TIMEOUT, set_as_default=False)
    except (OSError, ValueError):
        raise UserError(
            f"no Dask scheduler answers at {address}: start one with `dask scheduler`, or set engine to null"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=TIMEOUT)
        except TimeoutError:
            raise UserError(
                f"the Dask scheduler at {address} has no worker: start one in the checkout with "
                f"`python -m dask worker {address} --nworkers=-1 --nthreads=1`"
            ) from None
        try:
            yield client
        except KilledWorker:
            raise UserError(
                f"workers of the Dask scheduler at {address} died repeatedly: read their logs, then run the same again"
            ) from None
        except Exception:
            if client.status == "running":
                raise
            raise UserError(
                f"the Dask scheduler at {address} went away: start it and its workers, then run the same again"
            ) from None
