"""The command line, in one process with it: what it prints, writes, refuses and resumes; and its report."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE
from matplotlib.colors import to_rgba

import elbozoo
from elbozoo import cli, options, pictures
from elbozoo.benchmarks.datasets import load
from elbozoo.guides import DiagonalGaussian, FullCovarianceGaussian
from elbozoo.inference import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    REBAR,
    RELAX,
    STL,
    Adam,
    AnnealedKL,
    Beta,
    Bound,
    Capacity,
    Collapsed,
    DReG,
    FreeBits,
    GradientEstimator,
    Run,
    ScoreFunction,
    Shape,
    evaluate,
)
from elbozoo.inference.training import _Loop
from elbozoo.zoo import MLP, VAE, Bernoulli, Conv, DiscretizedLogistic, Gaussian, LinearVAE, Spec

SMALL = "--hidden 8 --latent-dim 2 --epochs 2 --no-progress"
ROUGH = "--num-data 30 --num-particles 20"
pytestmark = pytest.mark.filterwarnings(
    # ArviZ 0.23 under Matplotlib 3.11, and on groups of one's own.
    "ignore:Passing a dict or None as alias_mapping",
    "ignore:.*group is not defined in the InferenceData scheme",
)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A terminal that breaks no line, and a folder of the test's own to run in."""
    monkeypatch.setattr(cli.out, "_width", 300)
    monkeypatch.chdir(tmp_path)


def run(command: str) -> int:
    return cli.main(shlex.split(command))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small run in each engine that is installed."""
    root = tmp_path_factory.mktemp("runs")
    commands = {
        "numpyro": "--objective iwae --num-particles 3 --gradient dreg --shape annealed-kl --warmup 1 --seed 4",
        "pyro": "--valid validation",
    }
    from conftest import MISSING

    found = {}
    for engine, words in commands.items():
        if not MISSING[engine]:
            found[engine] = root / f"in <{engine}>"
            command = f"train vae --data digits --engine {engine} {words} {SMALL} --out '{found[engine]}'"
            assert run(command) == 0
    return found


# --- help, list, names ------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy(tmp_path: Path):
    code = (
        "import sys\nfrom elbozoo.cli import main\n"
        "try: main(['train', 'vae', '--help'])\n"
        "except SystemExit as end: print(end.code, sorted({n.partition('.')[0] for n in sys.modules}))"
    )
    root = str(Path(elbozoo.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--num-particles INT" in done.stdout
    code, _, modules = done.stdout.strip().splitlines()[-1].partition(" ")
    assert code == "0"
    assert "'elbozoo'" in modules
    heavy = ("jax", "numpyro", "flax", "torch", "pyro", "arviz", "matplotlib", "sklearn", "pandas")
    assert not [name for name in heavy if f"'{name}'" in modules]


PARTS = [cls for kind in cli.KINDS.values() for cls in options.choices(kind).values()] + [Adam]


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_every_setting_of_a_part_is_documented(cls: type):
    assert options.summary(cls)
    assert [name for name, setting in options.settings(cls).items() if not setting.help] == []


@pytest.mark.parametrize("name", [n for n, c in options.choices(Spec).items() if c.fitting_gradient != "pathwise"])
@pytest.mark.numpyro
def test_the_default_gradient_fits_the_model(name: str) -> None:
    """What ``elbozoo train <model>`` takes unless told otherwise is not refused by the model's sites."""
    import jax

    from elbozoo.inference.numpyro_engine import particles

    cls = options.choices(Spec)[name]
    of_rows = any(field.name == "data_dim" for field in dataclasses.fields(cls))
    spec = cls(data_dim=4) if of_rows else cls(image_shape=(1, 4, 4))
    chosen = cli.train_command(cls)().objective.gradient
    objective = ELBO(gradient=options.choose("gradient", GradientEstimator, chosen)())
    program, x = spec.numpyro(), np.zeros((3, spec.data_dim))

    def check(key: Any) -> None:
        params, _, _ = program.init(key, x)
        objective.check(particles(key, params, program.model_fn, program.guide_fn, (x,))[0])

    jax.eval_shape(check, jax.random.key(0))  # what is refused is seen from the sites' kinds


