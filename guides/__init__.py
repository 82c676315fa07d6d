"""The amortized posterior families: one folder a family, a spec beside its two forms."""

if __name__ == "guides":
    raise ImportError("guides must be a part of elbozoo; got the bare name. Write `import elbozoo.guides`.")

from elbozoo.guides.diagonal_gaussian import DiagonalGaussian
from elbozoo.guides.family import Family
from elbozoo.guides.full_covariance_gaussian import FullCovarianceGaussian

__all__ = ["DiagonalGaussian", "Family", "FullCovarianceGaussian"]
