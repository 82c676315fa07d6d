"""Write ``docs/bottleneck.md`` and its figures: every number and every picture on that page comes from here.

python docs/make_bottleneck.py                       # some minutes: five of processor time
python docs/make_bottleneck.py --small --out FOLDER  # seconds, to see that it runs
python docs/make_bottleneck.py --study               # puts new results of benchmarks/local_minima.py into the page

The words are in ``docs/bottleneck.md.j2``. They say what the numbers say: each claim that they rest on is checked, and
the page is not written where one does not hold. (This file is not called bottleneck.py: pandas looks for a module of
that name, and would find it.)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from elbozoo import pictures
from elbozoo.benchmarks import tables
from elbozoo.benchmarks.datasets import load
from elbozoo.inference import (
    ELBO,
    IWAE,
    AnnealedKL,
    FreeBits,
    Objective,
    RateDistortion,
    Run,
    bottleneck,
    fit,
    rate_distortion,
)
from elbozoo.inference.storage import write_atomically
from elbozoo.inference.training import environment
from elbozoo.zoo import MLP, VAE, LinearVAE
from elbozoo.zoo.linear_vae import direction_value, kl_per_direction, squared_error

HERE = Path(__file__).resolve().parent
STUDY = tables.RESULTS / "local_minima.json"

S2 = 0.33  # the linear decoder's variance: four of the eight leading directions of the digits are above it
LATENTS = 8  # of the linear model
LIVE = 4
VAE_LATENTS = 16
LINEAR_BETAS = (0.25, 0.5, 1.0, 2.0)
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0)
BATCH = 100


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    linear_steps: int = 3000
    epochs: int = 200
    seeds: int = 3
    num_particles: int = 1000
    hidden: tuple[int, ...] = (100, 100)
    linear_betas: tuple[float, ...] = LINEAR_BETAS
    betas: tuple[float, ...] = BETAS


SMALL = Size(linear_steps=20, epochs=2, seeds=1, num_particles=5, hidden=(8,), linear_betas=(1.0,), betas=(1.0,))


@dataclass
class Page:
    """What the template is given, and what its words rest on."""

    numbers: dict[str, Any]
    figures: dict[str, Figure]
    claims: dict[str, bool]


def main(argv: list[str] | None = None) -> int:
    """Write the page. Returns 1, without writing, where a claim does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds, with numbers that mean nothing")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for bottleneck.md and figures/")
    parser.add_argument("--study", action="store_true", help="rewrite what the page says of the study of local minima")
    asked = parser.parse_args(argv)
    if asked.study:
        rewrite_study(asked.out / "bottleneck.md")
        return 0
    page = Page({"small": asked.small, "versions": environment("numpyro")}, {}, {})
    size = SMALL if asked.small else Size()
    for part in PARTS:
        part(page, size)
    wrong = [claim for claim, holds in page.claims.items() if not holds]
    if wrong and not asked.small:
        print("The page's words do not fit these numbers: " + "; ".join(wrong), file=sys.stderr)
        return 1
    matplotlib.rcParams["svg.hashsalt"] = "bottleneck"  # equal figures are equal files
    for name, figure in page.figures.items():
        path = asked.out / "figures" / f"bottleneck_{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        path.write_text(re.sub(r"[ \t]+$", "", path.read_text("utf-8"), flags=re.MULTILINE), "utf-8")
    write_atomically(asked.out / "bottleneck.md", render(page).encode())
    return 0


def render(page: Page) -> str:
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=FileSystemLoader(HERE), **options)
    environment.filters |= {"nats": "{:.2f}".format, "signed": signed, "table": as_table}
    return environment.get_template("bottleneck.md.j2").render(**page.numbers)


def signed(x: float) -> str:
    """A difference in nats, with its sign unless it rounds to nothing."""
    return f"{x:+.2f}".replace("-", "−") if abs(x) >= 0.005 else "0.00"


def as_table(rows: list[Mapping[str, str]]) -> str:
    """A Markdown table of rows with the same keys."""
    return tables.table(list(rows[0]), [list(row.values()) for row in rows])


