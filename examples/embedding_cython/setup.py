"""The extension, with the header of pyopt: `pip install examples/embedding_cython`."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import pyopt

if __name__ == "__main__":
    trainer = Extension(
        "digits_trainer", ["digits_trainer.pyx"], include_dirs=[pyopt.get_include()], extra_compile_args=["-O3"]
    )
    setup(ext_modules=cythonize([trainer], compiler_directives={"language_level": 3}))
