"""Flow matching and temporal difference flows: tensors in, tensors out.

Time runs from `t = 0` (source, noise) to `t = 1` (data) everywhere.
"""
