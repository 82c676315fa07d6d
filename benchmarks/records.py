"""Result files of the benchmarks:

JSON that says under which settings, seeds, versions and machine each figure was measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class Record:
    """A result file that grows cell by cell, so that a stopped benchmark goes on where it was.

    Args:
        path: the JSON file. An existing one is continued; cells measured under another configuration are kept apart
            by their key.
        question: what the benchmark asks.
        config: its arguments (a frozen dataclass).
    """

    def __init__(self, path: Path, question: str, config: Any, engines: tuple[str, ...]):
        self.path = Path(path)
        versions = {k: v for engine in engines for k, v in environment(engine).items()}
        self.content: dict[str, Any] = {"question": question, "cells": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        # a folder is not a setting
        settings = {k: v for k, v in dataclasses.asdict(config).items() if not isinstance(v, Path | None)}
        self.content |= {"config": settings, "versions": versions, "machine": machine()}

    def cell(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of one cell: measured now, unless the file has them already."""
        if key not in self.content["cells"]:
            self.content["cells"][key] = measure()
            self.save()
        return self.content["cells"][key]

    def check(self, checks: dict[str, bool]) -> None:
        """Record whether each claim held."""
        self.content["checks"] = checks
        self.save()

    def save(self) -> None:
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())
