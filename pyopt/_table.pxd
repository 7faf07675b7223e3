# The table and its rows, for the tables of other kinds of arrays (pyopt/torch).

from cpython.object cimport PyObject
from libc.stdint cimport int64_t

from pyopt._engine cimport STATES, Numbers, Rule, Work


cdef struct View:  # what a step needs to know of an array
    char *data
    const int64_t *shape
    const int64_t *strides  # of bytes or of elements: they are compared with those of arrays of the same kind
    int ndim
    int itemsize
    Py_ssize_t size


cdef char *end_of(const View *view) noexcept
cdef bint same_shape(const View *a, const View *b) noexcept
cdef bint same_order(const View *a, const View *b) noexcept


cdef struct Range:  # of addresses, the end excluded
    char *begin
    char *end


cdef enum:
    RANGES = 2 + STATES  # the most that a row lists: parameter, state and step count


cdef class Row:
    cdef object param
    cdef object grad  # this step's, from the first look until its pointer is taken
    cdef object state  # a dict: its entry of optimizer.state, or the new one that will become it
    cdef tuple names  # of the state behind each stream, None where the options need none
    cdef View p
    cdef View s[STATES]
    cdef Py_ssize_t index  # over all groups
    cdef Py_ssize_t slot  # the numbers of its step, by its step count
    cdef bint active  # whether the table steps it this time
    cdef bint fresh  # whether its state is a new one
    cdef Range gap  # between ranges of the table, where its last gradient lay
    cdef Py_ssize_t gap_version
    cdef object reason  # why this table cannot step it, None where it can

    cdef bint bind(self, param, Py_ssize_t index) except -1
    cdef Py_ssize_t find_state(self, Table table, optimizer, group) except -1
    cdef Py_ssize_t next_step(self) except -1
    cdef bint bind_state(self, Table table, tuple names) except -1
    cdef void *take_gradient(self, Table table) except? NULL
    cdef int commit(self, Table table, optimizer) except -1
    cdef int list_ranges(self, list ranges) except -1


cdef class Table:
    cdef list rows  # one Row per parameter, in the order of the groups
    cdef list seen  # copies of the groups as they were when last checked
    cdef list plain  # per group: its hyper-parameters as Python numbers
    cdef list names  # per group: the state behind each stream of its rule
    cdef list counts  # per slot, a set of numbers of this step: the step count that it is for
    cdef double gradient_factor
    cdef bint counts_steps
    cdef bint stateless  # whether the rule keeps nothing with the options of the group at hand
    cdef object states  # optimizer.state
    cdef Py_ssize_t cursor  # how far find_state has come in it
    cdef Work *work
    cdef Numbers *numbers
    cdef Range *ranges  # where parameters and state lie, in ascending order
    cdef Py_ssize_t capacity, count, cost, n_ranges
    cdef Py_ssize_t version  # of the ranges
    cdef bint busy

    cdef PyObject *state_of(self, param) except? NULL
    cdef Row new_row(self)
    cdef int collect(self, optimizer, list grads) except -1
    cdef bint bind(self, optimizer, list groups) except -1
    cdef int before_sweep(self, optimizer) except -1
    cdef int reserve(self, Py_ssize_t n) except -1
    cdef int measure(self) except -1
    cdef list disjoint(self, list ranges)
    cdef int add(self, Rule rule, Row row, void *gradient) except -1
    cdef bint will_be_written(self, Row row, char *begin, Py_ssize_t length) noexcept
    cdef int release(self) except -1
