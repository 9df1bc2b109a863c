"""Publish records of runs without an orchestrator to MLflow."""

from __future__ import annotations

import argparse

from pipelines.runs import records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option."""


def run(options: argparse.Namespace) -> int:
    """Publish all records that are not complete in MLflow."""
    from pipelines.runs import live, tracking

    live.publish()
    print(f"published to {tracking.uri(records.home())}")
    return 0
