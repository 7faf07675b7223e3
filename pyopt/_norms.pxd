# Many arrays gone over at once: their norm, a factor, a bound.

from pyopt._engine cimport Work
from pyopt._rows cimport Rows


cdef class Batch:
    cdef list held  # the objects behind the work
    cdef Work *work
    cdef Py_ssize_t count, capacity, cost

    cdef int add(self, char *data, Py_ssize_t size, int element, held, Rows rows=*) except -1
    cdef int drop_duplicates(self) except -1


cdef list power_sums(Work *work, Py_ssize_t count, double power, double scale)
