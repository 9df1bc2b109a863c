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
from benchmarks.entropic import benchmark_entropic
from benchmarks.growth import benchmark_growth, draw_growth
from benchmarks.orchestration import benchmark_orchestration
from benchmarks.results import Claim, Result, markdown_table
from benchmarks.sampling import benchmark_sampling
from benchmarks.td_scale import benchmark_td_data, benchmark_td_scale
from benchmarks.td_speed import benchmark_td_speed
from benchmarks.training import benchmark_coupling, benchmark_training, benchmark_tutorial

PAGES: dict[str, dict[str, Callable[[bool], Result]]] = {
    "benchmarks": {
        "divergence": benchmark_divergence,
        "density": benchmark_density,
        "training": benchmark_training,
        "tutorial": benchmark_tutorial,
        "coupling": benchmark_coupling,
        "entropic": benchmark_entropic,
        "sampling": benchmark_sampling,
        "growth": benchmark_growth,
    },
    "td": {
        "td_speed": benchmark_td_speed,
        "td_scale": benchmark_td_scale,
        "td_data": benchmark_td_data,
    },
    "orchestration": {"orchestration": benchmark_orchestration},
}
"""The benchmarks of each file of results."""

PACKAGES = ("torch", "flow_matching", "zuko", "torchcfm", "torchdiffeq", "POT")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer settings and rows, five minutes")
    names = [name for page in PAGES.values() for name in page]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="which benchmarks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder of the results")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # of the peers
    torch.manual_seed(0)  # the peers draw from the global generator
    arguments.out.mkdir(parents=True, exist_ok=True)
    for title, benchmarks in PAGES.items():
        chosen = {name: benchmark for name, benchmark in benchmarks.items() if name in arguments.only}
        if chosen:
            write(title, {name: _run(name, chosen[name], arguments.quick) for name in chosen}, arguments.out)
    return 0


def _run(name: str, benchmark: Callable[[bool], Result], quick: bool) -> Result:
    start = time.perf_counter()
    result = benchmark(quick)
    print(f"{result.markdown()}\n{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return result


def write(title: str, results: dict[str, Result], folder: Path) -> None:
    """Write the tables of one page to a folder, and print its claims."""
    text = page(results)
    record = {"machine": machine(), "results": {name: result.json() for name, result in results.items()}}
    files = {f"{title}.md": text, f"{title}.json": json.dumps(record, indent=1) + "\n"}
    claims = [claim for result in results.values() for claim in result.claims if claim.suspects]
    if claims:
        files["profiles.md"] = profiles([claim for claim in claims if not claim.met])
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    if "growth" in results:
        draw_growth(results["growth"], folder / "growth.png")
    print(text.split("\n## ")[0], flush=True)
    print(f"Written to {folder}: {', '.join(files)}.")


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
        "paired, interleaved timings of CPU time, with the middle half, unless a table says otherwise."
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
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
