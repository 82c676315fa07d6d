"""The package as people get it: what a wheel holds, what an import loads, which names it answers to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import elbozoo

ROOT = Path(elbozoo.__file__).parents[1]
LINKED = ("benchmarks", "guides", "inference", "zoo")
ENGINES = {
    "pyro": ("torch", "pyro", "zuko", "torchdiffeq"),
    "numpyro": ("jax", "jaxlib", "numpyro", "flax", "optax", "flowjax", "equinox", "diffrax"),
}

checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="elbozoo is installed, not checked out")


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that finds this elbozoo, and cwd before it, as `python -c` does."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


# --- what an import loads ---

HIDE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
"""Makes an installed engine look as though it were not."""


def test_import_loads_neither_engine(tmp_path: Path):
    code = "import sys, elbozoo; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'elbozoo'" in done.stdout
    assert not [module for modules in ENGINES.values() for module in modules if f"'{module}'" in done.stdout]


@pytest.mark.parametrize("absent", sorted(ENGINES))
def test_one_engine_is_enough(absent: str, tmp_path: Path):
    """Every module imports without the absent engine, but those that are named for it (``model_pyro``, ``x_torch``)."""
    unusable = {name for names in ENGINES.values() for name in names if name in ENGINES[absent] or not find_spec(name)}
    modules = {
        ".".join(("elbozoo", *part, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for part in ((), ("zoo",), ("guides",), ("inference",))
        for folder in [Path(import_module(".".join(("elbozoo", *part))).__path__[0])]
        for path in folder.rglob("*.py")
        if path.stem != "__main__" and not unusable & set(path.stem.split("_"))
    }
    assert modules >= {"elbozoo", "elbozoo.zoo", "elbozoo.inference.objectives"}
    done = python(HIDE.format(hidden=ENGINES[absent]) + f"import {', '.join(sorted(modules))}", tmp_path)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve(tmp_path: Path):
    """In a new interpreter, where no other test has imported the parts already."""
    done = python("import elbozoo; print([getattr(elbozoo, name).__name__ for name in elbozoo.__all__[1:]])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([f"elbozoo.{name}" for name in LINKED])
    assert dir(elbozoo) == sorted(elbozoo.__all__)


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'elbozoo' has no attribute 'registry'"):
        _ = elbozoo.registry  # type: ignore[attr-defined]


def test_version_is_the_installed_one():
    try:
        installed = version("elbozoo")
    except PackageNotFoundError:
        pytest.skip("elbozoo is on the path, not installed")
    assert elbozoo.__version__ == installed


@pytest.mark.arviz
def test_arviz_writes_netcdf_with_what_we_depend_on(tmp_path: Path):
    """0.23 on Python 3.11 and 1.x from 3.12 on, each with the netCDF engine that the package brings."""
    import arviz

    z = np.arange(12.0).reshape(1, 4, 3)
    if sys.version_info < (3, 12):
        assert arviz.__version__.startswith("0.23")
        data = arviz.from_dict(posterior={"z": z})
    else:
        assert int(arviz.__version__.partition(".")[0]) >= 1
        data = arviz.from_dict({"posterior": {"z": z}})
    data.to_netcdf(str(tmp_path / "z.nc"), engine="h5netcdf")
    read = arviz.from_netcdf(str(tmp_path / "z.nc"), engine="h5netcdf")
    np.testing.assert_array_equal(read["posterior"]["z"].to_numpy(), z)


# --- the links ---


@checkout
@pytest.mark.parametrize("name", LINKED)
def test_bare_name_is_refused(name: str):
    done = python(f"import {name}", ROOT)
    assert done.returncode == 1
    assert re.search(rf"ImportError: .*import elbozoo\.{name}", done.stderr), done.stderr


@pytest.mark.parametrize("name", LINKED)
def test_users_own_module_does_not_shadow(name: str, tmp_path: Path):
    (tmp_path / f"{name}.py").write_text("mine = True\n")
    done = python(f"import {name}, elbozoo.{name}; assert {name}.mine; print(elbozoo.{name}.__file__)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(import_module(f"elbozoo.{name}").__path__[0] + "/__init__.py")


@checkout
@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative(name: str):
    """As git stores it: a link, or (core.symlinks=false) a text file, that holds the relative target."""
    link = ROOT / "elbozoo" / name
    assert (os.readlink(link) if link.is_symlink() else link.read_text()) == f"../{name}"


# --- what a wheel holds ---


def source_tree(target: Path, links: bool) -> Path:
    """A copy of what setuptools reads, with the links or with git's stand-ins for them."""
    patterns = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "elbozoo/**/*"]
    patterns += [f"{name}/**/*" for name in LINKED] + ["tests/*.py"]
    for source in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        if source.is_file() and "__pycache__" not in source.parts and not through_link(source):
            copy = target / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    for depth in ("zoo/deep", "zoo/deep/deeper"):  # packages further below a link than there may be today
        (target / depth).mkdir()
        (target / depth / "__init__.py").touch()
    for name in LINKED:
        link = target / "elbozoo" / name
        link.symlink_to(f"../{name}", target_is_directory=True) if links else link.write_text(f"../{name}")
    return target


