"""The command line: train, evaluate, diagnose, compare, report, bench, list, demo.

The options are the fields of dataclasses, those of the models, objectives, gradients and shapes among them
(:mod:`elbozoo.options`); their help is the docstrings'.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import shlex
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elbozoo import options
from elbozoo._version import __version__
from elbozoo.benchmarks import datasets, estimators
from elbozoo.guides import Family
from elbozoo.inference import (
    ELBO,
    IWAE,
    Adam,
    AnnealedKL,
    ElbozooError,
    FreeBits,
    Objective,
    Run,
    Start,
    diagnose,
    fit,
    storage,
)
from elbozoo.inference.data import Binarize
from elbozoo.inference.errors import CorruptFile, must
from elbozoo.inference.evaluation import Evaluation, PerDatum, evaluate
from elbozoo.inference.parts import one_of, whole_number
from elbozoo.inference.training import CHECKPOINT, WEIGHTS
from elbozoo.zoo import (
    MLP,
    VAE,
    Bernoulli,
    Denoiser,
    EndLikelihood,
    Likelihood,
    Network,
    Prior,
    Quantizer,
    Schedule,
    Spec,
)

out = Console(highlight=False)


def say(text: str) -> None:
    out.print(text, markup=False, soft_wrap=True)


# --- data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """Images to train on and images to evaluate on, flat, with what they settle about a model."""

    name: str
    train: np.ndarray
    test: np.ndarray
    facts: Mapping[str, Any]
    labels: np.ndarray | None = None
    """Of the images to evaluate on, where they have any."""

    @classmethod
    def read(cls, name: str, data_dir: Path | None = None, split: str = "test") -> Data:
        """A data set by name, or an .npy file, all of whose rows are for training and for evaluation."""
        if not name.endswith(".npy"):
            one_of("--data", name, datasets.NAMES)
            found = datasets.load(name, split=split, data_dir=data_dir)
            facts = {"data_dim": found.train.shape[1], "image_shape": (1, *found.image_shape), "levels": found.levels}
            return cls(name, found.train, found.test, facts, found.test_labels)
        path = Path(name).expanduser().resolve()
        array = datasets.load_array(path)
        if array.ndim < 2 or not array.size:
            raise must(
                str(path), "hold data as rows of an array", f"shape {array.shape}", "Save shape (N, D) or (N, H, W)"
            )
        flat = array.reshape(len(array), -1)
        facts: dict[str, Any] = {"data_dim": flat.shape[1]}
        if array.ndim == 3:
            facts["image_shape"] = (1, *array.shape[1:])
        return cls(str(path), flat, flat, facts)


def left_out(metavar: str) -> Any:
    """How the help shows an option whose default is None: what that means is in its text."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


DATA = "{" + ",".join(datasets.NAMES) + "}|FILE.npy"
STARTS = "{" + ",".join(options.choices(Start)) + "}"
BINARIZATIONS = "{" + ",".join(get_args(Binarize)) + "}"


# --- train ------------------------------------------------------------------------------------------------------


