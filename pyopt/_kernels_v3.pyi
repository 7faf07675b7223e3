from pyopt._kernels import *
