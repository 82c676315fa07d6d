"""Variational diffusion in Pyro: the forms of diffusion, whose sites the spec chooses."""

from elbozoo.zoo.diffusion_vae.model_pyro import Guide, Model

__all__ = ["Guide", "Model"]
