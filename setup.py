"""Builds the kernels into the wheel, for all processors of its kind; everything else is in pyproject.toml.

Without a compiler the wheel is made all the same, and compiles them at first use where it finds one. An editable install gets none:
there every change of the sources is compiled by itself.
"""

import runpy
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "src/pipeoptim/kernels"
compiler = runpy.run_path(f"{KERNELS}/compiler.py")


class BuildKernels(build_ext):
    """Compiles a plain shared library, which is no extension module: it is called through ctypes."""

    def run(self):
        if not (self.inplace or self.editable_mode):
            super().run()

    def build_extension(self, ext):
        try:
            compiler["compile_portable"](compiler["find_compiler"](), Path(self.get_ext_fullpath(ext.name)).absolute())
        except compiler["BuildError"] as error:
            warnings.warn(f"the wheel gets no compiled kernels, because {error}; {error.remedy}", stacklevel=1)

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


class AnyPython(bdist_wheel):
    """The library knows nothing of Python's binary interface, so one wheel serves every version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


sources = [f"{KERNELS}/{name}" for name in ("optim.c", "dispatch.c")]
setup(
    ext_modules=[Extension("pipeoptim.kernels.optim", sources, depends=[f"{KERNELS}/vector.h"])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
