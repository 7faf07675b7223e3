# HOW a step runs: the cutting of the work into parts, the only parallel region, threads and floating-point modes.
#
# - The work is cut at equal numbers of elements over all tensors, not per tensor: one region per step, balanced for one
#   huge tensor and for a thousand tiny ones. An element's result does not depend on where the cuts fall.
# - Where rules need sums over whole tensors there are two such regions: the first sums blocks of fixed size, which no
#   cut divides; the blocks are then added in their order, and the sums made to numbers of each tensor.
# - Of a table of which a gradient touches some rows, those are the work, side by side as it were: a span for each.
#   Where a row was touched several times its gradients are summed in double, in their order, just before.
# - A level of instructions is a property of the rules (_kernels*.pyx); this file is compiled once.

cimport cython
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t, uint64_t
from libc.math cimport sqrt
from libc.string cimport memcpy, memset

cdef extern from "_platform.h":
    void GOMP_parallel(void (*share)(void *) noexcept nogil, void *data, unsigned threads,
                       unsigned flags) noexcept nogil
    int omp_get_max_threads() noexcept nogil
    int omp_get_num_threads() noexcept nogil
    int omp_get_thread_num() noexcept nogil
    int omp_get_thread_limit() noexcept nogil
    void begin_openmp()
    bint find_openmp() noexcept nogil
    bint runtime_in_use(char *path, size_t size)
    bint nth_runtime(int n, char *path, size_t size)
    int usable_cpus()
    void watch_forks(void (*in_child)() noexcept nogil) noexcept nogil
    int initial_limit

from pyopt._rows cimport Touched

