"""Train, evaluate and save with one engine's extra installed and the other's absent: ``python ci/one_engine.py pyro``.

Run it outside the checkout to try an installed wheel.
"""

import importlib.util
import sys

import numpy as np

MODULES = {
    "pyro": ("torch", "pyro", "zuko", "torchdiffeq"),
    "numpyro": ("jax", "numpyro", "flax", "optax", "flowjax", "equinox", "diffrax"),
}
engine = sys.argv[1]
(other,) = set(MODULES) - {engine}

present = [module for module in MODULES[other] if importlib.util.find_spec(module)]
assert not present, f"elbozoo[{engine}] must bring nothing of {other}; found {present}"

import elbozoo

loaded = set(sys.modules) & set(MODULES[engine])
assert not loaded, f"import elbozoo must load no engine; it loaded {sorted(loaded)}"

from elbozoo.inference import IWAE, fit
from elbozoo.zoo import VAE

spec = VAE(data_dim=4, latent_dim=2)
x = (np.random.default_rng(0).random((64, 4)) < 0.3).astype(np.float32)
program = spec.pyro() if engine == "pyro" else spec.numpyro()
run = fit(program, x, objective=IWAE(num_particles=5), epochs=2, batch_size=16, seed=0, progress=False)
nll = run.evaluate(x, num_particles=50).nll
assert 0 < nll < 4 * np.log(2) + 1, f"the NLL of four sparse bits must be near theirs; got {nll}"
print(f"elbozoo {elbozoo.__version__} from {elbozoo.__file__}: {engine} without {other}, NLL {nll:.3f} nats")