PASSED_ON = (
    "epochs",
    "batch_size",
    "seed",
    "replicates",
    "early_stopping",
    "epoch_steps",
    "max_seconds",
    "frozen",
    "resume",
    "checkpoint_every",
    "device",
    "devices",
    "progress",
)
"""Options that ``fit`` has under the same names."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model and write its run folder.

    Args:
        data: a data set by name, or an .npy file with one datum a row (all of them are trained on).
        data_dir: folder with the data sets' files; else ELBOZOO_DATA, else a cache into which they are fetched.
        valid: held-out data for a bound after every epoch: validation (the end of a named data set's training images,
            which are then not trained on) or an .npy file.
        engine: numpyro (JAX) or pyro (PyTorch); the one that is installed, numpyro where both are.
        epochs: passes over the data.
        batch_size: data a minibatch.
        start_from: where training begins instead of at random weights, to see whether the objective gets out of a bad
            minimum: collapsed (the guide is the prior, the latents carry nothing), informative (an autoencoder, whose
            latents are all but free of charge) or ppca (probabilistic PCA, for vae and linear-vae); or to keep out of
            one: data-mean (the output's bias at the data's mean) or first-stage (of a latent-diffusion).
        start_epochs: passes over the data, before the others, that bring it there (with --start-from; default: 5).
        seed: fixes initial weights, order and noise.
        binarize: how grey pixels become the zeros and ones of a Bernoulli likelihood: stochastic redraws them at every
            step, static draws them once, threshold cuts at one half. Left out: stochastic for grey pixels under a
            Bernoulli, none otherwise.
        replicates: train this many seeds (on JAX at once), each into a folder replicate-<r>.
        epoch_steps: minibatches an epoch, where it is not to be a pass over the data.
        frozen: beginnings of the names of weights that stay as they are (encoder decoder, say).
        max_seconds: stop after the epoch in which the training has taken so long.
        early_stopping: stop when the held-out bound has not risen for this many epochs (needs --valid).
        out: the run folder; runs/<model>-<data>-<objective>-<shapes> if left out.
        resume: go on from the checkpoint in the run folder, bit for bit as if never stopped; start where there is none.
        checkpoint_every: epochs between checkpoints.
        device: cpu, gpu, cuda, …; the library's default if left out.
        devices: train on so many devices, each with its share of every minibatch (numpyro; for pyro, start elbozoo by
            torchrun with as many processes).
        progress: show a progress bar.
    """

    spec_class: ClassVar[type[Spec]]
    data: Annotated[str, tyro.conf.arg(metavar=DATA)] = "digits"
    data_dir: Annotated[Path | None, left_out("FOLDER")] = None
    valid: Annotated[str | None, left_out("validation|FILE.npy")] = None
    engine: Literal["numpyro", "pyro"] = "numpyro" if find_spec("numpyro") or not find_spec("pyro") else "pyro"
    epochs: int = 10
    batch_size: int = 128
    start_from: Annotated[str | None, left_out(STARTS)] = None
    start_epochs: Annotated[int | None, left_out("INT")] = None
    seed: int = 0
    binarize: Annotated[Binarize | None, left_out(BINARIZATIONS)] = None
    replicates: Annotated[int | None, left_out("INT")] = None
    epoch_steps: Annotated[int | None, left_out("INT")] = None
    frozen: tuple[str, ...] = ()
    max_seconds: Annotated[float | None, left_out("FLOAT")] = None
    early_stopping: Annotated[int | None, left_out("INT")] = None
    out: Annotated[Path | None, left_out("FOLDER")] = None
    resume: bool = False
    checkpoint_every: int = 1
    device: Annotated[str | None, left_out("NAME")] = None
    devices: Annotated[int | None, left_out("INT")] = None
    progress: bool = True

    def __call__(self, command: str) -> None:
        groups = [getattr(self, name) for name in ("model", "objective", "optimizer")]
        given = {f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)}
        data = Data.read(self.data, self.data_dir, "validation" if self.valid == "validation" else "test")
        if self.valid == "validation" and data.name.endswith(".npy"):
            todo = "Put the held-out rows in a file of their own and pass --valid FILE.npy"
            raise must("--valid", "be a file for data of your own", "validation", todo)
        spec, objective, optimizer = options.assemble(self.spec_class, given, data.facts)
        start = self.chosen_start()
        names = [options.command_name(type(spec)), Path(self.data).stem, given["objective"], *given["shape"]]
        names += [self.start_from] if self.start_from else []
        folder = self.out or Path("runs") / "-".join(names)
        if not self.resume and any((folder / name).exists() for name in (CHECKPOINT, WEIGHTS)):
            todo = "Add --resume to go on with it, or give another --out"
            raise must("--out", "be a folder without an earlier run", folder, todo)
        binarize = self.binarize or binarization(spec, data.train)
        valid = None if self.valid is None else data.test if self.valid == "validation" else Data.read(self.valid).test

        say(f"{names[0]} on {len(data.train)} data of {self.data}, in {self.engine}, into {folder}")
        if binarize != "none":
            say(f"Grey pixels become zeros and ones: --binarize {binarize}.")
        try:
            found = fit(
                getattr(spec, self.engine)(),
                data.train,
                objective=objective,
                optimizer=optimizer,
                start=start,
                valid=valid,
                binarize=binarize,
                directory=folder,
                **{name: getattr(self, name) for name in PASSED_ON},
            )
        except KeyboardInterrupt:
            raise Interrupted(folder, command) from None
        runs = found if isinstance(found, list) else [found]
        for r, run in enumerate(runs):
            place = folder / f"replicate-{r}" if self.replicates else folder
            record(run, data, command).save(place)
            last = run.history[-1]
            figures = ", ".join(f"{name} {last[name]:.2f}" for name in ("bound", "rate", "distortion"))
            say(f"{place}: {figures} nats in epoch {last['epoch']}. Next: elbozoo evaluate {shlex.quote(str(place))}")

    def chosen_start(self) -> Start | None:
        """The start that the options ask for. Raises: InvalidArgument for an unknown one, or for its epochs alone."""
        if self.start_from is not None:
            given = {} if self.start_epochs is None else {"epochs": self.start_epochs}
            return options.choose("start-from", Start, self.start_from)(**given)
        if self.start_epochs is not None:
            todo = f"Add --start-from {STARTS}, or leave it out"
            raise must("--start-epochs", "go with --start-from", "no --start-from", todo)
        return None


