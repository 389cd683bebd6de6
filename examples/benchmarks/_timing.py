"""Side-by-side timing: every candidate in turn, in one process, medians of ratios."""

import platform
import time
from collections.abc import Callable

import numpy as np
import sklearn
import torch


def describe_machine() -> str:
    """Say what the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    except OSError:
        pass
    return (
        f"{model}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, "
        f"scikit-learn {sklearn.__version__}"
    )


def interleaved(
    candidates: dict[str, Callable[[], object]], repeats: int, reference: str
) -> dict[str, tuple[float, float]]:
    """Return for each candidate its median CPU seconds and median ratio to the reference.

    All candidates run in turn, `repeats` times after one warm-up, so that a machine whose
    speed drifts slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    counted = {name: np.array(values[1:]) for name, values in seconds.items()}
    return {
        name: (float(np.median(values)), float(np.median(values / counted[reference])))
        for name, values in counted.items()
    }


def print_ratios(title: str, results: dict[str, tuple[float, float]], reference: str) -> None:
    """Print a Markdown table of the results."""
    print(f"\n### {title}\n\n| candidate | CPU s | ratio to {reference} |\n| --- | --- | --- |")
    for name, (seconds, ratio) in results.items():
        print(f"| {name} | {seconds:.3f} | {ratio:.2f} |", flush=True)
