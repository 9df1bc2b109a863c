"""Integration of velocity fields: ODE and SDE solvers, time grids, diffusion samplers."""

from flowmatch_core.solvers._problem import SolverError
from flowmatch_core.solvers.ddpm import DDPM, ddim
from flowmatch_core.solvers.diffusions import Constant, Custom, Diffusion, Memoryless, Proportional
from flowmatch_core.solvers.fixed_step import Tableau
from flowmatch_core.solvers.grids import EDM, Nodes, Power, TimeGrid, Uniform, Warped
from flowmatch_core.solvers.ode import SOLVERS, Solution, solve
from flowmatch_core.solvers.sde import SDE_SOLVERS, solve_sde

__all__ = [
    "DDPM",
    "EDM",
    "SDE_SOLVERS",
    "SOLVERS",
    "Constant",
    "Custom",
    "Diffusion",
    "Memoryless",
    "Nodes",
    "Power",
    "Proportional",
    "Solution",
    "SolverError",
    "Tableau",
    "TimeGrid",
    "Uniform",
    "Warped",
    "ddim",
    "solve",
    "solve_sde",
]
