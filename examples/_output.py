"""What every example does with its results: one line per number, one picture, one style."""

from __future__ import annotations

import argparse
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    raise SystemExit("The examples draw with matplotlib, which is not installed: pip install matplotlib.") from None

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["ACCENT", "MODEL", "OTHER", "TRUTH", "picture_path", "plt", "report", "save"]

TRUTH, MODEL, OTHER, ACCENT = "#555555", "#1f77b4", "#e08214", "#c0392b"
"""The colours of the truth, of the model, of what it is compared with, and of a mark such as a start state."""

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "image.cmap": "Blues",
        "savefig.dpi": 120,
    }
)


def picture_path(script: str, description: str | None) -> Path:
    """Read the command line of an example and return where its picture goes.

    Args:
        script: The `__file__` of the example.
        description: The `__doc__` of the example, shown by `--help`.

    Returns:
        The path given by `--out`, by default `output/<name>.png` beside the script.
    """
    default = Path(script).resolve().parent / "output" / f"{Path(script).stem}.png"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default, help="where the picture goes (default: %(default)s)")
    path: Path = parser.parse_args().out
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def report(label: str, value: float, error: float) -> None:
    """Print one number and its error; `examples/README.md` says in which range it should lie."""
    print(f"{label}: {value:.4g} ± {error:.2g}", flush=True)


def save(figure: Figure, path: Path) -> None:
    """Write the picture and close it."""
    figure.savefig(path, pil_kwargs={"optimize": True})
    plt.close(figure)
    print(f"picture: {path}")
