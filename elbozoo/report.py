"""Offline HTML pages: about several runs, how they differ; about one run, whether it is stuck and why.

``runs`` and ``evaluations`` are dicts with the same labels. Every figure is in nats per datum. The pictures are
those of :mod:`elbozoo.pictures`.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from elbozoo import pictures
from elbozoo._version import __version__
from elbozoo.inference import Diagnosis, Evaluation, RateDistortion, Run
from elbozoo.inference.storage import write_atomically
from elbozoo.options import describe
from elbozoo.pictures import Evaluations, Runs

# --- the table --------------------------------------------------------------------------------------------------


def results(runs: Runs, evaluations: Evaluations, paired: bool) -> list[dict[str, str]]:
    """The table of runs, one dict of printable cells a run.

    Args:
        runs: by label.
        evaluations: by the same labels.
        paired: whether all were evaluated on the same data, so that their NLLs may be subtracted datum by datum.
    """
    first = next(iter(evaluations.values()))
    rows = []
    for label, run in runs.items():
        found = evaluations[label]
        row = {"run": label, "NLL ± s.e.": f"{found.nll:.2f} ± {found.nll_se:.2f}"}
        if paired and len(runs) > 1:
            row["less the first's"] = "" if found is first else _difference(found, first)
        units = sum(len(a) for a in found.activity.values())
        row |= {"ELBO": f"{found.elbo:.2f}", "rate": f"{found.rate:.2f}", "distortion": f"{found.distortion:.2f}"}
        row["active units"] = "" if found.total_active_units is None else f"{found.total_active_units}/{units}"
        row["seconds"] = f"{sum(r['seconds'] for r in run.history):.1f}"
        rows.append(row)
    return rows


def _difference(a: Evaluation, b: Evaluation) -> str:
    """The mean difference of two NLLs with its standard error from the choice of data."""
    gap = b.per_datum.log_lik_estimate - a.per_datum.log_lik_estimate
    return f"{gap.mean():+.2f} ± {gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan:.2f}"


def caption(evaluations: Evaluations, paired: bool) -> str:
    """What the table's numbers are."""
    data = " or ".join(str(n) for n in sorted({e.num_data for e in evaluations.values()}))
    particles = " or ".join(str(k) for k in sorted({e.num_particles for e in evaluations.values()}))
    text = (
        f"Nats per datum over {data} data. NLL with K = {particles} importance samples, s.e. from the choice of data. "
    )
    if not paired:
        text += "The runs were not measured on one and the same data: their NLLs do not compare. "
    elif len(evaluations) > 1:
        text += "Less the first's: the NLLs subtracted datum by datum. "
    return text + "Seconds of training."


# --- the pages --------------------------------------------------------------------------------------------------


def write_report(
    runs: Runs, evaluations: Evaluations, data: Mapping[str, Any], path: str | Path, *, paired: bool = True
) -> Path:
    """One self-contained HTML page: table, curves, rates, samples, reconstructions, settings, versions.

    Args:
        runs: by label.
        evaluations: by the same labels.
        data: by the same labels, data to reconstruct, as they were before binarisation.
        path: the file; written whole or not at all.
        paired: see :func:`results`.

    Raises: WriteFailed.
    """
    return write_page("report.html.j2", path, **_parts(runs, evaluations, data, paired))


def write_diagnosis(
    run: Run,
    diagnosis: Diagnosis,
    data: Any,
    path: str | Path,
    *,
    label: str = "this run",
    labels: ArrayLike | None = None,
    curve: RateDistortion | None = None,
) -> Path:
    """One self-contained HTML page on whether a run is stuck and why: all of its report, and the diagnosis.

    Args:
        run: the run.
        diagnosis: what :func:`elbozoo.inference.diagnose` found.
        data: data to draw, as they were before binarisation.
        path: the file; written whole or not at all.
        label: the run's name on the page.
        labels: a label a datum, for the picture of the aggregate posterior.
        curve: a sweep over β, for the rate–distortion plane.

    Raises: WriteFailed.
    """
    found, gaps = diagnosis.bottleneck, diagnosis.gaps
    return write_page(
        "diagnosis.html.j2",
        path,
        **_parts({label: run}, {label: diagnosis.evaluation}, {label: data}, paired=True),
        verdict=diagnosis.verdict,
        figures=figures(diagnosis),
        plane=as_uri(pictures.rate_distortion_plane({label: found}, curve), "svg"),
        waterfall=None if gaps is None else as_uri(pictures.gap_waterfall(gaps), "svg"),
        collapse=as_uri(pictures.collapse_curve({label: found}), "svg"),
        ranks=None if diagnosis.calibration is None else as_uri(pictures.rank_histograms(diagnosis.calibration), "svg"),
        aggregate=as_uri(pictures.aggregate_posterior(run, data, labels), "svg"),
        interpolations=as_uri(pictures.interpolations(run, data), "png"),
        traversals=as_uri(pictures.traversals(run, data), "png"),
        summary=json.dumps(diagnosis.summary(), indent=2, ensure_ascii=False),
    )


