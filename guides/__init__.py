"""The amortized posterior families: one folder a family, a spec beside its two forms."""

if __name__ == "guides":
    raise ImportError("guides must be a part of elbozoo; got the bare name. Write `import elbozoo.guides`.")

from elbozoo.guides.diagonal_gaussian import DiagonalGaussian
from elbozoo.guides.family import Family
from elbozoo.guides.full_covariance_gaussian import FullCovarianceGaussian
from elbozoo.guides.inverse_autoregressive_flow import InverseAutoregressiveFlow
from elbozoo.guides.low_rank_gaussian import LowRankGaussian
from elbozoo.guides.mixture_of_gaussians import MixtureOfGaussians
from elbozoo.guides.neural_spline_flow import NeuralSplineFlow
from elbozoo.guides.semi_amortised import SemiAmortised

__all__ = [
    "DiagonalGaussian",
    "Family",
    "FullCovarianceGaussian",
    "InverseAutoregressiveFlow",
    "LowRankGaussian",
    "MixtureOfGaussians",
    "NeuralSplineFlow",
    "SemiAmortised",
]
