"""``fit``: one call for both engines and every objective; and ``Run``, what it returns."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elbozoo._version import __version__
from elbozoo.inference import storage
from elbozoo.inference.data import Binarize, prepare
from elbozoo.inference.errors import CorruptFile, NonFinite, must
from elbozoo.inference.objectives import ELBO, Objective
from elbozoo.inference.optimizers import Adam
from elbozoo.inference.parts import instance_of, one_of, positive, whole_number
from elbozoo.inference.recording import rewind
from elbozoo.inference.shapes import Shape
from elbozoo.inference.starts import Start
from elbozoo.inference.streams import InMemory, Passes, Rows, is_stream, source_of

if TYPE_CHECKING:
    from elbozoo.inference.evaluation import Evaluation

CHECKPOINT, WEIGHTS, CONFIG, HISTORY = "checkpoint.safetensors", "weights.safetensors", "config.json", "history.json"

_PHASE = 2**31  # from where the epochs of a starting phase count, so that its minibatches come in an order of their own


@dataclass(eq=False)
class Run:
    """A trained program with its history and settings.

    Attributes:
        program: the program with trained weights bound; its ``model`` and ``guide`` go into the user's own programs
            (torch modules in evaluation mode).
        objective: what was maximised.
        history: one dict an epoch: ``epoch``, ``step``, ``bound`` (unshaped, nats per datum, training minibatches),
            ``rate``, ``distortion``, ``kl_<site>``, ``seconds``, ``grad_norm`` (in NumPyro of every tenth step, where
            an epoch has as many and no ``skip_norm`` asks for it); ``live_<site>`` where the site factorises: how many
            of its dimensions have a minibatch-mean KL above 0.01 nats (the mean over the epoch's minibatches, so it
            need not be whole); ``valid_bound`` with held-out data; ``shaped_bound``, ``beta``, … under a shape;
            ``skipped``, the share of the epoch's updates, under ``Adam(skip_norm=…)``.
        config: settings, versions and seeds; JSON-able. After a start with a phase, ``config["phase"]`` has the figures
            of the phase's last epoch, as the history has those of an epoch.
    """

    program: Any
    objective: Objective
    history: list[dict[str, float | int]]
    config: dict[str, Any]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Trained weights under torch's ``state_dict`` names and layouts."""
        return self.program.weights

    def prepare(self, data: Any) -> tuple:
        """``data`` as this run's program takes it: checked, flattened, and binarised as in training.

        Pixels that training redraws are drawn once here, the same for every run.
        """
        return prepare(self.program, data, self.config["binarize"])

    def evaluate(self, data: Any, **options: Any) -> Evaluation:
        """:func:`elbozoo.inference.evaluation.evaluate` on ``data``, binarised as in training."""
        from elbozoo.inference.evaluation import evaluate

        return evaluate(self.program, self.prepare(data), **options)

    def to_arviz(self, data: Any, **options: Any) -> Any:
        """ArviZ groups for ``data``; see :func:`elbozoo.inference.posterior.to_arviz`."""
        from elbozoo.inference.posterior import to_arviz

        return to_arviz(self.program, self.prepare(data), **options)

    def save(self, directory: str | Path) -> Path:
        """Write config, weights and history into ``directory``, each file whole or not at all.

        Raises: WriteFailed; what was there before is intact.
        """
        directory = Path(directory)
        storage.save_arrays(directory / WEIGHTS, self.weights, {"engine": self.program.engine})
        storage.save_json(directory / HISTORY, {"rows": self.history})
        # Last, and with the weights' digest: what a kill leaves half-saved is seen.
        storage.save_json(directory / CONFIG, {**self.config, "weights": _digest(self.weights)})
        return directory

    @classmethod
    def load(cls, directory: str | Path, program: Any = None, *example: Any, objective: Objective | None = None) -> Run:
        """Read a run folder.

        Args:
            directory: what :meth:`save`, ``fit(directory=…)`` or ``elbozoo train`` wrote.
            program: the untrained program; rebuilt from the config for a model of the zoo. Any engine will do:
                weights are shared.
            example: a small batch, for a program that is not of the zoo.
            objective: what it was trained on, where that is an objective of the user's own.

        Raises: CorruptFile naming a missing, truncated or altered file; InvalidArgument when the weights are of
            another program.
        """
        directory = Path(directory)
        if not (directory / CONFIG).exists() and (directory / CHECKPOINT).exists():
            todo = "Go on with fit(..., resume=True) or `elbozoo train ... --resume`"
            got = "a checkpoint alone"
            raise must(str(directory / CONFIG), "be there in the folder of a finished run", got, todo, CorruptFile)
        config = storage.load_json(directory / CONFIG)
        arrays, _ = storage.load_arrays(directory / WEIGHTS)
        history = storage.load_json(directory / HISTORY)
        for name, content, keys in (
            (CONFIG, config, {"engine", "objective", "seed", "binarize"}),
            (HISTORY, history, {"rows"}),
        ):
            if missing := sorted(keys - set(content)):
                todo = "Restore it from a copy; another file may lie in its place"
                raise must(str(directory / name), f"have {', '.join(missing)}", sorted(content), todo, CorruptFile)
        if config.pop("weights", None) != _digest(arrays):
            todo = "Train it again, or resume it from its checkpoint; saving was cut short"
            raise must(str(directory / WEIGHTS), f"be the weights that {CONFIG} is about", "others", todo, CorruptFile)
        if program is None:
            if config.get("spec") is None:
                raise must(
                    "program",
                    "be given for a run of a program that is not of the zoo",
                    "None",
                    "Pass Run.load(directory, program, x[:1])",
                )
            from elbozoo.zoo.spec import Spec

            program = getattr(Spec.from_config(config["spec"]), config["engine"])()
        if example:
            example = prepare(program, example, check=False)
        program = program.with_weights(arrays, *example)
        if program.engine == "pyro":  # as fit hands it back
            for module in program._modules():
                module.eval()
        return cls(program, objective or objective_from_config(config["objective"]), history["rows"], config)


