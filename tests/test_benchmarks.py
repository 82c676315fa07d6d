"""Every benchmark script runs at a small size, and the docs' tables are what the committed results give."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from scipy import stats

from elbozoo.benchmarks import records
from elbozoo.benchmarks.records import Record
from elbozoo.inference import fit
from elbozoo.inference.errors import CorruptFile, InvalidArgument, NonFinite

ROOT = Path(__file__).resolve().parents[1]
NOT_SCRIPTS = {"__init__", "datasets", "grid", "loops", "papers", "records", "tables"}
SMOKE = [
    "clusters",
    "codes",
    "depth",
    "discrete",
    "estimators",
    "guides",
    "hierarchy",
    "instruments",
    "iwae_mnist",
    "local_minima",
]
SMOKE += ["overhead", "remedies", "scaling", "semi_supervised"]


def test_every_script_has_a_smoke_row() -> None:
    scripts = {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - NOT_SCRIPTS
    assert scripts == set(SMOKE)


@pytest.mark.pyro
@pytest.mark.numpyro
@pytest.mark.parametrize("name", SMOKE)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as a user starts it, command line and all, but in this process: the engines are imported already."""
    command = [f"benchmarks/{name}.py", "--smoke", "--results", str(tmp_path / f"{name}.json")]
    if name in ("instruments", "iwae_mnist"):
        command += ["--checkpoints", str(tmp_path / "checkpoints")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes that instruments starts
    runpy.run_path(command[0], run_name="__main__")
    record = json.loads((tmp_path / f"smoke_{name}.json").read_text())
    assert record["cells"]
    assert record["checks"]
    assert record["versions"]
    assert record["machine"]["cpu"]


def test_seeds_of_few_labels_are_of_one_budget_and_those_that_diverged_do_not_count() -> None:
    from elbozoo.benchmarks import semi_supervised, tables

    def cell(objective: str, seed: int, **more: Any) -> dict[str, Any]:
        return {"objective": objective, "labels": 100, "seed": seed, "epochs": 50, "num_train": 9, **more}

    def ended(objective: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
        figures = {"accuracy": accuracy, "accuracy_se": 0.01, "train_seconds": 3.0, "accuracy_by_stage": {"50": 0.5}}
        return cell(objective, seed, **figures, **more)

    cells = {"a": ended("auxiliary", 0, 0.9), "b": ended("auxiliary", 1, 0.95), "c": ended("classifier", 0, 0.8)}
    cells["d"] = cell("classifier", 1, diverged="at step 7, site z", accuracy_by_stage={"10": 0.99})
    assert semi_supervised.checks(cells, "mnist") == {
        "100 labels: M2 with the auxiliary loss is at most 0.02 below the published accuracy": True,
        "100 labels: M2 with the auxiliary loss classifies better than the classifier alone": True,
    }
    assert "| diverged at step 7, site z |" in tables.semi_supervised({"cells": cells, "config": {"data": "mnist"}})
    with pytest.raises(InvalidArgument, match="cells of auxiliary, 100 labels must be of one budget"):
        semi_supervised.checks(cells | {"e": ended("auxiliary", 2, 0.9) | {"epochs": 20}}, "mnist")


@pytest.mark.pyro
def test_a_training_with_few_labels_that_diverges_says_where_and_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from elbozoo.benchmarks import semi_supervised

    trained = semi_supervised.fit

    def diverging(*args: Any, epochs: int, **settings: Any) -> Any:
        if epochs > 1:
            raise NonFinite("of no interest", "z", 7)
        return trained(*args, epochs=epochs, **settings)

    monkeypatch.setattr(semi_supervised, "fit", diverging)
    small: dict[str, Any] = {"num_unlabelled": 40, "epochs_of_few": 2, "stages": 2, "hidden": 4, "num_test": 20}
    config = semi_supervised.Config(data="digits", latent_dim=2, num_draws=1, **small)
    found = semi_supervised.measure(config, "sampled", 20, 3)
    assert found["diverged"] == "at step 7, site z"
    assert (found["labels"], found["seed"], found["epochs"]) == (20, 3, 2)
    assert list(found["accuracy_by_stage"]) == ["1"]
    assert "accuracy" not in found


def test_orders_of_variances_are_claimed_and_shown_state_by_state() -> None:
    from elbozoo.benchmarks.discrete import claims
    from elbozoo.benchmarks.tables import discrete

    shared = {"batch_size": 7, "num_gradients": 9}
    cells = {
        "variances-2": {"epochs": 2, **shared, "variance": {"nvil": 3.0, "arm": 2.0, "disarm": 2.5}},
        "variances-20": {"epochs": 20, **shared, "variance": {"nvil": 2.0, "arm": 4.0}},
    }
    assert claims(cells) == {
        "after 2 epochs, the gradient's variance is larger under nvil than under arm": True,
        "after 2 epochs, the gradient's variance is larger under arm than under disarm": False,
        "after 20 epochs, the gradient's variance is larger under nvil than under arm": False,
    }
    head, _, *rows = discrete({"cells": cells, "config": {}}).splitlines()[2:]
    assert head == "| estimator | after 2 epochs | after 20 epochs |"
    assert rows == ["| nvil | 3 | 2 |", "| arm | 2 | 4 |", "| disarm | 2.5 | not run |"]


def test_discrete_estimators_are_compared_by_the_seeds_that_they_have_in_common() -> None:
    from elbozoo.benchmarks.discrete import claims
    from elbozoo.benchmarks.tables import discrete

    def cells(estimator: str, *nll: float) -> dict[str, Any]:
        same = {"net": "linear", "estimator": estimator, "training_particles": 1, "share_of_protocol": 0.5}
        same |= {"nll_se": 0.6, "elbo": -9.0, "train_seconds": 5.0, "num_particles": 3, "num_data": 2}
        return {f"linear-{estimator}-{i}": {**same, "seed": i, "nll": value} for i, value in enumerate(nll)}

    # all by less than 0.6; by how much does not change from seed to seed, though the seeds do
    found = cells("nvil", 8.0, 9.0, 10.0) | cells("disarm", 7.9, 8.8, 9.9) | cells("arm", 9.0, 8.0)
    found |= cells("rebar", 7.5)
    assert claims(found) == {
        "linear: rebar has a lower NLL than nvil, by more than the standard error of one": False,
        "linear: arm has a lower NLL than nvil, by more than the standard error of their difference over 2 seeds": False,
        "linear: disarm has a lower NLL than nvil, by more than the standard error of their difference over 3 seeds": (
            True
        ),
    }
    names = ["nvil", "arm", "disarm", "rebar", "score"]
    config = {"nets": ["linear", "nonlinear"], "estimators": names, "num_train": 4, "epochs": 1, "batch_size": 2}
    lines = discrete({"cells": found, "config": config}).splitlines()
    assert "| nvil | 1 | 9.00 ± 0.58 (-9.00), 5; 3 seeds | not run |" in lines
    assert "| rebar | 1 | 7.50 ± 0.60 (-9.00), 5 | not run |" in lines
    assert "| nvil than disarm | 0.13 ± 0.03 (3 seeds) |" in lines
    assert not any(line.startswith(("| score", "| nvil than rebar")) for line in lines)


@pytest.mark.numpyro
def test_a_learned_baseline_is_trained_on_the_minibatches_that_it_is_given() -> None:
    """Not on the batch whose gradient's variance is measured: one that knew only blank images is worse there."""
    from elbozoo.benchmarks import discrete
    from elbozoo.benchmarks.datasets import load

    config = discrete.Config(units=5, num_gradients=50)
    digits = (load("digits").train[:60] > 0.5).astype(np.float32)
    data = np.concatenate([digits, np.zeros_like(digits)])
    program = discrete.net(config, "linear", 64).numpyro()
    program = fit(program, digits, objective=discrete.ESTIMATORS["vimco-5"], epochs=1, batch_size=20).program
    draw = np.random.default_rng(0)
    batch, blank = draw.integers(0, 20, (300, 20)), draw.integers(60, 120, (300, 20))
    found = [discrete.variance(config, program, discrete.ESTIMATORS["nvil"], data, order) for order in (batch, blank)]
    assert found[1] > 1.2 * found[0]


@pytest.mark.numpyro
def test_worker_processes_can_import_what_the_sweep_measures_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot look into the script that was started."""
    from elbozoo.benchmarks import estimators

    grids: list[Any] = []
    monkeypatch.setattr(estimators, "measure_all", lambda grid, *_, **__: grids.append(grid))
    monkeypatch.setattr(sys, "argv", ["estimators.py", "--smoke", "--results", str(tmp_path / "r.json")])
    runpy.run_path(str(ROOT / "benchmarks" / "estimators.py"), run_name="__main__")
    assert [grid.measure for grid in grids] == [estimators.measure]


def test_tables_are_generated_from_the_results() -> None:
    from elbozoo.benchmarks.tables import PAGE, page

    assert PAGE.read_text() == page(), "run python benchmarks/tables.py"


def test_the_figure_of_hierarchies_has_a_line_for_each_cell_that_ended() -> None:
    from elbozoo.benchmarks.tables import hierarchy_figure

    def cell(guide: str, objective: str, **more: Any) -> dict[str, Any]:
        return {"layers": 2, "guide": guide, "objective": objective, "nats": [[3.0, 0.1]], **more}

    names = ("plain", "warm-up", "free-bits", "warm-up-free-bits", "layerwise")
    cells = [cell(guide, name) for guide in ("bottom-up", "ladder") for name in names]
    cells[0]["diverged"] = "nan"
    figure = hierarchy_figure({"cells": {str(i): c for i, c in enumerate(cells)}})
    labels = [[line.get_label() for line in ax.lines] for ax in figure.axes]
    assert labels == [list(names[1:]), list(names)]
    colours = [{line.get_label(): line.get_color() for line in ax.lines} for ax in figure.axes]
    assert colours[0].items() <= colours[1].items()


def test_claims_about_hierarchies_are_read_off_the_cells() -> None:
    from elbozoo.benchmarks.hierarchy import claims

    def cell(nll: float, *tops: float) -> dict[str, Any]:
        return {"nll": [nll, nll + 1, nll + 2.1], "nats": [[9.0, top] for top in tops]}

    cells = {
        "2-bottom-up-plain": cell(100.0, 0.0, 0.0, 1.0),
        "2-bottom-up-warm-up": {"diverged": "nan"},
        "2-ladder-layerwise": cell(99.0, 0.0, 1.0, 1.0),
        "2-ladder-plain": cell(99.0, 0.0, 0.0, 0.0),
    }
    assert json.loads(json.dumps(claims(cells))) == {
        "L = 2: bottom-up, plain: the top layer is dead (below 0.05 nats) in most seeds": True,
        "L = 2: ladder, layerwise: the top layer is alive in most seeds": True,
        "L = 2, ladder: layerwise has a lower NLL than plain": False,
    }
    assert claims({"2-bottom-up-plain": cell(100.0, 1.0, 0.0), "2-ladder-warm-up": cell(90.0, 0.0)}) == {
        "L = 2: bottom-up, plain: the top layer is dead (below 0.05 nats) in most seeds": False,
        "L = 2: ladder, warm-up: the top layer is alive in most seeds": False,
        "L = 2: ladder, warm-up, has a lower NLL than bottom-up, plain": True,
    }


def test_a_warm_up_that_no_layer_has_time_for_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    from elbozoo.benchmarks import hierarchy

    config = hierarchy.Config(data="digits", warmup=0.1, results=tmp_path / "r.json")
    with pytest.raises(InvalidArgument, match="warmup must be finite and above 0"):
        hierarchy.main(config)
    assert not config.results.exists()


def test_published_tables_are_printed() -> None:
    from elbozoo.benchmarks.papers import PAPERS

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "benchmarks/papers.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = " ".join(done.stdout.split())
    for paper in PAPERS:
        assert paper.source in said
        assert " ".join(paper.command.split()) in said


@pytest.mark.parametrize(
    ("ratio", "low", "high", "good", "decided"),
    [
        (1.0, 0.9, 1.04, True, True),
        (1.0, 0.9, 1.1, True, False),
        (1.1, 1.0, 1.2, False, False),
        (1.2, 1.1, 1.3, False, True),
    ],
)
def test_a_target_within_the_interval_is_undecided(
    ratio: float, low: float, high: float, good: bool, decided: bool
) -> None:
    from elbozoo.benchmarks.overhead import verdict_of

    claim, held = verdict_of("numpyro / hand-written JAX", {"median": ratio, "low": low, "high": high})
    assert held == good
    assert ("by the median alone" not in claim) == decided
    claim, held = verdict_of("pythae / numpyro", {"median": 2 * ratio, "low": None, "high": None})
    assert held == (2 * ratio >= 2.0)
    assert claim.endswith("target 2.0")


def test_claims_about_depth_are_read_off_the_cells() -> None:
    from elbozoo.benchmarks.depth import claims

    def cell(seconds: float, memory: float, bits: float) -> dict[str, Any]:
        costs = {"compile_processor_seconds": seconds, "step_processor_seconds": seconds, "temporary_bytes": memory}
        return {**costs, "bits_of_image": [bits, bits + 0.1, bits - 0.1]}

    good = {"trained-2": cell(1.0, 10, 3.0), "recomputed-2": cell(1.0, 9, 3.0)}
    good |= {"trained-8": cell(1.5, 40, 2.0), "recomputed-8": cell(1.5, 17, 2.0)}
    good |= {"in turn": {"growth": {"2 to 8": {"median": 3.9}}}}
    assert list(claims(good, (2, 8)).values()) == [True] * 6
    bad = {"trained-2": cell(1.0, 10, 2.0), "recomputed-2": cell(1.0, 11, 2.0)}
    bad |= {"trained-8": cell(4.5, 40, 2.0), "recomputed-8": cell(4.5, 41, 2.0)}
    bad |= {"in turn": {"growth": {"2 to 8": {"median": 4.1}}}}
    assert list(claims(bad, (2, 8)).values()) == [False] * 6


@pytest.mark.parametrize("index", range(5))
def test_every_published_table_has_its_script_and_whole_protocol(index: int) -> None:
    import tyro

    from elbozoo.benchmarks import discrete, hierarchy
    from elbozoo.benchmarks.papers import PAPERS

    assert len(PAPERS) == 5
    paper = PAPERS[index]
    assert (ROOT / "benchmarks" / f"{paper.script}.py").exists()
    config = tyro.cli(paper.config, args=paper.arguments)
    assert config == paper.config(**paper.full)
    assert len({figure.what for figure in paper.figures}) == len(paper.figures) > 0
    images = {  # what the share of the protocol is a share of
        "iwae_mnist": lambda: sum(3**i for i in range(config.stages)) == 3280,
        "hierarchy": lambda: config.num_train * config.epochs == hierarchy.PROTOCOL / 10,
        "discrete": lambda: not config.nets or config.num_train * config.epochs == discrete.PROTOCOL,
        "semi_supervised": lambda: (config.num_unlabelled, config.batch_size) == (50_000, 200),
    }
    assert images[paper.script]()


def test_no_published_figure_is_without_its_budget(tmp_path: Path) -> None:
    from elbozoo.benchmarks import papers

    burda, ladder, *_ = papers.PAPERS
    nll = next(f for f in burda.figures if f.cell["objective"] == "iwae-5" and f.name == "nll")
    assert papers.row(burda, nll, tmp_path) == [nll.what, "85.54", "not run", "", "", ""]

    def write(name: str, **cells: Any) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"cells": cells}))

    cell = {"objective": "iwae-5", "data": "mnist", "nll": 90.125, "nll_se": 0.25, "num_particles": 7, "num_data": 9}
    write(
        "iwae_mnist",
        other={**cell, "objective": "iwae-50", "share_of_protocol": 0.5},
        here={**cell, "share_of_protocol": 0.25},
    )
    assert papers.row(burda, nll, tmp_path)[1:] == [
        "85.54",
        "90.12 ± 0.25 (1 seed)",
        "K = 7, 9 data",
        "25.00%",
        "iwae_mnist.json: here",
    ]
    write("iwae_mnist", a={**cell, "share_of_protocol": 0.25}, b={**cell, "nll": 92.125, "share_of_protocol": 0.25})
    assert papers.row(burda, nll, tmp_path)[2] == "91.1 ± 1.0 (2 seeds)"
    write("iwae_mnist_longer", here={**cell, "nll": 88.0, "share_of_protocol": 0.5})
    assert papers.row(burda, nll, tmp_path)[2:] == [
        "88.00 ± 0.25 (1 seed)",
        "K = 7, 9 data",
        "50.00%",
        "iwae_mnist_longer.json: here",
    ]
    write("iwae_mnist_longer")
    write("iwae_mnist", a={**cell, "share_of_protocol": 0.25}, b={**cell, "share_of_protocol": 0.5})
    with pytest.raises(CorruptFile, match="be of one budget"):
        papers.row(burda, nll, tmp_path)
    write("iwae_mnist", here=cell)
    with pytest.raises(CorruptFile, match="here must have its budget"):
        papers.row(burda, nll, tmp_path)
    five = {"layers": 5, "guide": "ladder", "objective": "warm-up", "nll": [100.0, 102.0], "share_of_protocol": 0.01}
    write("hierarchy", five=five)
    assert papers.rows(ladder, tmp_path)[0][2:5] == ["101.0 ± 1.0 (2 seeds)", "", "10.00%"], (
        "of 200 epochs, not of 2000"
    )


def test_a_result_file_is_of_one_setting(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Config:
        hidden: int
        seeds: tuple[int, ...] = (0,)

    first = Record(tmp_path / "r.json", "Q?\n\nA.", Config(100), (), grid=("seeds",))
    first.cell("a", lambda: {"x": 1})
    noted = json.loads((tmp_path / "r.json").read_text()) | {"note": "On one core."}
    (tmp_path / "r.json").write_text(json.dumps(noted))
    more = Record(tmp_path / "r.json", "Q?\n\nA.", Config(100, seeds=(0, 1)), (), grid=("seeds",))
    assert more.cell("a", lambda: {"x": 2}) == {"x": 1}, "what is there is not measured again"
    more.check({"holds": True})
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["note"] == "On one core."
    assert found["config"] == {"hidden": 100, "seeds": [0, 1]}
    less = Record(tmp_path / "r.json", "Q?\n\nA.", Config(100, seeds=(2, 1)), (), grid=("seeds",))
    assert less.content["config"]["seeds"] == [0, 1, 2], "the head is that of all cells"
    with pytest.raises(InvalidArgument, match=r"be of the same settings.*config\.hidden"):
        Record(tmp_path / "r.json", "Q?\n\nA.", Config(200), (), grid=("seeds",))


def test_a_result_file_without_times_goes_on_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Config:
        hidden: int

    path = tmp_path / "r.json"
    first = Record(path, "Q?", Config(100), (), timed=False)
    first.cell("a", lambda: {"x": 1})
    here = first.machine
    there = here | {"cpu": "another"}
    monkeypatch.setattr(records, "machine", lambda: there)
    with pytest.raises(InvalidArgument, match=r"machine\.cpu"):
        Record(path, "Q?", Config(100), ())
    with pytest.raises(InvalidArgument, match=r"config\.hidden"):
        Record(path, "Q?", Config(200), (), timed=False)
    Record(path, "Q?", Config(100), (), timed=False).cell("b", lambda: {"x": 2})
    found = json.loads(path.read_text())
    assert found["machine"] == here
    assert found["cells"] == {"a": {"x": 1}, "b": {"x": 2, "machine": there}}


def minima_cell(start: str, objective: str, nll: list[float], collapsed: int = 0) -> dict[str, Any]:
    """A cell of the study of local minima, as far as its claims and words go."""
    count = len(nll)
    dead = [r < collapsed for r in range(count)]
    return {
        "decoder": "strong", "start": start, "objective": objective, "seeds": list(range(count)), "nll": nll,
        "collapsed": dead, "worse": dead, "rate": [0.5] * count, "rate_by_epoch": [0.1, 0.5], "rate_in_phase": [0.01] * count, "live_in_phase": [0] * count,
        "recovery_epoch": [2 if start == "collapsed" and not d else None for d in dead],
    }  # fmt: skip


def test_claims_about_minima_are_read_off_the_cells() -> None:
    from elbozoo.benchmarks.local_minima import claims, gap
    from elbozoo.benchmarks.tables import _minima_words

    rng = np.random.default_rng(0)
    cells = {
        "strong-normal-elbo": minima_cell("normal", "elbo", (40 + 0.1 * rng.random(8)).tolist()),
        "strong-collapsed-elbo": minima_cell("collapsed", "elbo", (42 + 0.1 * rng.random(6)).tolist(), collapsed=6),
        "strong-collapsed-annealed": minima_cell("collapsed", "annealed", (40 + 0.1 * rng.random(8)).tolist()),
        "strong-normal-annealed": minima_cell("normal", "annealed", (40.05 + 0.1 * rng.random(8)).tolist()),
    }
    one, two = ("strong", "collapsed", "elbo"), ("strong", "normal", "elbo")
    found = gap(cells, one, two)
    assert found is not None
    welch = stats.ttest_ind(cells["-".join(one)]["nll"], cells["-".join(two)]["nll"], equal_var=False)
    assert found[0] / found[1] == pytest.approx(welch.statistic, rel=1e-9)
    assert gap(cells, one, ("weak", "normal", "elbo")) is None
    held = claims(cells, tolerance=0.1)
    assert held["strong decoder, collapsed start: the ELBO does not get out in any seed"]
    assert held["strong decoder: the ELBO ends worse from the collapsed start than from the normal one"]
    assert held["strong decoder, collapsed start: annealed ends better than the ELBO"]
    assert not held["strong decoder, normal start: annealed ends better than the ELBO"]
    assert not held["strong decoder, normal start: the ELBO leaves some seed with the whole latent collapsed"]
    assert not any("weak" in claim or "iwae" in claim for claim in held), (
        "nothing is claimed of cells that are not there"
    )
    said = " ".join(_minima_words(cells))
    assert "6 of 30 runs end with the whole latent collapsed: 6 of elbo from the collapsed start." in said
    assert f"From the collapsed start the plain ELBO ends {found[0]:.2f} ± {found[1]:.2f} nats above" in said


def test_a_table_has_the_cells_of_models_that_were_asked_for_before() -> None:
    """A result file that was continued with other models keeps all cells, in the order of the present ones, then theirs."""
    from elbozoo.benchmarks import tables

    record = json.loads((ROOT / "benchmarks/results/remedies.json").read_text())
    record["config"]["models"] = ["ladder"]
    rows = tables.remedies(record).splitlines()[4:]
    assert [row.split(" | ")[1] for row in rows[:2]] == ["ladder", "ladder"]
    assert sum(row.startswith("| ") for row in rows) == len(record["cells"])