def through_link(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return parts[0] == "elbozoo" and len(parts) > 1 and parts[1] in LINKED


def build(tree: Path, what: str, out: Path) -> Path:
    """Build by setuptools' own hook (wheel, sdist or editable), in this environment: nothing is downloaded."""
    code = f"from setuptools.build_meta import build_{what} as build; import sys; print(build(sys.argv[1]))"
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.strip().splitlines()[-1]


def files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a checkout with symbolic links."""
    folder = tmp_path_factory.mktemp("links")
    return build(source_tree(folder / "tree", links=True), "wheel", folder)


@checkout
def test_wheel_holds_every_source_file(wheel: Path):
    """All code, and whatever else lies in a package (``package-data`` in pyproject.toml has to name its kind)."""
    expected = {
        f"elbozoo/{path.relative_to(ROOT).as_posix()}".replace("elbozoo/elbozoo/", "elbozoo/")
        for name in ("elbozoo", *LINKED)
        for path in (ROOT / name).rglob("*")
        if path.is_file() and not through_link(path) and path.suffix not in (".pyc", ".md")
        if path.suffix == ".py" or (path.parent / "__init__.py").exists()
    }
    expected |= {"elbozoo/zoo/deep/__init__.py", "elbozoo/zoo/deep/deeper/__init__.py"}
    assert set(files(wheel)) == expected


@checkout
def test_wheel_holds_real_files_under_one_name(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        assert {name.partition("/")[0].partition("-")[0] for name in archive.namelist()} == {"elbozoo"}
        assert not [item.filename for item in archive.infolist() if item.external_attr >> 28 == 0o12]  # a link's mode
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        assert f"Version: {elbozoo.__version__}\n" in archive.read(metadata).decode()
        assert [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]


@checkout
def test_wheel_is_the_same_without_links(wheel: Path, tmp_path: Path):
    assert files(build(source_tree(tmp_path / "tree", links=False), "wheel", tmp_path / "out")) == files(wheel)


@checkout
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_wheel_is_the_same_through_an_sdist(links: bool, wheel: Path, tmp_path: Path):
    sdist = build(source_tree(tmp_path / "tree", links), "sdist", tmp_path / "out")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    tree = tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz")
    assert (tree / "CHANGELOG.md").exists()
    assert files(build(tree, "wheel", tmp_path / "out")) == files(wheel)


@checkout
def test_editable_install_is_a_plain_path(tmp_path: Path):
    """Type checkers and editors follow a path, and do not run an import hook."""
    tree = source_tree(tmp_path / "tree", links=True)
    editable = build(tree, "editable", tmp_path / "out")
    (path_file,) = files(editable)
    assert path_file.endswith(".pth")
    with zipfile.ZipFile(editable) as archive:
        assert Path(archive.read(path_file).decode().strip()) == tree


# --- the suite's own ground ---


def test_annotations_are_checked_in_tests():
    from jaxtyping import TypeCheckError

    from elbozoo.inference.errors import must

    with pytest.raises(TypeCheckError, match="parameter 'name'"):
        must(1, "be text", 1, "Pass text")  # type: ignore[arg-type]


@pytest.mark.numpyro
def test_jax_is_float64_on_the_cpu():
    import jax

    assert jax.numpy.ones(1).dtype == "float64"
    assert {device.platform for device in jax.devices()} == {"cpu"}


@pytest.mark.pyro
def test_torch_is_float64():
    import torch

    assert torch.ones(1).dtype == torch.float64