# --- the linear model -------------------------------------------------------------------------------------------

DIGITS = load("digits")
SPEC = LinearVAE(data_dim=64, latent_dim=LATENTS, scale=S2**0.5)
GREY = DIGITS.train.astype(np.float64)
EIGENVALUES = np.linalg.eigvalsh(np.cov(GREY, rowvar=False, bias=True))[::-1]


def linear_model(page: Page, size: Size) -> None:
    """The closed form: which directions carry nats, how many, what each is worth."""
    served = EIGENVALUES[:LATENTS]
    kl, value = kl_per_direction(served, S2), direction_value(served, S2)
    rows = []
    for i in range(LATENTS):
        row = {"direction": str(i + 1), "λ": f"{served[i]:.3f}", "λ / σ²": f"{served[i] / S2:.2f}"}
        row |= {"KL, nats": f"{kl[i]:.3f}", "worth, nats": f"{value[i]:.3f}"}
        row["posterior variance"] = f"{min(1.0, S2 / served[i]):.3f}"
        rows.append(row)
    optimum = SPEC.optimum(GREY)
    best = float(SPEC.elbo(optimum, GREY).mean())
    lost = float(SPEC.elbo(without(optimum, 0), GREY).mean())
    page.numbers |= {
        "s2": S2, "latents": LATENTS, "directions": rows, "live": int((kl > 0).sum()), "linear_rate": kl.sum(),
        "linear_elbo": best, "cost_of_first": best - lost, "worth_of_first": value[0], "kl_of_first": kl[0],
    }  # fmt: skip
    page.figures["waterfilling"] = waterfilling()
    page.claims["losing a direction costs its value"] = abs(best - lost - value[0]) < 1e-6
    page.claims["four directions are live"] = int((kl > 0).sum()) == LIVE


def without(weights: dict[str, np.ndarray], latent: int) -> dict[str, np.ndarray]:
    """The same linear VAE with one latent collapsed: its decoder's column 0, its guide the prior."""
    weights = {name: array.copy() for name, array in weights.items()}
    weights["decoder.weight"][:, latent] = 0.0
    weights["encoder.weight"][latent] = 0.0
    weights["encoder.bias"][latent] = weights["encoder_log_scale"][latent] = 0.0
    return weights


def waterfilling() -> Figure:
    """Eigenvalues as bars; what is above the water level β σ² is carried, what is below is distortion."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    place, value = np.arange(1, LATENTS + 1), EIGENVALUES[:LATENTS]
    for axes, beta in zip(panels, (0.5, 1.0, 1.7), strict=True):
        theta = beta * S2
        axes.bar(place, np.minimum(value, theta), color=pictures.LIGHT, width=0.85)
        axes.bar(place, np.maximum(value - theta, 0.0), bottom=theta, color=pictures.DARK, width=0.85)
        axes.axhline(theta, color="0", linewidth=0.9)
        rate, live = kl_per_direction(value, S2, beta).sum(), int((value > theta).sum())
        axes.set_title(f"β = {beta:g}: {live} live, rate {rate:.2f} nats", fontsize=9)
        axes.text(LATENTS + 1.5, theta, "β σ²", ha="right", va="bottom", fontsize=8)
        axes.set_xlim(0.3, LATENTS + 1.6)
        axes.set_xlabel("principal direction")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("variance λ of the data")
    return figure


def linear_curve(page: Page, size: Size) -> None:
    """Trained under each β, the linear model is on the closed form's curve, and its slope is β."""
    found = rate_distortion(
        SPEC.numpyro(),
        GREY,
        size.linear_betas,
        num_particles=min(size.num_particles, 100),
        epochs=size.linear_steps,
        batch_size=len(GREY),
        learning_rate=Falling(0.05, 0.001, size.linear_steps),
        progress=False,
    )
    exact = np.array([closed_form(beta) for beta in np.geomspace(0.2, 2.2, 60)]).T
    rows, shortfall = [], []
    for point in found.points:
        rate, distortion = closed_form(point.beta)
        shortfall.append(point.distortion - distortion + point.beta * (point.rate - rate))
        row = {"β": f"{point.beta:g}", "rate, trained": f"{point.rate:.3f}", "closed form": f"{rate:.3f}"}
        row |= {"distortion, trained": f"{point.distortion:.3f}", "closed form ": f"{distortion:.3f}"}
        rows.append(row | {"live": str(point.active_units["z"])})
    slopes = [f"{s.slope:.3f} ± {s.se:.3f} between β = {s.low:g} and {s.high:g}" for s in found.slopes()]
    page.numbers |= {"linear_points": rows, "shortfall": max(map(abs, shortfall)), "slopes": slopes}
    page.figures["linear_curve"] = pictures.rate_distortion_plane({}, found, (exact[0], exact[1]))
    page.claims["training is on the curve"] = max(map(abs, shortfall)) < 0.03
    within = [s.low - 2 * s.se < s.slope < s.high + 2 * s.se for s in found.slopes()]
    page.claims["each slope lies between its two β"] = all(within)


