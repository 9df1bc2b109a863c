"""Speed and error of flowmatch_core beside its peers: `python -m benchmarks`, or `make bench`."""

import os

# read when torch, numpy and scipy are first imported; one thread, so that a ratio is about work and not about cores
for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"
