"""Prints what pyproject.toml asks for: `cranium` is its dependencies, any other word one of its extras, one a line."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for word in sys.argv[1:]:
    print(
        *(project["dependencies"] if word == "cranium" else project["optional-dependencies"][word]), sep="\n"
    )