def closed_form(beta: float) -> tuple[float, float]:
    """Rate and distortion of the optimum under β."""
    served = EIGENVALUES[:LATENTS]
    error = squared_error(served, S2, beta).sum() + EIGENVALUES[LATENTS:].sum()
    return kl_per_direction(served, S2, beta).sum(), 0.5 * error / S2 + 32 * np.log(2 * np.pi * S2)


@dataclass(frozen=True)
class Falling:
    """A learning rate that falls by the same factor every step."""

    start: float
    end: float
    steps: int

    def __call__(self, step: Any) -> Any:
        return self.start * (self.end / self.start) ** (step / self.steps)


def starts(page: Page, size: Size) -> None:
    """Whatever it starts from, the linear model ends at the one optimum: also from collapse, and back into it."""
    rng = np.random.default_rng(0)
    nothing = {n: 1e-3 * rng.normal(size=w.shape) for n, w in SPEC.optimum(GREY).items()}
    nothing["decoder.bias"] = GREY.mean(axis=0)
    everything = SPEC.optimum(GREY, beta=0.2)  # all eight directions are live
    programs = {f"random start {i + 1}": (SPEC.numpyro(), i) for i in range(size.seeds)}
    programs["collapsed start"] = (SPEC.numpyro().with_weights(nothing), 0)
    programs["all eight live"] = (SPEC.numpyro().with_weights(everything), 0)
    runs = {
        name: fit(
            program, GREY, seed=seed, epochs=size.linear_steps, batch_size=len(GREY),
            learning_rate=Falling(0.05, 0.001, size.linear_steps), progress=False,
        )
        for name, (program, seed) in programs.items()
    }  # fmt: skip
    best = float(SPEC.elbo(SPEC.optimum(GREY), GREY).mean())
    short = {name: best - float(SPEC.elbo(run.weights, GREY).mean()) for name, run in runs.items()}
    live = {name: int(live_directions(run.weights).sum()) for name, run in runs.items()}
    rows = [
        {"start": name, "short of the optimum, nats": f"{short[name]:.4f}", "live directions": str(live[name])}
        for name in runs
    ]
    page.numbers |= {"starts": rows, "worst_start": max(short.values())}
    page.figures["starts"] = approach(runs, best)
    page.claims["every start reaches the optimum"] = max(short.values()) < 0.05
    page.claims["four directions live in the end"] = set(live.values()) == {LIVE}


