"""Objectives, gradient estimators, shapes; the two engines; fit, evaluate, posterior."""

if __name__ == "inference":
    raise ImportError("inference must be a part of elbozoo; got the bare name. Write `import elbozoo.inference`.")

from elbozoo.inference.diagnosis import Diagnosis, diagnose
from elbozoo.inference.errors import CorruptFile, ElbozooError, InvalidArgument, NonFinite, Refused
from elbozoo.inference.evaluation import Evaluation, evaluate
from elbozoo.inference.gradients import STL, DReG, GradientEstimator, Pathwise, ScoreFunction
from elbozoo.inference.information import Bottleneck, bottleneck
from elbozoo.inference.minima import Course, LocalMinima, local_minima
from elbozoo.inference.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, TVO, Bound, Objective, Renyi
from elbozoo.inference.optimizers import Adam
from elbozoo.inference.posterior import to_arviz
from elbozoo.inference.shapes import AnnealedKL, Beta, Capacity, FreeBits, Shape
from elbozoo.inference.starts import PPCA, Collapsed, Informative, Start
from elbozoo.inference.terms import Site, Terms
from elbozoo.inference.training import Run, fit

__all__ = [
    "CIWAE",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "PPCA",
    "STL",
    "TVO",
    "Adam",
    "AnnealedKL",
    "Beta",
    "Bottleneck",
    "Bound",
    "Capacity",
    "Collapsed",
    "CorruptFile",
    "Course",
    "DReG",
    "Diagnosis",
    "ElbozooError",
    "Evaluation",
    "FreeBits",
    "GradientEstimator",
    "Informative",
    "InvalidArgument",
    "LocalMinima",
    "NonFinite",
    "Objective",
    "Pathwise",
    "Refused",
    "Renyi",
    "Run",
    "ScoreFunction",
    "Shape",
    "Site",
    "Start",
    "Terms",
    "bottleneck",
    "diagnose",
    "evaluate",
    "fit",
    "local_minima",
    "to_arviz",
]
