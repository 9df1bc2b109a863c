"""Run the benchmarks, print their tables and write them to a folder."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.density import benchmark_density, benchmark_divergence
from benchmarks.growth import benchmark_growth, draw_growth
from benchmarks.results import Claim, Result, markdown_table
from benchmarks.sampling import benchmark_sampling
from benchmarks.training import benchmark_coupling, benchmark_training, benchmark_tutorial

BENCHMARKS: dict[str, Callable[[bool], Result]] = {
    "divergence": benchmark_divergence,
    "density": benchmark_density,
    "training": benchmark_training,
    "tutorial": benchmark_tutorial,
    "coupling": benchmark_coupling,
    "sampling": benchmark_sampling,
    "growth": benchmark_growth,
}

PACKAGES = ("torch", "flow_matching", "zuko", "torchcfm", "torchdiffeq", "POT")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer settings and rows, under two minutes")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="which benchmarks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder of the results")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # of the peers
    torch.manual_seed(0)  # the peers draw from the global generator
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    for name in arguments.only:
        start = time.perf_counter()
        results[name] = BENCHMARKS[name](arguments.quick)
        print(f"{results[name].markdown()}\n{time.perf_counter() - start:.0f} s\n", flush=True)

    text = page(results)
    (arguments.out / "benchmarks.md").write_text(text)
    record = {"machine": machine(), "results": {name: result.json() for name, result in results.items()}}
    (arguments.out / "benchmarks.json").write_text(json.dumps(record, indent=1) + "\n")
    if "growth" in results:
        draw_growth(results["growth"], arguments.out / "growth.png")
    missed = [claim for result in results.values() for claim in result.claims if not claim.met]
    (arguments.out / "profiles.md").write_text(profiles(missed))
    print(text.split("\n## ")[0], flush=True)
    print(f"Written to {arguments.out}: benchmarks.md, benchmarks.json, profiles.md, growth.png.")
    return 0


def page(results: dict[str, Result]) -> str:
    """Return all tables as one page, the claims first."""
    claims = [claim.row() for result in results.values() for claim in result.claims]
    head = f"# Benchmarks\n\n{machine()}\n\n" + (markdown_table(claims) if claims else "")
    return "\n".join([head, *(result.markdown() for result in results.values())])


def machine() -> str:
    """Return one line on where the numbers come from."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return (
        f"{_processor()}, {torch.get_num_threads()} thread, float32, Python {platform.python_version()}, {versions}. "
        f"{os.cpu_count()} cores, load average of the last 15 minutes {os.getloadavg()[2]:.1f}. Ratios are medians of "
        "paired, interleaved timings, with the middle half."
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def profiles(claims: list[Claim]) -> str:
    """Return where the time goes in what misses its ratio."""
    parts = ["# Profiles of what misses its ratio\n"]
    for claim in claims:
        for name, call in claim.suspects.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                call()
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40)
            parts.append(f"## {claim.text}: {claim.ratio}; {name}\n\n```\n{table}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
