# HOW a step visits many tensors: the table of their buffers, the cutting into parts, the only prange.
#
# - The table is kept between steps. Parameters and state are exported once and held; gradients are looked at in every
#   step and let go at its end, so that no step keeps a gradient alive.
# - Everything is checked before anything changes: `collect` may raise, the sweep cannot, `commit` writes the counts.
# - The work is cut at equal numbers of elements over all tensors, not per tensor: one region per step, balanced for one
#   huge tensor and for a thousand tiny ones. An element's result does not depend on where the cuts fall.
# - A level of instructions is a property of the rules (_kernels*.pyx); this file is compiled once.

from cpython.buffer cimport PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from cython.parallel cimport prange

cimport openmp

import numpy as np
from numpy import ndarray

from pyopt.checks import count as check_count
from pyopt.checks import plain
from pyopt.parameter import Parameter, check_gradient, check_no_overlap, check_state, label


cdef class Rule:
    """An update rule: its span for either element type and the packer of its numbers."""

    @staticmethod
    cdef Rule make(Span32 span32, Span64 span64, Pack pack):
        cdef Rule rule = Rule.__new__(Rule)
        rule.span32 = span32
        rule.span64 = span64
        rule.pack = pack
        return rule


# --- the sweep --------------------------------------------------------------------------------------------------------

cdef enum:
    LINE = 64  # parts begin at multiples of this many elements
    ROW_COST = 64  # what a tensor costs beyond its elements, in elements


cdef struct Work:  # one tensor of one step
    Py_ssize_t start  # the cost of all tensors before it, in elements
    Py_ssize_t size
    Py_ssize_t slot  # which of the step's sets of numbers
    bint is_double
    Span32 span32
    Span64 span64
    void *stream[2 + STATES]


cdef struct Numbers:
    double value[SCALARS]


cdef Py_ssize_t cut(const Work *w, Py_ssize_t cost) noexcept nogil:
    """The element of w where a part begins that begins at this cost."""
    cdef Py_ssize_t i = cost - w.start
    if i <= 0:
        return 0
    return w.size if i >= w.size else i & ~<Py_ssize_t>(LINE - 1)


cdef void run_span(const Work *w, Py_ssize_t begin, Py_ssize_t end, const void *numbers) noexcept nogil:
    cdef float *f[2 + STATES]
    cdef double *d[2 + STATES]
    cdef int j
    if w.is_double:
        for j in range(2 + STATES):
            d[j] = NULL if w.stream[j] == NULL else <double *>w.stream[j] + begin
        w.span64(d[0], d[1], d[2], d[3], d[4], end - begin, numbers)
    else:
        for j in range(2 + STATES):
            f[j] = NULL if w.stream[j] == NULL else <float *>w.stream[j] + begin
        w.span32(f[0], f[1], f[2], f[3], f[4], end - begin, numbers)


cdef void run_part(const Work *work, Py_ssize_t count, const Numbers *numbers, Py_ssize_t begin,
                   Py_ssize_t end) noexcept nogil:
    """All work between two costs."""
    cdef Py_ssize_t low = 0, high = count, k, first, last
    while high - low > 1:  # the last tensor that starts at or before begin
        k = (low + high) // 2
        if work[k].start <= begin:
            low = k
        else:
            high = k
    for k in range(low, count):
        if work[k].start >= end:
            break
        first = cut(&work[k], begin)
        last = cut(&work[k], end)
        if first < last:
            run_span(&work[k], first, last, &numbers[work[k].slot])