def record(run: Run, data: Data, command: str) -> Run:
    """Note in a run's config what ``fit`` cannot know."""
    run.config |= {"dataset": data.name, "image_shape": data.facts.get("image_shape"), "command": command}
    return run


class Interrupted(Exception):
    """Ctrl-C while training."""

    def __init__(self, folder: Path, command: str):
        found = any(folder.rglob(CHECKPOINT))
        saved = f"the last checkpoint is in {folder}" if found else "there is no checkpoint yet"
        command = command if "--resume" in command else f"{command} --resume"
        super().__init__(f"{saved}; go on with: {command}")


def binarization(spec: Spec, x: np.ndarray) -> Binarize:
    """What grey pixels need: "stochastic" under a Bernoulli likelihood, else "none"."""
    grey = isinstance(getattr(spec, "likelihood", None), Bernoulli) and not np.isin(x, (0, 1)).all()
    return "stochastic" if grey else "none"


@cache
def objective_options(gradient: str) -> type:
    """Everything that an objective can be made of, with the name of the estimator that is the default."""
    names = {"objective": "elbo", "gradient": gradient, "shape": ""}
    kinds = {o: (kind, names[o]) for o, kind in options.OBJECTIVE.items()}
    about = "What is maximised. A setting in [brackets] goes with the choice it names."
    return options.group("Objective", about, kinds, ())


@cache
def optimizer_options() -> type:
    """The settings of Adam."""
    return options.group("Optimizer", options.summary(Adam), {}, (Adam,))


@cache
def train_command(spec: type[Spec]) -> type[Train]:
    """``Train`` with the options of one model, and of everything that an objective can be made of."""
    defaults = {f.name: f.default_factory for f in dataclasses.fields(spec) if callable(f.default_factory)}
    pieces = {o: (kind, options.command_name(type(defaults[o]()))) for o, kind in options.nested(spec).items()}
    groups = {
        "model": options.group("Model", options.summary(spec), pieces, (spec,)),
        "objective": objective_options(spec.fitting_gradient),
        "optimizer": optimizer_options(),
    }
    rows = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in groups.items()]
    made = dataclasses.make_dataclass(
        f"Train{spec.__name__}", rows, bases=(Train,), namespace={"spec_class": spec}, frozen=True, kw_only=True
    )
    made.__doc__ = options.summary(spec)
    return made


# --- evaluate, compare, report ------------------------------------------------------------------------------------

DRAWN = 40
"""Data in a run's netCDF file: with its default number of draws they make one call, which is compiled once."""

