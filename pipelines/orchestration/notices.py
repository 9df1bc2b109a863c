"""Short messages about failure and recovery, sent to the addresses that environment variables hold."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from pipelines.runs import records


def report(variables: Sequence[str], profile: str, failure: str | None, link: str) -> None:
    """Send one message if a run failed, or if it succeeded after one that failed.

    Args:
        variables: Names of environment variables that hold addresses of Apprise, such as `json://host/path`.
        profile: Profile of the run.
        failure: The failed stage and the reason; None if the run succeeded.
        link: Where the run can be looked at.
    """
    marker = records.home() / "notices" / f"{profile}.failed"
    if failure is not None:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        _send(variables, f"flowmatch {profile} failed", f"{failure}\n{link}")
    elif marker.exists():
        marker.unlink()
        _send(variables, f"flowmatch {profile} works again", f"every stage is up to date.\n{link}")


def _send(variables: Sequence[str], title: str, body: str) -> None:
    for variable in variables:
        try:
            problem = _problem(os.environ.get(variable), title, body)
        except Exception as error:  # of a service's plugin; its message may contain the address
            problem = type(error).__name__
        if problem:
            print(f"notice: not sent to ${variable} ({problem}).", file=sys.stderr)


def _problem(address: str | None, title: str, body: str) -> str | None:
    """Send a message and return what went wrong; the address may hold a password and is never part of it."""
    if not address:
        return "the variable is not set"
    from apprise import Apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL)
    service = Apprise()
    if not service.add(address):
        return "its value is no address of Apprise"
    return None if service.notify(title=title, body=body) else "the service did not accept it"
