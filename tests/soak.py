"""Random walks over the cache and over the scheduler on all cores, then the exhaustive search, as long as one likes.

    make soak
    python -m tests.soak --operations 1000000 --seed 7

Half of the operations go to each machine. A failure is told with the seed of its walk, which does it again.
"""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field

from tests.cache import machine as cache
from tests.cache.exhaustive import search
from tests.schedule import machine as schedule

WALKS: dict[str, Callable[..., int]] = {"cache": cache.walk, "schedule": schedule.walk}
BATCH = 100  # walks that a process does before it reports
REPORT_SECONDS = 20.0
DEPTH = 8  # of the exhaustive search


@dataclass
class Result:
    """What some walks of one machine came to."""

    machine: str
    checked: int = 0
    seconds: float = 0.0
    rules: Counter[str] = field(default_factory=Counter)
    failure: str = ""

    def add(self, other: "Result") -> None:
        self.checked += other.checked
        self.seconds += other.seconds
        self.rules += other.rules


def run(machine: str, first: int) -> Result:
    """BATCH walks of a machine, from this seed on, or as many as go well."""
    result, began = Result(machine), time.monotonic()
    for seed in range(first, first + BATCH):
        try:
            result.checked += WALKS[machine](seed, counts=result.rules)
        except Exception:
            result.failure = f"tests.{machine}.machine.walk({seed}) failed:\n{traceback.format_exc()}"
            break
    result.seconds = time.monotonic() - began
    return result


def soak(operations: int, seed: int, processes: int) -> list[Result]:
    """Walk until each machine has checked its half of so many operations.

    Raises:
        AssertionError: a walk failed; the message has its seed.
    """
    done = {machine: Result(machine) for machine in WALKS}
    following = dict.fromkeys(WALKS, seed)
    running: set[Future[Result]] = set()
    began = said = time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        while left := [m for m in WALKS if done[m].checked < operations // 2]:
            while len(running) < 2 * processes:
                machine = min(left, key=lambda m: following[m])
                running.add(pool.submit(run, machine, following[machine]))
                following[machine] += BATCH
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for result in (future.result() for future in finished):
                assert not result.failure, result.failure
                done[result.machine].add(result)
            if time.monotonic() - said > REPORT_SECONDS:
                said = time.monotonic()
                checked = " ".join(f"{m} {r.checked:,}" for m, r in done.items())
                print(f"{said - began:7.0f} s: {checked} operations", flush=True)
        pool.shutdown(cancel_futures=True)
    return list(done.values())


def report(results: list[Result], seconds: float) -> None:
    """How often each rule ran, and how fast it all went."""
    for result in results:
        for name, times in sorted(result.rules.items()):
            print(f"  {name:<30} {times:>12,}")
    for result in results:
        rate = result.checked / result.seconds
        print(f"{result.machine:<10} {result.checked:>12,} checked operations, {rate:,.0f} a second and process")
    print(f"{sum(r.checked for r in results):,} operations in {seconds:,.0f} seconds, and nothing was wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description="Random walks over the cache and the scheduler.")
    parser.add_argument("--operations", type=int, default=10**7, help="how many to check (default: 10 million)")
    parser.add_argument("--seed", type=int, default=10**6, help="of the first walk (default: a million)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"of the exhaustive search (default: {DEPTH})")
    wishes = parser.parse_args()
    began = time.monotonic()
    try:
        results = soak(wishes.operations, wishes.seed, wishes.processes)
        report(results, time.monotonic() - began)
        search(wishes.depth)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