Folder = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
Folders = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]]


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """On what, and how finely, runs are measured.

    Args:
        data: a data set by name (its test images) or an .npy file; what each run was trained on if left out.
        data_dir: folder with the data sets' files; else ELBOZOO_DATA, else a cache into which they are fetched.
        num_particles: importance samples a datum, K of the NLL.
        num_data: measure on the first so many data only.
        seed: fixes the draws.
    """

    data: Annotated[str | None, left_out(DATA)] = None
    data_dir: Annotated[Path | None, left_out("FOLDER")] = None
    num_particles: int = 1000
    num_data: Annotated[int | None, left_out("INT")] = None
    seed: int = 0

    def measure(self, runs: Mapping[Path, Run]) -> Measured:
        """Evaluate the runs of some folders; what was measured before in the same way is read from the folder."""
        if self.num_data is not None:
            whole_number("--num-data", self.num_data)
        found = Measured({}, {}, {}, {})
        for folder, run in runs.items():
            name = dataset_of(run, self.data)
            if name == run.config.get("dataset") and name.endswith(".npy"):
                say(f"{folder}: measured on its training data; --data takes another file.")
            images = Data.read(name, self.data_dir).test[: self.num_data]
            x = run.prepare(images)
            names = [f.resolve().name for f in runs]
            label = folder.resolve().name if names.count(folder.resolve().name) == 1 else str(folder)
            found.runs[label], found.images[label] = run, images
            found.digests[label] = storage.checksum(x)
            found.evaluations[label] = self._evaluate(run, folder, x, found.digests[label], Path(name).stem)
        return found

    def _evaluate(self, run: Run, folder: Path, x: tuple, digest: str, data: str) -> Evaluation:
        path = folder / f"evaluation-{data}-{self.num_particles}.safetensors"
        weights = storage.checksum(run.weights.values())
        key = {"weights": weights, "data": digest, "num_particles": self.num_particles, "seed": self.seed}
        key["elbozoo"] = __version__
        if path.exists():
            try:
                arrays, notes = storage.load_arrays(path)
                if notes.get("key") == key:
                    return unpack(arrays, notes)
            except CorruptFile:  # no loss: it is computed anew
                pass
        found = evaluate(run.program, x, num_particles=self.num_particles, seed=self.seed, progress=out.is_terminal)
        arrays, scalars = pack(found)
        storage.save_arrays(path, arrays, {"key": key, **scalars})
        return found


