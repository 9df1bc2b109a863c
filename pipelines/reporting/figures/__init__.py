"""Figures of results; each is a function of tables that returns a matplotlib figure.

Figures are drawn without a display.
"""

import matplotlib

matplotlib.use("Agg")