def figures(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    """The figures behind a verdict: what it is, its value with its standard error, what it means."""
    evaluation, found, gaps = diagnosis.evaluation, diagnosis.bottleneck, diagnosis.gaps
    nll = f"NLL, K = {evaluation.num_particles}"
    rows: list[tuple[str, float, float | None, str]]
    rows = [(nll, evaluation.nll, evaluation.nll_se, "−log p(x) by importance sampling; lower is better")]
    if diagnosis.exact_nll is not None:
        rows.append(
            ("NLL, exact", diagnosis.exact_nll, diagnosis.exact_nll_se, "−log p(x) in closed form or by enumeration")
        )
    rows += [
        ("−ELBO", -evaluation.elbo, None, "rate + distortion"),
        ("gap", diagnosis.gap, None, "log p(x) − ELBO: exactly, or at least so much"),
    ]
    if gaps is not None:
        rows += [
            ("amortisation gap", gaps.amortisation, gaps.amortisation_se, "what one network for all data loses"),
            ("approximation gap", gaps.approximation, gaps.approximation_se, "what the guide's family loses"),
        ]
    information, of_data = found.mutual_information, "the part of the rate that tells data apart"
    rows += [
        ("rate", found.rate, found.rate_se, "E KL(q(z|x) ‖ p(z)): what the latents carry"),
        ("distortion", found.distortion, found.distortion_se, "−E log p(x|z): what decoding loses"),
        ("I_q(x; z)", information, found.mutual_information_se, of_data),
        ("KL(q(z) ‖ p(z))", found.marginal_kl, found.marginal_kl_se, "the part of the rate that misses the prior"),
    ]
    return [(name, _with_error(value, se), text) for name, value, se, text in rows]


def _with_error(value: float, se: float | None) -> str:
    return f"{value:.3f}" + (f" ± {se:.3f}" if se is not None and math.isfinite(se) else "")


def _parts(runs: Runs, evaluations: Evaluations, data: Mapping[str, Any], paired: bool) -> dict[str, Any]:
    """What every page has."""
    return {
        "title": ", ".join(runs),
        "version": __version__,
        "rows": results(runs, evaluations, paired),
        "caption": caption(evaluations, paired),
        "objectives": {label: describe(run.objective) for label, run in runs.items()},
        "curves": as_uri(pictures.curves(runs), "svg"),
        "kl": as_uri(pictures.kl_per_dimension(evaluations), "svg"),
        "samples": {label: as_uri(pictures.samples(run, data=data[label]), "png") for label, run in runs.items()},
        "reconstructions": {
            label: as_uri(pictures.reconstructions(run, data[label]), "png") for label, run in runs.items()
        },
        "binarized": any(run.config["binarize"] != "none" for run in runs.values()),
        "configs": {label: json.dumps(run.config, indent=2) for label, run in runs.items()},
    }


def write_page(template: str, path: str | Path, **content: Any) -> Path:
    """Fill a template of the package and write the page, whole or not at all. Raises: WriteFailed."""
    loader = FunctionLoader(lambda name: files("elbozoo").joinpath(name).read_text("utf-8"))
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    html = Environment(loader=loader, **options).get_template(template).render(**content)
    write_atomically(Path(path), html.encode())
    return Path(path)


def as_uri(figure: Figure, kind: str) -> str:
    """A figure as a data URI, so that the page needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
