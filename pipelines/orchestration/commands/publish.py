"""Publish records of runs without an orchestrator to MLflow."""

from __future__ import annotations

import argparse

from pipelines.base.redact import redact
from pipelines.runs import records, store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option."""


def run(options: argparse.Namespace) -> int:
    """Publish all records that are not complete in MLflow."""
    from pipelines.runs import live

    home = records.home()
    with store.answering(home):
        live.publish()
    print(f"published to {redact(store.uri(home))}")
    return 0