def _digest(weights: Mapping[str, np.ndarray]) -> str:
    return storage.checksum(weights[name] for name in sorted(weights))


# --- configuration ----------------------------------------------------------------------------------------------


def to_config(part: Any) -> Any:
    """A frozen dataclass as a JSON-able dict, class names under ``"class"``; a function by its name alone.

    A learning-rate function with settings of its own is best a frozen dataclass with ``__call__``: then they are
    kept, and compared on resuming.
    """
    if is_dataclass(part) and not isinstance(part, type):
        return {"class": type(part).__name__, **{f.name: to_config(getattr(part, f.name)) for f in fields(part)}}
    if isinstance(part, str | int | float | bool | None):
        return part
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))  # an address differs from process to process


def objective_from_config(config: Mapping[str, Any]) -> Any:
    """The objective (or the part of one) that :func:`to_config` described.

    Nothing is evaluated: names are looked up among the public ones.
    """
    from elbozoo import inference

    values = {k: objective_from_config(v) if isinstance(v, Mapping) else v for k, v in config.items() if k != "class"}
    cls = getattr(inference, str(config.get("class")), None)
    try:
        if isinstance(cls, type) and is_dataclass(cls):
            return cls(**values)
    except TypeError:  # a field that this version does not have
        pass
    got = {**values, "class": config.get("class")}
    todo = "Pass Run.load(..., objective=...) if it is your own, else use the version that wrote it"
    raise must("objective", "be one that this version knows", got, todo, CorruptFile)


def environment(engine: str) -> dict[str, str]:
    """Versions of everything that a figure may depend on."""
    names = ["numpy", *(["torch", "pyro-ppl"] if engine == "pyro" else ["jax", "numpyro", "flax", "optax"])]
    found = {"elbozoo": __version__, **{name: _version(name) for name in names}}
    return {name: number for name, number in found.items() if number is not None}


