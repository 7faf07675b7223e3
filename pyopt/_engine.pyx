# HOW a step runs: the cutting of the work into parts, the only parallel region, threads and floating-point modes.
#
# - The work is cut at equal numbers of elements over all tensors, not per tensor: one region per step, balanced for one
#   huge tensor and for a thousand tiny ones. An element's result does not depend on where the cuts fall.
# - A level of instructions is a property of the rules (_kernels*.pyx); this file is compiled once.

from cython.parallel cimport parallel

cimport openmp


cdef class Rule:
    """An update rule: the state behind each stream, its span for either element type, the packer of its numbers."""

    @staticmethod
    cdef Rule make(str name, tuple states, Span32 span32, Span64 span64, Pack pack):
        cdef Rule rule = Rule.__new__(Rule)
        rule.name = name
        rule.states = states
        rule.span32 = span32
        rule.span64 = span64
        rule.pack = pack
        return rule


# --- the sweep --------------------------------------------------------------------------------------------------------

cdef enum:
    LINE = 64  # parts begin at multiples of this many elements


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
        w.span64(d[0], d[1], d[2], d[3], d[4], d[5], end - begin, numbers)
    else:
        for j in range(2 + STATES):
            f[j] = NULL if w.stream[j] == NULL else <float *>w.stream[j] + begin
        w.span32(f[0], f[1], f[2], f[3], f[4], f[5], end - begin, numbers)


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


cdef void sweep(const Work *work, Py_ssize_t count, const Numbers *numbers) noexcept nogil:
    """Run the rules of all work."""
    cdef Py_ssize_t cost = work[count - 1].start + work[count - 1].size + ROW_COST if count else 0
    sweep_on(work, count, numbers, cost, threads_for(cost), flush_denormals)


cdef void sweep_on(const Work *work, Py_ssize_t count, const Numbers *numbers, Py_ssize_t cost, int threads,
                   bint flush) noexcept nogil:
    if threads == 1:
        run_in_mode(work, count, numbers, 0, cost, flush)
        return
    with parallel(num_threads=threads):  # not prange, whose lastprivate index costs a barrier at the entry
        run_share(work, count, numbers, cost, threads, flush)


cdef void run_share(const Work *work, Py_ssize_t count, const Numbers *numbers, Py_ssize_t cost, int parts,
                    bint flush) noexcept nogil:
    """What falls to this thread: one part, or several where OpenMP gave a smaller team than asked for."""
    cdef Py_ssize_t part = openmp.omp_get_thread_num()
    while part < parts:
        run_in_mode(work, count, numbers, cost * part // parts, cost * (part + 1) // parts, flush)
        part += openmp.omp_get_num_threads()


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
    sweep_on(NULL, 0, NULL, 0, threads, False)  # makes the team
    deadline = openmp.omp_get_wtime() + 1e-3
    for _draw in range(200):
        start = openmp.omp_get_wtime()
        sweep_on(NULL, 0, NULL, 0, threads, False)
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