ctypedef fused floating:
    float
    double

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define prefetch(address) __builtin_prefetch((address), 1, 3)
    #else
    #define prefetch(address) ((void)(address))
    #endif
    """
    void prefetch(const void *address) noexcept nogil


cdef class Rule:
    """An update rule: the state behind each stream, its span for either element type, the packer of its numbers."""

    @staticmethod
    cdef Rule make(str name, tuple states, Kernel kernel, Pack pack):
        cdef Rule rule = Rule.__new__(Rule)
        rule.name = name
        rule.states = states
        rule.kernel = kernel
        rule.pack = pack
        return rule

    @property
    def has_sums(self):
        """Whether its steps need sums over whole tensors."""
        return self.kernel.finish != NULL

    @property
    def by_row(self):
        """Whether it steps row by row: its state has one element for each row, along the first axis."""
        return self.kernel.finish_row32 != NULL


cdef class Outcome:
    """What a step that is written in Python has prepared, or done."""

    cdef int carry_out(self) except -1:
        """Write what was prepared."""
        return 0

    cdef int undo(self) except -1:
        """Put back what was done."""
        return 0


# --- the sweep --------------------------------------------------------------------------------------------------------

cdef enum:
    LINE = 64  # parts begin at multiples of this many elements
    STAGE = 512  # elements that are converted together, a divisor of BLOCK


cdef Py_ssize_t cut(const Work *w, const Touched *t, Py_ssize_t cost, Py_ssize_t line,
                    bint whole_rows) noexcept nogil:
    """The element of w where a part begins that begins at this cost; of touched rows, counted over those alone."""
    cdef Py_ssize_t i = cost - w.start, row, width
    if i <= 0:
        return 0
    if t == NULL:
        return w.size if i >= w.size else i & ~(line - 1)
    width = t.width
    row = i // (width + TOUCH_COST)
    if row >= t.count:
        return t.count * width
    i -= row * (width + TOUCH_COST)
    return row * width + (width if i >= width else 0 if whole_rows else i & ~(line - 1))


cdef Py_ssize_t cost_of(const Work *w) noexcept nogil:
    """What a tensor costs, in elements."""
    return w.size if w.touched == NULL else w.touched.count * (w.touched.width + TOUCH_COST)


cdef void run(const Work *w, Py_ssize_t begin, const void *g, Py_ssize_t n, const Numbers *numbers,
              double *sums) noexcept nogil:
    """The rule on n elements, or its sums over them; g: their gradient, NULL where it is to be read as it is stored."""
    cdef const Kernel *k = numbers.kernel
    cdef const void *h = &numbers.value[0]
    cdef float *f[2 + STATES]
    cdef double *d[2 + STATES]
    cdef bint by_row = k.finish_row32 != NULL  # its state has no elements to go with these
    cdef int j
    if sums == NULL and k.span32 == NULL:
        return
    if w.stored != NULL:
        run_stored(w, begin, <const float *>g, n, numbers, sums)
    elif w.is_double:
        for j in range(2 + STATES):
            d[j] = NULL if w.stream[j] == NULL or j > 1 and by_row else <double *>w.stream[j] + begin
        if sums == NULL:
            k.span64(d[0], <const double *>g, d[2], d[3], d[4], d[5], n, h)
        else:
            k.reduce64(d[0], <const double *>g, d[2], d[3], d[4], d[5], n, h, sums)
    else:
        for j in range(2 + STATES):
            f[j] = NULL if w.stream[j] == NULL or j > 1 and by_row else <float *>w.stream[j] + begin
        if sums == NULL:
            k.span32(f[0], <const float *>g, f[2], f[3], f[4], f[5], n, h)
        else:
            k.reduce32(f[0], <const float *>g, f[2], f[3], f[4], f[5], n, h, sums)


cdef const void *gradient_at(const Work *w, Py_ssize_t begin) noexcept nogil:
    """The gradient of a stretch of memory from an element on; NULL where it is stored in a type of its own."""
    return NULL if w.stream[1] == NULL or w.stored != NULL else <char *>w.stream[1] + begin * (8 if w.is_double else 4)


cdef char *aside_of(const Stored *stored, int j, const Codec *c, Py_ssize_t begin) noexcept nogil:
    """What lies beside the elements of a stream from this one on."""
    return NULL if stored.aside[j] == NULL else stored.aside[j] + begin // c.group * c.aside


cdef Direct direct_span(const Work *w, const Kernel *k) noexcept nogil:
    """What steps a mix of types without conversion in memory, NULL for nothing."""
    cdef const Stored *stored = w.stored
    cdef int j, of_state = -1
    for j in range(2, 2 + STATES):
        if w.stream[j] != NULL:
            if of_state >= 0 and stored.codec[j] != of_state:
                return NULL
            of_state = stored.codec[j]
    if of_state < 0:
        return NULL
    if stored.codec[1] == BFLOAT16 and (stored.codec[0] == BFLOAT16 or stored.codec[0] == SPLIT):
        return k.direct[ALL] if of_state == BFLOAT16 else k.direct[PARAMETER] if of_state == PLAIN else NULL
    return k.direct[STATE] if stored.codec[0] == stored.codec[1] == PLAIN and of_state == BFLOAT16 else NULL


cdef void run_direct(Direct span, const Work *w, Py_ssize_t begin, Py_ssize_t n, const Numbers *numbers) noexcept nogil:
    cdef const Codec *codecs = numbers.kernel.codecs
    cdef void *x[2 + STATES]
    cdef int j
    for j in range(2 + STATES):
        x[j] = NULL
        if w.stream[j] != NULL:
            x[j] = <char *>w.stream[j] + begin * codecs[w.stored.codec[j]].size
    span(x[0], x[1], x[2], x[3], x[4], x[5], n, &numbers.value[0],
         aside_of(w.stored, 0, &codecs[w.stored.codec[0]], begin))


cdef void run_stored(const Work *w, Py_ssize_t begin, const float *g, Py_ssize_t n, const Numbers *numbers,
                     double *sums) noexcept nogil:
    """As run, where elements must be converted: part by part in the cache, into float32, and rounded once at the end.

    n is at most BLOCK where there are sums.
    """
    cdef float room[2 + STATES][BLOCK]
    cdef const Kernel *k = numbers.kernel
    cdef const Stored *stored = w.stored
    cdef const Codec *c
    cdef Work part
    cdef Py_ssize_t m
    cdef int j
    cdef bint by_row = k.finish_row32 != NULL
    cdef bint is_norm = sums != NULL and k.finish == NULL and not by_row  # it looks at the gradient alone
    cdef bint moves_state = sums == NULL if k.finish == NULL else k.moves_state == (sums != NULL)
    cdef Direct direct = direct_span(w, k) if sums == NULL and g == NULL else NULL
    if direct != NULL:
        run_direct(direct, w, begin, n, numbers)
        return
    part.is_double, part.stored = False, NULL
    while n > 0:
        m = n if sums != NULL else min(<Py_ssize_t>STAGE, n)
        for j in range(2 + STATES):
            c = &k.codecs[stored.codec[j]]
            if w.stream[j] == NULL or is_norm and j != 1 or j > 1 and by_row:
                part.stream[j] = NULL
            elif j == 1 and g != NULL:
                part.stream[j] = <void *>g
            elif c.load == NULL:
                part.stream[j] = <char *>w.stream[j] + begin * c.size
            else:
                part.stream[j] = room[j]
                c.load(room[j], <char *>w.stream[j] + begin * c.size, aside_of(stored, j, c, begin), m)
        run(&part, 0, part.stream[1], m, numbers, sums)
        for j in range(2 + STATES):
            c = &k.codecs[stored.codec[j]]
            if c.store == NULL or part.stream[j] == NULL or (
                    sums != NULL if j == 0 else not k.writes_both if j == 1 else not moves_state):
                continue
            c.store(room[j], <char *>w.stream[j] + begin * c.size, aside_of(stored, j, c, begin), m, stored.key, begin)
        begin += m
        if g != NULL:
            g = g + m
        n -= m


cdef void run_with_extras(const Work *w, Py_ssize_t begin, Py_ssize_t end, const Numbers *numbers,
                          const Extras *extras) noexcept nogil:
    """The rule and all that rides along, on one block after the other, which stays in the cache meanwhile."""
    cdef Py_ssize_t n
    while begin < end:
        n = min(<Py_ssize_t>BLOCK, end - begin)
        run(w, begin, gradient_at(w, begin), n, numbers, NULL)
        ride_along(w, begin, n, numbers, extras)
        begin += n


cdef void ride_along(const Work *w, Py_ssize_t begin, Py_ssize_t n, const Numbers *numbers,
                     const Extras *extras) noexcept nogil:
    """What a sweep does with n elements behind the rule."""
    cdef Py_ssize_t size = 8 if w.is_double else 4
    cdef Work beside
    cdef Stored stored
    cdef Numbers weight
    cdef int j
    memset(&beside, 0, sizeof(Work))
    beside.is_double = w.is_double
    beside.stream[1] = w.stream[0]
    weight.kernel = extras.kernel
    if w.stored != NULL:
        size = numbers.kernel.codecs[w.stored.codec[1]].size
        memset(&stored, 0, sizeof(Stored))
        stored.codec[1], stored.aside[1] = w.stored.codec[0], w.stored.aside[0]
        beside.stored = &stored  # averages are of float32
    for j in range(extras.averages):
        beside.stream[0], weight.value[0] = w.averaged[j].data, w.averaged[j].weight
        run(&beside, begin, gradient_at(&beside, begin), n, &weight, NULL)
        if w.averaged[j].kept != NULL:
            memcpy(<char *>w.averaged[j].data + begin * 4, w.averaged[j].kept + begin * 4, n * 4)
    if w.clears:
        memset(<char *>w.stream[1] + begin * size, 0, n * size)


cdef enum:
    AHEAD = 20  # rows that are fetched into the cache before their turn
    FETCHED = 1024  # bytes of each stream of a row, at most: behind those the CPU sees the pattern


cdef Py_ssize_t size_of(const Work *w, const Codec *codecs, int j) noexcept nogil:
    """Bytes of an element of a stream."""
    return codecs[w.stored.codec[j]].size if w.stored != NULL else 8 if w.is_double else 4


cdef void fetch_row(const Work *w, const Codec *codecs, Py_ssize_t k, bint by_row) noexcept nogil:
    """Have the CPU fetch what the k-th touched row needs, without waiting for it."""
    cdef const Touched *t = w.touched
    cdef Py_ssize_t size, i, j, bytes_of_row
    cdef const char *at
    if k >= t.count or t.row == NULL:
        return
    for j in range(2 + STATES):
        if w.stream[j] == NULL:
            continue
        size = size_of(w, codecs, j)
        bytes_of_row = min(<Py_ssize_t>FETCHED, t.width * size)
        if j > 1 and by_row:
            prefetch(<const char *>w.stream[j] + t.row[k] * size)
            continue
        at = <const char *>w.stream[j] + (t.place[t.first[k]] if j == 1 else t.row[k]) * t.width * size
        i = 0
        while i < bytes_of_row:
            prefetch(at + i)
            i += 64


cdef const void *sum_values(const Work *w, const Codec *codecs, Py_ssize_t k, Py_ssize_t column, Py_ssize_t n,
                            double *room) noexcept nogil:
    """The gradient of n elements of the k-th touched row: where its values lie, or the sum of several in room."""
    cdef const Touched *t = w.touched
    cdef const int64_t *place
    if t.row == NULL:
        return values_at(w, codecs, k * t.width + column, n, <float *>room)
    place = t.place + t.first[k]
    if t.first[k + 1] - t.first[k] == 1:
        return values_at(w, codecs, place[0] * t.width + column, n, <float *>room)
    add_all_values(w, codecs, place, t.first[k + 1] - t.first[k], column, n, room)
    if not w.is_double:
        narrow(<float *>room, room, n)
    return room


cdef const void *values_at(const Work *w, const Codec *codecs, Py_ssize_t begin, Py_ssize_t n,
                           float *room) noexcept nogil:
    """Values from an element on, of the type that rules compute in: where they lie, or in room."""
    cdef const char *at = <const char *>w.stream[1] + begin * size_of(w, codecs, 1)
    if w.stored == NULL or codecs[w.stored.codec[1]].load == NULL:
        return at
    codecs[w.stored.codec[1]].load(room, at, NULL, n)
    return room


cdef void add_all_values(const Work *w, const Codec *codecs, const int64_t *place, Py_ssize_t count, Py_ssize_t column,
                         Py_ssize_t n, double *room) noexcept nogil:
    """The sum of the values of several places."""
    cdef float wide[BLOCK]
    cdef const void *values
    cdef Py_ssize_t i
    for i in range(count):
        values = values_at(w, codecs, place[i] * w.touched.width + column, n, wide)
        if w.is_double:
            add_values[double](room, <const double *>values, n, i == 0)
        else:
            add_values[float](room, <const float *>values, n, i == 0)


cdef void add_values(double *restrict total, const floating *restrict values, Py_ssize_t n, bint first) noexcept nogil:
    cdef Py_ssize_t i
    if first:
        for i in range(n):
            total[i] = values[i]
    else:
        for i in range(n):
            total[i] = total[i] + values[i]


cdef void narrow(float *to, const double *total, Py_ssize_t n) noexcept nogil:
    """Round to float, in the same memory."""
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = <float>total[i]


cdef void run_rows(const Work *w, Py_ssize_t begin, Py_ssize_t end, const Numbers *numbers,
                   double *sums) noexcept nogil:
    """The rule on touched rows from one element to another, or its sums over them, which begin with those of w.

    Where the rows are kept to a norm both are at ends of rows.
    """
    cdef const Touched *t = w.touched
    cdef double room[BLOCK]
    cdef Py_ssize_t i = begin, k, column, n, blocks = (t.width + BLOCK - 1) // BLOCK
    cdef const Codec *codecs = numbers.kernel.codecs
    cdef bint by_row = numbers.kernel.finish_row32 != NULL
    for k in range(AHEAD):
        fetch_row(w, codecs, begin // t.width + k, by_row)
    if by_row:
        run_whole_rows(w, begin // t.width, end // t.width, numbers, room)
        return
    while i < end:
        k = i // t.width
        column = i - k * t.width
        if column == 0 or i == begin:
            fetch_row(w, codecs, k + AHEAD, by_row)
        n = min(min(<Py_ssize_t>BLOCK - column % BLOCK, t.width - column), end - i)
        run(w, (k if t.row == NULL else t.row[k]) * t.width + column, sum_values(w, codecs, k, column, n, room), n,
            numbers, NULL if sums == NULL else &sums[SUMS * (k * blocks + column // BLOCK)])
        i += n
        if sums == NULL and w.max_row_norm > 0 and column + n == t.width:
            keep_norm(w, codecs, k if t.row == NULL else t.row[k], room)


cdef void keep_norm(const Work *w, const Codec *codecs, Py_ssize_t row, double *room) noexcept nogil:
    """Scale a row whose 2-norm is larger than it may be."""
    cdef Py_ssize_t width = w.touched.width, column = 0, n
    cdef double total = 0, norm, factor
    cdef void *p
    while column < width:
        n = min(<Py_ssize_t>BLOCK, width - column)
        p = row_at(w, codecs, row * width + column, n, room)
        total += sum_of_squares[double](<double *>p, n) if w.is_double else sum_of_squares[float](<float *>p, n)
        column += n
    norm = sqrt(total)
    if not norm > w.max_row_norm:
        return
    factor = w.max_row_norm / (norm + 1e-7)
    column = 0
    while column < width:
        n = min(<Py_ssize_t>BLOCK, width - column)
        p = row_at(w, codecs, row * width + column, n, room)
        if w.is_double:
            multiply[double](<double *>p, factor, n)
        else:
            multiply[float](<float *>p, factor, n)
            store_row(w, codecs, row * width + column, n, <float *>p)
        column += n


cdef void *row_at(const Work *w, const Codec *codecs, Py_ssize_t begin, Py_ssize_t n, double *room) noexcept nogil:
    """Elements of the parameter, of the type that rules compute in: where they lie, or in room."""
    cdef char *at = <char *>w.stream[0] + begin * size_of(w, codecs, 0)
    cdef const Codec *c
    if w.stored == NULL or codecs[w.stored.codec[0]].load == NULL:
        return at
    c = &codecs[w.stored.codec[0]]
    c.load(<float *>room, at, aside_of(w.stored, 0, c, begin), n)
    return room


cdef void store_row(const Work *w, const Codec *codecs, Py_ssize_t begin, Py_ssize_t n, const float *p) noexcept nogil:
    """Store what row_at has put into room."""
    cdef const Codec *c
    if w.stored != NULL and codecs[w.stored.codec[0]].store != NULL:
        c = &codecs[w.stored.codec[0]]
        c.store(p, <char *>w.stream[0] + begin * c.size, aside_of(w.stored, 0, c, begin), n, w.stored.key, begin)


cdef enum:
    SQUARES = 8  # partial sums side by side


cdef double sum_of_squares(const floating *restrict x, Py_ssize_t n) noexcept nogil:
    """In double: element i goes into partial sum i % 8, and these are added in pairs."""
    cdef double part[SQUARES]
    cdef Py_ssize_t i = 0
    cdef int j
    for j in range(SQUARES):
        part[j] = 0
    while i + SQUARES <= n:
        for j in range(SQUARES):
            part[j] += <double>x[i + j] * <double>x[i + j]
        i += SQUARES
    for j in range(<int>(n - i)):
        part[j] += <double>x[i + j] * <double>x[i + j]
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]))


cdef void multiply(floating *restrict x, double factor, Py_ssize_t n) noexcept nogil:
    cdef floating f = <floating>factor
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = x[i] * f


cdef enum:
    BATCH = 8  # rows whose sums are made one behind the other, so that the CPU need not wait for each


cdef void run_whole_rows(const Work *w, Py_ssize_t begin, Py_ssize_t end, const Numbers *numbers,
                         double *room) noexcept nogil:
    """A rule that steps row by row, on the touched rows from one to another."""
    cdef const Touched *t = w.touched
    cdef Py_ssize_t k = begin, most = max(<Py_ssize_t>1, min(<Py_ssize_t>BATCH, BLOCK // t.width)), count, j
    while k < end:
        count = min(most, end - k)
        for j in range(count):
            fetch_row(w, numbers.kernel.codecs, k + AHEAD + j, True)
        if t.width > BLOCK:
            run_long_row(w, k, numbers, room)
        else:
            run_short_rows(w, k, count, numbers, room)
        if w.max_row_norm > 0:
            for j in range(1 if t.width > BLOCK else count):
                keep_norm(w, numbers.kernel.codecs, k + j if t.row == NULL else t.row[k + j], room)
        k += count


cdef void run_short_rows(const Work *w, Py_ssize_t k, Py_ssize_t count, const Numbers *numbers,
                         double *room) noexcept nogil:
    """A rule that steps row by row, on some rows that all have room."""
    cdef const Touched *t = w.touched
    cdef Numbers own[BATCH]
    cdef double total[SUMS * BATCH]
    cdef const void *g[BATCH]
    cdef Py_ssize_t row[BATCH]
    cdef Py_ssize_t j
    for j in range(count):
        row[j] = k + j if t.row == NULL else t.row[k + j]
        g[j] = sum_values(w, numbers.kernel.codecs, k + j, 0, t.width, room + j * t.width)
        run(w, row[j] * t.width, g[j], t.width, numbers, &total[SUMS * j])
    for j in range(count):
        own[j] = numbers[0]
        finish_row(w, row[j], &own[j], &total[SUMS * j])
    for j in range(count):
        run(w, row[j] * t.width, g[j], t.width, &own[j], NULL)


cdef void run_long_row(const Work *w, Py_ssize_t k, const Numbers *numbers, double *room) noexcept nogil:
    """A rule that steps row by row, on a row of several blocks."""
    cdef const Touched *t = w.touched
    cdef Numbers own = numbers[0]
    cdef double total[SUMS]
    cdef double part[SUMS]
    cdef Py_ssize_t row = k if t.row == NULL else t.row[k], column = 0, n
    cdef int j
    for j in range(SUMS):
        total[j] = 0
    while column < t.width:
        n = min(<Py_ssize_t>BLOCK, t.width - column)
        run(w, row * t.width + column, sum_values(w, numbers.kernel.codecs, k, column, n, room), n, numbers, part)
        for j in range(SUMS):
            total[j] += part[j]
        column += n
    finish_row(w, row, &own, total)
    column = 0
    while column < t.width:
        n = min(<Py_ssize_t>BLOCK, t.width - column)
        run(w, row * t.width + column, sum_values(w, numbers.kernel.codecs, k, column, n, room), n, &own, NULL)
        column += n


cdef void finish_row(const Work *w, Py_ssize_t row, Numbers *own, const double *total) noexcept nogil:
    """Make the sums over a row of the table to the numbers of its step, and to its state."""
    cdef const Codec *c
    cdef char *at
    cdef float state
    if w.is_double:
        own.kernel.finish_row64(own.value, total, w.touched.width, <double *>w.stream[2] + row)
    elif w.stored == NULL or w.stored.codec[2] == PLAIN:
        own.kernel.finish_row32(own.value, total, w.touched.width, <float *>w.stream[2] + row)
    else:
        c = &own.kernel.codecs[w.stored.codec[2]]
        at = <char *>w.stream[2] + row * c.size
        c.load(&state, at, NULL, 1)
        own.kernel.finish_row32(own.value, total, w.touched.width, &state)
        c.store(&state, at, NULL, 1, 0, row)


cdef void run_part(const Pass *a, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """All work between two costs."""
    cdef Py_ssize_t low = 0, high = a.count, line = LINE if a.sums == NULL else BLOCK, k, i, first, last, grain
    cdef const Work *w
    cdef const Numbers *numbers
    cdef const Touched *touched
    cdef bint rows
    while high - low > 1:  # the last tensor that starts at or before begin
        k = (low + high) // 2
        if a.work[k].start <= begin:
            low = k
        else:
            high = k
    for k in range(low, a.count):
        w = &a.work[k]
        if w.start >= end:
            break
        numbers = &a.numbers[w.slot] if a.norm == NULL else a.norm
        rows = numbers.kernel.finish_row32 != NULL or a.norm == NULL and w.max_row_norm > 0  # no cut divides one
        touched = w.touched
        grain = line if w.stored == NULL else <Py_ssize_t>BLOCK
        if touched != NULL and touched.row == NULL and not rows:  # a norm of all of it
            touched = NULL
        first, last = cut(w, touched, begin, grain, rows), cut(w, touched, end, grain, rows)
        if first >= last:
            continue
        if touched != NULL:
            if a.sums == NULL or a.norm != NULL:
                run_rows(w, first, last, numbers, NULL if a.sums == NULL else &a.sums[SUMS * w.block])
            if a.extras != NULL and w.touched.row == NULL:
                ride_along(w, first, last - first, numbers, a.extras)
        elif a.extras != NULL:
            run_with_extras(w, first, last, numbers, a.extras)
        elif a.sums == NULL:
            run(w, first, gradient_at(w, first), last - first, numbers, NULL)
        elif a.norm != NULL and w.stream[1] != NULL or numbers.kernel.finish != NULL:
            i = first
            while i < last:
                run(w, i, gradient_at(w, i), min(<Py_ssize_t>BLOCK, last - i), numbers,
                    &a.sums[SUMS * (w.block + i // BLOCK)])
                i += BLOCK


cdef Py_ssize_t number_blocks(Work *work, Py_ssize_t count) noexcept nogil:
    """Number the blocks of all work; returns how many there are."""
    cdef Py_ssize_t k, blocks = 0
    for k in range(count):
        work[k].block = blocks
        blocks += blocks_of(&work[k])
    return blocks


cdef Py_ssize_t blocks_of(const Work *w) noexcept nogil:
    """Into how many blocks a tensor falls; of touched rows each by itself, of all of them the whole."""
    if w.touched == NULL or w.touched.row == NULL:
        return (w.size + BLOCK - 1) // BLOCK
    return w.touched.count * ((w.touched.width + BLOCK - 1) // BLOCK)


cdef void finish(const Pass *a, Numbers *numbers) noexcept nogil:
    """Make the sums of blocks, in their order, to the numbers of each tensor."""
    cdef uint64_t mode = set_float_mode(float_mode(a.flush))
    cdef double own[SUMS]
    cdef double joint[SUMS]
    cdef Py_ssize_t k, i, blocks, size = 0
    cdef const Work *w
    cdef const Kernel *kernel
    cdef int j
    for j in range(SUMS):
        joint[j] = 0
    for k in range(a.count):
        w = &a.work[k]
        kernel = numbers[w.slot].kernel
        if kernel.finish == NULL or w.size == 0:
            continue
        blocks = (w.size + BLOCK - 1) // BLOCK
        for j in range(SUMS):
            own[j] = 0
        for i in range(w.block, w.block + blocks):
            for j in range(SUMS):
                own[j] += a.sums[SUMS * i + j]
        size += w.size
        for j in range(SUMS):
            joint[j] += own[j]
        if not kernel.joint:
            kernel.finish(numbers[w.slot].value, own, w.size)
    for k in range(a.count):
        kernel = numbers[a.work[k].slot].kernel
        if kernel.finish != NULL and kernel.joint:
            kernel.finish(numbers[a.work[k].slot].value, joint, size)
    set_float_mode(mode)


cdef Pass pass_over(const Work *work, Py_ssize_t count) noexcept nogil:
    """One region over all work, on as many threads as pay."""
    cdef Pass a
    memset(&a, 0, sizeof(Pass))
    a.work, a.count, a.flush = work, count, flush_denormals
    a.cost = work[count - 1].start + cost_of(&work[count - 1]) + ROW_COST if count else 0
    a.parts = threads_for(a.cost)
    if a.parts > 1 and startable(a.parts) < a.parts:
        a.parts = 1  # libgomp would end the process: this step does without
    return a


cdef void sweep(const Work *work, Py_ssize_t count, Numbers *numbers, double *sums,
                const Extras *extras) noexcept nogil:
    """Run the rules of all work; sums, room for SUMS of each block, is NULL where no rule has any, as are extras."""
    global used
    cdef Pass a = pass_over(work, count)
    a.numbers = numbers
    if sums != NULL:
        a.sums = sums
        sweep_on(&a)
        finish(&a, numbers)
        a.sums = NULL
    a.extras = extras
    used = sweep_on(&a)


cdef void sum_gradients(const Work *work, Py_ssize_t count, const Numbers *norm, double *sums) noexcept nogil:
    """Sums of a norm over the gradients of all work, which has its blocks numbered, into sums[SUMS * block]."""
    cdef Pass a = pass_over(work, count)
    a.norm, a.sums = norm, sums
    sweep_on(&a)


cdef int sweep_on(const Pass *a) noexcept nogil:
    """Run one pass on a team of as many threads as it has parts; returns how many OpenMP gave."""
    global own_team
    cdef Region region
    if a.parts == 1:
        run_in_mode(a, 0, a.cost)
        return 1
    region.work, region.given = a, 1
    GOMP_parallel(run_share, &region, a.parts, 0)
    own_team = a.parts
    return region.given


cdef struct Region:
    const Pass *work
    int given  # how many threads OpenMP gave


cdef void run_share(void *data) noexcept nogil:
    """What falls to this thread: one part, or several where OpenMP gave a smaller team than asked for."""
    cdef Region *region = <Region *>data
    cdef const Pass *a = region.work
    cdef Py_ssize_t part = omp_get_thread_num()
    if part == 0:
        region.given = omp_get_num_threads()
    while part < a.parts:
        run_in_mode(a, a.cost * part // a.parts, a.cost * (part + 1) // a.parts)
        part += omp_get_num_threads()


cdef void run_in_mode(const Pass *a, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """A part in the floating-point mode of the step, whatever the thread's own: bits must not depend on the thread."""
    cdef uint64_t mode = set_float_mode(float_mode(a.flush))
    run_part(a, begin, end)
    set_float_mode(mode)


