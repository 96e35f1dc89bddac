"""Prints the dependencies of pyproject.toml at their lowest declared versions, for `pip install -r`."""

import pathlib
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    print(requirement.replace(">=", "=="))