@pytest.mark.parametrize(
    "command",
    [c for c in cli.COMMANDS if c not in ("train", "bench")]
    + [f"train {m}" for m in options.choices(Spec)]
    + [f"bench {c}" for c in cli.BENCH],
)
def test_every_option_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    """Read off the help itself: every option is followed by words, on its line or on the next."""
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    text = re.sub("[│|╭╮╰╯─]|-{3,}", " ", capsys.readouterr().out)
    entries = re.split(r"\n {2,4}(?=--?[a-z])", text)[1:]
    assert entries or command == "list"
    for entry in entries:
        rest = entry.strip().partition("  ")[2]
        said = re.sub(r"\(default: [^)]*\)|\(required\)|\[[\w, -]+\]", "", " ".join(rest.split()))
        assert len(re.findall(r"\w+", said)) >= 2, f"{command}: {entry!r}"


def test_list_names_everything_with_its_first_line(capsys: pytest.CaptureFixture[str]):
    assert run("list") == 0
    text = capsys.readouterr().out
    for kind in (
        "models",
        "networks",
        "likelihoods",
        "guides",
        "priors",
        "quantizers",
        "objectives",
        "gradients",
        "shapes",
    ):
        assert re.search(rf"^{kind}", text, re.MULTILINE)
    names = {"VAE": "vae", "LinearVAE": "linear-vae", "DReG": "dreg", "STL": "stl", "Renyi": "renyi", "Conv": "conv"}
    names |= {"FullCovarianceGaussian": "full-covariance-gaussian", "ScoreFunction": "score-function", "MLP": "mlp"}
    names |= {"AnnealedKL": "annealed-kl", "FreeBits": "free-bits", "PIWAE": "piwae", "Bernoulli": "bernoulli"}
    for name in names.values():
        assert re.search(rf"^  {name} ", text, re.MULTILINE), name
    assert re.search(r"^  iwae +The importance-weighted bound\.", text, re.MULTILINE)
    for cls in (*options.choices(Bound).values(), *options.choices(Shape).values()):
        first = (cls.__doc__ or "").splitlines()[0].replace("``", "")
        assert first[:60] in text
    assert {cls.__name__: options.command_name(cls) for cls in PARTS if cls.__name__ in names} == names


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == elbozoo.__version__


# --- what the options ask for -------------------------------------------------------------------------------------


