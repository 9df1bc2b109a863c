"""Dask and Ray clusters on which Prefect runs stages: `operation.cluster` of params.yaml."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from pipelines.base.errors import UserError

_CONNECT_SECONDS = 10.0


def check(cluster: str) -> None:
    """Check that a cluster's packages are installed and that its address answers.

    Raises:
        UserError: Stages cannot run there; the message says what to install or start.
    """
    extra = _extra(cluster)
    if find_spec(f"prefect_{extra}") is None:
        raise UserError(
            f"operation.cluster is {cluster!r}, whose packages are not installed; run "
            f"`pip install -c requirements.lock -e '.[pipeline,{extra}]'` in the project's folder."
        )
    if "://" not in cluster:
        return
    address = urlsplit(cluster)
    assert address.hostname and address.port
    try:
        socket.create_connection((address.hostname, address.port), _CONNECT_SECONDS).close()
    except OSError as error:
        start = "dask scheduler" if extra == "dask" else "ray start --head"
        raise UserError(
            f"operation.cluster is {cluster!r}, where nothing answers ({error.strerror or error}); "
            f"start it there (`{start}`), or set operation.cluster to null."
        ) from None
    if not _is_loopback(address.hostname) and not os.environ.get("PREFECT_API_URL"):
        raise UserError(
            f"operation.cluster is {cluster!r}, whose machines cannot reach a private Prefect server; "
            "start `prefect server start` where they can and set PREFECT_API_URL to its address."
        )


def task_runner(cluster: str, workers: int) -> Any:
    """Return Prefect's task runner for a cluster.

    Args:
        cluster: `dask` or `ray` for one on this machine, which ends with the run; else an address.
        workers: Stages at once on a cluster of this machine.
    """
    if _extra(cluster) == "dask":
        from prefect_dask.task_runners import DaskTaskRunner

        if cluster != "dask":
            return DaskTaskRunner(address=cluster)
        here = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
        return DaskTaskRunner(cluster_kwargs=here)
    from prefect_ray.task_runners import RayTaskRunner

    if cluster != "ray":
        return RayTaskRunner(address=cluster)
    return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"})


def _extra(cluster: str) -> str:
    return "ray" if cluster.startswith("ray") else "dask"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