cdef uint64_t enter_mode() noexcept nogil:
    """Let this thread compute as a step does, denormals kept; returns the mode before."""
    return set_float_mode(float_mode(False))


cdef void leave_mode(uint64_t mode) noexcept nogil:
    set_float_mode(mode)


# --- pieces -----------------------------------------------------------------------------------------------------------

cdef struct Pieces:
    Piece piece
    const void *job
    Py_ssize_t count
    bint flush


cdef void run_pieces(Piece piece, const void *job, Py_ssize_t count, Py_ssize_t cost) noexcept nogil:
    """Run all pieces of a job, independent of each other, on as many threads as pay for so many elements."""
    global used, own_team
    cdef int threads = threads_for(cost)
    cdef Pieces all
    all.piece, all.job, all.count, all.flush = piece, job, count, flush_denormals
    if threads > 1 and startable(threads) < threads:
        threads = 1
    used = threads
    if threads == 1:
        run_some(&all, 0, count)
        return
    GOMP_parallel(run_share_of_pieces, &all, threads, 0)
    own_team = threads


cdef void run_share_of_pieces(void *data) noexcept nogil:
    """What falls to this thread, whatever the size of the team that OpenMP gave."""
    cdef const Pieces *all = <const Pieces *>data
    cdef Py_ssize_t part = omp_get_thread_num(), parts = omp_get_num_threads()
    run_some(all, all.count * part // parts, all.count * (part + 1) // parts)


cdef void run_some(const Pieces *all, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Pieces in the floating-point mode of the step."""
    cdef uint64_t mode = set_float_mode(float_mode(all.flush))
    cdef Py_ssize_t i
    for i in range(begin, end):
        all.piece(all.job, i)
    set_float_mode(mode)


cdef extern from *:
    """
    /* Round to nearest, no traps, denormals kept or flushed; set_float_mode returns the mode before. */
    #if defined(__SSE2__)
    #include <xmmintrin.h>
    #define PYOPT_CAN_FLUSH 1
    static uint64_t float_mode(int flush) { return flush ? 0x9fc0 : 0x1f80; }
    static uint64_t set_float_mode(uint64_t mode) {
        uint64_t before = _mm_getcsr();
        _mm_setcsr((unsigned int)mode);
        return before;
    }
    #elif defined(__aarch64__)
    #define PYOPT_CAN_FLUSH 1
    static uint64_t float_mode(int flush) { return flush ? 1u << 24 : 0; }
    static uint64_t set_float_mode(uint64_t mode) {
        uint64_t before;
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(mode));
        return before;
    }
    #else
    #define PYOPT_CAN_FLUSH 0
    static uint64_t float_mode(int flush) { (void)flush; return 0; }
    static uint64_t set_float_mode(uint64_t mode) { return mode; }
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
    uint64_t float_mode(bint flush) noexcept nogil
    uint64_t set_float_mode(uint64_t mode) noexcept nogil
    int cpu_level() noexcept nogil


# --- the number of threads --------------------------------------------------------------------------------------------

begin_openmp()

cdef int team = 1  # what holds now: that of the block entered last of those still open, else the base
cdef int base_team = 1  # as set outside of blocks; pyopt.threads sets the default
cdef list open_blocks = []  # in the order in which they were entered
cdef object guard = object()  # its critical section guards all these; the list's own is taken by each of its methods
cdef bint forked = False  # libgomp's threads do not survive a fork: a region in the child would wait for them for ever
cdef Py_ssize_t parallel_cost = 0  # 1 more than a test has set


@cython.final
cdef class OpenBlock:
    cdef TeamBlock owner
    cdef unsigned long thread
    cdef int threads


cdef class TeamBlock:
    """A `with` block of a number of threads; compiled, so that a signal finds it entered whole or not at all."""
    cdef int threads

    def __init__(self, int threads):
        self.threads = threads

    def __enter__(self):
        cdef OpenBlock block = OpenBlock.__new__(OpenBlock)
        block.owner, block.thread, block.threads = self, PyThread_get_thread_ident(), self.threads
        require_startable(self.threads)
        with cython.critical_section(guard):
            open_blocks.append(block)
            renew_team()

    def __exit__(self, *_):
        cdef Py_ssize_t i
        with cython.critical_section(guard):
            for i in range(len(open_blocks) - 1, -1, -1):
                if (<OpenBlock>open_blocks[i]).owner is self:
                    del open_blocks[i]
                    break
            renew_team()


cdef void renew_team() noexcept:
    global team
    team = (<OpenBlock>open_blocks[len(open_blocks) - 1]).threads if open_blocks else base_team


def set_team(int threads):
    """How many threads a step may use: in this thread's innermost open block if it has one, else where none is open."""
    global base_team
    cdef OpenBlock block
    cdef unsigned long thread = PyThread_get_thread_ident()
    require_startable(threads)
    with cython.critical_section(guard):
        for block in reversed(open_blocks):
            if block.thread == thread:
                block.threads = threads
                break
        else:
            base_team = threads
        renew_team()


def set_default_team(int threads):
    """The base to begin with; whether it can be started is seen at the first step that would."""
    global base_team
    base_team = threads
    renew_team()


cpdef int get_team() noexcept nogil:
    """How many threads a step uses now: those asked for, less if OpenMP is limited, 1 without it or after a fork."""
    cdef int limit
    if forked or not find_openmp():
        return 1
    limit = omp_get_max_threads()
    return limit if limit < initial_limit and limit < team else team


def is_limited():
    """Whether something else set OpenMP's number in this thread (threadpoolctl, torch.set_num_threads) and it wins."""
    return not forked and find_openmp() and get_team() < team


def openmp_in_use():
    """The file whose OpenMP steps run on, None where the process has none: steps run in one thread."""
    cdef char path[4096]
    return path.decode(errors="surrogateescape") if runtime_in_use(path, sizeof(path)) else None


def openmp_runtimes():
    """The files of the OpenMP runtimes that this process has loaded."""
    cdef char path[4096]
    cdef list found = []
    while nth_runtime(<int>len(found), path, sizeof(path)):
        found.append(path.decode(errors="surrogateescape"))
    return found


def count_cpus():
    """The CPUs that this process may use, 0 where only Python can tell."""
    return usable_cpus()


def threads_used():
    """How many threads the last step of this Python thread ran on."""
    return used


cdef void in_child() noexcept nogil:
    global forked
    forked = True


cdef void learn_of_forks() noexcept nogil:
    """Be told of forks, whoever makes them: Python's os.fork is not all that a process has."""
    watch_forks(in_child)


learn_of_forks()


def is_forked():
    return forked


# --- whether threads can be started -----------------------------------------------------------------------------------
# Where a thread cannot be started libgomp ends the process. So they are started here first, all at once, and libgomp's
# own right after, which it then keeps for this Python thread. What remains: a limit that falls between the two; and
# another library on the same libgomp whose smaller team, in the same Python thread, made it drop the rest of ours.

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdlib.h>

    static __thread int own_team = 1;  /* the threads libgomp keeps for this thread, itself included */
    static __thread int used = 1;
    static size_t stack_size = 0;      /* of libgomp's threads, 0 for the system's default */
    static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;

    static void *pass(void *gate) {
        pthread_mutex_lock((pthread_mutex_t *)gate);
        pthread_mutex_unlock((pthread_mutex_t *)gate);
        return NULL;
    }

    /* How many of so many threads the machine starts; they have ended when it returns. */
    static int start_threads(int count) {
        pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
        pthread_attr_t attributes;
        pthread_t *threads = (pthread_t *)malloc(sizeof(pthread_t) * (size_t)count);
        int started = 0, i;
        if (threads == NULL) return 0;
        if (pthread_attr_init(&attributes)) { free(threads); return 0; }
        if (stack_size) pthread_attr_setstacksize(&attributes, stack_size);
        pthread_mutex_lock(&gate);
        while (started < count && !pthread_create(&threads[started], &attributes, pass, &gate)) started++;
        pthread_mutex_unlock(&gate);
        for (i = 0; i < started; i++) pthread_join(threads[i], NULL);
        pthread_attr_destroy(&attributes);
        free(threads);
        return started;
    }
    """
    ctypedef struct pthread_mutex_t:
        pass
    int own_team, used
    size_t stack_size
    pthread_mutex_t starting
    int pthread_mutex_lock(pthread_mutex_t *mutex) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept nogil
    int start_threads(int count) noexcept nogil


def set_stack_size(size_t size):
    global stack_size
    stack_size = size


cdef int startable(int threads) noexcept nogil:
    """The size up to this one of the team that this Python thread can have; where it is this one, it has it now."""
    cdef int started, needed = min(threads, omp_get_thread_limit())
    cdef Pass nothing
    if needed <= own_team:
        return threads
    pthread_mutex_lock(&starting)
    started = 1 + start_threads(needed - 1)
    if started == needed:
        memset(&nothing, 0, sizeof(Pass))
        nothing.parts = threads
        sweep_on(&nothing)
    pthread_mutex_unlock(&starting)
    return threads if started == needed else started


cdef int require_startable(int threads) except -1:
    cdef int started = threads
    if not forked:
        with nogil:
            started = startable(threads)
    if started < threads:
        raise RuntimeError(f"num_threads == {threads}, but this process can have only {started} threads in a step now: "
                           "see its limits (ulimit -a, the cgroup's pids.max and memory)")
    return 0


# --- denormals, the CPU -----------------------------------------------------------------------------------------------

cdef bint flush_denormals = False


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


# --- from which size threads pay --------------------------------------------------------------------------------------

# Fixed, not measured: what one moment on a busy machine says must not hold for the life of a process. On quiet machines
# two threads that still spin pay from 20 000 elements of Adam and 50 000 of SGD on, where either loses or gains half a
# microsecond; threads that have gone to sleep take tens of microseconds to wake, the more the larger the team.

cdef enum:
    REGION_COST = 24576  # of a parallel region, in elements
    THREAD_COST = 4096  # of each of its threads


def get_parallel_cost():
    """The least number of elements that is shared among threads."""
    return least_shared(get_team())


def set_parallel_cost(Py_ssize_t cost):
    """For tests: share this many elements and more; -1 as usual."""
    global parallel_cost
    parallel_cost = cost + 1


cdef Py_ssize_t least_shared(int threads) noexcept nogil:
    return parallel_cost - 1 if parallel_cost > 0 else REGION_COST + <Py_ssize_t>THREAD_COST * threads


cdef int threads_for(Py_ssize_t cost) noexcept nogil:
    cdef int threads = get_team()
    return threads if threads > 1 and cost >= least_shared(threads) else 1


cdef int threads_of(int most, Py_ssize_t cost) noexcept nogil:
    """The size of the team where not pyopt's setting but the caller says how many threads there may be."""
    if forked or most <= 1 or not find_openmp() or cost < least_shared(most) or startable(most) < most:
        return 1
    return most
