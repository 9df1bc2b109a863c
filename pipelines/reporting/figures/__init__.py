"""Pictures of results, each a function of tables that returns a matplotlib figure.

Figures are drawn without a screen.
"""

import matplotlib

matplotlib.use("Agg")
