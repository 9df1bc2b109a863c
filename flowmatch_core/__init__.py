"""Flow matching and temporal difference flows: tensors in, tensors out.

Time runs from `t = 0` (source, noise) to `t = 1` (data) everywhere. The public names of all modules are attributes of
the package, loaded when they are first used:

Examples:
    >>> import flowmatch_core as fm
    >>> fm.CondOT().alpha(0.25)
    tensor(0.2500, dtype=torch.float64)
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from flowmatch_core.averaging import polyak_update as polyak_update
    from flowmatch_core.averaging import ramped_step as ramped_step
    from flowmatch_core.components import ComponentFlow as ComponentFlow
    from flowmatch_core.components import draw_component as draw_component
    from flowmatch_core.couplings import ConditionalOT as ConditionalOT
    from flowmatch_core.couplings import Coupling as Coupling
    from flowmatch_core.couplings import Independent as Independent
    from flowmatch_core.couplings import IndexCoupling as IndexCoupling
    from flowmatch_core.couplings import MinibatchOT as MinibatchOT
    from flowmatch_core.couplings import Reflow as Reflow
    from flowmatch_core.couplings import SchrodingerBridge as SchrodingerBridge
    from flowmatch_core.couplings import Sinkhorn as Sinkhorn
    from flowmatch_core.dequantise import Dequantiser as Dequantiser
    from flowmatch_core.dequantise import importance_bound as importance_bound
    from flowmatch_core.discrete import CosineSchedule as CosineSchedule
    from flowmatch_core.discrete import Denoiser as Denoiser
    from flowmatch_core.discrete import EvidenceBound as EvidenceBound
    from flowmatch_core.discrete import Logits as Logits
    from flowmatch_core.discrete import MaskSource as MaskSource
    from flowmatch_core.discrete import MixturePath as MixturePath
    from flowmatch_core.discrete import PolynomialSchedule as PolynomialSchedule
    from flowmatch_core.discrete import Probabilities as Probabilities
    from flowmatch_core.discrete import Schedule as Schedule
    from flowmatch_core.discrete import Source as Source
    from flowmatch_core.discrete import TokenDistribution as TokenDistribution
    from flowmatch_core.discrete import TokenFlow as TokenFlow
    from flowmatch_core.discrete import TokenTable as TokenTable
    from flowmatch_core.discrete import UniformSource as UniformSource
    from flowmatch_core.discrete import cross_entropy_loss as cross_entropy_loss
    from flowmatch_core.discrete import generalised_kl_loss as generalised_kl_loss
    from flowmatch_core.discrete import guided_tokens as guided_tokens
    from flowmatch_core.discrete import jump_divergence as jump_divergence
    from flowmatch_core.discrete import perplexity as perplexity
    from flowmatch_core.discrete import solve_ctmc as solve_ctmc
    from flowmatch_core.field import Field as Field
    from flowmatch_core.field import Time as Time
    from flowmatch_core.field import VelocityField as VelocityField
    from flowmatch_core.flow import BoundContinuousFlow as BoundContinuousFlow
    from flowmatch_core.flow import BoundFlow as BoundFlow
    from flowmatch_core.flow import ContinuousFlow as ContinuousFlow
    from flowmatch_core.flow import Flow as Flow
    from flowmatch_core.flow import FlowTransform as FlowTransform
    from flowmatch_core.flow import LogDensity as LogDensity
    from flowmatch_core.flow import Moments as Moments
    from flowmatch_core.forward_backward import FBLoss as FBLoss
    from flowmatch_core.forward_backward import ForwardBackward as ForwardBackward
    from flowmatch_core.forward_backward import draw_latents as draw_latents
    from flowmatch_core.forward_backward import fb_actor_loss as fb_actor_loss
    from flowmatch_core.forward_backward import fb_loss as fb_loss
    from flowmatch_core.forward_backward import fb_orthonormality_loss as fb_orthonormality_loss
    from flowmatch_core.forward_backward import fb_value_loss as fb_value_loss
    from flowmatch_core.forward_backward import reward_weights as reward_weights
    from flowmatch_core.forward_backward import uniform_latents as uniform_latents
    from flowmatch_core.guidance import GuidanceScale as GuidanceScale
    from flowmatch_core.guidance import drop_condition as drop_condition
    from flowmatch_core.guidance import guided as guided
    from flowmatch_core.intervals import Interval as Interval
    from flowmatch_core.intervals import paired_difference as paired_difference
    from flowmatch_core.intervals import paired_ratio as paired_ratio
    from flowmatch_core.intervals import t_interval as t_interval
    from flowmatch_core.marginals import Marginals as Marginals
    from flowmatch_core.metrics import Floor as Floor
    from flowmatch_core.metrics import bits_per_dim as bits_per_dim
    from flowmatch_core.metrics import emd as emd
    from flowmatch_core.metrics import energy_distance as energy_distance
    from flowmatch_core.metrics import mmd as mmd
    from flowmatch_core.metrics import normalised_path_energy as normalised_path_energy
    from flowmatch_core.metrics import path_energy as path_energy
    from flowmatch_core.metrics import sampling_floor as sampling_floor
    from flowmatch_core.metrics import sliced_wasserstein as sliced_wasserstein
    from flowmatch_core.metrics import wasserstein2 as wasserstein2
    from flowmatch_core.mixture import MixtureFlow as MixtureFlow
    from flowmatch_core.networks import ACTIVATIONS as ACTIVATIONS
    from flowmatch_core.networks import ConcatSquashField as ConcatSquashField
    from flowmatch_core.networks import ConvUNetField as ConvUNetField
    from flowmatch_core.networks import EncodedField as EncodedField
    from flowmatch_core.networks import FiLMField as FiLMField
    from flowmatch_core.networks import FlatUNetField as FlatUNetField
    from flowmatch_core.networks import FourierTime as FourierTime
    from flowmatch_core.networks import LabelEmbedding as LabelEmbedding
    from flowmatch_core.networks import MLPField as MLPField
    from flowmatch_core.networks import NoisePrediction as NoisePrediction
    from flowmatch_core.networks import Preconditioned as Preconditioned
    from flowmatch_core.networks import ResidualField as ResidualField
    from flowmatch_core.networks import UNetMLPField as UNetMLPField
    from flowmatch_core.normalizing import DiscreteTimeFlow as DiscreteTimeFlow
    from flowmatch_core.objectives import BrownianBridge as BrownianBridge
    from flowmatch_core.objectives import RegressionBatch as RegressionBatch
    from flowmatch_core.objectives import Spline as Spline
    from flowmatch_core.objectives import cfm_batch as cfm_batch
    from flowmatch_core.objectives import cfm_loss as cfm_loss
    from flowmatch_core.objectives import draw_snapshots as draw_snapshots
    from flowmatch_core.objectives import interpolant_loss as interpolant_loss
    from flowmatch_core.objectives import nll_loss as nll_loss
    from flowmatch_core.objectives import posterior_cfm_loss as posterior_cfm_loss
    from flowmatch_core.objectives import sb_cfm_loss as sb_cfm_loss
    from flowmatch_core.objectives import sf2m_loss as sf2m_loss
    from flowmatch_core.objectives import snapshot_cfm_loss as snapshot_cfm_loss
    from flowmatch_core.oracles import GaussianMixture as GaussianMixture
    from flowmatch_core.oracles import LinearGaussianMDP as LinearGaussianMDP
    from flowmatch_core.paths import OU as OU
    from flowmatch_core.paths import VE as VE
    from flowmatch_core.paths import VP as VP
    from flowmatch_core.paths import AffinePath as AffinePath
    from flowmatch_core.paths import CondOT as CondOT
    from flowmatch_core.paths import Cosine as Cosine
    from flowmatch_core.paths import CustomPath as CustomPath
    from flowmatch_core.paths import PathSample as PathSample
    from flowmatch_core.paths import Polynomial as Polynomial
    from flowmatch_core.paths import Quantity as Quantity
    from flowmatch_core.paths import Rescheduled as Rescheduled
    from flowmatch_core.paths import VelocityOf as VelocityOf
    from flowmatch_core.prefetch import ahead as ahead
    from flowmatch_core.solvers import DDPM as DDPM
    from flowmatch_core.solvers import EDM as EDM
    from flowmatch_core.solvers import SOLVERS as SOLVERS
    from flowmatch_core.solvers import Memoryless as Memoryless
    from flowmatch_core.solvers import Nodes as Nodes
    from flowmatch_core.solvers import Power as Power
    from flowmatch_core.solvers import Solution as Solution
    from flowmatch_core.solvers import SolverError as SolverError
    from flowmatch_core.solvers import Uniform as Uniform
    from flowmatch_core.solvers import Warped as Warped
    from flowmatch_core.solvers import ddim as ddim
    from flowmatch_core.solvers import solve as solve
    from flowmatch_core.solvers import solve_sde as solve_sde
    from flowmatch_core.successor import EnsembleHorizonModel as EnsembleHorizonModel
    from flowmatch_core.successor import GaussianEnsemble as GaussianEnsemble
    from flowmatch_core.successor import GeometricHorizonModel as GeometricHorizonModel
    from flowmatch_core.successor import HorizonGAN as HorizonGAN
    from flowmatch_core.successor import HorizonModel as HorizonModel
    from flowmatch_core.successor import HorizonVAE as HorizonVAE
    from flowmatch_core.successor import LatentHorizonModel as LatentHorizonModel
    from flowmatch_core.successor import LatentNetwork as LatentNetwork
    from flowmatch_core.successor import Loss as Loss
    from flowmatch_core.successor import Particles as Particles
    from flowmatch_core.successor import Plan as Plan
    from flowmatch_core.successor import SuccessorLoss as SuccessorLoss
    from flowmatch_core.successor import Transitions as Transitions
    from flowmatch_core.successor import ensemble_loss as ensemble_loss
    from flowmatch_core.successor import gan_loss as gan_loss
    from flowmatch_core.successor import geometric as geometric
    from flowmatch_core.successor import gpi as gpi
    from flowmatch_core.successor import mc_cfm_loss as mc_cfm_loss
    from flowmatch_core.successor import n_step as n_step
    from flowmatch_core.successor import path_error as path_error
    from flowmatch_core.successor import td2_cfm_loss as td2_cfm_loss
    from flowmatch_core.successor import td2_dd_loss as td2_dd_loss
    from flowmatch_core.successor import td_cfm_coupled_loss as td_cfm_coupled_loss
    from flowmatch_core.successor import td_cfm_loss as td_cfm_loss
    from flowmatch_core.successor import td_dd_loss as td_dd_loss
    from flowmatch_core.successor import vae_loss as vae_loss
    from flowmatch_core.times import LateTime as LateTime
    from flowmatch_core.times import LogitNormalTime as LogitNormalTime
    from flowmatch_core.times import StratifiedTime as StratifiedTime
    from flowmatch_core.times import TimeLaw as TimeLaw
    from flowmatch_core.times import UniformTime as UniformTime
    from flowmatch_core.whitening import partial_whitening as partial_whitening

_MODULES = {
    "averaging": ("polyak_update", "ramped_step"),
    "components": ("ComponentFlow", "draw_component"),
    "couplings": (
        "ConditionalOT",
        "Coupling",
        "Independent",
        "IndexCoupling",
        "MinibatchOT",
        "Reflow",
        "SchrodingerBridge",
        "Sinkhorn",
    ),
    "dequantise": ("Dequantiser", "importance_bound"),
    "discrete": (
        "EvidenceBound",
        "CosineSchedule",
        "Denoiser",
        "Logits",
        "MaskSource",
        "MixturePath",
        "PolynomialSchedule",
        "Probabilities",
        "Schedule",
        "Source",
        "TokenDistribution",
        "TokenFlow",
        "TokenTable",
        "UniformSource",
        "cross_entropy_loss",
        "generalised_kl_loss",
        "guided_tokens",
        "jump_divergence",
        "perplexity",
        "solve_ctmc",
    ),
    "field": ("Field", "Time", "VelocityField"),
    "flow": (
        "BoundContinuousFlow",
        "BoundFlow",
        "ContinuousFlow",
        "Flow",
        "FlowTransform",
        "LogDensity",
        "Moments",
    ),
    "forward_backward": (
        "FBLoss",
        "ForwardBackward",
        "draw_latents",
        "fb_actor_loss",
        "fb_loss",
        "fb_orthonormality_loss",
        "fb_value_loss",
        "reward_weights",
        "uniform_latents",
    ),
    "guidance": ("GuidanceScale", "drop_condition", "guided"),
    "intervals": ("Interval", "paired_difference", "paired_ratio", "t_interval"),
    "marginals": ("Marginals",),
    "metrics": (
        "Floor",
        "bits_per_dim",
        "emd",
        "energy_distance",
        "mmd",
        "normalised_path_energy",
        "path_energy",
        "sampling_floor",
        "sliced_wasserstein",
        "wasserstein2",
    ),
    "mixture": ("MixtureFlow",),
    "networks": (
        "ACTIVATIONS",
        "ConcatSquashField",
        "ConvUNetField",
        "EncodedField",
        "FiLMField",
        "FlatUNetField",
        "FourierTime",
        "LabelEmbedding",
        "MLPField",
        "NoisePrediction",
        "Preconditioned",
        "ResidualField",
        "UNetMLPField",
    ),
    "normalizing": ("DiscreteTimeFlow",),
    "objectives": (
        "BrownianBridge",
        "RegressionBatch",
        "Spline",
        "cfm_batch",
        "cfm_loss",
        "draw_snapshots",
        "interpolant_loss",
        "nll_loss",
        "posterior_cfm_loss",
        "sb_cfm_loss",
        "sf2m_loss",
        "snapshot_cfm_loss",
    ),
    "oracles": ("GaussianMixture", "LinearGaussianMDP"),
    "paths": (
        "AffinePath",
        "CondOT",
        "Cosine",
        "CustomPath",
        "OU",
        "PathSample",
        "Polynomial",
        "Quantity",
        "Rescheduled",
        "VE",
        "VP",
        "VelocityOf",
    ),
    "prefetch": ("ahead",),
    "solvers": (
        "DDPM",
        "EDM",
        "Memoryless",
        "Nodes",
        "Power",
        "SOLVERS",
        "Solution",
        "SolverError",
        "Uniform",
        "Warped",
        "ddim",
        "solve",
        "solve_sde",
    ),
    "successor": (
        "EnsembleHorizonModel",
        "GaussianEnsemble",
        "GeometricHorizonModel",
        "HorizonGAN",
        "HorizonModel",
        "HorizonVAE",
        "LatentHorizonModel",
        "LatentNetwork",
        "Loss",
        "Particles",
        "Plan",
        "SuccessorLoss",
        "Transitions",
        "ensemble_loss",
        "gan_loss",
        "geometric",
        "gpi",
        "mc_cfm_loss",
        "n_step",
        "path_error",
        "td2_cfm_loss",
        "td2_dd_loss",
        "td_cfm_coupled_loss",
        "td_cfm_loss",
        "td_dd_loss",
        "vae_loss",
    ),
    "times": ("LateTime", "LogitNormalTime", "StratifiedTime", "TimeLaw", "UniformTime"),
    "whitening": ("partial_whitening",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = frozenset(_MODULES) | {"divergence", "transport"}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    """Import the module of a public name on first use, so that `import flowmatch_core` stays cheap."""
    if name in _SUBMODULES:
        return import_module(f"flowmatch_core.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'flowmatch_core' has no attribute {name!r}.")
    value = getattr(import_module(f"flowmatch_core.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_SUBMODULES])
