# One step of an optimizer. The kinds of arrays it is made on: pyopt/_arrays.pyx, pyopt/torch/_tensors.pyx.

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t

from pyopt._asked cimport Asked, Average
from pyopt._engine cimport AVERAGES, STATES, Averaged, Extras, Numbers, Rule, Stored, Work
from pyopt._lock cimport Lock
from pyopt._plans cimport Plan
from pyopt._rows cimport Sorter, Touched
from pyopt._views cimport View


cdef enum:
    COUNTS = 4  # numbers kept per parameter: the step count and what a rule adds to it

cdef long long MOST_STEPS  # as in checks.py

cdef enum Route:
    IDLE  # no gradient
    KERNEL
    LEFT  # to whoever else can step it


cdef void hold(PyObject **place, value) noexcept


cdef struct Range:  # of addresses, the end excluded
    char *begin
    char *end


cdef struct Written:  # memory that a step writes, or a parameter that it must not write by accident
    Range range
    Py_ssize_t row
    char *reach  # where they are in order: the furthest end up to here
    Py_ssize_t is_gradient  # to be cleared; as wide as the others, so that no byte is left out


cdef struct Row:  # one parameter
    # Of this step: references, counted, and let go at its end.
    PyObject *param
    PyObject *data  # the array behind it
    PyObject *grad
    PyObject *indices  # of a row-sparse gradient, else NULL
    PyObject *values
    PyObject *entry  # its dict in optimizer.state, NULL while it has none
    PyObject *made  # its first state, a dict, which comes into the entry after the sweep; else NULL
    PyObject *state[STATES]
    PyObject *aside[1 + STATES]  # what is kept beside the parameter, and beside each state; NULL for nothing
    PyObject *count[COUNTS]
    # Of this step: numbers.
    bint has_aside
    Route route
    Py_ssize_t group
    Py_ssize_t slot  # of its scalars and its new counts
    Py_ssize_t work  # its place in the work, -1 where the sweep has nothing to do for it
    Range read  # where its gradient lies
    Py_ssize_t place  # of its parameter among all
    Py_ssize_t n_flat  # how many parameters it stands for, whose gradients stay where they are; 0 for itself alone
    bint beside  # no rule steps it, only what rides along
    bint keeps_gradient  # it cannot be filled with zeros in place, or shares memory with other things
    Range filled  # where its gradient lies that will be
    bint must_copy  # its gradient, before the sweep can walk it
    bint has_copy  # its gradient is the workspace's copy of it
    char *count_at[COUNTS]
    int count_size[COUNTS]
    Touched touched  # the rows of a table that the gradient touches
    # From step to step, numbers alone.
    Range known_free  # between what is written, where its last gradient lay
    Py_ssize_t free_version
    uint64_t passed  # a digest of objects and addresses that a closer look has passed
    bint careful  # it was left before: the closer look comes first
    Sorter sorter  # of row-sparse gradients


