"""The metadata is in pyproject.toml. This maps the linked packages where a checkout has no symbolic links.

With git's ``core.symlinks=false`` (a default on Windows) the links ``elbozoo/zoo -> ../zoo`` and its siblings are
checked out as small text files, and setuptools would leave those packages out in silence.
"""

from pathlib import Path

from setuptools import Distribution, find_packages, setup

LINKED = ("zoo", "guides", "inference", "benchmarks")


class LinklessDistribution(Distribution):
    """Adds the linked packages that the search in pyproject.toml cannot reach."""

    def parse_config_files(self, *args, **kwargs):
        super().parse_config_files(*args, **kwargs)
        for name in LINKED:
            package = f"elbozoo.{name}"
            if not Path("elbozoo", name).is_dir() and package not in self.packages:
                self.package_dir[package] = name
                self.packages += [package, *(f"{package}.{sub}" for sub in find_packages(name))]


setup(distclass=LinklessDistribution)
