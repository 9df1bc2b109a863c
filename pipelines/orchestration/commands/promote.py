"""Decide which version of each model is the champion."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from pipelines.orchestration.commands import _workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)
    parser.add_argument("--workspace", type=Path, help="folder of the run (default: that of the profile)")
    parser.add_argument("--invocation", help="run to file the decisions on (default: the one that trained the model)")
    parser.add_argument("--json", action="store_true", help="print the decisions as JSON")
    by_hand = parser.add_mutually_exclusive_group()
    by_hand.add_argument("--rollback", metavar="NAME", help="make the previous champion of a model the champion again")
    by_hand.add_argument(
        "--set",
        nargs=2,
        metavar=("NAME", "VERSION"),
        help="make a version the champion without a comparison",
    )


def run(options: argparse.Namespace) -> int:
    """Decide on the versions without a decision, or choose a champion by hand; return 1 if one is undecided."""
    from pipelines.orchestration import promotion

    if options.rollback:
        print(promotion.roll_back(options.rollback))
        return 0
    if options.set:
        name, version = options.set
        print(promotion.crown(name, version))
        return 0
    if options.workspace:  # of the run that asks, which holds its lock
        decisions = promotion.decide(options.workspace, options.invocation)
    else:
        with _workspace.held(options) as here:
            decisions = promotion.decide(here, options.invocation)
    if options.json:
        print(json.dumps([asdict(decision) for decision in decisions]))
    elif decisions:
        print(promotion.table(decisions))
    else:
        print("nothing to decide: no version since the last decision has the weights of this folder.")
    return int(any(decision.outcome == "undecided" for decision in decisions))
