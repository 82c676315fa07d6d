"""Variational diffusion in NumPyro: the forms of diffusion, whose sites the spec chooses."""

from elbozoo.zoo.diffusion_vae.model_numpyro import Guide, Model

__all__ = ["Guide", "Model"]