@dataclass(frozen=True, eq=False)
class Measured:
    """Runs by label, each with its evaluation and the data as they were before binarisation."""

    runs: dict[str, Run]
    evaluations: dict[str, Evaluation]
    images: dict[str, np.ndarray]
    digests: dict[str, str]
    """By label, the hash of the data as the model saw them."""

    @property
    def paired(self) -> bool:
        """Whether all were evaluated on one and the same array."""
        return len(set(self.digests.values())) == 1

    def show(self) -> None:
        """Print the table of all runs."""
        from elbozoo.report import caption, results

        rows = results(self.runs, self.evaluations, self.paired)
        table = Table(box=SIMPLE_HEAD, padding=0)
        for i, column in enumerate(rows[0]):
            header = "\n".join(textwrap.wrap(column, 10))
            table.add_column(header, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        out.print(table)
        out.print(caption(self.evaluations, self.paired), markup=False)


def load(folders: Sequence[Path]) -> dict[Path, Run]:
    """The runs of some folders."""
    if not folders:
        raise must("RUN", "be given", "none", "Name one run folder or more")
    return {folder: Run.load(folder) for folder in dict.fromkeys(folders)}


def pack(evaluation: Evaluation) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An evaluation as arrays and plain values."""
    arrays, scalars = {}, {}
    for field in dataclasses.fields(evaluation):
        value = getattr(evaluation, field.name)
        if isinstance(value, PerDatum):
            arrays |= {f"per_datum/{n}": a for n, a in vars(value).items()}
        elif field.name in ("rate_per_dimension", "activity"):
            arrays |= {f"{field.name}/{n}": a for n, a in value.items()}
        else:
            scalars[field.name] = value
    return arrays, scalars


def unpack(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> Evaluation:
    """What ``pack`` packed."""
    groups: dict[str, dict[str, np.ndarray]] = {"per_datum": {}, "rate_per_dimension": {}, "activity": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    scalars = {n: v for n, v in notes.items() if n != "key"}
    return Evaluation(**scalars, **{**groups, "per_datum": PerDatum(**groups["per_datum"])})


@dataclass(frozen=True, kw_only=True)
class Evaluate(Measuring):
    """Measure a run: NLL by importance sampling, rate, distortion, active units.

    Args:
        run: a run folder.
        json: print the figures as JSON, for programs.
    """

    run: Folder
    json: bool = False

    def __call__(self, command: str) -> None:
        (found,) = self.measure(load([self.run])).evaluations.values()
        out.print_json(json.dumps(found.summary())) if self.json else out.print(found)


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say whether a run is stuck, and why: a verdict in words, with its figures and a page of pictures.

    Args:
        run: a run folder; or the folder of several replicates, which are compared, and the best diagnosed.
        data: a data set by name (its test images) or an .npy file; what the run was trained on if left out.
        data_dir: folder with the data sets' files; else ELBOZOO_DATA, else a cache into which they are fetched.
        num_particles: importance samples a datum, K of the NLL.
        num_data: diagnose on the first so many data only.
        num_gaps: data for the split of the bound's gap (each is optimised by itself); 0 to leave it out.
        num_simulations: simulated data for the guide's calibration; 0 to leave it out.
        seed: fixes the draws.
        out: folder for diagnosis.json and report.html (which has all that `elbozoo report` writes, and the diagnosis);
            the run folder if left out.
    """

    run: Folder
    data: Annotated[str | None, left_out(DATA)] = None
    data_dir: Annotated[Path | None, left_out("FOLDER")] = None
    num_particles: int = 1000
    num_data: int = 1000
    num_gaps: int = 50
    num_simulations: int = 500
    seed: int = 0
    out: Annotated[Path | None, left_out("FOLDER")] = None

    def __call__(self, command: str) -> None:
        from elbozoo.report import write_diagnosis

        whole_number("--num-data", self.num_data, 2)
        replicates = sorted(self.run.glob("replicate-*"), key=lambda p: (len(p.name), p.name))
        runs = load(replicates or [self.run])
        folder, run = next(iter(runs.items()))
        data = Data.read(dataset_of(run, self.data), self.data_dir)
        names = ("num_particles", "num_data", "num_gaps", "num_simulations", "seed")
        settings = {name: getattr(self, name) for name in names}
        images = data.test[: self.num_data]
        found = diagnose(run if len(runs) == 1 else list(runs.values()), images, **settings, progress=out.is_terminal)
        if found.minima is not None:
            folder, run = list(runs.items())[found.minima.best]
            say(f"The best of {len(runs)} replicates is {folder}.")
        out.print(found.evaluation)
        for sentence in found.verdict:
            lines = textwrap.fill(sentence, min(out.width, 100), initial_indent="• ", subsequent_indent="  ")
            out.print(lines, markup=False)
        place = self.out or self.run
        storage.save_json(place / "diagnosis.json", {"data": data.name, "settings": settings, **found.summary()})
        labels = None if data.labels is None else data.labels[: self.num_data]
        write_diagnosis(run, found, images, place / "report.html", label=folder.resolve().name, labels=labels)
        say(f"Figures: {place / 'diagnosis.json'}")
        say(f"Report: {place / 'report.html'}")


def dataset_of(run: Run, data: str | None) -> str:
    """The data to measure a run on: those asked for, else those that it was trained on."""
    name = data or run.config.get("dataset")
    if name is None:
        condition = "be given for a run that `elbozoo train` did not make"
        raise must("--data", condition, "nothing", f"Add --data {DATA}")
    return name


@dataclass(frozen=True, kw_only=True)
class Compare(Measuring):
    """Measure several runs and print one table.

    Args:
        runs: run folders; the first is what the others are held against.
    """

    runs: Folders = ()

    def __call__(self, command: str) -> None:
        self.measure(load(self.runs)).show()


@dataclass(frozen=True, kw_only=True)
class Report(Measuring):
    """Write one HTML page about one run or several, and for each its draws for ArviZ.

    Args:
        runs: run folders; the first is what the others are held against.
        out: the page; report.html in the first run's folder if left out.
        draws: posterior draws of each of the first forty data in each run's posterior.nc; 0 for no file.
    """

    runs: Folders = ()
    out: Annotated[Path | None, left_out("FILE.html")] = None
    draws: int = 100

    def __call__(self, command: str) -> None:
        self.write(self.measure(load(self.runs)))

    def write(self, measured: Measured) -> None:
        """Write what there is to write about runs that have been measured."""
        from elbozoo.report import write_report

        for folder, run, images in zip(
            dict.fromkeys(self.runs), measured.runs.values(), measured.images.values(), strict=True
        ):
            if self.draws:
                save_netcdf(run, images[:DRAWN], self.draws, folder / "posterior.nc")
        path = self.out or self.runs[0] / "report.html"
        write_report(measured.runs, measured.evaluations, measured.images, path, paired=measured.paired)
        say(f"Report: {path}")


def save_netcdf(run: Run, data: np.ndarray, num_draws: int, path: Path) -> None:
    """ArviZ's groups for some data, as netCDF, written whole or not at all.

    Of a diffusion there are a tenth of the draws: each is several times as large as its datum.
    """
    if run.program.outline(run.prepare(data[:1])).estimated:
        num_draws = -(-num_draws // 10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning)
        found = run.to_arviz(data, num_draws=num_draws)
    with tempfile.TemporaryDirectory() as folder:
        found.to_netcdf(Path(folder) / path.name, engine="h5netcdf")
        storage.write_atomically(path, (Path(folder) / path.name).read_bytes())


# --- bench ----------------------------------------------------------------------------------------------------------

Results = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RESULTS", help_behavior_hint="")]]


@dataclass(frozen=True, kw_only=True)
class BenchRun(estimators.Config):
    """Compare the objectives on this machine: where each lands, what it costs, how noisy its gradient is.

    On the models of the zoo, or with --program and --data FILE.npy on a program of your own. A finished cell is never
    measured twice: stop it and go on at any time.

    Args:
        cells: folder of the cells' files.
        results: JSON file to write; `elbozoo bench report` makes a page of it.
    """

    cells: Path = Path("runs/bench")
    results: Path = Path("runs/bench.json")

    def __call__(self, command: str) -> None:
        estimators.main(self)
        say(f"Figures: {self.results}. Next: elbozoo bench report {shlex.quote(str(self.results))}")


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Write one HTML page of benchmarks' result files: sortable tables, pictures, and each figure's record.

    Args:
        results: result files (JSON); those in benchmarks/results of the checkout if left out.
        out: the page.
        markdown: a file for the same tables in Markdown.
    """

    results: Results = ()
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.html")] = Path("benchmarks.html")
    markdown: Annotated[Path | None, left_out("FILE.md")] = None

    def __call__(self, command: str) -> None:
        from elbozoo import bench_report

        found = [bench_report.read(path) for path in self.results or bench_report.committed()]
        bench_report.write_report(found, self.out)
        say(f"Report: {self.out}")
        if self.markdown is not None:
            storage.write_atomically(self.markdown, bench_report.markdown(found).encode())
            say(f"Tables: {self.markdown}")


@dataclass(frozen=True, kw_only=True)
class BenchList:
    """Name benchmarks' result files, what each asks, and how many of its claims hold.

    Args:
        results: result files (JSON); those in benchmarks/results of the checkout if left out.
    """

    results: Results = ()

    def __call__(self, command: str) -> None:
        from elbozoo import bench_report

        table = Table(box=None, pad_edge=False, show_header=False)
        for found in [bench_report.read(path) for path in self.results or bench_report.committed()]:
            checks = list(found.content.get("checks", {}).values())
            held = f"{sum(checks)} of {len(checks)} hold" if checks else ""
            table.add_row(*map(escape, (found.name, held, found.content["question"])))
        out.print(table)


class Bench:
    """Compare the objectives on this machine, on a model of the zoo or on a program of your own."""


BENCH: dict[str, type] = {"run": BenchRun, "report": BenchReport, "list": BenchList}
"""The commands of ``elbozoo bench``."""


# --- list, demo ---------------------------------------------------------------------------------------------------

KINDS = {"models": Spec, "networks": Network, "likelihoods": Likelihood, "guides": Family, "priors": Prior}
KINDS |= {"denoisers": Denoiser, "schedules": Schedule, "ends": EndLikelihood}
KINDS |= (
    {"quantizers": Quantizer} | {f"{option}s": kind for option, kind in options.OBJECTIVE.items()} | {"starts": Start}
)


@dataclass(frozen=True, kw_only=True)
class List:
    """Name the models and their parts, objectives, gradients, shapes and starts, with a line each."""

    def __call__(self, command: str) -> None:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        for title, kind in KINDS.items():
            table.add_row(f"[bold]{title}[/bold]")
            for name, cls in options.choices(kind).items():
                table.add_row(f"  {name}", escape(options.summary(cls)))
        out.print(table)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small VAE on handwritten digits under four objectives, and hold them against one another.

    Args:
        out: folder for the four runs and the report.
        engine: numpyro (JAX) or pyro (PyTorch).
        epochs: passes over the data.
        num_particles: importance samples a datum, K of the NLL.
        seed: fixes everything random.
    """

    out: Path = Path("runs/demo")
    engine: Literal["numpyro", "pyro"] = "numpyro"
    epochs: int = 200
    num_particles: int = 1000
    seed: int = 0

    def __call__(self, command: str) -> None:
        data = Data.read("digits")
        spec = VAE(data.facts["data_dim"], latent_dim=16, network=MLP(hidden=(100, 100)))
        objectives: dict[str, Objective] = {
            "elbo": ELBO(),
            "iwae": IWAE(num_particles=10),
            "annealed-kl": AnnealedKL(ELBO(), warmup=self.epochs / 2),
            "free-bits": FreeBits(ELBO(), free_bits=0.25),
        }
        program = getattr(spec, self.engine)()
        runs: dict[Path, Run] = {}
        for name, objective in objectives.items():
            say(f"{name}: {options.describe(objective)}")
            run = fit(
                program,
                data.train,
                objective=objective,
                epochs=self.epochs,
                batch_size=100,
                learning_rate=3e-3,
                seed=self.seed,
                binarize="stochastic",
            )
            runs[record(run, data, command).save(self.out / name)] = run
        report = Report(runs=tuple(runs), out=self.out / "report.html", num_particles=self.num_particles)
        measured = report.measure(runs)
        measured.show()
        report.write(measured)


COMMANDS: dict[str, type] = {"train": Train, "evaluate": Evaluate, "diagnose": Diagnose, "compare": Compare}
COMMANDS |= {"report": Report, "bench": Bench, "list": List, "demo": Demo}


def parser(chosen: str) -> Any:
    """The commands, as one type for tyro; the options of every model only where ``train`` is the one chosen."""

    def union(classes: Mapping[str, Any]) -> Any:
        members = ((cls, tyro.conf.subcommand(name, description=text)) for name, (cls, text) in classes.items())
        return reduce(operator.or_, (Annotated[cls, named] for cls, named in members))

    def summaries(classes: Mapping[str, type]) -> dict[str, tuple[type, str]]:
        return {name: (cls, options.summary(cls)) for name, cls in classes.items()}

    groups: dict[str, tuple[Any, str]] = {"bench": (union(summaries(BENCH)), options.summary(Bench))}
    if chosen == "train":
        models = {name: (train_command(cls), options.summary(cls)) for name, cls in options.choices(Spec).items()}
        groups["train"] = union(models), options.summary(Train)
    return union({**summaries(COMMANDS), **groups})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``elbozoo``; the process's own when None.

    Returns: the exit code: 0, 2 for a refusal, 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv == ["--version"]:
        say(__version__)
        return 0
    if argv[0] == "bench" and argv[1:2] and argv[1].startswith("--") and argv[1] != "--help":
        argv.insert(1, "run")  # what `elbozoo bench --program …` asks for
    about = f"elbozoo {__version__}: deep latent-variable models in Pyro and NumPyro, measured in nats."
    try:
        below = {"train": ("model", options.choices(Spec)), "bench": ("command of bench", BENCH)}
        for word, (what, known) in zip(argv, (("command", COMMANDS), below.get(argv[0], ("", ()))), strict=False):
            if known and not word.startswith("-"):
                one_of(what, word, known)
        config = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
        command = tyro.cli(parser(argv[0]), prog="elbozoo", description=about, args=argv, config=config)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain("warning", message)
            command(shlex.join(["elbozoo", *argv]))
    except ElbozooError as error:
        complain("error", error)
        return 2
    except Interrupted as error:
        complain("interrupted", error)
        return 130
    except KeyboardInterrupt:
        complain("interrupted", "nothing more was written")
        return 130
    return 0


def complain(kind: str, message: Any) -> None:
    """One line on standard error."""
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