cdef void sweep(const Work *work, Py_ssize_t count, const Numbers *numbers, Py_ssize_t cost, int threads,
                bint flush) noexcept nogil:
    cdef int part
    if threads == 1:
        run_in_mode(work, count, numbers, 0, cost, flush)
        return
    for part in prange(threads, num_threads=threads, schedule="static"):
        run_in_mode(work, count, numbers, cost * part // threads, cost * (part + 1) // threads, flush)


cdef void run_in_mode(const Work *work, Py_ssize_t count, const Numbers *numbers, Py_ssize_t begin, Py_ssize_t end,
                      bint flush) noexcept nogil:
    """A part in the floating-point mode of the step, whatever the thread's own: bits must not depend on the thread."""
    cdef unsigned long mode = set_float_mode(float_mode(flush))
    run_part(work, count, numbers, begin, end)
    set_float_mode(mode)


cdef extern from *:
    """
    /* Round to nearest, no traps, denormals kept or flushed; set_float_mode returns the mode before. */
    #if defined(__SSE2__)
    #include <xmmintrin.h>
    #define PYOPT_CAN_FLUSH 1
    static unsigned long float_mode(int flush) { return flush ? 0x9fc0 : 0x1f80; }
    static unsigned long set_float_mode(unsigned long mode) {
        unsigned long before = _mm_getcsr();
        _mm_setcsr((unsigned int)mode);
        return before;
    }
    #elif defined(__aarch64__)
    #define PYOPT_CAN_FLUSH 1
    static unsigned long float_mode(int flush) { return flush ? 1ul << 24 : 0; }
    static unsigned long set_float_mode(unsigned long mode) {
        unsigned long before;
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(mode));
        return before;
    }
    #else
    #define PYOPT_CAN_FLUSH 0
    static unsigned long float_mode(int flush) { (void)flush; return 0; }
    static unsigned long set_float_mode(unsigned long mode) { return mode; }
    #endif

    /* The best level of instructions that both the CPU and the operating system support (libgcc asks XGETBV). */
    static int cpu_level(void) {
    #if defined(__x86_64__)
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
              && __builtin_cpu_supports("bmi2")))
            return 0;
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
               && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
               && __builtin_cpu_supports("avx512vl") ? 2 : 1;
    #else
        return 0;
    #endif
    }
    """
    const bint CAN_FLUSH "PYOPT_CAN_FLUSH"
    unsigned long float_mode(bint flush) noexcept nogil
    unsigned long set_float_mode(unsigned long mode) noexcept nogil
    int cpu_level() noexcept nogil


# --- threads and modes of the process ---------------------------------------------------------------------------------

cdef int team = 1  # as asked for; pyopt.threads sets the default
cdef bint flush_denormals = False
cdef bint forked = False  # libgomp's threads do not survive a fork: a region in the child would wait for them for ever
cdef int initial_limit = openmp.omp_get_max_threads()
cdef Py_ssize_t parallel_cost = -1  # the least cost that is shared among threads, once it is known
cdef Py_ssize_t LEAST_SHARED = 4096
cdef double NS_PER_ELEMENT = 0.25  # of the fastest rules in cache: the more a rule does, the sooner threads pay


def set_team(int threads):
    """How many threads a step may use; returns the number before."""
    global team, parallel_cost
    before = team
    if threads != team:
        team, parallel_cost = threads, -1
    return before


cpdef int get_team() noexcept nogil:
    """How many threads a step uses now: those asked for, less if OpenMP was limited since, 1 in a forked child."""
    cdef int limit = openmp.omp_get_max_threads()
    if forked:
        return 1
    return limit if limit < initial_limit and limit < team else team


def after_fork():
    global forked
    forked = True


def is_forked():
    return forked


def set_flush_denormal(bint mode):
    """Treat denormal numbers as zero inside steps, as torch.set_flush_denormal does for one thread.

    Moments of parameters that get no gradient any more decay into denormals, on which many CPUs are slow.

    Args:
        mode: True flushes, in every thread of a step and nowhere else; False (the default) is IEEE arithmetic.

    Returns:
        Whether this CPU can flush.

    Example:
        >>> import pyopt
        >>> supported = pyopt.set_flush_denormal(True)
        >>> supported = pyopt.set_flush_denormal(False)
    """
    global flush_denormals
    flush_denormals = mode and CAN_FLUSH
    return bool(CAN_FLUSH)


def get_flush_denormal():
    """Whether steps treat denormal numbers as zero."""
    return bool(flush_denormals)


def get_cpu_level():
    """0 for baseline, 1 for x86-64-v3, 2 for x86-64-v4."""
    return cpu_level()


def get_parallel_cost():
    """The least number of elements that is shared among threads; -1 while it has not been measured."""
    return parallel_cost


def set_parallel_cost(Py_ssize_t cost):
    """Share this many elements and more; -1 measures it at the next step that could."""
    global parallel_cost
    parallel_cost = cost


cdef Py_ssize_t measure_parallel_cost(int threads) noexcept nogil:
    """The cost from which on a region pays: the least time of empty regions, four times for threads that sleep.

    It ends after a millisecond: on a busy machine a single region can take many.
    """
    cdef double best = 1, start, end = 0, deadline
    cdef int _draw
    sweep(NULL, 0, NULL, 0, threads, False)  # makes the team
    deadline = openmp.omp_get_wtime() + 1e-3
    for _draw in range(200):
        start = openmp.omp_get_wtime()
        sweep(NULL, 0, NULL, 0, threads, False)
        end = openmp.omp_get_wtime()
        best = min(best, end - start)
        if end > deadline:
            break
    return max(LEAST_SHARED, <Py_ssize_t>(4e9 * best / NS_PER_ELEMENT * threads / (threads - 1)))


cdef int threads_for(Py_ssize_t cost) noexcept nogil:
    global parallel_cost
    cdef int threads = get_team()
    if threads == 1:
        return 1
    if parallel_cost < 0:
        if cost < LEAST_SHARED:  # a small step need not wait for the measurement
            return 1
        parallel_cost = measure_parallel_cost(threads)
    return threads if cost >= parallel_cost else 1


# --- the table --------------------------------------------------------------------------------------------------------

cdef class Export:
    """A buffer held for as long as this object lives."""
    cdef Py_buffer view

    def __cinit__(self, array, int flags):
        PyObject_GetBuffer(array, &self.view, flags)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef bint same_shape(const Py_buffer *a, const Py_buffer *b) noexcept:
    cdef int i
    if a.ndim != b.ndim:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i]:
            return False
    return True


