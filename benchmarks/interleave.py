"""Timing side by side: in each round every call takes its turn, so that a busy moment hits them alike."""
import time


def interleaved(calls, rounds, warm_up=2):
    """Return the CPU seconds of every call in each round, a list by name; the rounds to warm up are not counted."""
    times = {name: [] for name in calls}
    for r in range(rounds + warm_up):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if r >= warm_up:
                times[name].append(time.process_time() - start)
    return times
