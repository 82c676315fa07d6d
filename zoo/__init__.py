"""The models: one folder a model, a spec beside its two forms."""

if __name__ == "zoo":
    raise ImportError("zoo must be a part of elbozoo; got the bare name. Write `import elbozoo.zoo`.")

from elbozoo.zoo.autoencoder import Autoencoder
from elbozoo.zoo.categorical_vae import CategoricalVAE
from elbozoo.zoo.deep_hierarchical_vae import DeepHierarchicalVAE
from elbozoo.zoo.denoisers import Denoiser, GaussianDenoiser, MLPDenoiser, UNet
from elbozoo.zoo.diffusion import DiscretizedNormal, EndLikelihood, ExactNormal
from elbozoo.zoo.diffusion.sampling import draw, flow_bound, flow_log_prob
from elbozoo.zoo.diffusion_vae import DiffusionVAE
from elbozoo.zoo.gaussian_mixture_vae import GaussianMixtureVAE
from elbozoo.zoo.hierarchical_vae import HierarchicalVAE
from elbozoo.zoo.hierarchical_vqvae import HierarchicalVQVAE
from elbozoo.zoo.ladder_vae import LadderVAE
from elbozoo.zoo.latent_diffusion import LatentDiffusion
from elbozoo.zoo.likelihoods import (
    AutoregressiveBernoulli,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
)
from elbozoo.zoo.linear_vae import LinearVAE
from elbozoo.zoo.networks import MLP, Conv, FullyConv, Network
from elbozoo.zoo.priors import FlowPrior, MixturePrior, Prior, StandardNormal, VampPrior
from elbozoo.zoo.quantizers import Codebook, FiniteScalar, Quantizer, Residual
from elbozoo.zoo.schedules import (
    CosineSchedule,
    LearnedSchedule,
    LinearSchedule,
    PolynomialSchedule,
    Schedule,
    TabulatedSchedule,
)
from elbozoo.zoo.semi_supervised_vae import SemiSupervisedVAE
from elbozoo.zoo.sigmoid_belief_net import SigmoidBeliefNet
from elbozoo.zoo.spec import Spec
from elbozoo.zoo.vae import VAE
from elbozoo.zoo.variational_diffusion import VariationalDiffusion
from elbozoo.zoo.vqvae import VQVAE, CodeUsage, code_usage

__all__ = [
    "MLP",
    "VAE",
    "VQVAE",
    "Autoencoder",
    "AutoregressiveBernoulli",
    "Bernoulli",
    "CategoricalVAE",
    "CodeUsage",
    "Codebook",
    "ContinuousBernoulli",
    "Conv",
    "CosineSchedule",
    "DeepHierarchicalVAE",
    "Denoiser",
    "DiffusionVAE",
    "DiscretizedLogistic",
    "DiscretizedNormal",
    "EndLikelihood",
    "ExactNormal",
    "FiniteScalar",
    "FlowPrior",
    "FullyConv",
    "Gaussian",
    "GaussianDenoiser",
    "GaussianMixtureVAE",
    "HierarchicalVAE",
    "HierarchicalVQVAE",
    "LadderVAE",
    "LatentDiffusion",
    "LearnedSchedule",
    "Likelihood",
    "LinearSchedule",
    "LinearVAE",
    "MLPDenoiser",
    "MixturePrior",
    "Network",
    "PolynomialSchedule",
    "Prior",
    "Quantizer",
    "Residual",
    "Schedule",
    "SemiSupervisedVAE",
    "SigmoidBeliefNet",
    "Spec",
    "StandardNormal",
    "TabulatedSchedule",
    "UNet",
    "VampPrior",
    "VariationalDiffusion",
    "code_usage",
    "draw",
    "flow_bound",
    "flow_log_prob",
]