cdef class Workspace(Lock):
    # From step to step.
    cdef list plans
    cdef object norm  # of the last step that computed it
    cdef public long long skipped_steps
    cdef dict copies  # private copies of gradients, by row
    cdef Row *rows
    cdef Work *work
    cdef Numbers *numbers
    cdef double *sums  # SUMS for each block
    cdef Written *written
    cdef Written *known  # what was written when `ordered` was made of it
    cdef Written *ordered
    cdef Averaged *averaged_at  # AVERAGES for each piece of work
    cdef Stored *stored_at  # one for each piece of work
    cdef Py_ssize_t row_capacity, range_capacity, sums_capacity, average_capacity, stored_capacity, n_known, version
    # Of this step.
    cdef list groups, new_plans, new_counts, slot_errors
    cdef object states
    cdef dict new_copies
    cdef list spares  # floats that make room for others
    cdef dict kept  # in an exchange, copies of averages that the parameters would round
    cdef list roundings  # by group, where it rounds by chance: itself, its next count, the key of this step
    cdef tuple count_names, shared_numbers
    cdef int n_counts
    cdef bint counts_steps, armed
    cdef bint needs_rows  # all gradients must be row-sparse
    cdef bint bare_rows  # gradients may be row-sparse where no rule runs
    cdef bint again  # the look, since Python code has run or must run
    cdef bint unsteady  # other Python code has run than in a step that changes nothing but numbers
    cdef Py_ssize_t n_rows, n_work, n_written, cursor
    cdef double gradient_factor
    # What rides along.
    cdef Extras extras
    cdef Py_ssize_t cursors[AVERAGES]
    cdef bint has_extras, needs_norm, norm_known, skips
    cdef bint bare, exchanging  # no rule runs; parameters and an average change places
    cdef double max_norm, clip
    cdef int nonfinite, clearing
    cdef list counted  # all averages
    cdef list averages, weights, averaged  # those that this step updates, how far, and (array, weight) row by row
    cdef list gradients, fills, drops  # as the parameters have them, and what becomes of those that are not swept

    cdef int note_norm(self, norm) except -1
    cdef bint gather(self, optimizer, list grads) except -1
    cdef int ask(self, optimizer, Asked asked) except -1
    cdef int ride(self, Average average, Rule rule) except -1
    cdef int take_averages(self, Row *row, Py_ssize_t index) except -1
    cdef Stored *stored_of(self, Work *work) except NULL
    cdef int note_element(self, Work *work, int stream, const View *v) except -1
    cdef bint note_aside(self, Row *row, Py_ssize_t index, Work *work, const View *p) except -1
    cdef int take_aside(self, Row *row, Plan plan, PyObject *source, Py_ssize_t index) except -1
    cdef int keep_average(self, Row *row, Average average, array) except -1
    cdef const char *kept_of(self, Row *row, const View *p) except? NULL
    cdef Averaged *averages_of(self, Py_ssize_t work) except NULL
    cdef int take_norm(self) except -1
    cdef object label_of(self, Py_ssize_t index)
    cdef int clip_gradients(self) noexcept
    cdef int prepare_clearing(self) except -1
    cdef int clear_rest(self) noexcept
    cdef int add_idle_slot(self) except -1
    cdef bint keep_gradient(self, const Written *written) noexcept
    cdef double *reserve_sums(self, Py_ssize_t blocks) except NULL

    cdef int collect(self, optimizer, list grads) except -1
    cdef Plan plan_of(self, optimizer, Py_ssize_t g, group)
    cdef Py_ssize_t take_state(self, Row *row, Plan plan, optimizer, Py_ssize_t index) except -1
    cdef object last_copy(self, Py_ssize_t index)
    cdef int use_copy(self, Row *row, Py_ssize_t index, copy) except -1
    cdef int add_slot(self, Plan plan, optimizer, Py_ssize_t step, tuple before) except -1
    cdef int repeat_slot(self) except -1
    cdef bint take_entry(self, Row *row) except -1
    cdef int look(self, optimizer) except -1
    cdef int look_once(self) except -1
    cdef Py_ssize_t look_at_rows(self, Row *row, Work *work, const View *p, const void *indices, int itemsize,
                                 Py_ssize_t n, bint *ascending) except -2
    cdef bint steps_by_row(self, Row *row)
    cdef double max_row_norm(self, const Row *row)
    cdef bint has_codes(self, const Work *work) noexcept
    cdef int take_all_rows(self, Row *row, Work *work, const View *p) except -1
    cdef int order_written(self) except -1
    cdef bint add_written(self, Py_ssize_t row, char *begin, char *end, bint is_gradient=*) except -1
    cdef int find_tangles(self, Row *row, Py_ssize_t index) except -1
    cdef double *room_for_sums(self) except? NULL
    cdef bint enter_states(self) except -1
    cdef int arm(self) except -1
    cdef int disarm(self) noexcept
    cdef int commit(self) noexcept
    cdef int store_shared_numbers(self) noexcept
    cdef int reserve(self, Py_ssize_t n) except -1

    # What a kind of arrays answers.
    cdef list units(self, list params, Py_ssize_t g, Plan plan)
    cdef int take(self, Row *row, Py_ssize_t index) except -1
    cdef bint has_master(self, Row *row, Plan plan) except -1
    cdef int read_view(self, PyObject *array, View *v) except -1
    cdef int take_gradient(self, Row *row, Py_ssize_t index) except -1
    cdef int refuse_gradient(self, Row *row, Py_ssize_t index, optimizer) except -1
    cdef int check_entry(self, Row *row, Py_ssize_t index) except -1
    cdef bint holds(self, PyObject *entry, name) except -1
    cdef Py_ssize_t read_step(self, Row *row, Py_ssize_t index) except -2
    cdef dict make_state(self, Row *row, Py_ssize_t index, Plan plan, optimizer)
    cdef int take_arrays(self, Row *row, Py_ssize_t index) except -1
    cdef tuple read_counts(self, Row *row, Py_ssize_t index)
    cdef int lacks(self, Row *row, Py_ssize_t index, name) except -1
    cdef bint look_at(self, Row *row, Py_ssize_t index, Work *work) except -1
    cdef object first_average(self, Row *row, Py_ssize_t index)
    cdef object copy_of(self, average)
    cdef double left_sum(self, Row *row, double power, double scale) except? -1
    cdef bint has_finite_gradient(self, Row *row) except -1
    cdef int fill(self, list grads) except -1
    cdef bint overlap(self, Py_ssize_t first, Py_ssize_t second) except -1
    cdef int tangle(self, Py_ssize_t reader, Py_ssize_t writer) except -1
    cdef bint settle(self, optimizer) except -1
    cdef int average_left(self) except -1
    cdef int announce(self) except -1
    cdef int make_counts(self, Row *row) except -1
    cdef int store_counts(self, Row *row) noexcept
