"""Seconds of calls on a card, without the host's share, or with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

ENOUGH = 0.25  # seconds of one measurement, about
LEAST_ROUNDS, MOST_ROUNDS = 3, 25
IN_A_GRAPH, EAGER, HOST = "in a graph", "eager", "host's clock"


def seconds_each(
    call: Call | Sequence[Call], device: str, calls: int = 1, graph: bool = True
) -> tuple[list[float], str]:
    """Seconds of one call, once for each round, and how it was measured.

    Args:
        call: or several, which take turns: on weights of their own, say, so that none is found in the cache.
        calls: of a round, at least; all that were given are in each.
        graph: in a CUDA graph, so that the host has no part in it. What can't be captured is launched call by call.
    """
    given = [call] if callable(call) else list(call)
    if device != "cuda":
        return _by_host(given, rounds=2), HOST
    given *= -(-calls // len(given))
    if graph:
        try:
            captured = capture(given)
        except Exception:  # a library that synchronises, or that launches on another stream
            torch.cuda.synchronize()  # if the device answers no more, this raises
        else:
            return _by_events([captured.replay], len(given)), IN_A_GRAPH
    for each in given:
        each()
    return _by_events(given, len(given)), EAGER


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls in a graph; each has been made before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _by_events(calls: Sequence[Call], count: int) -> list[float]:
    samples: list[float] = []
    total = 0.0
    for _ in range(2 + MOST_ROUNDS):  # two of them untimed
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
        total += samples[-1]
        if len(samples) >= 2 + LEAST_ROUNDS and total > ENOUGH:
            break
    return [seconds / count for seconds in samples[2:]]


def _by_host(calls: Sequence[Call], rounds: int) -> list[float]:
    samples = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - begin) / len(calls))
    return samples


def host_seconds(call: Call, device: str, calls: int) -> list[float]:
    """Seconds until the device is ready, of calls one after another as Python makes them: the host's share counts."""
    samples = []
    for _ in range(7 if device == "cuda" else 2):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) / calls)
    return samples[1:]


def free() -> None:
    """Gives back the card's memory that calls have left, before the next contender."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
