"""Display names of methods; only this module turns a key of `params.yaml` into a name."""

from __future__ import annotations

import re

METHODS = {
    "cfm": "CFM",
    "ot_cfm": "OT-CFM",
    "vp_cfm": "VP-CFM",
    "cfm_tuned": "CFM + maximum likelihood",
    "component_cfm": "CFM inside components",
    "ffjord": "FFJORD",
    "independent": "independent pixels",
    "gaussian": "Gaussian",
    "gaussian_mixture": "Gaussian mixture",
    "kernel_density": "KDE",
    "large_mixture": "Gaussian mixture (large)",
    "small_mixture": "Gaussian mixture (small)",
    "glow": "Glow-style",
    "made": "MADE",
    "maf": "MAF",
    "naf": "NAF",
    "nsf": "NSF",
    "real_nvp": "Real NVP",
    "mc_cfm": "MC-CFM",
    "td_cfm": "TD-CFM",
    "td_cfm_coupled": "TD-CFM(C)",
    "td2_cfm": "TD²-CFM",
    "td_dd": "TD-DD",
    "td2_dd": "TD²-DD",
    "cfm_tilted": "CFM, mixture of seeds, tilted",
    "cfm_and_maf": "CFM and MAF, mixture",
    "cfm_and_maf_tilted": "CFM and MAF, mixture, tilted",
    "gan": "GAN",
    "vae": "VAE",
    "ensemble": "Ensemble",
    "single": "best single policy",
    "simulation": "GPI by simulation",
    "expert": "scripted policy",
}


def split(method: str) -> tuple[str, str]:
    """Return the known method that begins a method's key, and the rest of the key.

    >>> split("td_cfm_coupled_curved"), split("td2_cfm"), split("my_method")
    (('td_cfm_coupled', 'curved'), ('td2_cfm', ''), ('my_method', ''))
    """
    known = [name for name in METHODS if method == name or method.startswith(f"{name}_")]
    base = max(known, key=len, default=method)
    return base, method[len(base) + 1 :]


def label(method: str) -> str:
    """Return the display name of a method, or of the mixture of its seeds.

    >>> label("td2_cfm"), label("td_cfm_curved"), label("td2_cfm_k2"), label("my_method")
    ('TD²-CFM', 'TD-CFM curved', 'TD²-CFM K=2', 'my_method')
    >>> label("ot_cfm x4")
    'OT-CFM, mixture of 4 seeds'
    """
    if mixture := re.fullmatch(r"(\w+) x(\d+)", method):
        return f"{label(mixture[1])}, mixture of {mixture[2]} seeds"
    base, variant = split(method)
    steps = re.fullmatch(r"k(\d+)", variant)
    return f"{METHODS.get(base, base)} {f'K={steps[1]}' if steps else variant.replace('_', ' ')}".rstrip()
