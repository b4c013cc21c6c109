"""Calls in several threads at once, whose results have to be those of one thread."""

import sys
import threading
from contextlib import contextmanager

import pytest
import torch

THREADS = 4
COUNTS = [20, pytest.param(1000, marks=pytest.mark.slow)]  # of calls in each


@contextmanager
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_all(threads):
    with switching_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def in_threads(work):
    """Runs work(number) in several threads at once, and raises what any of them raised."""
    failures, barrier, threads = [], threading.Barrier(THREADS), torch.get_num_threads()

    def run(number):
        try:
            torch.set_num_threads(threads)  # a new thread's products may be made by more, which is another order
            barrier.wait()
            with torch.no_grad():
                work(number)
        except BaseException as error:
            failures.append(error)

    run_all([threading.Thread(target=run, args=(number,)) for number in range(THREADS)])
    if failures:
        raise failures[0]


def differences(call, count):
    """How many of the results of call(number) differ in threads from what they are in one."""
    with torch.no_grad():
        wanted = [call(number) for number in range(THREADS)]
    different = []

    def work(number):
        for _ in range(count):
            if not torch.equal(call(number), wanted[number]):
                different.append(number)

    in_threads(work)
    return len(different)
