"""Objectives, gradient estimators, shapes; the two engines; fit, evaluate, posterior."""

if __name__ == "inference":
    raise ImportError("inference must be a part of elbozoo; got the bare name. Write `import elbozoo.inference`.")

from elbozoo.inference.annealing import AnnealedLikelihood, Bracket, annealed_importance_sampling, bracket
from elbozoo.inference.calibration import Calibration, calibrate
from elbozoo.inference.classification import accuracy, class_probabilities, cluster_accuracy
from elbozoo.inference.diagnosis import Diagnosis, diagnose
from elbozoo.inference.discrete import ARM, REBAR, RELAX, DisARM, Enumerate, GumbelSoftmax, StraightThrough
from elbozoo.inference.errors import CorruptFile, ElbozooError, InvalidArgument, NonFinite, Refused
from elbozoo.inference.evaluation import Evaluation, evaluate
from elbozoo.inference.exact import exact_log_lik
from elbozoo.inference.gradient_noise import GradientNoise, gradient_noise
from elbozoo.inference.gradients import (
    NVIL,
    RWS,
    STL,
    VIMCO,
    Covariance,
    DReG,
    GradientEstimator,
    Pathwise,
    ScoreFunction,
)
from elbozoo.inference.ground_truth import GroundTruth, ground_truth
from elbozoo.inference.information import Bottleneck, bottleneck
from elbozoo.inference.minima import Course, LocalMinima, local_minima
from elbozoo.inference.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, TVO, Bound, Objective, Renyi
from elbozoo.inference.optimizers import Adam
from elbozoo.inference.posterior import to_arviz
from elbozoo.inference.rate_distortion import RateDistortion, RatePoint, rate_distortion
from elbozoo.inference.shapes import (
    P2,
    AnnealedKL,
    Beta,
    Capacity,
    Classification,
    FreeBits,
    LayerwiseAnnealedKL,
    MinSNR,
    Shape,
    SimpleLoss,
)
from elbozoo.inference.starts import PPCA, Collapsed, DataMean, FirstStage, Informative, Start
from elbozoo.inference.suboptimality import Gaps, gaps, optimise_guide
from elbozoo.inference.terms import Site, Terms
from elbozoo.inference.training import Run, fit

__all__ = [
    "ARM",
    "CIWAE",
    "ELBO",
    "IWAE",
    "MIWAE",
    "NVIL",
    "P2",
    "PIWAE",
    "PPCA",
    "REBAR",
    "RELAX",
    "RWS",
    "STL",
    "TVO",
    "VIMCO",
    "Adam",
    "AnnealedKL",
    "AnnealedLikelihood",
    "Beta",
    "Bottleneck",
    "Bound",
    "Bracket",
    "Calibration",
    "Capacity",
    "Classification",
    "Collapsed",
    "CorruptFile",
    "Course",
    "Covariance",
    "DReG",
    "DataMean",
    "Diagnosis",
    "DisARM",
    "ElbozooError",
    "Enumerate",
    "Evaluation",
    "FirstStage",
    "FreeBits",
    "Gaps",
    "GradientEstimator",
    "GradientNoise",
    "GroundTruth",
    "GumbelSoftmax",
    "Informative",
    "InvalidArgument",
    "LayerwiseAnnealedKL",
    "LocalMinima",
    "MinSNR",
    "NonFinite",
    "Objective",
    "Pathwise",
    "RateDistortion",
    "RatePoint",
    "Refused",
    "Renyi",
    "Run",
    "ScoreFunction",
    "Shape",
    "SimpleLoss",
    "Site",
    "Start",
    "StraightThrough",
    "Terms",
    "accuracy",
    "annealed_importance_sampling",
    "bottleneck",
    "bracket",
    "calibrate",
    "class_probabilities",
    "cluster_accuracy",
    "diagnose",
    "evaluate",
    "exact_log_lik",
    "fit",
    "gaps",
    "gradient_noise",
    "ground_truth",
    "local_minima",
    "optimise_guide",
    "rate_distortion",
    "to_arviz",
]
