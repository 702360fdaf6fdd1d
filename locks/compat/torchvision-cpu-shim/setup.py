"""Puts the .pth file next to the module; pyproject.toml cannot say that."""
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "torchvision_cpu_shim.pth"


class WithPth(build_py):
    def run(self):
        super().run()
        self.copy_file(PTH, str(Path(self.build_lib, PTH)), preserve_mode=False)

    def get_outputs(self, include_bytecode=1):
        return super().get_outputs(include_bytecode) + [str(Path(self.build_lib, PTH))]


setup(cmdclass={"build_py": WithPth})