cdef bint same_order(const Py_buffer *a, const Py_buffer *b) noexcept:
    """Whether two buffers of one shape and type lay their elements out alike; a length of 1 has no stride."""
    cdef int i
    for i in range(a.ndim):
        if a.strides[i] != b.strides[i] and a.shape[i] > 1:
            return False
    return True


cdef class Row:
    """One parameter of the table: the objects that its pointers come from, and the exports that hold them."""
    cdef object param, data, dtype
    cdef dict state  # its entry of optimizer.state, or the new one that will become it
    cdef Export export
    cdef tuple names  # of the state behind each stream
    cdef list state_exports
    cdef PyObject *arrays[STATES]  # held by state_exports, kept to be compared
    cdef void *state_buffers[STATES]
    cdef object copy  # a gradient in the parameter's memory order, where its own is another
    cdef Export copy_export
    cdef Py_ssize_t slot  # the numbers of its step, by its step count
    cdef bint active, fresh

    cdef int bind(self, param, data) except -1:
        """Hold the buffer of a parameter; what belonged to another one is let go."""
        if not isinstance(param, Parameter):
            raise TypeError(f"'params' of a param group holds a {type(param).__name__}, must be a list of Parameters")
        self.names = None
        self.export = Export(data, PyBUF_STRIDES | PyBUF_WRITABLE)
        self.param = param
        self.data = data
        self.dtype = data.dtype
        self.copy = self.copy_export = None
        self.state_exports = [None] * STATES
        self.arrays[0] = self.arrays[1] = self.arrays[2] = NULL
        return 0

    cdef Py_ssize_t find_state(self, optimizer, dict group, state, bint counts_steps, Py_ssize_t index) except -1:
        """Find or make the state; the number of the step to come, 1 or 2 where the optimizer does not count."""
        cdef PyObject *found = PyDict_GetItemWithError(state, self.param)
        self.fresh = found == NULL or not <object>found
        if self.fresh:
            self.state = optimizer.new_state(self.param, group)
        elif found != <PyObject *>self.state:
            self.state = <object>found
        if not counts_steps:
            return 1 if self.fresh else 2
        cdef PyObject *step = PyDict_GetItemWithError(self.state, "step")
        if step == NULL:
            raise KeyError(f"{label(index, self.param)}: state has no 'step', only {sorted(self.state)}")
        if type(<object>step) is not int or not 0 <= <object>step < 2**63 - 1:
            check_count(f"{label(index, self.param)}: state 'step'", <object>step)
        return <Py_ssize_t><object>step + 1

    cdef bint bind_state(self, tuple names, Py_ssize_t index) except -1:
        """Take the pointers of the state; whether an array is a new one, or was replaced by the user."""
        cdef PyObject *array
        cdef Export export
        cdef bint changed = False
        cdef int j
        self.names = names
        for j in range(STATES):
            name = names[j]
            if name is None:
                self.state_buffers[j] = NULL
                continue
            array = PyDict_GetItemWithError(self.state, name)
            if array == NULL or array != self.arrays[j]:
                check_state(label(index, self.param), name, self.state, self.data)
                self.state_exports[j] = Export(<object>array, PyBUF_STRIDES | PyBUF_WRITABLE)
                self.arrays[j] = array
                changed = True
            export = self.state_exports[j]
            self.state_buffers[j] = export.view.buf
        return changed

    cdef int list_arrays(self, list arrays, Py_ssize_t index) except -1:
        """Append (label, array) of all that a step writes."""
        what = label(index, self.param)
        arrays.append((what, self.data))
        for j in range(STATES):
            if self.names is not None and self.names[j] is not None:
                arrays.append((f"{what}: state {self.names[j]!r}", <object>self.arrays[j]))
        return 0

    cdef void *copy_gradient(self, grad) except NULL:
        if self.copy is None:
            self.copy = np.empty_like(self.data)
            self.copy_export = Export(self.copy, PyBUF_STRIDES | PyBUF_WRITABLE)
        np.copyto(self.copy, grad)
        return self.copy_export.view.buf


