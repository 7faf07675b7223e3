# The handler of pyopt.jax, in a capsule as XLA takes it: pyopt/_xla.h.

from cpython.pycapsule cimport PyCapsule_New

from pyopt.api cimport pyopt_api, pyopt_functions, pyopt_rule


cdef extern from "_xla.h":
    const pyopt_functions *xla_door
    void xla_step()


xla_door = pyopt_api()
step_handler = PyCapsule_New(<void *>xla_step, NULL, NULL)


def option_names(str rule):
    """The options of a rule in the order of the C door: "lr", "betas[0]", "betas[1]", ..."""
    cdef const pyopt_rule *found = xla_door.rule(xla_door.find_rule(rule.encode()))
    return [found.options[i].name.decode() for i in range(found.n_options)]
