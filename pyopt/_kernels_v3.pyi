from pyopt._kernels import adagrad as adagrad
from pyopt._kernels import adam as adam
from pyopt._kernels import lion as lion
from pyopt._kernels import rmsprop as rmsprop
from pyopt._kernels import roof as roof
from pyopt._kernels import sgd as sgd
