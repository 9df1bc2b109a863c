"""The tests and tutorials of other libraries, computed by them and by this library, value by value.

`python -m peers` runs all cases; see `docs/results/peers.md`. Nothing is copied: an adapter calls the installed package
of the peer and this library on the same inputs, and compares.
"""
