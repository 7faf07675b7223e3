# Norms of many arrays and what is done to all of them: one region of threads each, the sums those of a step.

from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.math cimport ilogb, isfinite, isnan, sqrt
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset

from pyopt._engine cimport (
    BFLOAT16, FLOAT16, ROW_COST, SUMS, Numbers, Rule, Stored, Work, blocks_of, cost_of, number_blocks, sum_gradients,
    sweep,
)
from pyopt._libm cimport pow
from pyopt._rows cimport Rows
from pyopt._views cimport OF_BFLOAT16, OF_FLOAT16, OF_FLOAT64

from pyopt._isa import kernels

cdef double INFINITY = float("inf")
cdef Stored in_bfloat16, in_float16
memset(&in_bfloat16, 0, sizeof(Stored))
memset(&in_float16, 0, sizeof(Stored))
in_bfloat16.codec[0] = in_bfloat16.codec[1] = BFLOAT16
in_float16.codec[0] = in_float16.codec[1] = FLOAT16


cdef class Batch:
    """Dense arrays, each gone over as one stretch of memory, and values of rows, summed as a step sums them.

    A subclass says what it takes: see pyopt/_arrays.pyx, pyopt/torch/_tensors.pyx.
    """

    def __cinit__(self):
        self.held = []

    def __dealloc__(self):
        PyMem_Free(self.work)

    cdef int add(self, char *data, Py_ssize_t size, int element, held, Rows rows=None) except -1:
        """Add an array of elements of a type (_views.pxd), which is held, or the values of some rows of a table."""
        cdef Work *w
        cdef void *block
        if self.count == self.capacity:
            block = PyMem_Realloc(self.work, (2 * self.capacity + 16) * sizeof(Work))
            if block == NULL:
                raise MemoryError("no memory for a list of arrays")
            self.work = <Work *>block
            self.capacity = 2 * self.capacity + 16
        w = &self.work[self.count]
        memset(w, 0, sizeof(Work))
        w.stream[0] = w.stream[1] = data
        w.size, w.is_double, w.start, w.row = size, element == OF_FLOAT64, self.cost, self.count
        w.stored = &in_bfloat16 if element == OF_BFLOAT16 else &in_float16 if element == OF_FLOAT16 else NULL
        if rows is not None:
            w.touched = &rows.touched
        self.cost += cost_of(w) + ROW_COST
        self.held.append(held if rows is None else (held, rows))
        self.count += 1
        return 0

    def sums(self, double power, double scale=1):
        """Per array the sum of (|x| * scale)**power, its largest |x| for inf."""
        return power_sums(self.work, self.count, power, scale)

    def apply(self, Rule rule, dict scalars):
        """Run a rule without state on every array, once on one that was added twice; ValueError if others overlap.

        Of rows it is run on their values as they lie, and so they are gone over from then on.
        """
        cdef Numbers numbers
        cdef Py_ssize_t k
        self.drop_duplicates()
        self.cost = 0
        for k in range(self.count):
            self.work[k].touched, self.work[k].start = NULL, self.cost
            self.cost += self.work[k].size + ROW_COST
        numbers.kernel = &rule.kernel
        rule.pack(scalars, numbers.value)
        with nogil:
            sweep(self.work, self.count, &numbers, NULL, NULL)

    cdef int drop_duplicates(self) except -1:
        cdef Py_ssize_t k, n = 0
        cdef Work *ordered
        cdef Work *w
        if self.count < 2:
            return 0
        ordered = <Work *>PyMem_Realloc(NULL, self.count * sizeof(Work))
        if ordered == NULL:
            raise MemoryError("no memory for a list of arrays")
        memcpy(ordered, self.work, self.count * sizeof(Work))
        qsort(ordered, self.count, sizeof(Work), by_address)
        try:
            for k in range(1, self.count):
                w = &ordered[k]
                if w.size == 0 or <char *>w.stream[0] >= end_of(&ordered[n]):
                    if w.size:
                        n = k
                elif (w.stream[0] != ordered[n].stream[0] or w.size != ordered[n].size
                        or w.is_double != ordered[n].is_double or w.stored != ordered[n].stored):
                    first, second = sorted([w.row, ordered[n].row])
                    raise ValueError(f"gradients {first} and {second} overlap in memory, must be apart or the same")
                else:
                    self.work[w.row].size = 0  # it costs nothing but its turn
        finally:
            PyMem_Free(ordered)
        return 0


cdef char *end_of(const Work *w) noexcept nogil:
    return <char *>w.stream[0] + w.size * (8 if w.is_double else 4 if w.stored == NULL else 2)


cdef int by_address(const void *a, const void *b) noexcept nogil:
    cdef const Work *x = <const Work *>a
    cdef const Work *y = <const Work *>b
    if x.stream[0] != y.stream[0]:
        return -1 if <char *>x.stream[0] < <char *>y.stream[0] else 1
    return (x.row > y.row) - (x.row < y.row)


cdef list power_sums(Work *work, Py_ssize_t count, double power, double scale):
    """Per gradient the sum of (|x| * scale)**power, its largest |x| for inf; 0 where there is none."""
    cdef Numbers norm
    cdef Py_ssize_t k, i, blocks = number_blocks(work, count)
    cdef Work *w
    cdef double own
    cdef double *sums
    cdef list found = []
    cdef Rule rule = kernels.norm
    norm.kernel = &rule.kernel
    rule.pack({"power": power, "scale": scale}, norm.value)
    sums = <double *>PyMem_Realloc(NULL, (blocks + 1) * SUMS * sizeof(double))
    if sums == NULL:
        raise MemoryError("no memory for the sums of norms")
    try:
        with nogil:
            sum_gradients(work, count, &norm, sums)
        for k in range(count):
            w = &work[k]
            own = 0
            for i in range(w.block, w.block + blocks_of(w) if w.stream[1] != NULL else w.block):
                own = added(own, sums[SUMS * i], power)
            found.append(own)
    finally:
        PyMem_Free(sums)
    return found


cdef double added(double total, double x, double power) noexcept:
    """Two sums together; for inf the larger, NaN if either is."""
    if power != INFINITY:
        return total + x
    return x if x > total or isnan(x) else total


def norm_of(sums_of, double power):
    """The norm of arrays, by sums_of(power, scale), which returns a sum of (|x| * scale)**power per array."""
    cdef double scale, largest, total = sum_of(sums_of(power, 1.0), power)
    if power == INFINITY or isnan(total) or 1e-290 < total < INFINITY:
        return root(total, power)
    largest = sum_of(sums_of(INFINITY, 1.0), INFINITY)  # powers that are too large or too small for a double
    if largest == 0 or not isfinite(largest):
        return largest
    scale = 2.0 ** min(-ilogb(largest), 1000)
    return root(sum_of(sums_of(power, scale), power), power) / scale


cdef double sum_of(list sums, double power) except? -1:
    cdef double total = 0, x
    for x in sums:
        if not isnan(total):
            total = added(total, x, power)
    return total


cdef double root(double total, double power) noexcept:
    if power == 2:
        return sqrt(total)
    return total if power == 1 or power == INFINITY else pow(total, 1 / power)


def clip_factor(double max_norm, double norm):
    """What gradients are multiplied with, torch's: at most 1, NaN for a norm that is NaN."""
    cdef double factor = max_norm / (norm + 1e-6)
    return 1.0 if factor >= 1 else factor
