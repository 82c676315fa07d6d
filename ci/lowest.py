"""Print the oldest versions that pyproject.toml allows, as pip's constraints: ``python ci/lowest.py numpyro``."""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"][sys.argv[1]]]:
    name, oldest = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement).groups()
    print(f"{name}=={oldest}")