class Asked(Exception):
    """Carries what ``fit`` was called with."""


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The arguments that a command hands to ``fit``."""

    def fit(program: Any, data: Any, **arguments: Any) -> None:
        raise Asked({"spec": program.spec, "engine": program.engine, "data": data, **arguments})

    monkeypatch.setattr(cli, "fit", fit)

    def ask(command: str) -> dict[str, Any]:
        with pytest.raises(Asked) as found:
            run(f"train {command}")
        return {**found.value.args[0], "printed": capsys.readouterr().out}

    return ask


WORDS = {
    "--objective iwae --num-particles 50": IWAE(50),
    "--objective iwae --gradient dreg": IWAE(gradient=DReG()),
    "--objective miwae --outer 2 --inner 3 --gradient stl": MIWAE(2, 3, STL()),
    "--objective ciwae --beta 0.25": CIWAE(0.25),
    "--shape beta --beta 4": Beta(ELBO(), 4.0),
    "--gradient score-function --pathwise-where-possible False": ELBO(gradient=ScoreFunction(False)),
    "--gradient rebar --adapt True --temperature 0.3": ELBO(gradient=REBAR(0.3, adapt=True)),
    "--objective iwae --gradient relax --network-units 8 --eta 0.5": IWAE(gradient=RELAX(eta=0.5, network_units=8)),
    "--analytic-kl False --num-particles 2": ELBO(2, analytic_kl=False),
    "--shape annealed-kl free-bits --warmup 3 --free-bits 0.2 --per site": AnnealedKL(
        FreeBits(ELBO(), 0.2, "site"), warmup=3.0
    ),
    "--shape annealed-kl --schedule-form cyclical --cycles 2 --unit steps": AnnealedKL(
        schedule_form="cyclical", cycles=2, unit="steps"
    ),
    "--shape capacity --capacity 5 --gamma 10": Capacity(ELBO(), 5.0, 10.0),
}


@pytest.mark.numpyro
@pytest.mark.parametrize("words", WORDS)
def test_objectives(words: str, ask: Any):
    assert ask(f"vae --engine numpyro {words}")["objective"] == WORDS[words]


SPECS = {
    "vae": VAE(64, 50),
    "vae --latent-dim 3 --hidden 10 20 --activation relu": VAE(64, 3, network=MLP((10, 20), "relu")),
    "vae --network conv --channels 4 8 --hidden 16": VAE(64, network=Conv((1, 8, 8), (4, 8), 16)),
    "vae --likelihood discretized-logistic": VAE(64, likelihood=DiscretizedLogistic(17)),
    "vae --likelihood discretized-logistic --levels 33": VAE(64, likelihood=DiscretizedLogistic(33)),
    "vae --likelihood gaussian --scale 0.5": VAE(64, likelihood=Gaussian(0.5)),
    "vae --likelihood gaussian --scale pixel": VAE(64, likelihood=Gaussian("pixel")),
    "vae --guide full-covariance-gaussian": VAE(64, guide=FullCovarianceGaussian()),
    "linear-vae --latent-dim 2 --scale 0.5 --learn-scale True --guide full": LinearVAE(64, 2, 0.5, True, "full"),
}


@pytest.mark.numpyro
@pytest.mark.parametrize("words", SPECS)
def test_models(words: str, ask: Any):
    """The digits settle the number of pixels, the image's shape and the number of levels."""
    assert ask(f"{words} --engine numpyro")["spec"] == SPECS[words]


@pytest.mark.numpyro
def test_settings_of_the_training(ask: Any):
    words = "--epochs 3 --batch-size 7 --seed 5 --replicates 2 --checkpoint-every 4 --device cpu --devices 2 --resume --out here"
    words += " --learning-rate 0.01 --eps 1e-4 --clip-norm 2 --skip-norm 200 --average 0.999 --valid validation --binarize threshold --no-progress"
    words += (
        " --start-from collapsed --start-epochs 2 --epoch-steps 3 --max-seconds 9.5 --frozen encoder decoder.layers.0"
    )
    asked = ask(f"vae --engine numpyro --data digits {words}")
    digits = load("digits", split="validation")
    np.testing.assert_array_equal(asked.pop("data"), digits.train)
    np.testing.assert_array_equal(asked.pop("valid"), digits.test)
    assert asked.pop("printed").endswith("--binarize threshold.\n")
    assert asked == {
        "spec": VAE(64),
        "engine": "numpyro",
        "objective": ELBO(),
        "optimizer": Adam(0.01, eps=1e-4, clip_norm=2.0, skip_norm=200.0, average=0.999),
        "start": Collapsed(epochs=2),
        "epochs": 3,
        "batch_size": 7,
        "seed": 5,
        "replicates": 2,
        "early_stopping": None,
        "epoch_steps": 3,
        "max_seconds": 9.5,
        "frozen": ("encoder", "decoder.layers.0"),
        "resume": True,
        "checkpoint_every": 4,
        "device": "cpu",
        "devices": 2,
        "progress": False,
        "directory": Path("here"),
        "binarize": "threshold",
    }


@pytest.mark.numpyro
def test_grey_pixels_are_binarised_for_a_bernoulli_alone(ask: Any, tmp_path: Path):
    grey = ask("vae --engine numpyro")
    assert (grey["binarize"], "--binarize stochastic" in grey["printed"]) == ("stochastic", True)
    assert grey["directory"] == Path("runs/vae-digits-elbo")
    other = ask("vae --engine numpyro --likelihood continuous-bernoulli --shape free-bits")
    assert (other["binarize"], "--binarize" in other["printed"]) == ("none", False)
    assert other["directory"] == Path("runs/vae-digits-elbo-free-bits")
    np.save(tmp_path / "binary.npy", np.eye(6).reshape(6, 2, 3))
    binary = ask("vae --engine numpyro --data binary.npy")
    assert binary["binarize"] == "none"
    assert binary["spec"] == VAE(6)
    assert binary["data"].shape == (6, 6)


