"""Compiles the CPU kernels when the package is built; everything else is in pyproject.toml.

Without a compiler the package is built without them: it warns, and torch's own kernels serve.
"""

import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        kernels = runpy.run_path(str(Path(__file__).parent / "kernels" / "cpu" / "build.py"))
        library: Path = kernels["LIBRARY"]
        if not self.editable_mode:
            library = Path(self.build_lib) / "cluster" / "kernels" / "cpu" / library.name
        try:
            kernels["build"](library)
        except kernels["BuildError"] as error:
            self.warn(f"the CPU kernels are left out, torch serves in their place: {error}")


class PlatformWheel(bdist_wheel):
    """For one kind of machine, but for every Python 3: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}, distclass=BinaryDistribution)