@cache
def _version(name: str) -> str | None:
    """Looked up once: it takes as long as many steps of a small model, and cannot change in a process."""
    try:
        return version(name)
    except PackageNotFoundError:  # pragma: no cover
        return None


# --- fit --------------------------------------------------------------------------------------------------------


def fit(
    program: Any,
    data: Any,
    *,
    objective: Objective | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    epoch_steps: int | None = None,
    learning_rate: float | Callable[[Any], Any] = 1e-3,
    optimizer: Any = None,
    start: Start | None = None,
    frozen: Sequence[str] = (),
    seed: int = 0,
    valid: Any = None,
    binarize: Binarize = "none",
    replicates: int | None = None,
    early_stopping: int | None = None,
    max_seconds: float | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1,
    device: str | None = None,
    devices: int | None = None,
    progress: bool = True,
) -> Any:
    r"""Train a program's model and guide together: maximise the objective's surrogate, report its bound.

    The program is left as it is: the trained one is ``run.program``. A program that already has trained weights goes
    on from them. (A plain Pyro function that closes over a module shares it with every copy, so that module is trained
    in place; pass a method of the module instead.)

    A site outside the data plate (a global latent) is charged once for all data, so the plate must say how many there
    are: ``plate("data", N, subsample_size=len(x))``.

    Data larger than memory are read as they are needed, some minibatches at a time, by a background thread:

    * a memory-mapped array (``np.load(path, mmap_mode="r")``), a Zarr array, an HDF5 data set, or anything else with
      ``shape``, ``dtype``, ``ndim`` and rows by ``data[array of row numbers]``; or a tuple with such. The minibatches,
      and so the weights, are those of the same array in memory. Where ``batch_size`` is all of them, they are loaded.
    * an iterable of batches, as a torch ``DataLoader``: each an array or tensor, or a tuple or list of them. They are
      taken as they come: ``batch_size`` is not used, and no ``seed`` fixes their order. An epoch is one pass; with
      ``epoch_steps`` so many batches, passes going on. All batches have one size; a smaller last one sits out. Under
      torch the training itself calls the iterable (a ``DataLoader``'s workers read ahead).

    Rows are checked when they are read. A broken one ends the training by its number, with the checkpoint of the last
    whole epoch in ``directory``. ``valid`` is held in memory.

    Args:
        program: a zoo program, or ``Program(model, guide)`` of either engine around the user's own.
        data: array ``(N, …)``, or a tuple of arrays passed to model and guide as arguments. Images are flattened for
            a zoo program. They need not fit into memory (see below).
        objective: bound, gradient and shape; ``ELBO()`` by default.
        epochs: passes over the data.
        batch_size: data a minibatch; larger than the data means all of it. The rest that does not fill a batch sits
            out, another one every epoch.
        epoch_steps: minibatches an epoch, where it is not to be a pass over the data: passes go on from one epoch to
            the next. For rows of the history, checkpoints and ``max_seconds`` at other distances.
        learning_rate: Adam's step size, or a function of the step.
        optimizer: :class:`~elbozoo.inference.optimizers.Adam`, an optax transformation (NumPyro), or a function from
            parameters to a torch optimizer (Pyro). Overrides ``learning_rate``.
        start: :class:`~elbozoo.inference.DataMean`, :class:`~elbozoo.inference.Collapsed`,
            :class:`~elbozoo.inference.Informative` or :class:`~elbozoo.inference.PPCA`: where to begin instead of at
            the initial weights. Its epochs come before those of ``epochs`` and are not in the history; the objective's
            schedule and the optimiser start after it.
        frozen: parameters that stay as they are, by the first parts of their names in ``run.weights``
            (``("encoder", "decoder.layers.0")``); a start's phase trains them.
        seed: fixes order and noise, and the initial weights of a zoo program and of param statements (modules of the
            user's own start as they are).
        valid: held-out data, on which the bound is computed every epoch.
        binarize: for grey pixels under a Bernoulli: "stochastic" redraws every pixel at every step with the pixel as
            mean; "static" draws once, the same whatever the seed; "threshold" cuts at ½.
        replicates: train this many seeds (``seed``, ``seed + 1``, …); the result is a list of runs. On JAX they are
            one compiled program, in which they take turns on a CPU and go side by side on an accelerator.
        early_stopping: stop when the held-out bound has not risen for this many epochs (needs ``valid``; not with
            replicates).
        max_seconds: stop after the epoch in which the epochs have taken so long (the first one compiles): for comparing
            at equal time. With ``resume``, of all its parts together; of replicates, on torch each for itself.
        directory: write config, weights, history and a checkpoint here, each file whole or not at all.
        resume: go on from the checkpoint in ``directory`` (to more ``epochs``, if asked), bit for bit as if never
            stopped. Without a checkpoint, start. Other data are told by a checksum; of data not in memory by one of
            shape, type and sixteen rows, of an iterable by the shapes of its batches. A resumed iterable begins a pass:
            bit for bit where every pass is the same and an epoch is a pass.
        checkpoint_every: epochs between checkpoints; the last epoch always has one.
        device: "cpu", "gpu", …; when None, where the weights of a Pyro program are, else the library's default.
        devices: train one model on so many devices, each with its share of every minibatch (``batch_size`` is of all
            together, and a multiple). On JAX they are devices of this process. On torch each is a process of its own,
            started by ``torchrun --nproc-per-node n script.py``, and all call ``fit`` alike; the first one writes the
            files (of ``resume`` all must see them), and ``live_<site>`` is the mean of the shares' counts.
        progress: show a bar.

    Returns: a :class:`Run`, or a list of them with ``replicates``.

    Units: every figure of the history is nats per datum.

    Raises:
        InvalidArgument: bad settings, device or data, before anything is written; a program that cannot be trained on
            minibatches.
        Refused: the objective has no right gradient on this program.
        NonFinite: a bound or gradient went non-finite; carries the site, the step and the run with the last good state.
        CorruptFile: the checkpoint is unreadable.
        WriteFailed: the folder is not writable, or the disk full (earlier files are intact; resume when there is room).
    """
    objective = ELBO() if objective is None else objective
    if max_seconds is not None:
        positive("max_seconds", max_seconds)
    if epoch_steps is not None:
        whole_number("epoch_steps", epoch_steps)
    _check_settings(
        program,
        objective,
        epochs,
        batch_size,
        seed,
        binarize,
        replicates,
        early_stopping,
        valid,
        checkpoint_every,
        resume,
        directory,
        start,
    )
    optimizer = Adam(learning_rate) if optimizer is None else optimizer
    source = source_of(program, data, batch_size, binarize)
    _check_devices(devices, source, program, replicates)
    _check_source(source, epochs, epoch_steps, replicates, start, objective, valid)
    held_out = None if valid is None else prepare(program, valid, binarize)
    steps = epoch_steps or source.steps
    shaped = objective.in_steps(steps) if isinstance(objective, Shape) and steps else objective
    _warn_long_warmup(shaped, epochs * steps if steps else math.inf)

    config = {
        "engine": program.engine,
        "spec": None if program.spec is None else program.spec.to_config(),
        "objective": to_config(objective),
        "optimizer": to_config(optimizer),
        "start": to_config(start),
        "frozen": list(frozen),
        "epochs": epochs,
        "batch_size": source.batch_size if isinstance(source, Passes) else batch_size,
        "epoch_steps": epoch_steps,
        "seed": seed,
        "binarize": binarize,
        "num_data": None if math.isinf(source.num_data) else source.num_data,
        "replicates": replicates,
        "device": device,
        "devices": devices,
        "versions": environment(program.engine),
    }
    if directory is not None:
        _check_directory(Path(directory), resume)
        # to know the data again on resuming
        config |= {"data": source.checksum(), "valid": None if held_out is None else storage.checksum(held_out)}
    if replicates is not None and program.engine == "pyro":  # torch has no vmap over whole programs: one after another
        importlib.import_module("elbozoo.inference.pyro_trainer").check_copies(program, source.example)
        where = [None if directory is None else Path(directory) / f"replicate-{r}" for r in range(replicates)]
        return [
            fit(
                program,
                data,
                objective=objective,
                epochs=epochs,
                batch_size=batch_size,
                epoch_steps=epoch_steps,
                optimizer=optimizer,
                start=start,
                frozen=frozen,
                seed=seed + r,
                valid=valid,
                binarize=binarize,
                max_seconds=max_seconds,
                directory=where[r],
                resume=resume,
                checkpoint_every=checkpoint_every,
                device=device,
                progress=progress,
            )
            for r in range(replicates)
        ]
    if devices in (None, 1) or program.engine == "numpyro":
        together = contextlib.nullcontext(0)
    else:
        together = importlib.import_module("elbozoo.inference.pyro_devices").group(devices, device)
    with together as rank:
        seeds = [seed + r for r in range(replicates or 1)]
        trainer_class = importlib.import_module(f"elbozoo.inference.{program.engine}_trainer").Trainer
        settings = {"batch_size": source.batch_size, "num_data": source.num_data, "seeds": seeds, "device": device}
        settings |= {"devices": devices or 1}
        settings |= {"redraw_pixels": binarize == "stochastic"}
        make = partial(trainer_class, optimizer=optimizer, data=source.example, **settings)
        data = source.drawn if isinstance(source, InMemory) else source.example
        trainer = make(program, shaped, frozen=tuple(frozen))
        weights = None if start is None else start.weights(program, data[0])
        if weights is not None:
            trainer.begin_at(weights)
        checkpoint = None if directory is None else Path(directory) / CHECKPOINT
        directory, progress = (None, False) if rank else (directory, progress)  # the first process's alone
        loop = _Loop(trainer, source, objective, config, seeds, None if directory is None else Path(directory))
        if resume and checkpoint is not None and checkpoint.exists():
            loop.resume(checkpoint, epochs)
        elif start is not None and weights is None:
            _run_phase(start, make(*start.phase(program, objective, data[0])), loop, progress)
        del data
        if isinstance(source, InMemory):
            del source.drawn  # redrawn pixels would stay in memory twice

        def stopped() -> bool:
            rows = loop.rows[0]
            out_of_time = max_seconds is not None and sum(row["seconds"] for row in rows) >= max_seconds
            return (
                loop.epoch >= epochs or out_of_time or (early_stopping is not None and _stalled(rows, early_stopping))
            )

        with _bar(progress, epochs, loop) as tick:
            while not stopped():
                loop.run_epoch()
                if held_out is not None:
                    for rows, value in zip(
                        loop.rows, trainer.held_out(held_out, min(batch_size, len(held_out[0]))), strict=True
                    ):
                        rows[-1]["valid_bound"] = trainer.same(float(value))
                tick()
                if directory is not None and (stopped() or loop.epoch % checkpoint_every == 0):
                    loop.checkpoint()
        runs = loop.runs()
        if directory is not None:
            for r, run in enumerate(runs):
                run.save(Path(directory) if replicates is None else Path(directory) / f"replicate-{r}")
        return runs[0] if replicates is None else runs