# --- refusals ---------------------------------------------------------------------------------------------------

REFUSED = {
    "trian": r"command must be one of .*; got 'trian'\. The nearest is 'train'\.",
    "train vea": r"model must be one of .*; got 'vea'\. The nearest is 'vae'\.",
    "train vae --objective iwea": r"--objective must be one of .*; got 'iwea'\. The nearest is 'iwae'\.",
    "train vae --gradient dregs": r"--gradient .*'dreg'\.",
    "train vae --shape anealed-kl": r"--shape .*'annealed-kl'\.",
    "train vae --guide diagonal": r"--guide .*'diagonal-gaussian'\.",
    "train vae --data mnits": r"--data .*'mnist'\.",
    "train vae --activation rleu": r"activation .*'relu'\.",
    "train vae --alpha 2": r"--alpha must go with --objective renyi; got .* elbo .*leave --alpha out\.",
    "train vae --warmup 2": r"--warmup must go with --shape annealed-kl or --shape capacity or --shape layerwise-annealed-kl; got ",
    "train vae --channels 4": r"--channels must go with --network conv or --network fully-conv; got ",
    "train vae --objective ciwae --shape beta --beta 1": r"--beta must belong to one .*; got ciwae and beta\.",
    "train vae --objective iwae --num-particles 0": r"num_particles must be a whole number of at least 1; got 0\.",
    "train vae --objective renyi --alpha 1": r"alpha must .*; got 1\.0\.",
    "train vae --objective iwae --shape free-bits": r"FreeBits\.objective must be an ELBO.*; got IWAE\.",
    "train linear-vae": r"--latent-dim must be given for linear-vae; got nothing\.",
    "train vae --data nowhere.npy": r"nowhere\.npy must be a file that can be read; got ",
    "train vae --data flat.npy": r"flat\.npy must hold data as rows of an array; got shape \(3,\)\.",
    "train vae --data bytes.npy": r"data must lie in \[0, 1\] to be binarised; got \[0.*, 255.*\]\.",
    "train vae --early-stopping 2": r"early_stopping must go with held-out data",
    "train vae --start-from warm": r"--start-from must be one of \['ppca', 'collapsed', 'data-mean', 'first-stage', 'informative'\]; got 'warm'",
    "train vae --start-from data-mean --start-epochs 3": r"epochs must be 0 for DataMean, which has no phase; got 3\.",
    "train vae --start-epochs 3": r"--start-epochs must go with --start-from; got no --start-from\. Add --start-from ",
    "train vae --out full": r"--out must be a folder without an earlier run; got full\. Add --resume ",
    "evaluate nowhere": r"nowhere/config\.json must ",
    "compare": r"RUN must be given; got none\.",
}


