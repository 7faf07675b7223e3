# The kernels once more, compiled by setup.py for x86-64-v4; pyopt/_isa.py chooses.

include "_kernels.pyx"