def live_directions(weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which latents' posterior means vary, up to a rotation of the latents."""
    encoder = np.asarray(weights["encoder.weight"], np.float64)
    return np.linalg.eigvalsh(encoder @ np.cov(GREY, rowvar=False, bias=True) @ encoder.T) > 0.01


def approach(runs: Mapping[str, Run], best: float) -> Figure:
    """How far each run's bound is from the optimum, over steps."""
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axes = figure.subplots()
    for i, (name, run) in enumerate(runs.items()):
        bound = np.array([row["bound"] for row in run.history])
        starts = np.unique(np.geomspace(1, 0.8 * len(bound), 80).astype(int))
        smooth = np.array([bound[s - 1 : s + s // 4].mean() for s in starts])  # each is of one draw a datum
        style = {"color": pictures.COLOURS[i % 5], "linestyle": pictures.LINES[i % 5]}
        axes.plot(starts, best - smooth, label=name, linewidth=1.4, **style)
    axes.set(xlabel="step", ylabel="nats below the optimum", yscale="symlog", ylim=(-0.2, None), xscale="log")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


# --- equal likelihoods at unequal rates -----------------------------------------------------------------------------


def equal_likelihood(page: Page, size: Size) -> None:
    """The page's own example: one likelihood, any rate. It is run here as it stands on the page."""
    found: dict[str, Any] = {}
    template = (HERE / "bottleneck.md.j2").read_text("utf-8")
    (example,) = re.findall(r"```python\n(# One likelihood.*?)```", template, flags=re.DOTALL)
    exec(compile(example, "docs/bottleneck.md", "exec"), found)
    measured = found["measured"]
    rows = [
        {
            "share": f"{s:g}",
            "rate": f"{e.rate:.3f}",
            "distortion": f"{e.distortion:.3f}",
            "NLL": f"{e.nll:.3f}",
        }
        for s, e in measured.items()
    ]
    nll = [e.nll for e in measured.values()]
    page.numbers["shares"] = rows
    models = {f"share {s:g}": e for s, e in measured.items()}
    page.figures["equal_likelihood"] = pictures.rate_distortion_plane(models)
    page.claims["the likelihoods are equal"] = max(nll) - min(nll) < 1e-3
    page.claims["the rates are not"] = (
        max(e.rate for e in measured.values()) > 1 > min(e.rate for e in measured.values())
    )


# --- a VAE on digits ------------------------------------------------------------------------------------------------


def objectives(size: Size) -> dict[str, Objective]:
    return {
        "ELBO": ELBO(),
        "annealed KL": AnnealedKL(ELBO(), warmup=size.epochs / 2),
        "free bits": FreeBits(ELBO(), free_bits=0.25),
        "IWAE-10": IWAE(num_particles=10),
    }


def vae(size: Size) -> Any:
    return VAE(64, latent_dim=VAE_LATENTS, network=MLP(hidden=size.hidden)).numpyro()


def options(size: Size) -> dict[str, Any]:
    return {
        "epochs": size.epochs, "batch_size": BATCH, "learning_rate": 3e-3, "binarize": "stochastic", "progress": False,
    }  # fmt: skip


def digits(page: Page, size: Size) -> None:
    """A VAE's own curve: what it gives up under each β, and where its nats go under β = 1."""
    curve = rate_distortion(
        vae(size), DIGITS.train, size.betas, test=DIGITS.test, num_particles=size.num_particles, **options(size)
    )
    page.numbers["vae_points"] = [
        {
            "β": f"{p.beta:g}", "rate": f"{p.rate:.2f} ± {p.rate_se:.2f}",
            "distortion": f"{p.distortion:.2f} ± {p.distortion_se:.2f}", "−ELBO": f"{-p.elbo:.2f}",
            "NLL": f"{p.nll:.2f} ± {p.nll_se:.2f}", "active units": str(p.active_units["z"]),
        }
        for p in curve.points
    ]  # fmt: skip
    page.figures["vae_curve"] = pictures.rate_distortion_plane({}, curve)
    page.figures["collapse"] = pictures.collapse_curve({f"β = {p.beta:g}": p.collapse_epsilon for p in curve.points})
    plain = next(p for p in curve.points if p.beta == 1.0)
    found = bottleneck(plain.run.program, plain.run.prepare(DIGITS.test), num_data=None)
    page.numbers |= {
        "surgery": found, "log_num_data": float(np.log(found.num_data)), "active": plain.active_units["z"],
        "num_test": found.num_data, "num_particles": size.num_particles, "epochs": size.epochs,
    }  # fmt: skip
    page.figures["aggregate"] = pictures.aggregate_posterior(plain.run, DIGITS.test, DIGITS.test_labels)
    page.claims |= _claims_of_the_curve(curve)


def _claims_of_the_curve(curve: RateDistortion) -> dict[str, bool]:
    rate = [p.rate for p in curve.points]
    best = min(curve.points, key=lambda p: -p.elbo)
    return {
        "the rate falls as β rises": rate == sorted(rate, reverse=True),
        "β = 1 has the best ELBO of the sweep, within its error": -best.elbo
        > -next(p for p in curve.points if p.beta == 1.0).elbo - 3 * 0.3,
    }


def remedies(page: Page, size: Size) -> None:
    """The same VAE under four objectives, several seeds each."""
    runs: dict[str, list[Run]] = {
        name: fit(vae(size), DIGITS.train, objective=objective, replicates=size.seeds, **options(size))
        for name, objective in objectives(size).items()
    }
    measured = {n: [r.evaluate(DIGITS.test, num_particles=size.num_particles) for r in rs] for n, rs in runs.items()}
    rows, mean = [], {}
    for name, found in measured.items():
        figures: dict[str, Callable[[Any], float]] = {
            "NLL": lambda e: e.nll, "−ELBO": lambda e: -e.elbo, "rate": lambda e: e.rate,
            "distortion": lambda e: e.distortion, "active units": lambda e: e.total_active_units,
        }  # fmt: skip
        values = {key: [get(e) for e in found] for key, get in figures.items()}
        mean[name] = {key: float(np.mean(v)) for key, v in values.items()}
        row = {"objective": name}
        for key, v in values.items():
            digits = 0 if key == "active units" else 2
            row[key] = f"{min(v):.{digits}f} – {max(v):.{digits}f}"
        rows.append(row)
    page.numbers |= {"vae_latents": VAE_LATENTS, "remedies": rows, "seeds": size.seeds, "mean": mean}
    page.figures["rates"] = pictures.kl_per_dimension({name: found[0] for name, found in measured.items()})
    page.figures["remedies"] = pictures.rate_distortion_plane({name: found[0] for name, found in measured.items()})
    plain, eased = mean["ELBO"], [mean["annealed KL"], mean["free bits"]]
    page.claims |= {
        "annealing and free bits carry more": min(m["rate"] for m in eased) > plain["rate"],
        "and use more units": min(m["active units"] for m in eased) > plain["active units"],
        "annealing leaves the ELBO as it is": abs(eased[0]["−ELBO"] - plain["−ELBO"]) < 0.1,
        "free bits cost ELBO": eased[1]["−ELBO"] > plain["−ELBO"] + 0.1,
        "annealing and IWAE have a better likelihood": max(eased[0]["NLL"], mean["IWAE-10"]["NLL"]) < plain["NLL"],
        "IWAE has the lowest rate": min(mean, key=lambda n: mean[n]["rate"]) == "IWAE-10",
        "IWAE has the best likelihood": min(mean, key=lambda n: mean[n]["NLL"]) == "IWAE-10",
        "IWAE has the loosest bound": max(mean, key=lambda n: mean[n]["−ELBO"]) == "IWAE-10",
    }


# --- the study of local minima ----------------------------------------------------------------------------------------


def study(page: Page, size: Size) -> None:
    page.numbers["study"] = study_block()


def study_block() -> str:
    """What ``benchmarks/local_minima.py`` found, where its results are there."""
    writer = tables.WRITERS.get("local_minima")
    if not STUDY.exists() or writer is None:
        return "Its results are not here yet."
    record = json.loads(STUDY.read_text("utf-8"))
    return "\n\n".join(part for part in (record["question"], writer(record), tables._checks(record)) if part)


def rewrite_study(path: Path) -> None:
    """Put the study's results as they are now into a page that is there."""
    page, count = re.subn(MARKED, lambda found: f"{found[1]}{study_block()}{found[2]}", path.read_text("utf-8"))
    assert count == 1, f"{path} has no place for the study"
    write_atomically(path, page.encode())


MARKED = re.compile(r"(<!-- study -->\n).*?(\n<!-- /study -->)", re.DOTALL)

PARTS = (linear_model, linear_curve, starts, equal_likelihood, digits, remedies, study)

if __name__ == "__main__":
    sys.exit(main())
