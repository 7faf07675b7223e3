from cpython.object cimport PyObject
from libc.stdint cimport int64_t

from pyopt._views cimport View

cdef dict flats  # by the id of their first parameter
cdef object fold  # what puts them in the place of their parameters, see flat.py
cdef object flat_state  # the kind of optimizer.state that has some


cdef class Flat:
    cdef readonly object block
    cdef readonly list gradients  # the views
    cdef list references  # weak ones, of the parameters
    cdef readonly Py_ssize_t count
    cdef Py_ssize_t itemsize
    cdef int64_t *starts  # in elements, and the end
    cdef int64_t *layout  # of each: number of axes, shape, strides
    cdef readonly dict index  # the place of a parameter, by its id

    cdef list weak(self)
    cdef int replace_references(self, list references) except -1
    cdef bint is_at(self, PyObject *tensor, const View *block, Py_ssize_t i, const int64_t *layout,
                    list layouts) except -1
    cdef bint is_whole(self, list params, Py_ssize_t at) except -1