cdef struct Range:  # of addresses, the end excluded
    char *begin
    char *end


cdef class Table:
    """The buffers of one optimizer, kept from step to step."""
    cdef list rows  # one Row per parameter, in the order of the groups
    cdef list seen  # copies of the groups as they were when last checked
    cdef list plain  # per group: its hyper-parameters as Python numbers
    cdef list names  # per group: the state behind each stream of its rule, None where its options need none
    cdef list counts  # per slot, a set of numbers of this step: the step count that it is for
    cdef Work *work
    cdef Numbers *numbers
    cdef Py_buffer *grads  # exports of this step's gradients
    cdef Range *ranges  # where parameters and state lie, in ascending order
    cdef Py_ssize_t capacity, count, held, cost, n_ranges
    cdef bint busy

    def __cinit__(self):
        self.rows, self.seen, self.plain, self.names, self.counts = [], [], [], [], []

    def __dealloc__(self):
        PyMem_Free(self.work)
        PyMem_Free(self.numbers)
        PyMem_Free(self.grads)
        PyMem_Free(self.ranges)

    def step(self, optimizer, list grads=None):
        """One step of the optimizer's rule on every parameter that has a gradient: all of it, or an error and nothing.

        grads, where given, stand for the parameters' own, in the order of the groups.
        """
        if self.busy:
            raise RuntimeError(f"{type(optimizer).__name__}.step() is already running in another thread")
        self.busy = True
        cdef Py_ssize_t k
        try:
            self.collect(optimizer, grads)
            with nogil:
                sweep(self.work, self.count, self.numbers, self.cost, threads_for(self.cost), flush_denormals)
            self.commit(optimizer)
        finally:
            for k in range(self.held):
                PyBuffer_Release(&self.grads[k])
            self.held = 0
            self.busy = False

    cdef int collect(self, optimizer, list grads) except -1:
        """Fill the work of this step. Every check stands here: what follows cannot fail."""
        cdef list groups = optimizer.param_groups, params
        cdef Rule rule = optimizer.rule
        cdef object state = optimizer.state
        cdef bint counts_steps = optimizer.counts_steps
        cdef Py_ssize_t g, _i, step, last_step, k = 0
        cdef bint changed
        cdef Row row
        self.count = self.cost = 0
        self.counts.clear()
        if self.bind(groups, optimizer):
            self.measure()
        changed = False
        for g in range(len(groups)):
            group = groups[g]
            params = group["params"]
            last_step = -1
            for _i in range(len(params)):
                row = self.rows[k]
                grad = row.param.grad if grads is None else grads[k]
                row.active = grad is not None
                if row.active:
                    step = row.find_state(optimizer, group, state, counts_steps, k)
                    changed |= row.bind_state(<tuple>self.names[g], k)
                    if step != last_step:
                        rule.pack(optimizer.scalars(self.plain[g], step), &self.numbers[len(self.counts)])
                        self.counts.append(step)
                        last_step = step
                    row.slot = len(self.counts) - 1
                k += 1
        if changed:
            self.measure()
        for k in range(len(self.rows)):
            row = self.rows[k]
            if row.active:
                self.add(rule, row, row.param.grad if grads is None else grads[k], k)
        return 0

    cdef bint bind(self, list groups, optimizer) except -1:
        """Bring groups and rows up to date with what the user may have changed; whether a parameter is a new one."""
        cdef list params
        cdef Py_ssize_t g, i, k = 0
        cdef bint changed = False
        cdef Row row
        for g in range(len(groups)):
            group = groups[g]
            if g >= len(self.seen) or not same_values(group, <dict>self.seen[g]):
                optimizer.check_group(group)
                self.seen[g:g + 1] = [dict(group)]
                self.plain[g:g + 1] = [plain(group)]
                self.names[g:g + 1] = [optimizer.state_streams(group)]
            params = group["params"]
            for i in range(len(params)):
                param = params[i]
                if k == len(self.rows):
                    self.rows.append(Row())
                row = self.rows[k]
                data = param._data if type(param) is Parameter else getattr(param, "_data", None)
                if data is not row.data or param is not row.param:
                    row.bind(param, data)
                    changed = True
                k += 1
        if k != len(self.rows):
            del self.rows[k:]
            changed = True
        return changed

    cdef int measure(self) except -1:
        """Make room for all rows and note where lies what the step will write, no two in one place."""
        cdef Py_ssize_t n = len(self.rows), i
        cdef list arrays = []
        for i in range(n):
            (<Row>self.rows[i]).list_arrays(arrays, i)
        cdef list ranges = check_no_overlap(arrays)
        if n > self.capacity:
            self.work = <Work *>grown(self.work, n * sizeof(Work))
            self.numbers = <Numbers *>grown(self.numbers, n * sizeof(Numbers))
            self.grads = <Py_buffer *>grown(self.grads, n * sizeof(Py_buffer))
            self.ranges = <Range *>grown(self.ranges, n * (1 + STATES) * sizeof(Range))
            self.capacity = n
        self.n_ranges = len(ranges)
        for i in range(self.n_ranges):
            self.ranges[i].begin = <char *><size_t>ranges[i][0]
            self.ranges[i].end = <char *><size_t>ranges[i][1]
        return 0

    cdef int add(self, Rule rule, Row row, grad, Py_ssize_t index) except -1:
        """Add a row to the work of this step."""
        cdef Work *w = &self.work[self.count]
        cdef const Py_buffer *p = &row.export.view
        cdef Py_buffer *g = &self.grads[self.held]
        cdef int j
        w.start = self.cost
        w.size = p.len // p.itemsize
        w.slot = row.slot
        w.is_double = p.itemsize == sizeof(double)
        w.span32 = rule.span32
        w.span64 = rule.span64
        w.stream[0] = p.buf
        if type(grad) is not ndarray or grad.dtype is not row.dtype:
            grad = check_gradient(label(index, row.param), row.data, grad)
        PyObject_GetBuffer(grad, g, PyBUF_STRIDES)
        self.held += 1
        if not same_shape(p, g):
            check_gradient(label(index, row.param), row.data, grad)
        if same_order(p, g) and <size_t>g.buf % g.itemsize == 0 and not self.will_be_written(<char *>g.buf, g.len):
            w.stream[1] = g.buf
        else:
            w.stream[1] = row.copy_gradient(grad)
        for j in range(STATES):
            w.stream[2 + j] = row.state_buffers[j]
        self.count += 1
        self.cost += w.size + ROW_COST
        return 0

    cdef bint will_be_written(self, const char *begin, Py_ssize_t length) noexcept:
        """Whether a gradient shares memory with a parameter or state: copied then, since the sweep has no order."""
        cdef Py_ssize_t low = 0, high = self.n_ranges, k
        while low < high:  # the first range that ends beyond begin
            k = (low + high) // 2
            if self.ranges[k].end > begin:
                high = k
            else:
                low = k + 1
        return low < self.n_ranges and self.ranges[low].begin < begin + length

    cdef int commit(self, optimizer) except -1:
        """Write the step counts, and give new state its place."""
        cdef Row row
        cdef object state = optimizer.state
        cdef bint counts_steps = optimizer.counts_steps
        for row in self.rows:
            if row.active:
                if counts_steps:
                    row.state["step"] = self.counts[row.slot]
                if row.fresh and row.state:
                    state[row.param] = row.state
        return 0


cdef bint same_values(dict group, dict seen) noexcept:
    """Whether a group holds the objects that were checked; a list may have changed inside, that of params is compared
    row by row."""
    cdef Py_ssize_t position = 0
    cdef PyObject *key
    cdef PyObject *value
    if len(group) != len(seen):
        return False
    while PyDict_Next(group, &position, &key, &value):
        if PyDict_GetItemWithError(seen, <object>key) != value:
            return False
        if type(<object>value) is list and <object>key != "params":
            return False
    return True


cdef void *grown(void *block, size_t size) except NULL:
    block = PyMem_Realloc(block, size)
    if block == NULL:
        raise MemoryError(f"no {size} bytes for the table of parameters")
    return block
