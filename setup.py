"""All of the project's description is in pyproject.toml. This puts configs/ into a wheel, as ullme/configs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """An editable install reads configs/ where it lies."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "ullme", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPy})