@pytest.mark.numpyro
@pytest.mark.parametrize("command", REFUSED)
def test_refusals_are_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "bytes.npy", np.array([[0, 255]], np.uint8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.safetensors").touch()
    engine = " --engine numpyro" if command.startswith("train ") else ""
    before = sorted(tmp_path.rglob("*"))
    assert run(command + engine) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.match(rf"error: .*{REFUSED[command]}", printed), printed
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_options_exit_with_two_and_the_nearest(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        run("train vae --num-particle 3")
    assert end.value.code == 2
    assert "--num-particles" in capsys.readouterr().err


@pytest.mark.numpyro
def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fit(*_: Any, **__: Any) -> None:
        import warnings

        warnings.warn("one\n two", stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit", fit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        assert run("train vae --engine numpyro") == 130
    assert capsys.readouterr().err.splitlines()[0] == "warning: one two"


# --- train, evaluate, compare -------------------------------------------------------------------------------------


def test_train_writes_a_run(engine: str, folders: dict[str, Path]):
    found = Run.load(folders[engine])
    assert found.program.engine == engine
    assert found.program.spec == VAE(64, 2, MLP((8,)), Bernoulli(), DiagonalGaussian())
    assert [row["epoch"] for row in found.history] == [1, 2]
    assert found.config["dataset"] == "digits"
    assert found.config["binarize"] == "stochastic"
    assert found.config["command"].startswith("elbozoo train vae --data digits")
    if engine == "numpyro":
        assert found.objective == AnnealedKL(IWAE(3, DReG()), warmup=1.0)
        assert found.config["seed"] == 4
    else:
        assert found.config["num_data"] == 1197
        assert all(math.isfinite(row["valid_bound"]) for row in found.history)


def test_evaluate(engine: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    """The figures are ``evaluate``'s; they are read from the run's folder until the run or the question changes."""
    folder = folders[engine]
    command = f"evaluate '{folder}' {ROUGH} --json"
    assert run(command) == 0
    printed = json.loads(capsys.readouterr().out)
    found = Run.load(folder)
    expected = evaluate(found.program, found.prepare(load("digits").test[:30]), num_particles=20).summary()
    assert {**printed, "seconds": 0} == {**expected, "seconds": 0}

    assert run(f"evaluate '{folder}' {ROUGH}") == 0
    assert f"{expected['nll']:.3f}" in capsys.readouterr().out

    assert run(f"evaluate '{folder}' --num-data 0") == 2
    assert "--num-data must be a whole number of at least 1; got 0." in capsys.readouterr().err

    def refuse(*_: Any, **__: Any) -> None:
        raise Asked

    monkeypatch.setattr(cli, "evaluate", refuse)
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out) == printed
    for other in ("--seed 1", "--num-data 29"):
        with pytest.raises(Asked):
            run(f"{command} {other}")
    weights, file = folder / "weights.safetensors", folder / "evaluation-digits-20.safetensors"
    config = folder / "config.json"
    whole, kept, about = weights.read_bytes(), file.read_bytes(), config.read_bytes()
    try:
        file.write_bytes(kept[:-1])  # not whole
        with pytest.raises(Asked):
            run(command)
        file.write_bytes(kept)
        found.program = found.program.with_weights({n: w + 0.01 for n, w in found.weights.items()})
        found.save(folder)
        with pytest.raises(Asked):
            run(command)
    finally:
        weights.write_bytes(whole)
        config.write_bytes(about)


@pytest.mark.pyro
@pytest.mark.numpyro
def test_compare(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    """One table; the difference of two runs on the same data is taken datum by datum."""
    names = " ".join(f"'{f}'" for f in folders.values())
    assert run(f"compare {names} {ROUGH}") == 0
    text = capsys.readouterr().out
    x = load("digits").test[:30]
    runs = [Run.load(folder) for folder in folders.values()]
    first, second = (r.evaluate(x, num_particles=20) for r in runs)
    gap = first.per_datum.log_lik_estimate - second.per_datum.log_lik_estimate
    row = next(line for line in text.splitlines() if "<pyro>" in line)
    assert f"{second.nll:.2f} ± {second.nll_se:.2f}" in row
    assert f"{second.nll - first.nll:+.2f} ± {gap.std(ddof=1) / math.sqrt(30):.2f}" in row
    assert all(f"{value:.2f}" in row for value in (second.elbo, second.rate, second.distortion))
    assert f"{second.total_active_units}/2" in row
    assert "30 data" in text
    assert "K = 20" in text


@pytest.mark.numpyro
def test_runs_on_different_data_are_not_subtracted(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    assert run("train linear-vae --latent-dim 1 --epochs 1 --engine numpyro --no-progress --out grey") == 0
    assert run(f"compare '{folders['numpyro']}' grey {ROUGH}") == 0
    text = capsys.readouterr().out
    assert "do not compare" in text
    assert "first's" not in text


@pytest.mark.numpyro
def test_npy_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    np.save("mine.npy", rng.random((12, 2, 3)))
    assert run("train linear-vae --data mine.npy --latent-dim 1 --epochs 1 --engine numpyro --no-progress --out r") == 0
    assert Run.load("r").config["image_shape"] == [1, 2, 3]
    assert "training data" not in capsys.readouterr().out
    assert run("evaluate r --num-particles 2") == 0
    assert "measured on its training data" in capsys.readouterr().out
    np.save("other.npy", rng.random((5, 6)))
    assert run("evaluate r --num-particles 2 --data other.npy --json") == 0
    printed = capsys.readouterr().out
    assert "training data" not in printed
    assert json.loads(printed)["num_data"] == 5


@pytest.mark.numpyro
def test_replicates(capsys: pytest.CaptureFixture[str]):
    assert run(f"train vae --engine numpyro {SMALL} --replicates 2 --out r") == 0
    seeds = [Run.load(Path("r") / f"replicate-{i}").config["seed"] for i in range(2)]
    assert seeds == [0, 1]
    assert "elbozoo evaluate r/replicate-1" in capsys.readouterr().out


@PYRO_ALONE  # written once for both engines
def test_ctrl_c_and_resume(engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Ctrl-C in the second epoch leaves the first one's checkpoint; resumed, the run is the one never stopped."""
    words = f"train vae --engine {engine} {SMALL}"
    assert run(f"{words} --out whole") == 0
    run_epoch = _Loop.run_epoch

    def stop(loop: _Loop, *args: Any) -> None:
        if loop.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(loop, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "run_epoch", stop)
        capsys.readouterr()
        assert run(f"{words} --out cut") == 130
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("interrupted: the last checkpoint is in cut; go on with: elbozoo train vae ")
    resume = printed.partition("go on with: elbozoo ")[2].strip()
    assert resume == f"{words} --out cut --resume"
    assert run(f"{words} --out cut") == 2  # not without asking
    assert run(resume) == 0
    whole, cut = Run.load("whole"), Run.load("cut")
    assert [row["epoch"] for row in cut.history] == [1, 2]
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(cut.weights[name], weight)


# --- report, demo -------------------------------------------------------------------------------------------------


def images(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/[a-z+]+;base64,([^"]+)"', page)]


@pytest.mark.arviz
@pytest.mark.numpyro
def test_report(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    import arviz

    folder = folders["numpyro"]
    assert run(f"report '{folder}' {ROUGH} --draws 5") == 0
    page = (folder / "report.html").read_text()
    assert str(folder / "report.html") in capsys.readouterr().out
    found = Run.load(folder)
    measured = found.evaluate(load("digits").test[:30], num_particles=20)
    assert f"<td>{measured.nll:.2f} ± {measured.nll_se:.2f}</td>" in page
    assert "<td>in &lt;numpyro&gt;</td>" in page  # a label is text, not markup
    assert "in <numpyro>" not in page
    assert "&#34;seed&#34;: 4" in page  # the config
    assert found.config["versions"]["numpyro"] in page
    pictures = images(page)
    assert len(pictures) == page.count("<img") == 4
    assert [p[:4] for p in pictures].count(b"\x89PNG") == 2
    assert sum(b"<svg" in p for p in pictures) == 2
    assert not re.search(r"""(?:src|href)=["'](?!data:)|<script|@import|url\(""", page)  # nothing from elsewhere
    draws = arviz.from_netcdf(folder / "posterior.nc")
    assert dict(draws.posterior["z"].sizes) == {"chain": 1, "draw": 5, "data": 30, "z_dim": 2}


def test_figures(engine: str, folders: dict[str, Path]):
    found = Run.load(folders[engine])
    digits = load("digits").test
    measured = found.evaluate(digits[:30], num_particles=20)
    figure = pictures.curves({"a": found, "b": found})
    assert [axes.get_title() for axes in figure.axes] == [
        "bound", *(["held-out bound"] if engine == "pyro" else []), "rate", "distortion", "live units"
    ]  # fmt: skip
    line = figure.axes[-2].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), [row["distortion"] for row in found.history])
    styles = {(str(line.get_color()), str(line.get_linestyle())) for line in figure.axes[0].lines}
    assert len({style for _, style in styles}) == 2  # told apart without colour

    figure = pictures.kl_per_dimension({"a": measured})
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, sorted(measured.rate_per_dimension["z"], reverse=True))

    picture = np.ma.filled(pictures.reconstructions(found, digits, columns=5).axes[0].images[0].get_array(), np.nan)
    assert picture.shape == (3 * 9 - 1, 5 * 9 - 1)
    np.testing.assert_allclose(picture[:8, :8], digits[0].reshape(8, 8), rtol=1e-6)
    np.testing.assert_array_equal(picture[9:17, :8], found.prepare(digits[:5])[0][0].reshape(8, 8))
    seen = found.prepare(digits[:5])
    decoded = found.program.predict(seen, num_particles=20)["mean"]["x"].mean(0)
    np.testing.assert_allclose(picture[18:, 9:17], decoded[1].reshape(8, 8))

    drawn = np.ma.filled(pictures.samples(found, rows=2, columns=3).axes[0].images[0].get_array(), np.nan)
    assert drawn.shape == (17, 26)
    assert np.nanmin(drawn) >= 0
    assert np.nanmax(drawn) <= 1


@pytest.mark.numpyro
def test_dimensions_that_are_not_active_are_hollow(folders: dict[str, Path]):
    import dataclasses

    measured = Run.load(folders["numpyro"]).evaluate(load("digits").test[:30], num_particles=20)
    one_asleep = dataclasses.replace(
        measured,
        rate_per_dimension={"z": np.array([0.5, 2.0])},
        activity={"z": np.array([0.009, 0.02])},
    )
    bars = pictures.kl_per_dimension({"a": one_asleep}).axes[0].patches
    assert [bar.get_height() for bar in bars] == [2.0, 0.5]
    assert [bar.get_facecolor() for bar in bars] == [to_rgba("0.25"), to_rgba("1.0")]


@pytest.mark.numpyro
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("demo --epochs 2 --num-particles 5 --out d") == 0
    text = capsys.readouterr().out
    names = ("elbo", "iwae", "annealed-kl", "free-bits")
    rows = {name: line for name in names for line in text.splitlines() if re.match(rf" *{name} .*±", line)}
    assert set(rows) == set(names)
    for name in names:
        files = {p.name for p in (tmp_path / "d" / name).iterdir()}
        assert files >= {"config.json", "weights.safetensors", "history.json", "posterior.nc"}
    for name in ("elbo", "annealed-kl"):
        measured = Run.load(Path("d") / name).evaluate(load("digits").test, num_particles=5)
        assert f"{measured.nll:.2f} ± {measured.nll_se:.2f}" in rows[name]
        assert f"{measured.elbo:.2f}" in rows[name]
    assert isinstance(Run.load("d/free-bits").objective, FreeBits)
    page = (tmp_path / "d" / "report.html").read_text()
    assert len(images(page)) == 2 + 2 * len(names)


def test_diagnose(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A verdict in words; the same and its figures as JSON."""
    for name, folder in folders.items():
        more = "--num-gaps 4 --num-simulations 40" if name == "numpyro" else "--num-gaps 0 --num-simulations 0"
        assert run(f"diagnose '{folder}' --num-data 40 --num-particles 20 {more} --out '{tmp_path / 'd'}'") == 0
        text = " ".join(capsys.readouterr().out.split())
        found = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
        assert len(images((tmp_path / "d" / "report.html").read_text())) == (11 if name == "numpyro" else 9)
        assert found["bottleneck"]["num_data"] == 40
        assert all(" ".join(sentence.split())[:60] in text for sentence in found["verdict"])
        assert f"{found['evaluation']['nll']:.3f}" in text
    assert run("diagnose nowhere") == 2


def test_diagnose_replicates(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A folder of replicates: the best is diagnosed, and how the seeds differ is said."""
    monkeypatch.chdir(tmp_path)
    assert run("train linear-vae --data digits --epochs 1 --replicates 2 --out r --latent-dim 2") == 0
    assert run("diagnose r --num-data 30 --num-particles 10 --num-gaps 0 --num-simulations 0") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The best of 2 replicates is r/replicate-" in text
    assert "Over 2 seeds the NLL" in text
    found = json.loads((tmp_path / "r" / "diagnosis.json").read_text())
    assert found["minima"]["num_data"] == 30
    assert found["evaluation"]["nll"] == min(found["minima"]["nll"])
