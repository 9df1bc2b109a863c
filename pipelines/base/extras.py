"""The packages that the pipeline needs beside those of the library."""

from __future__ import annotations

import sys
from importlib.util import find_spec

MODULES = (
    *("apprise", "dvc", "filelock", "h5py", "httpx", "jinja2", "matplotlib", "mlflow", "mujoco", "networkx", "pandas"),
    *("PIL", "prefect", "psutil", "pyarrow", "pydantic", "pydantic_core", "safetensors", "sklearn", "sqlalchemy"),
    *("threadpoolctl", "vl_convert", "yaml"),
)
"""What the extra `pipeline` of pyproject.toml brings, as it is imported."""


def check() -> None:
    """Check that the extra `pipeline` is installed; rooms that commands start in call this when they are imported.

    Raises:
        ModuleNotFoundError: It names a package that is missing, and how to install it.
        SystemExit: The same, where the room was started as a command by `python -m`.
    """
    missing = next((module for module in MODULES if find_spec(module) is None), None)
    if missing is None:
        return
    sentence = (
        f"the pipeline needs a package ({missing}) that is not installed: "
        "run `pip install -e '.[pipeline]'` in the project's folder."
    )
    if sys.argv[0] == "-m":  # Python is about to run a module of the room
        sys.exit(sentence)
    raise ModuleNotFoundError(sentence, name=missing)