def _run_phase(start: Start, trainer: Any, loop: _Loop, progress: bool) -> None:
    """Train the phase of a start from the initial parameters of ``loop``, and hand the trained ones over to it."""
    trainer.adopt(loop.trainer)
    phase = _Loop(trainer, loop.source, loop.objective, loop.config, loop.seeds, None, first=_PHASE)
    with _bar(progress, start.epochs, phase, "start") as tick:
        while phase.epoch < start.epochs:
            phase.run_epoch()
            tick()
    loop.trainer.adopt(trainer)
    loop.phase = [{n: v for n, v in rows[-1].items() if n != "seconds"} for rows in phase.rows]


NORM_EVERY = 10
"""Steps from one measured norm of the gradient to the next, where measuring takes time."""


class _Loop:
    """A training in progress: trainer, rows of history, epoch; what a checkpoint holds.

    ``first`` is the epoch from which the order of the minibatches is counted: 0 but in a starting phase.
    """

    def __init__(
        self,
        trainer: Any,
        source: InMemory | Rows | Passes,
        objective: Objective,
        config: dict[str, Any],
        seeds: list[int],
        directory: Path | None,
        first: int = 0,
    ):
        self.trainer, self.objective, self.config, self.seeds, self.directory = (
            trainer,
            objective,
            config,
            seeds,
            directory,
        )
        self.source = source
        steps = config.get("epoch_steps") or source.steps
        # torch has the norm at once, and stops at the step: there it is measured at each whatever this says
        trainer.norm_every = NORM_EVERY if steps is not None and steps >= NORM_EVERY else 1
        self.first, self.epoch, self.rows = first, 0, [[] for _ in seeds]
        self.phase: list[dict[str, float | int] | None] = [None for _ in seeds]

    @property
    def steps(self) -> int:
        """Steps taken in the finished epochs."""
        return int(self.rows[0][-1]["step"]) if self.rows[0] else 0

    def run_epoch(self) -> None:
        start, before, found = time.perf_counter(), self.trainer.snapshot(), []
        chunks = self.source.epoch(self.seeds, self.first, self.epoch, self.config.get("epoch_steps"), self.trainer.put)
        try:
            with contextlib.closing(chunks):
                for data, order in chunks:
                    if data is not None:
                        self.trainer.data = data
                    done = sum(m["bound"].shape[1] for m in found)
                    found.append(self._run_chunk(order, done, self.trainer.snapshot() if found else before))
        except NonFinite:
            raise
        except Exception:  # the data cannot be read: what was trained until this epoch is kept
            self.trainer.take(before)
            if self.directory is not None and self.epoch:
                with contextlib.suppress(storage.WriteFailed):
                    self.checkpoint()
            raise
        metrics = {n: np.concatenate([m[n] for m in found], axis=1) for n in found[0]}
        step = self.steps + metrics["bound"].shape[1]
        self.epoch += 1
        seconds = self.trainer.same(time.perf_counter() - start)
        for r, rows in enumerate(self.rows):
            row = {n: float(v[r].mean(where=(n != "grad_norm") | (v[r] >= 0))) for n, v in metrics.items()}
            for name in ("beta", "capacity"):  # a schedule's value where the epoch ends
                if name in metrics:
                    row[name] = float(metrics[name][r, -1])
            rows.append({"epoch": self.epoch, "step": step, **row, "seconds": seconds})

    def _run_chunk(self, order: np.ndarray, done: int, before: Any) -> dict[str, np.ndarray]:
        """Metrics ``(replicates, steps)``; ``done`` steps of the epoch come before, and led to the state ``before``."""
        metrics = self.trainer.epoch(order)
        bad = ~(np.isfinite(metrics["bound"]) & np.isfinite(metrics["grad_norm"])).all(axis=0)
        if bad.any() or self.trainer.bad_parameter():
            self._stop(before, order, int(np.argmax(bad)) if bad.any() else order.shape[1], done)
        return metrics

    def _stop(self, before: Any, order: np.ndarray, bad_step: int, done: int) -> None:
        site, within, replicate = rewind(self.trainer, before, order, bad_step)
        step = self.steps + done + within
        run = None if self.trainer.bad_parameter() else self.runs()[replicate]
        where = (
            "there is no good state: the initial parameters are not finite"
            if run is None
            else "the last good state is in error.run"
        )
        if run is not None and self.directory is not None:
            try:
                where += f" and in {run.save(self.directory / 'last-good')}"
            except storage.WriteFailed as error:
                where += f" (not on disk: {error})"
        seed = f", seed {self.seeds[replicate]}" if len(self.seeds) > 1 else ""
        seed += " of the starting phase" if self.first else ""
        raise NonFinite(
            f"site '{site}' must stay finite while training; got a non-finite value at step {step} "
            f"(epoch {self.epoch + 1}{seed}). "
            f"Lower the learning rate, clip gradients with Adam(clip_norm=…), or bound the scale; {where.rstrip('.')}.",
            site,
            step,
            run,
        )

    def runs(self) -> list[Run]:
        return [
            Run(program, self.objective, rows, {**self.config, "seed": seed, "phase": phase})
            for program, rows, seed, phase in zip(
                self.trainer.programs(), self.rows, self.seeds, self.phase, strict=True
            )
        ]

    @property
    def _settings(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the run that was stopped."""
        return json.loads(
            json.dumps({k: v for k, v in self.config.items() if k not in ("epochs", "versions", "device")})
        )

    def checkpoint(self) -> None:
        """State, history and settings in one file, so that they cannot disagree."""
        assert self.directory is not None
        notes = {"epoch": self.epoch, "rows": self.rows, "phase": self.phase, "settings": self._settings}
        storage.save_arrays(self.directory / CHECKPOINT, self.trainer.arrays(), notes)

    def resume(self, checkpoint: Path, epochs: int) -> None:
        arrays, notes = storage.load_arrays(checkpoint)
        if "settings" not in notes:
            raise must(
                str(checkpoint),
                "be a checkpoint of this library",
                "a file without settings",
                "Choose another directory",
                CorruptFile,
            )
        changed = [k for k, v in self._settings.items() if notes["settings"].get(k) != v]
        if changed:
            raise must(
                "settings",
                "equal those of the run to resume",
                f"different {', '.join(changed)}",
                "Resume with the same settings (epochs may grow), or start in another directory",
            )
        if notes["epoch"] > epochs:
            raise must(
                "epochs",
                f"be at least the {notes['epoch']} of the checkpoint",
                epochs,
                "Ask for more, or start in another directory",
            )
        self.trainer.restore(arrays)
        self.epoch, self.rows = notes["epoch"], notes["rows"]
        self.phase = notes.get("phase", self.phase)


def _check_settings(
    program: Any,
    objective: Any,
    epochs: Any,
    batch_size: Any,
    seed: Any,
    binarize: Any,
    replicates: Any,
    early_stopping: Any,
    valid: Any,
    checkpoint_every: Any,
    resume: Any,
    directory: Any,
    start: Any,
) -> None:
    if getattr(program, "engine", None) not in ("pyro", "numpyro"):
        raise must(
            "program",
            "be a zoo program, or a Program around your own model and guide",
            type(program).__name__,
            "Write VAE(…).numpyro(), or elbozoo.inference.numpyro_engine.Program(model, guide)",
        )
    if not isinstance(objective, Objective):
        raise must("objective", "be an objective", repr(objective), "Write objective=IWAE(num_particles=50), say")
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        whole_number(name, value)
    whole_number("seed", seed, 0)
    if seed >= 2**31:
        raise must("seed", "be below 2**31", seed, "Pass a smaller one; it fits both engines")
    for name, value in (("replicates", replicates), ("early_stopping", early_stopping)):
        if value is not None:
            whole_number(name, value)
    one_of("binarize", binarize, get_args(Binarize))
    if start is not None:
        instance_of("start", start, Start)
    if early_stopping is not None and (valid is None or replicates is not None):
        raise must(
            "early_stopping",
            "go with held-out data and one replicate",
            f"valid={'given' if valid is not None else None}, replicates={replicates}",
            "Pass valid=…, and replicates=None",
        )
    if resume and directory is None:
        raise must("directory", "be given to resume", "None", "Pass the directory of the run to go on with")


def _check_devices(devices: int | None, source: InMemory | Rows | Passes, program: Any, replicates: int | None) -> None:
    """Refuse what several devices cannot share."""
    if devices is None:
        return
    whole_number("devices", devices)
    if devices == 1:
        return
    if source.batch_size % devices:
        todo = f"Pass a batch_size that is a multiple of {devices}"
        raise must("batch_size", f"be a multiple of devices={devices}", source.batch_size, todo)
    if replicates is not None:
        raise must("replicates", "be None on several devices", replicates, "Call fit for every seed")
    if isinstance(source, Passes) and program.engine == "pyro":
        todo = "Pass arrays, memory-mapped ones say, of which each process takes its share"
        raise must("data", "be rows of arrays on several devices", "an iterable, whose order is its own", todo)


def _check_source(
    source: InMemory | Rows | Passes,
    epochs: int,
    epoch_steps: int | None,
    replicates: int | None,
    start: Start | None,
    objective: Objective,
    valid: Any,
) -> None:
    """Refuse what data that are not in memory cannot serve."""
    if valid is not None and is_stream(valid):
        todo = "Pass arrays: some of the held-out data will do"
        raise must("valid", "fit into memory", f"an iterable ({type(valid).__name__})", todo)
    if start is not None and start.reads_data and not isinstance(source, InMemory):
        todo = "Start on some of the data in memory, and pass the run's program on: fit(run.program, data)"
        raise must("data", f"be in memory for {type(start).__name__}, which looks at all of them", "a stream", todo)
    if not isinstance(source, Passes):
        return
    source.check(epochs + (start.epochs if start else 0) if epoch_steps is None else 1, replicates)
    if source.steps is None and epoch_steps is None and _counts_epochs(objective):
        todo = "Pass epoch_steps, or unit='steps' in the shape"
        raise must("data", "have a length for a schedule in epochs", "an iterable without len()", todo)


def _counts_epochs(objective: Objective) -> bool:
    """Whether the length of a schedule is in epochs."""
    return isinstance(objective, Shape) and (
        getattr(objective, "unit", "steps") == "epochs" or _counts_epochs(objective.objective)
    )


def _check_directory(directory: Path, resume: bool) -> None:
    """Refuse to write over an earlier run, and find out now whether the directory can be written to."""
    if not resume and any((directory / name).exists() for name in (CHECKPOINT, WEIGHTS, "replicate-0")):
        raise must(
            "directory",
            "hold no earlier run",
            str(directory),
            "Pass resume=True to go on with it, or another directory",
        )
    storage.check_writable(directory)


def _warn_long_warmup(objective: Objective, steps: float) -> None:
    while isinstance(objective, Shape):
        length = getattr(objective, "total", getattr(objective, "warmup", 0))
        if length > steps:
            warnings.warn(
                f"{type(objective).__name__}: the warm-up of {length:g} steps is longer than the run of {steps} steps, "
                "so training ends on another objective than the reported bound. Shorten the warm-up or train longer.",
                stacklevel=3,
            )
        objective = objective.objective


def _stalled(rows: list[dict[str, float | int]], patience: int) -> bool:
    bounds = np.nan_to_num([r["valid_bound"] for r in rows], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return len(bounds) > 0 and len(bounds) - 1 - int(np.argmax(bounds)) >= patience


class _bar:
    """A progress bar over epochs with the latest bound."""

    def __init__(self, show: bool, epochs: int, loop: _Loop, name: str = "epochs"):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self.progress, self.epochs, self.loop, self.name = Progress(*columns, disable=not show), epochs, loop, name

    def __enter__(self) -> Callable[[], None]:
        self.progress.start()
        self.task = self.progress.add_task(
            self.name, total=self.epochs, completed=self.loop.epoch, note="compiling" if self.loop.epoch == 0 else ""
        )
        return self.tick

    def tick(self) -> None:
        rows = [r[-1] for r in self.loop.rows]
        note = f"bound {np.mean([r['bound'] for r in rows]):.2f} nats"
        if "valid_bound" in rows[0]:
            note += f", held out {np.mean([r['valid_bound'] for r in rows]):.2f}"
        self.progress.update(self.task, completed=self.loop.epoch, note=note)

    def __exit__(self, *exc: Any) -> None:
        self.progress.stop()
