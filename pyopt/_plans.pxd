# What a step needs to know of a param group.

from cpython.object cimport PyObject

from pyopt._engine cimport STATES, Rule


cdef class Plan:
    cdef dict seen
    cdef readonly dict options
    cdef readonly Rule rule
    cdef readonly tuple names
    cdef PyObject *name[STATES]
    cdef object first_name
    cdef readonly dict storage  # None where it is the usual one
    cdef object master_name  # of what the state keeps beside a short parameter
    cdef tuple aside_names  # of what it keeps beside its arrays
    cdef object unsigned  # those that are never negative
    cdef bint chance
    cdef double max_row_norm  # 0 for none
    cdef bint stateless, finite, takes_rows
    cdef object too_large


cdef bint is_as_seen(group, dict seen) except -1
cdef Plan new_plan(optimizer, Py_ssize_t g, group, bint counts_steps)
