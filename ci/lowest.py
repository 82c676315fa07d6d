"""Print the oldest versions that pyproject.toml allows, as pip's constraints: ``python ci/lowest.py numpyro``."""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"][sys.argv[1]]]:
    found = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
    if not found:
        sys.exit(f"{requirement!r} in pyproject.toml must begin with name>=version. Give its oldest version.")
    print("==".join(found.groups()))
