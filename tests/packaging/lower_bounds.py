"""Print the oldest version that pyproject.toml admits of everything a user may install, as pip takes them.

pip install $(python tests/packaging/lower_bounds.py) -e '.[test]'
"""

from __future__ import annotations

import re
from pathlib import Path

import tomllib

WITHOUT = ("test", "dev", "browser")
"""Extras that are tools of ours: users do not have them."""


def lower_bounds(pyproject: Path) -> list[str]:
    """`name==version` for each dependency and each of the users' extras.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in WITHOUT]
    found = []
    for line in sum(extras, project["dependencies"]):
        bound = re.match(r"([\w.-]+)>=([\w.]+)", line)
        if bound is None:
            raise ValueError(f"no lower bound: {line}")
        found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    print(" ".join(lower_bounds(Path(__file__).resolve().parents[2] / "pyproject.toml")))
