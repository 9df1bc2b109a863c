"""Published test negative log-likelihoods of density models, and the papers they come from.

Nats on the five tabular data sets, bits per dimension on the two of images; lower is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DATA: Mapping[str, str] = {
    "power": "POWER",
    "gas": "GAS",
    "hepmass": "HEPMASS",
    "miniboone": "MINIBOONE",
    "bsds300": "BSDS300",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
}
"""Names of the data sets in the papers, by kind."""

IMAGES = ("mnist", "cifar10")
"""Kinds whose numbers are bits per dimension."""


@dataclass(frozen=True)
class Published:
    """A model with published numbers.

    Attributes:
        model: Its name.
        source: Paper that the numbers are read from.
        values: Numbers by kind of data set, with the errors that the paper states.
        absent: Why this project has no such row; empty where it has one.
    """

    model: str
    source: str
    values: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""


def _tabular(power: str, gas: str, hepmass: str, miniboone: str, bsds300: str) -> dict[str, str]:
    names = ("power", "gas", "hepmass", "miniboone", "bsds300")
    return dict(zip(names, (power, gas, hepmass, miniboone, bsds300), strict=True))


_MAF = "Papamakarios et al. 2017, arXiv 1705.07057"
_FFJORD = (
    "Grathwohl et al. 2019, arXiv 1810.01367, Tables 2 and 6; ± is the standard deviation of three runs. On images "
    "Real NVP, Glow and FFJORD are multi-scale networks; a single flow of FFJORD has 1.05 on MNIST"
)
_NO_TAN = "no maintained library has transformation autoregressive networks, only the code of the paper"

MODELS = (
    Published(
        "Gaussian", f"{_MAF}; ± is two standard errors",
        _tabular("7.74 ± .02", "3.58 ± .75", "27.93 ± .02", "37.24 ± 1.07", "-96.67 ± .25"),
    ),
    Published(
        "MADE", _FFJORD,
        _tabular("3.08 ± .03", "-3.56 ± .04", "20.98 ± .02", "15.59 ± .50", "-148.85 ± .28")
        | {"mnist": "2.04", "cifar10": "5.67"},
    ),
    Published(
        "Real NVP", _FFJORD,
        _tabular("-.17 ± .01", "-8.33 ± .14", "18.71 ± .02", "13.55 ± .49", "-153.28 ± 1.78")
        | {"mnist": "1.06", "cifar10": "3.49"},
    ),
    Published(
        "Glow", _FFJORD,
        _tabular("-.17 ± .01", "-8.15 ± .40", "18.92 ± .08", "11.35 ± .07", "-155.07 ± .03")
        | {"mnist": "1.05", "cifar10": "3.35"},
    ),
    Published(
        "MAF", _FFJORD,
        _tabular("-.24 ± .01", "-10.08 ± .02", "17.70 ± .02", "11.75 ± .44", "-155.69 ± .28")
        | {"mnist": "1.89", "cifar10": "4.31"},
    ),
    Published(
        "FFJORD", _FFJORD,
        _tabular("-.46 ± .01", "-8.59 ± .12", "14.92 ± .08", "10.43 ± .04", "-157.40 ± .19")
        | {"mnist": ".99", "cifar10": "3.40"},
    ),
    Published(
        "TAN, as FFJORD quotes it", _FFJORD,
        _tabular("-.48 ± .01", "-11.19 ± .02", "15.12 ± .02", "11.01 ± .48", "-157.03 ± .07"),
        _NO_TAN,
    ),
    Published(
        "TAN", "Oliva et al. 2018, arXiv 1801.09819, by its authors' table at github.com/lupalab/tan, who ask that the "
        "numbers of their submission, which FFJORD quotes, not be used",
        _tabular("-.60 ± .01", "-12.06 ± .02", "13.78 ± .02", "11.01 ± .48", "-159.80 ± .07"),
        _NO_TAN,
    ),
    Published(
        "MAF-DDSF", _FFJORD,
        _tabular("-.62 ± .01", "-11.96 ± .33", "15.09 ± .40", "8.86 ± .15", "-157.73 ± .04"),
        "no maintained library has deep dense sigmoidal flows; the row NAF has zuko's layers, in which the other "
        "dimensions are an input of the monotonic network and do not determine its weights",
    ),
    Published(
        "Flow matching, OT path", "Lipman et al. 2023, arXiv 2210.02747, Table 1, with importance-weighted "
        "dequantisation, which lowers it by about .1",
        {"cifar10": "2.99"},
    ),
)  # fmt: skip
"""Models in the order of the table."""
