"""Result files of the benchmarks: JSON with the settings, seeds, versions and machine of each figure."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elbozoo.inference.errors import must
from elbozoo.inference.storage import write_atomically
from elbozoo.inference.training import environment


def machine() -> dict[str, Any]:
    """The processor, its cores and the operating system."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")),
            model,
        )
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def accelerator(engines: tuple[str, ...]) -> str | None:
    """The kind of device that the engines' arrays are made on by default, where it is no CPU."""
    if "numpyro" in engines:
        import jax

        kinds = {d.device_kind for d in jax.devices() if d.platform != "cpu"}
        return ", ".join(sorted(kinds)) or None
    return None


@contextmanager
def compiled_once() -> Iterator[None]:
    """Inside, what JAX compiles is kept for later cells of the same program, though each of them makes it anew.

    A folder that JAX has been given already (``JAX_COMPILATION_CACHE_DIR``) is left as it is, and serves.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        compilation_cache.reset_cache()  # it holds on to the folder that it was first used with
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


def settings_of(config: Any) -> dict[str, Any]:
    """A script's arguments; a folder is not a setting."""
    return {k: v for k, v in dataclasses.asdict(config).items() if not isinstance(v, Path | None)}


def versions_of(engines: tuple[str, ...]) -> dict[str, str]:
    """Of the libraries that the engines' figures depend on."""
    return {k: v for engine in engines for k, v in environment(engine).items()}


def about(question: str, config: Any, engines: tuple[str, ...]) -> dict[str, Any]:
    """The head of a result file: the first paragraph of ``question``, the settings, the versions and the machine."""
    on = machine() | {"accelerator": accelerator(engines)}
    facts = {"config": settings_of(config), "versions": versions_of(engines), "machine": on}
    return {"question": " ".join(question.split("\n\n")[0].split()), **json.loads(json.dumps(facts))}


def differences(
    found: dict[str, Any],
    facts: dict[str, Any],
    grid: tuple[str, ...],
    parts: tuple[str, ...] = ("config", "versions", "machine"),
) -> list[str]:
    """What a result file says otherwise than ``facts``, in these parts of its head, as "part.name".

    What it does not name is None; ``grid`` may differ, and so may the build of the operating system.
    """
    return [
        f"{part}.{name}"
        for part in parts
        for name, value in facts[part].items()
        if name not in (*grid, "system") and found[part].get(name) != value
    ]


def write_result(path: Path, content: Any) -> None:
    """Write a result file, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


class Record:
    """A result file that grows cell by cell, so that a stopped benchmark goes on where it was.

    Args:
        path: the JSON file. An existing one is continued, if it is of the same settings, versions and machine (the
            build of its operating system aside); a ``note`` in it, on how it was measured, stays.
        question: what the benchmark asks: the first paragraph of its docstring.
        config: its arguments (a frozen dataclass).
        engines: whose versions count.
        grid: fields of ``config`` that say which cells there are; they may differ when a file is continued, whose head
            then has those of both.
        timed: whether what is claimed are times. If not, the file may be continued on another machine, which each
            cell measured there then names.

    Raises: InvalidArgument for a file of other settings.
    """

    def __init__(
        self,
        path: Path,
        question: str,
        config: Any,
        engines: tuple[str, ...],
        grid: tuple[str, ...] = (),
        timed: bool = True,
    ):
        self.path = Path(path)
        facts = about(question, config, engines)
        self.machine = facts["machine"]
        kept: dict[str, Any] = {"cells": {}}
        if self.path.exists() and (found := json.loads(self.path.read_text()))["cells"]:
            kept = {part: found[part] for part in ("cells", "note") if part in found}
            if other := differences(found, facts, grid, ("config", "versions", *(("machine",) if timed else ()))):
                todo = "Pass another --results file, or delete this one to measure anew"
                raise must(str(self.path), "be of the same settings, versions and machine", f"other {other}", todo)
            if not timed:
                kept["machine"] = found["machine"]
            facts["config"] |= {name: _both(found["config"].get(name), facts["config"][name]) for name in grid}
        self.content = facts | kept

    def cell(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of one cell: measured now, unless the file has them already."""
        if key not in self.content["cells"]:
            elsewhere = {} if self.machine == self.content["machine"] else {"machine": self.machine}
            self.content["cells"][key] = measure() | elsewhere
            self.save()
        return self.content["cells"][key]

    def check(self, checks: dict[str, bool]) -> None:
        """Record whether each claim held."""
        self.content["checks"] = checks
        self.save()

    def save(self) -> None:
        write_result(self.path, self.content)


def _both(before: Any, now: Any) -> Any:
    """The values of a list that a file had, then those that are new; of anything else what it is now."""
    if isinstance(before, list) and isinstance(now, list):
        return [*before, *(value for value in now if value not in before)]
    return now
