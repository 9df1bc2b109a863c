"""Run the cases of the peers, print their table and write it to a page."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from peers.cases import Outcome, Suite, run

PEERS = ("torchcfm", "flow_matching", "zuko", "torchdiffeq", "pot", "torchsde", "sbi")
"""The modules of this folder with the cases of a peer."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m peers", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=PEERS, help="which peers; the page is not written")
    parser.add_argument("--match", default="", help="only cases whose name holds this; the page is not written")
    parser.add_argument("--out", type=Path, default=Path("peers/results.md"), help="the page")
    arguments = parser.parse_args()

    outcomes = {}
    for name in arguments.only:
        peer = suite(name)
        outcomes[name] = run_suite(peer, arguments.match)
        failed = [outcome for outcome in outcomes[name] if outcome.status == "fail"]
        print("\n".join(f"FAIL {peer.distribution} {outcome.source}\n  {outcome.detail}" for outcome in failed))
        seconds = {outcome.source: outcome.seconds for outcome in outcomes[name]}
        slowest = max(seconds, key=lambda source: seconds[source], default="no case")
        print(f"{peer.distribution}: {sum(seconds.values()):.0f} s, most for {slowest}", flush=True)
    print(f"\n{table(outcomes)}")
    if tuple(arguments.only) == PEERS and not arguments.match:
        arguments.out.write_text(page(outcomes), encoding="utf-8")
        print(f"Written to {arguments.out}.")
    return int(any(outcome.status == "fail" for cases in outcomes.values() for outcome in cases))


def suite(name: str) -> Suite:
    """Return the cases of a peer; its package is imported only now."""
    found: Suite = importlib.import_module(f"peers.{name}").suite
    return found


def run_suite(peer: Suite, match: str = "") -> list[Outcome]:
    """Run the cases whose name holds `match`."""
    return [run(case) for case in peer.cases.values() if match in case.source]


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return one row a peer, with its numbers of cases, and their sum."""
    rows = ["| peer | cases | pass | fail | not applicable |", "| --- | --- | --- | --- | --- |"]
    total = [outcome for cases in outcomes.values() for outcome in cases]
    for name, cases in [*outcomes.items(), ("all", total)]:
        counts = [sum(o.status == status for o in cases) for status in ("pass", "fail", "not applicable")]
        rows.append(f"| {name} | {len(cases)} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows) + "\n"


def page(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the table and what stands behind it: versions, failures and reasons."""
    suites = {name: suite(name) for name in outcomes}
    versions = ", ".join(f"{s.distribution} {importlib.metadata.version(s.distribution)}" for s in suites.values())
    parts = [
        "# Tests and tutorials of the peers",
        f"Python {platform.python_version()}, torch {torch.__version__}, {versions}.",
        table(outcomes),
    ]
    for name, cases in outcomes.items():
        peer = suites[name]
        parts.append(f"## {peer.distribution}")
        parts.append(f"Tests of [{peer.repository}](https://github.com/{peer.repository}) at {peer.commit}.")
        failed = [
            f"- `{outcome.source}`: {outcome.detail.splitlines()[0]}" for outcome in cases if outcome.status == "fail"
        ]
        if failed:
            parts.append("\n".join(["Failed:", "", *failed]))
        reasons: dict[str, list[str]] = {}
        for outcome in cases:
            if outcome.status == "not applicable":
                reasons.setdefault(outcome.detail, []).append(f"`{outcome.source}`")
        if reasons:
            rows = [f"| {reason} | {', '.join(sources)} |" for reason, sources in reasons.items()]
            parts.append("\n".join(["| not applicable, because | tests |", "| --- | --- |", *rows]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
