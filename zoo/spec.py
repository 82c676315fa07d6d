"""What every model of the zoo is: a spec that builds a program in either engine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part

if TYPE_CHECKING:
    import elbozoo.inference.numpyro_engine
    import elbozoo.inference.pyro_engine


@dataclasses.dataclass(frozen=True)
class Spec(Part):
    """A model and its guide, as hyperparameters: frozen, comparable, JSON-able, and without an engine.

    A model folder's ``__init__.py`` holds one, and ``model_pyro.py`` and ``model_numpyro.py`` beside it hold its two
    forms: classes ``Model(spec, name)`` and ``Guide(spec, model, name)`` with the same methods in one order. A guide
    is given its model because some share the generative path (a ladder) or climb its density (semi-amortised).
    """

    generative: ClassVar[bool] = True
    """Whether the model is a distribution of data; else nothing can be drawn from it, nor its likelihood evaluated."""

    fitting_gradient: ClassVar[str] = "pathwise"
    """The gradient estimator that fits its sites, by the name it has on the command line: the default there."""

    data_decoder: ClassVar[str] = "decoder"
    """What the weights' names of the network begin with that the likelihood reads."""

    def pyro(self, name: str = "") -> elbozoo.inference.pyro_engine.Program:
        """The program in Pyro: ``.model`` and ``.guide`` are PyroModules.

        Args:
            name: prefix of every parameter's name (``name.decoder...``), so that two models can live in one program.

        Raises:
            InvalidArgument: Pyro is not installed, or ``name`` is not an identifier.
        """
        form = self.form_module("pyro")
        from elbozoo.inference.pyro_engine import Program

        model = form.Model(self, check_name(name))
        return Program(model, form.Guide(self, model, name), spec=self)

    def numpyro(self, name: str = "") -> elbozoo.inference.numpyro_engine.Program:
        """The program in NumPyro: ``.model`` and ``.guide`` are plain callables.

        Args:
            name: prefix of every parameter's name (``name.decoder$params``), so that two models can live in one
                program. Sample sites keep their names: put ``numpyro.handlers.scope`` over the program for those.

        Raises:
            InvalidArgument: NumPyro is not installed, or ``name`` is not an identifier.
        """
        form = self.form_module("numpyro")
        from elbozoo.inference.numpyro_engine import Program

        model = form.Model(self, check_name(name))
        return Program(model, form.Guide(self, model, name), spec=self)

    def check(self, x: Any) -> None:
        """Raise InvalidArgument unless ``x`` is data that the model can have generated."""
        raise NotImplementedError

    @property
    def data_network(self) -> Any:
        """The architecture that the likelihood reads, mirrored; None where that is none of ``elbozoo.zoo.networks``."""
        return getattr(self, "network", None)

    def bias_of_mean(self, mean: np.ndarray) -> dict[str, np.ndarray]:
        """The weight, by name, that puts the likelihood at ``mean`` where the last layer's other weights are 0.

        Args:
            mean: of the data, (data_dim,); see :class:`~elbozoo.inference.DataMean` for what it becomes.

        Raises: InvalidArgument for a model whose likelihood reads no network that ends in a bias.
        """
        if self.data_network is None:
            todo = "Use another start, or none"
            raise must("DataMean", "start a model with a network that ends in a bias", type(self).__name__, todo)
        likelihood, of_bias = self.likelihood, self.data_network.pooled(mean)  # type: ignore[attr-defined]
        outputs = np.zeros((likelihood.num_outputs, len(of_bias)))
        outputs[0] = likelihood.outputs_of_mean(of_bias)
        return {f"{self.data_decoder}.{self.data_network.last_bias}": outputs.ravel()}

    def check_data(self, x: Any, *others: Any) -> None:
        """Raise InvalidArgument unless ``x``, and what is passed after it (labels), are data of the model."""
        if others:
            got = f"{1 + len(others)} arrays"
            raise must("data", f"be what {type(self).__name__} takes", got, "Leave the last one out")
        self.check(x)


def check_name(name: str) -> str:
    """``name``, refused unless it is empty or a Python identifier."""
    if name and not name.isidentifier():
        raise must("name", "be empty or a Python identifier", repr(name), 'Pass name="left", say')
    return name


def check_shape(x: Any, data_dim: int) -> np.ndarray:
    """``x`` as a NumPy array, refused unless its shape is (N, data_dim)."""
    array = np.asarray(x)
    if array.ndim != 2 or array.shape[1] != data_dim:
        raise must("x", f"have shape (N, {data_dim})", array.shape, "Flatten each datum to one row")
    return array


def plate_sizes(x: Any, size: int | None, data_dim: int) -> tuple[int, int]:
    """The data plate's size N and its minibatch's size B.

    B is the length of ``x``; without ``x`` the program draws ``size`` data (one by default). N is ``size`` where it is
    given, B otherwise; N > B scales the minibatch's log densities by N / B.

    Args:
        x: data of shape (..., B, data_dim), or None.
        size: number of data in the whole set, or None.
        data_dim: entries of one datum.

    Raises:
        InvalidArgument: ``x`` has another shape, or more rows than ``size``.
    """
    if x is None:
        return (size or 1,) * 2
    if len(x.shape) < 2 or x.shape[-1] != data_dim:
        raise must("x", f"have shape (B, {data_dim})", tuple(x.shape), "Flatten each datum to one row")
    batch = x.shape[-2]
    if size is not None and size < batch:
        raise must("size", f"be at least the batch's {batch} rows", size, "Pass the length of the whole data set")
    return size or batch, batch
