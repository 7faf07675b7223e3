# The C door: pyopt/include/pyopt.h, and here what its functions do. Everything between the header and the last section
# is C without Python, which tools/build_c_library links without it: no objects, no exceptions, no module variables but
# zeros.
#
# The work is the engine's: the same cuts, kernels and sums as a step of an optimizer. A chunk is a fixed share of the
# cost of all rows, so that a range of chunks is a part as a thread of a step has one.

from libc.math cimport fabs, floor, isfinite, isnan
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memcpy, memset, strcmp

from pyopt cimport _numbers as numbers
from pyopt cimport _rules as rules
from pyopt._engine cimport (
    BFLOAT16, CHANCE_BFLOAT16, CHANCE_FLOAT16, FLOAT16, KAHAN_BFLOAT16, KAHAN_FLOAT16, PLAIN, ROW_COST, SCALARS,
    SIGNED_CODES, SPLIT, STATES, SUMS, UNSIGNED_CODES, Codec, Kernel, Numbers, Pass, Rule, Stored, Work, enter_mode,
    finish, leave_mode, number_blocks, run_in_mode, sweep_on, threads_of,
)
from pyopt._storage cimport key_of_block, mixed
from pyopt.api cimport (
    PYOPT_BFLOAT16, PYOPT_BFLOAT16_KAHAN, PYOPT_BFLOAT16_SPLIT, PYOPT_BFLOAT16_STOCHASTIC, PYOPT_CAPSULE, PYOPT_DTYPES,
    PYOPT_FLOAT16, PYOPT_FLOAT16_KAHAN, PYOPT_FLOAT16_STOCHASTIC, PYOPT_FLOAT32, PYOPT_FLOAT64, PYOPT_INVALID,
    PYOPT_MAJOR, PYOPT_MINOR, PYOPT_MOST_KEPT, PYOPT_NO_MEMORY, PYOPT_OK, PYOPT_ROW, PYOPT_SIGNED_8BIT, PYOPT_SLOT,
    PYOPT_UNCHECKED, PYOPT_UNSIGNED_8BIT, pyopt_functions, pyopt_kept, pyopt_plan, pyopt_row, pyopt_rule, pyopt_slot,
    pyopt_stream,
)

cdef extern from "_catalogue.h" nogil:
    enum:
        ANY, NON_NEGATIVE, POSITIVE, BETA, BETA_OR_NONE, FRACTION, INNER, GROWTH, COUNT, WARMUP, FLAG
    enum:
        ADABELIEF, ADADELTA, ADAGRAD, ADAM, ADAMW, ADAMW_SCHEDULE_FREE, ADAMAX, ADAN, ADEMAMIX, ADOPT, ASGD, FTRL, LAMB
        LARS, LION, NADAM, PRODIGY, RADAM, RMSPROP, RPROP, SGD, SGD_SCHEDULE_FREE, RULES
    ctypedef struct Entry:
        pyopt_rule rule
        const char *kernel
        const char *summing
    const Entry catalogue[]

cdef extern from *:
    """
    #include <float.h>
    #include <stddef.h>
    #define MOST_STEPS ((int64_t)1 << 52)     /* as in checks.py */
    #define MOST_ELEMENTS ((int64_t)1 << 56)  /* of all rows: so that no sum of costs and no size in bytes overflows */
    /* Structs as callers of version 1.0 know them; one of a later version is longer than ours, but not by much. */
    #define LEAST_ROW offsetof(pyopt_row, beside)
    #define LEAST_SLOT offsetof(pyopt_slot, seed)
    #define MOST_SIZE 4096
    #define is_aligned(pointer, width) (((size_t)(pointer) & ((size_t)(width) - 1)) == 0)  /* a power of 2 */
    #define address(pointer) ((unsigned long long)(size_t)(pointer))
    #define enter(used) (!__atomic_exchange_n((used), 1, __ATOMIC_ACQUIRE))
    #define leave(used) __atomic_store_n((used), 0, __ATOMIC_RELEASE)
    """
    const double FLT_MAX
    const double FLT_TRUE_MIN
    const int64_t MOST_STEPS, MOST_ELEMENTS
    const size_t LEAST_ROW, LEAST_SLOT, MOST_SIZE
    bint is_aligned(const void *pointer, size_t width) noexcept nogil
    unsigned long long address(const void *pointer) noexcept nogil
    bint enter(int *used) noexcept nogil
    void leave(int *used) noexcept nogil

cdef enum:
    CHUNK = 16384  # elements' cost of a chunk: long against its start, short against what threads must share
    STREAMS = 2 + STATES
    PLACES = 2 * STREAMS  # where a row has memory: streams, and what lies beside each


cdef struct Slot:  # what a plan knows of the rows of one slot
    int rule
    Py_ssize_t rows
    bint has_float32
    double *kept  # the caller's, of the last step that was prepared
    bint present[STATES]  # whether all rows have this state
    Py_ssize_t lacking[STATES]  # the first row that has not


cdef struct Plan:
    int used  # by a step or its preparation
    Work *work
    Stored *stored  # of each row, NULL where all streams of all rows are plain
    int64_t *place_of  # each row's, for chance; NULL where nothing is rounded by chance
    int32_t *slot_of  # each row's
    Py_ssize_t count
    Slot *slots
    Py_ssize_t n_slots
    Numbers *numbers  # of the slots, then those of each row, where there are sums
    Numbers *prepared
    double *sums
    int64_t cost
    bint prepares_sums  # there is memory for them
    bint has_sums  # this step


cdef struct Extent:  # of the rows of a plan
    Py_ssize_t n_slots
    bint is_stored  # there are streams of other types than rules compute in
    bint by_chance  # and parameters that are rounded by chance


cdef struct Interval:  # of memory that a step writes or reads
    char *begin
    char *end
    Py_ssize_t row
    int place  # 0 the parameter, 1 the gradient, then the states; then what lies beside each of these


cdef Kernel kernels[RULES][2]  # the second for options that need sums


# --- the query --------------------------------------------------------------------------------------------------------

cdef Kernel idle  # all NULL: what runs before the first `prepare`


cdef bint is_rule(int rule) noexcept nogil:
    return 0 <= rule < RULES


cdef int count_rules() noexcept nogil:
    return RULES


cdef const pyopt_rule *rule_at(int rule) noexcept nogil:
    return &catalogue[rule].rule if is_rule(rule) else NULL


cdef int find_rule(const char *name) noexcept nogil:
    cdef int i
    for i in range(RULES):
        if name != NULL and strcmp(name, catalogue[i].rule.name) == 0:
            return i
    return -1


cdef int find_option(int rule, const char *name) noexcept nogil:
    cdef int i
    if is_rule(rule) and name != NULL:
        for i in range(catalogue[rule].rule.n_options):
            if strcmp(name, catalogue[rule].rule.options[i].name) == 0:
                return i
    return -1


cdef void fill_defaults(int rule, double *options) noexcept nogil:
    cdef int i
    if is_rule(rule) and options != NULL:
        for i in range(catalogue[rule].rule.n_options):
            options[i] = catalogue[rule].rule.options[i].usual


cdef double initial_state(int rule, int state, const double *options) noexcept nogil:
    if not is_rule(rule) or not 0 <= state < catalogue[rule].rule.n_states:
        return 0
    return option_or(0, rule, catalogue[rule].rule.states[state].initial, options)


cdef double option_or(double value, int rule, int option, const double *options) noexcept nogil:
    """An option, by default where there are none; the value where it is none."""
    if option < 0:
        return value
    return options[option] if options != NULL else catalogue[rule].rule.options[option].usual


cdef void fill_kept(int rule, const double *options, double *kept) noexcept nogil:
    cdef int i
    cdef const pyopt_kept *number
    if is_rule(rule) and kept != NULL:
        for i in range(catalogue[rule].rule.n_kept):
            number = &catalogue[rule].rule.kept[i]
            kept[i] = option_or(number.value, rule, number.initial, options)


# --- plans ------------------------------------------------------------------------------------------------------------

cdef const char *stream_name(int rule, int stream) noexcept nogil:
    if stream == 0:
        return "parameter"
    if stream == 1:
        return "gradient"
    return catalogue[rule].rule.states[stream - 2].name


cdef const pyopt_stream *stream_at(const pyopt_row *row, int stream) noexcept nogil:
    if stream == 0:
        return &row.parameter
    return &row.gradient if stream == 1 else &row.state[stream - 2]


cdef void *beside_of(const pyopt_row *row, int stream) noexcept nogil:
    if stream == 1:
        return NULL
    return row.beside[0 if stream == 0 else stream - 1]


cdef const pyopt_row *row_at(const pyopt_row *rows, size_t k, pyopt_row *own) noexcept nogil:
    return <const pyopt_row *>struct_at(rows, rows.size, k, own, &PYOPT_ROW, sizeof(pyopt_row))


cdef const void *struct_at(const void *first, size_t stride, size_t k, void *own, const void *usual,
                           size_t size) noexcept nogil:
    """One of the caller's structs, at its stride; of an older version's a copy, the rest of which is as usual."""
    cdef const char *at = <const char *>first + k * stride
    if stride >= size:
        return at
    memcpy(own, usual, size)
    memcpy(own, at, stride)
    return own


cdef bint is_size(size_t given, size_t least) noexcept nogil:
    return least <= given <= MOST_SIZE and given % sizeof(void *) == 0


cdef int create(const pyopt_row *rows, size_t count, int flags, pyopt_plan **plan, char *message,
                size_t size) noexcept nogil:
    cdef Plan *made
    cdef Extent extent
    cdef int status
    size = 0 if message == NULL else size
    if plan == NULL or (rows == NULL and count > 0):
        snprintf(message, size, "%s is NULL, must be an address", <const char *>("plan" if plan == NULL else "rows"))
        return PYOPT_INVALID
    if flags & ~PYOPT_UNCHECKED:
        snprintf(message, size, "flags == %d, must be 0 or PYOPT_UNCHECKED, %d", flags, <int>PYOPT_UNCHECKED)
        return PYOPT_INVALID
    status = check_rows(rows, count, &extent, message, size)
    if status != PYOPT_OK:
        return status
    made = <Plan *>calloc(1, sizeof(Plan))
    if made == NULL:
        return no_memory(message, size)
    made.count, made.n_slots = count, extent.n_slots
    status = PYOPT_OK if reserve(made, &extent) else no_memory(message, size)
    if status == PYOPT_OK:
        status = fill_plan(made, rows, message, size)
    if status == PYOPT_OK and not flags & PYOPT_UNCHECKED:
        status = check_overlaps(made, message, size)
    if status != PYOPT_OK:
        destroy(<pyopt_plan *>made)
        return status
    plan[0] = <pyopt_plan *>made
    return PYOPT_OK


cdef int check_rows(const pyopt_row *rows, size_t count, Extent *found, char *message, size_t size) noexcept nogil:
    cdef Py_ssize_t k
    cdef pyopt_row own
    cdef const pyopt_row *row
    cdef int64_t total = 0
    memset(found, 0, sizeof(Extent))
    if not is_aligned(rows, sizeof(void *)):
        snprintf(message, size, "rows is at 0x%llx, must be aligned to %zu bytes", address(rows), sizeof(void *))
        return PYOPT_INVALID
    if count > <size_t>MOST_ELEMENTS:
        snprintf(message, size, "count == %zu rows, must be <= 2**56", count)
        return PYOPT_INVALID
    if count > 0 and not is_size(rows.size, LEAST_ROW):
        return bad_size("row", 0, rows.size, sizeof(pyopt_row), message, size)
    for k in range(<Py_ssize_t>count):
        row = row_at(rows, k, &own)
        if row.size != rows.size:
            return bad_size("row", k, row.size, sizeof(pyopt_row), message, size)
        if check_row(row, k, message, size) != PYOPT_OK:
            return PYOPT_INVALID
        if total > MOST_ELEMENTS - row.n:
            snprintf(message, size, "row %zd: n == %lld with %lld in the rows before it, must be <= 2**56 together", k,
                     <long long>row.n, <long long>total)
            return PYOPT_INVALID
        total += row.n
        found.n_slots = max(found.n_slots, <Py_ssize_t>row.slot + 1)
        found.is_stored |= not has_plain_streams(row)
        found.by_chance |= is_by_chance(row)
    if found.n_slots > <Py_ssize_t>count:
        snprintf(message, size, "slot == %zd of a row, must be below the number of rows, %zu", found.n_slots - 1, count)
        return PYOPT_INVALID
    return PYOPT_OK


cdef bint reserve(Plan *plan, const Extent *extent) noexcept nogil:
    """Memory for all of a plan but its sums; whether there is enough."""
    cdef Py_ssize_t k
    plan.work = <Work *>calloc(plan.count + 1, sizeof(Work))
    plan.slot_of = <int32_t *>calloc(plan.count + 1, sizeof(int32_t))
    plan.slots = <Slot *>calloc(plan.n_slots + 1, sizeof(Slot))
    plan.numbers = <Numbers *>calloc(plan.n_slots + 1, sizeof(Numbers))
    plan.prepared = <Numbers *>calloc(plan.n_slots + 1, sizeof(Numbers))
    if extent.is_stored:
        plan.stored = <Stored *>calloc(plan.count, sizeof(Stored))
    if extent.by_chance:
        plan.place_of = <int64_t *>calloc(plan.count, sizeof(int64_t))
    if (plan.work == NULL or plan.slot_of == NULL or plan.slots == NULL or plan.numbers == NULL
            or plan.prepared == NULL or extent.is_stored and plan.stored == NULL
            or extent.by_chance and plan.place_of == NULL):
        return False
    for k in range(plan.n_slots):
        plan.numbers[k].kernel = &idle
    return True


cdef int no_memory(char *message, size_t size) noexcept nogil:
    snprintf(message, size, "no memory for a plan")
    return PYOPT_NO_MEMORY


cdef int bad_size(const char *what, Py_ssize_t k, size_t given, size_t due, char *message, size_t size) noexcept nogil:
    snprintf(message, size, "%s %zd: size == %zu, must be sizeof(pyopt_%s), %zu here, the same in all %ss", what, k,
             given, what, due, what)
    return PYOPT_INVALID


# --- dtypes -----------------------------------------------------------------------------------------------------------

cdef extern from *:
    """
    static const char *const dtype_names[] = {
        "FLOAT32", "FLOAT64", "BFLOAT16", "FLOAT16", "BFLOAT16_SPLIT", "BFLOAT16_KAHAN", "FLOAT16_KAHAN",
        "BFLOAT16_STOCHASTIC", "FLOAT16_STOCHASTIC", "SIGNED_8BIT", "UNSIGNED_8BIT"
    };
    """
    const char *dtype_names[]


cdef struct Kind:  # of elements of a dtype
    unsigned char codec  # the engine's name of it
    unsigned char width  # bytes of an element
    unsigned char aside  # bytes beside for each `group` elements
    Py_ssize_t group


cdef Kind kinds[PYOPT_DTYPES]


cdef void fill_kinds() noexcept nogil:
    cdef const Codec *c
    cdef int i
    kinds[PYOPT_FLOAT32].codec = kinds[PYOPT_FLOAT64].codec = PLAIN
    kinds[PYOPT_BFLOAT16].codec, kinds[PYOPT_FLOAT16].codec = BFLOAT16, FLOAT16
    kinds[PYOPT_BFLOAT16_SPLIT].codec = SPLIT
    kinds[PYOPT_BFLOAT16_KAHAN].codec, kinds[PYOPT_FLOAT16_KAHAN].codec = KAHAN_BFLOAT16, KAHAN_FLOAT16
    kinds[PYOPT_BFLOAT16_STOCHASTIC].codec = CHANCE_BFLOAT16
    kinds[PYOPT_FLOAT16_STOCHASTIC].codec = CHANCE_FLOAT16
    kinds[PYOPT_SIGNED_8BIT].codec, kinds[PYOPT_UNSIGNED_8BIT].codec = SIGNED_CODES, UNSIGNED_CODES
    for i in range(PYOPT_DTYPES):
        c = &kernels[0][0].codecs[kinds[i].codec]
        kinds[i].width, kinds[i].aside, kinds[i].group = 8 if i == PYOPT_FLOAT64 else c.size, c.aside, c.group


cdef bint has_plain_streams(const pyopt_row *row) noexcept nogil:
    cdef int j
    for j in range(2 + catalogue[row.rule].rule.n_states):
        if stream_at(row, j).data != NULL and kinds[stream_at(row, j).dtype].codec != PLAIN:
            return False
    return True


cdef bint is_by_chance(const pyopt_row *row) noexcept nogil:
    cdef int codec = kinds[row.parameter.dtype].codec
    return row.parameter.data != NULL and (codec == CHANCE_BFLOAT16 or codec == CHANCE_FLOAT16)


cdef uint32_t dtypes_for(const pyopt_row *row, int stream) noexcept nogil:
    """The bits of the dtypes that a stream may have: float64 goes with nothing else."""
    cdef uint32_t found = catalogue[row.rule].rule.dtypes[stream], double_bit = <uint32_t>1 << PYOPT_FLOAT64
    if stream == 0:
        return found
    return double_bit if row.parameter.dtype == PYOPT_FLOAT64 else found & ~double_bit


cdef int refuse_dtype(const pyopt_row *row, Py_ssize_t k, int stream, char *message, size_t size) noexcept nogil:
    cdef uint32_t may_be = dtypes_for(row, stream)
    cdef char names[300]
    cdef int i, length = 0
    for i in range(PYOPT_DTYPES):
        if may_be >> i & 1:
            length += snprintf(names + length, sizeof(names) - length, "%sPYOPT_%s (%d)",
                               <const char *>(", " if length else ""), dtype_names[i], i)
    snprintf(message, size, "row %zd: dtype == %d of its %s, must be one of %s", k, <int>stream_at(row, stream).dtype,
             stream_name(row.rule, stream), names)
    return PYOPT_INVALID


cdef int check_stream(const pyopt_row *row, Py_ssize_t k, int j, char *message, size_t size) noexcept nogil:
    cdef const pyopt_stream *stream = stream_at(row, j)
    cdef void *beside = beside_of(row, j)
    cdef const Kind *kind
    if stream.data == NULL and (j < 2 and row.n > 0 or beside != NULL):
        snprintf(message, size, "row %zd: its %s is NULL, must be an address", k, stream_name(row.rule, j))
        return PYOPT_INVALID
    if stream.data == NULL and j > 0:
        return PYOPT_OK
    if not 0 <= stream.dtype < PYOPT_DTYPES or not dtypes_for(row, j) >> stream.dtype & 1:
        return refuse_dtype(row, k, j, message, size)
    kind = &kinds[stream.dtype]
    if not is_aligned(stream.data, kind.width):
        snprintf(message, size, "row %zd: its %s is at 0x%llx, must be aligned to %d bytes", k,
                 stream_name(row.rule, j), address(stream.data), <int>kind.width)
        return PYOPT_INVALID
    if kind.aside == 0:
        if beside != NULL:
            snprintf(message, size, "row %zd: beside its %s is 0x%llx, must be NULL: PYOPT_%s has nothing there", k,
                     stream_name(row.rule, j), address(beside), dtype_names[stream.dtype])
            return PYOPT_INVALID
    elif beside == NULL and row.n > 0:
        snprintf(message, size, "row %zd: beside its %s is NULL, must be the address of what PYOPT_%s keeps there", k,
                 stream_name(row.rule, j), dtype_names[stream.dtype])
        return PYOPT_INVALID
    elif not is_aligned(beside, kind.aside):
        snprintf(message, size, "row %zd: beside its %s is at 0x%llx, must be aligned to %d bytes", k,
                 stream_name(row.rule, j), address(beside), <int>kind.aside)
        return PYOPT_INVALID
    return PYOPT_OK


cdef int check_row(const pyopt_row *row, Py_ssize_t k, char *message, size_t size) noexcept nogil:
    cdef int j, n_streams
    if not is_rule(row.rule):
        snprintf(message, size, "row %zd: rule == %d, must be one that find_rule returned", k, <int>row.rule)
        return PYOPT_INVALID
    if row.slot < 0:
        snprintf(message, size, "row %zd: slot == %d, must be >= 0", k, <int>row.slot)
        return PYOPT_INVALID
    if not 0 <= row.n <= MOST_ELEMENTS:
        snprintf(message, size, "row %zd: n == %lld, must be >= 0 and <= 2**56", k, <long long>row.n)
        return PYOPT_INVALID
    if not -1 <= row.place <= MOST_STEPS:
        snprintf(message, size, "row %zd: place == %lld, must be >= 0 and <= 2**52, or -1", k, <long long>row.place)
        return PYOPT_INVALID
    n_streams = 2 + catalogue[row.rule].rule.n_states
    for j in range(STREAMS):
        if j < n_streams:
            if check_stream(row, k, j, message, size) != PYOPT_OK:
                return PYOPT_INVALID
        elif stream_at(row, j).data != NULL or beside_of(row, j) != NULL:
            snprintf(message, size, "row %zd: it has state %d, but %s has %d", k, j - 2, catalogue[row.rule].rule.name,
                     n_streams - 2)
            return PYOPT_INVALID
    return PYOPT_OK


cdef int fill_plan(Plan *plan, const pyopt_row *rows, char *message, size_t size) noexcept nogil:
    cdef Py_ssize_t k
    cdef pyopt_row own
    cdef const pyopt_row *row
    cdef Work *w
    cdef Slot *slot
    cdef int j
    cdef bint is_missing
    for k in range(plan.count):
        row, w = row_at(rows, k, &own), &plan.work[k]
        slot = &plan.slots[row.slot]
        w.start, w.size, w.slot, w.row = plan.cost, row.n, row.slot, k
        plan.slot_of[k] = row.slot
        w.is_double = row.parameter.dtype == PYOPT_FLOAT64
        if plan.stored != NULL and not has_plain_streams(row):
            w.stored = &plan.stored[k]
        for j in range(2 + catalogue[row.rule].rule.n_states):
            w.stream[j] = stream_at(row, j).data
            if w.stored != NULL and w.stream[j] != NULL:
                plan.stored[k].codec[j] = kinds[stream_at(row, j).dtype].codec
                plan.stored[k].aside[j] = <char *>beside_of(row, j)
        if plan.place_of != NULL:
            plan.place_of[k] = k if row.place < 0 else row.place
        plan.cost += row.n + ROW_COST
        if slot.rows == 0:
            slot.rule = row.rule
            for j in range(STATES):
                slot.present[j] = True
        elif slot.rule != row.rule:
            snprintf(message, size, "row %zd: its rule is %s, must be %s, as of the rows before it in slot %d", k,
                     catalogue[row.rule].rule.name, catalogue[slot.rule].rule.name, <int>row.slot)
            return PYOPT_INVALID
        for j in range(STATES):
            is_missing = row.n > 0 and w.stream[2 + j] == NULL
            if is_missing and slot.present[j]:
                slot.present[j], slot.lacking[j] = False, k
        slot.rows += 1
        slot.has_float32 |= not w.is_double
    return PYOPT_OK


cdef Interval interval_of(const Work *w, int place) noexcept nogil:
    """What one stream of a row takes of memory, or what lies beside it: nothing where there is none."""
    cdef Interval found
    cdef int j = place % STREAMS, codec = PLAIN if w.stored == NULL else w.stored.codec[j]
    cdef const Codec *layout = &kernels[0][0].codecs[codec]
    cdef Py_ssize_t length = w.size * (8 if w.is_double else layout.size)
    found.row, found.place, found.begin = w.row, place, <char *>w.stream[j]
    if place >= STREAMS:
        found.begin = NULL if w.stored == NULL else w.stored.aside[j]
        length = (w.size + layout.group - 1) // layout.group * layout.aside
    found.end = found.begin if found.begin == NULL else found.begin + length
    return found


cdef int check_overlaps(const Plan *plan, char *message, size_t size) noexcept nogil:
    """Nothing that a step writes may be written twice, or be read as a gradient; gradients may be shared."""
    cdef Py_ssize_t n = 0, k
    cdef int j, places = STREAMS if plan.stored == NULL else PLACES
    cdef bint ascends = True
    cdef Interval *found = <Interval *>calloc(plan.count * places + 1, sizeof(Interval))
    cdef const Interval *written = NULL  # that reaches furthest, of those before
    cdef const Interval *reading = NULL
    cdef const Interval *other = NULL
    if found == NULL:
        return no_memory(message, size)
    for k in range(plan.count):
        for j in range(places):
            found[n] = interval_of(&plan.work[k], j)
            if found[n].begin == found[n].end:
                continue
            ascends = ascends and (n == 0 or found[n].begin >= found[n - 1].begin)
            n += 1
    if not ascends:
        qsort(found, n, sizeof(Interval), by_address)
    for k in range(n):
        # In the order of addresses: with what is written before, and where this is, with what is read before.
        if written != NULL and found[k].begin < written.end:
            other = written
        elif found[k].place != 1 and reading != NULL and found[k].begin < reading.end:
            other = reading
        else:
            if found[k].place == 1:
                if reading == NULL or found[k].end > reading.end:
                    reading = &found[k]
            elif written == NULL or found[k].end > written.end:
                written = &found[k]
            continue
        snprintf(message, size, "row %zd: %s %s overlaps the %s%s of row %zd, must have memory of its own",
                 found[k].row, <const char *>("its" if found[k].place < STREAMS else "what is beside its"),
                 name_of(plan, &found[k]), <const char *>("" if other.place < STREAMS else "memory beside the "),
                 name_of(plan, other), other.row)
        free(found)
        return PYOPT_INVALID
    free(found)
    return PYOPT_OK


cdef const char *name_of(const Plan *plan, const Interval *of) noexcept nogil:
    return stream_name(plan.slots[plan.slot_of[of.row]].rule, of.place % STREAMS)


cdef int by_address(const void *a, const void *b) noexcept nogil:
    cdef const char *x = (<const Interval *>a).begin
    cdef const char *y = (<const Interval *>b).begin
    return (x > y) - (x < y)


cdef void destroy(pyopt_plan *handle) noexcept nogil:
    cdef Plan *plan = <Plan *>handle
    if plan != NULL:
        free(plan.work)
        free(plan.stored)
        free(plan.place_of)
        free(plan.slot_of)
        free(plan.slots)
        free(plan.numbers)
        free(plan.prepared)
        free(plan.sums)
        free(plan)


# --- the options of a step --------------------------------------------------------------------------------------------

cdef const pyopt_slot *slot_at(const pyopt_slot *slots, Py_ssize_t i, pyopt_slot *own) noexcept nogil:
    return <const pyopt_slot *>struct_at(slots, slots.size, i, own, &PYOPT_SLOT, sizeof(pyopt_slot))


cdef const char *unmet(int check, double x) noexcept nogil:
    """What an option must be, where it is not; else NULL."""
    if (check == WARMUP or check == BETA_OR_NONE) and isnan(x):
        return NULL
    if check == FLAG:
        return unless(x == 0 or x == 1, "0 or 1")
    if not isfinite(x):
        return "finite"
    if check == NON_NEGATIVE:
        return unless(x >= 0, ">= 0")
    if check == POSITIVE or check == WARMUP:
        return unless(x > 0, "> 0")
    if check == BETA or check == BETA_OR_NONE:
        return unless(0 <= x < 1, ">= 0 and < 1")
    if check == FRACTION:
        return unless(0 <= x <= 1, ">= 0 and <= 1")
    if check == INNER:
        return unless(0 < x < 1, "> 0 and < 1")
    if check == GROWTH:
        return unless(x > 1, "> 1")
    if check == COUNT:
        return unless(0 <= x <= MOST_STEPS and floor(x) == x, "an integer from 0 to 2**52")
    return NULL


cdef const char *unless(bint holds, const char *must) noexcept nogil:
    if holds:
        return NULL
    return must


cdef int check_slot(const Plan *plan, Py_ssize_t i, const pyopt_slot *given, char *message, size_t size) noexcept nogil:
    cdef const Slot *slot = &plan.slots[i]
    cdef const pyopt_rule *rule = &catalogue[slot.rule].rule
    cdef const double *o = given.options
    cdef const char *must
    cdef int j, needed_by
    if not 1 <= given.step <= MOST_STEPS:
        snprintf(message, size, "slot %zd: step == %lld, must be >= 1 and <= 2**52", i, <long long>given.step)
        return PYOPT_INVALID
    if not -1 <= given.rounding_step <= MOST_STEPS:
        snprintf(message, size, "slot %zd: rounding_step == %lld, must be >= 0 and <= 2**52, or -1", i,
                 <long long>given.rounding_step)
        return PYOPT_INVALID
    if not isfinite(given.gradient_factor):
        snprintf(message, size, "slot %zd: gradient_factor == %g, must be finite", i, given.gradient_factor)
        return PYOPT_INVALID
    if o == NULL or (rule.n_kept > 0 and given.kept == NULL):
        snprintf(message, size, "slot %zd: its %s is NULL, must be an address", i,
                 <const char *>("options" if o == NULL else "kept"))
        return PYOPT_INVALID
    if not is_aligned(o, sizeof(double)) or (rule.n_kept > 0 and not is_aligned(given.kept, sizeof(double))):
        must = "kept" if is_aligned(o, sizeof(double)) else "options"
        snprintf(message, size, "slot %zd: its %s is at 0x%llx, must be aligned to %zu bytes", i, must,
                 address(given.kept if is_aligned(o, sizeof(double)) else o), sizeof(double))
        return PYOPT_INVALID
    for j in range(rule.n_options):
        must = unmet(rule.options[j].check, o[j])
        if must == NULL and slot.has_float32 and o[j] != 0 and not isnan(o[j]) and not (
                FLT_TRUE_MIN / 2 < fabs(o[j]) <= FLT_MAX):
            must = "a number of float32: at most 3.4e38, if not 0 at least 1.4e-45"
        if must != NULL:
            snprintf(message, size, "slot %zd: %s == %.17g, must be %s", i, rule.options[j].name, o[j], must)
            return PYOPT_INVALID
    if slot.rule == RPROP and o[4] < o[3]:
        snprintf(message, size, "slot %zd: step_sizes[1] == %g, must be >= step_sizes[0], %g", i, o[4], o[3])
        return PYOPT_INVALID
    if slot.rule == SGD and o[4] != 0 and (o[1] == 0 or o[2] != 0):
        snprintf(message, size, "slot %zd: nesterov == 1 with momentum == %g and dampening == %g, must have "
                 "momentum > 0 and dampening == 0", i, o[1], o[2])
        return PYOPT_INVALID
    for j in range(rule.n_states):
        needed_by = rule.states[j].needed_by
        if not slot.present[j] and (needed_by < 0 or o[needed_by] != 0):
            snprintf(message, size, "row %zd: its %s is NULL, must be an address: %s needs it", slot.lacking[j],
                     rule.states[j].name, rule.name if needed_by < 0 else rule.options[needed_by].name)
            return PYOPT_INVALID
    return PYOPT_OK


cdef bint needs_sums(int rule, const double *o) noexcept nogil:
    if rule == ADAM or rule == ADAMW:
        return o[7] != 0 or o[8] != 0
    return rule == LAMB or rule == LARS or rule == PRODIGY


cdef void make_numbers(int rule, const pyopt_slot *given, double *kept, double *h) noexcept nogil:
    """The numbers of a rule, of its options, the count of the step, and what it keeps, which moves on."""
    cdef const double *o = given.options
    cdef double t = <double>given.step
    if rule == ADABELIEF:
        numbers.adabelief(<const numbers.AdaBelief *>o, t, <rules.AdaBelief *>h)
    elif rule == ADADELTA:
        numbers.adadelta(<const numbers.Adadelta *>o, t, <rules.Adadelta *>h)
    elif rule == ADAGRAD:
        numbers.adagrad(<const numbers.Adagrad *>o, t, <rules.Adagrad *>h)
    elif (rule == ADAM or rule == ADAMW) and needs_sums(rule, o):
        numbers.adam_scaled(<const numbers.Adam *>o, t, 1 if rule == ADAMW else o[9], <rules.AdamScaled *>h)
    elif rule == ADAM or rule == ADAMW:
        numbers.adam(<const numbers.Adam *>o, t, 1 if rule == ADAMW else o[9], <rules.Adam *>h)
    elif rule == ADAMW_SCHEDULE_FREE:
        numbers.adamw_schedule_free(<const numbers.AdamWScheduleFree *>o, t, <numbers.ScheduleFreeKept *>kept,
                                    <rules.AdamWScheduleFree *>h)
    elif rule == ADAMAX:
        numbers.adamax(<const numbers.Adamax *>o, t, <rules.Adamax *>h)
    elif rule == ADAN:
        numbers.adan(<const numbers.Adan *>o, t, <rules.Adan *>h)
    elif rule == ADEMAMIX:
        numbers.ademamix(<const numbers.AdEMAMix *>o, t, <rules.AdEMAMix *>h)
    elif rule == ADOPT:
        numbers.adopt(<const numbers.ADOPT *>o, t, <rules.ADOPT *>h)
    elif rule == ASGD:
        numbers.asgd(<const numbers.ASGD *>o, t, <numbers.ASGDKept *>kept, <rules.ASGD *>h)
    elif rule == FTRL:
        numbers.ftrl(<const numbers.FTRL *>o, t, <rules.FTRL *>h)
    elif rule == LAMB:
        numbers.lamb(<const numbers.LAMB *>o, t, <rules.LAMB *>h)
    elif rule == LARS:
        numbers.lars(<const numbers.LARS *>o, t, <rules.LARS *>h)
    elif rule == LION:
        numbers.lion(<const numbers.Lion *>o, t, <rules.Lion *>h)
    elif rule == NADAM:
        numbers.nadam(<const numbers.NAdam *>o, t, <numbers.NAdamKept *>kept, <rules.NAdam *>h)
    elif rule == PRODIGY:
        numbers.prodigy(<const numbers.Prodigy *>o, t, <const numbers.ProdigyKept *>kept, <rules.Prodigy *>h)
    elif rule == RADAM:
        numbers.radam(<const numbers.RAdam *>o, t, <rules.RAdam *>h)
    elif rule == RMSPROP:
        numbers.rmsprop(<const numbers.RMSprop *>o, t, <rules.RMSprop *>h)
    elif rule == RPROP:
        numbers.rprop(<const numbers.Rprop *>o, t, <rules.Rprop *>h)
    elif rule == SGD:
        numbers.sgd(<const numbers.SGD *>o, t, <rules.SGD *>h)
    elif rule == SGD_SCHEDULE_FREE:
        numbers.sgd_schedule_free(<const numbers.SGDScheduleFree *>o, t, <numbers.ScheduleFreeKept *>kept,
                                  <rules.SGDScheduleFree *>h)
    h[0] *= given.gradient_factor  # a plain double: a member of Numbers could not be the same for the compiler


cdef int check_numbers(const Plan *plan, Py_ssize_t i, const double *h, char *message, size_t size) noexcept nogil:
    """What is computed must be finite too, and be in float32 where it becomes that; flags read as tiny doubles."""
    cdef bint shared = plan.slots[i].rule == PRODIGY  # d and its numerator stay double
    cdef int j
    for j in range(SCALARS):
        if not isfinite(h[j]) or (plan.slots[i].has_float32 and fabs(h[j]) > FLT_MAX and not (shared and 1 <= j <= 2)):
            snprintf(message, size, "slot %zd: number %d of its rule is %g in this step, must be finite and, for "
                     "float32, at most 3.4e38", i, j, h[j])
            return PYOPT_INVALID
    return PYOPT_OK


cdef int prepare(pyopt_plan *handle, const pyopt_slot *slots, size_t count, char *message, size_t size) noexcept nogil:
    cdef int status = take(handle, message, size)
    if status == PYOPT_OK:
        status = prepare_taken(<Plan *>handle, slots, count, message, size)
        leave(&(<Plan *>handle).used)
    return status


cdef int take(pyopt_plan *handle, char *message, size_t size) noexcept nogil:
    """Have a plan for a step, which no other thread may be in."""
    size = 0 if message == NULL else size
    if handle == NULL:
        snprintf(message, size, "plan is NULL, must be an address")
        return PYOPT_INVALID
    if not enter(&(<Plan *>handle).used):
        snprintf(message, size, "plan is in a step, must be used by one thread at a time")
        return PYOPT_INVALID
    return PYOPT_OK


cdef int prepare_taken(Plan *plan, const pyopt_slot *slots, size_t count, char *message, size_t size) noexcept nogil:
    """Make the numbers of a step, in the mode of steps: they too must not depend on the caller's."""
    cdef uint64_t mode = enter_mode()
    cdef int status = make_all_numbers(plan, slots, count, message, size)
    leave_mode(mode)
    return status


cdef int make_all_numbers(Plan *plan, const pyopt_slot *slots, size_t count, char *message, size_t size) noexcept nogil:
    cdef pyopt_slot own
    cdef const pyopt_slot *given
    cdef Numbers *n
    cdef double kept[PYOPT_MOST_KEPT]
    cdef Py_ssize_t i, k, first_joint = -1
    cdef bint has_sums = False
    cdef int status, rule
    size = 0 if message == NULL else size
    if slots == NULL and count > 0:
        snprintf(message, size, "slots is NULL, must be an address")
        return PYOPT_INVALID
    if not is_aligned(slots, sizeof(void *)):
        snprintf(message, size, "slots is at 0x%llx, must be aligned to %zu bytes", address(slots), sizeof(void *))
        return PYOPT_INVALID
    if count < <size_t>plan.n_slots:
        snprintf(message, size, "count == %zu slots, must be %zd: the rows have slots up to %zd", count, plan.n_slots,
                 plan.n_slots - 1)
        return PYOPT_INVALID
    if plan.n_slots > 0 and not is_size(slots.size, LEAST_SLOT):
        return bad_size("slot", 0, slots.size, sizeof(pyopt_slot), message, size)
    for i in range(plan.n_slots):
        if plan.slots[i].rows == 0:
            continue
        given, n, rule = slot_at(slots, i, &own), &plan.prepared[i], plan.slots[i].rule
        if given.size != slots.size:
            return bad_size("slot", i, given.size, sizeof(pyopt_slot), message, size)
        status = check_slot(plan, i, given, message, size)
        if status != PYOPT_OK:
            return status
        if catalogue[rule].rule.n_kept > 0:
            memcpy(kept, given.kept, catalogue[rule].rule.n_kept * sizeof(double))
        memset(n, 0, sizeof(Numbers))
        make_numbers(rule, given, kept, n.value)
        n.kernel = &kernels[rule][1 if needs_sums(rule, given.options) and catalogue[rule].summing != NULL else 0]
        has_sums = has_sums or n.kernel.finish != NULL
        status = check_numbers(plan, i, n.value, message, size)
        if status != PYOPT_OK:
            return status
        if rule == PRODIGY:
            if first_joint < 0:
                first_joint = i
            status = check_joint(plan, slots, first_joint, i, message, size)
            if status != PYOPT_OK:
                return status
    if has_sums and not plan.prepares_sums:
        status = reserve_sums(plan, message, size)
        if status != PYOPT_OK:
            return status
    # From here on nothing can fail.
    memcpy(plan.numbers, plan.prepared, plan.n_slots * sizeof(Numbers))
    for i in range(plan.n_slots):
        rule = plan.slots[i].rule
        if plan.slots[i].rows == 0 or catalogue[rule].rule.n_kept == 0:
            continue
        given = slot_at(slots, i, &own)
        plan.slots[i].kept = given.kept
        if rule != PRODIGY:
            make_numbers(rule, given, given.kept, plan.prepared[i].value)
    if plan.place_of != NULL:
        for k in range(plan.count):
            given = slot_at(slots, plan.slot_of[k], &own)
            plan.stored[k].key = key_of_row(given, plan.place_of[k])
    if has_sums or plan.has_sums:
        for k in range(plan.count):
            assign_numbers(plan, k)
    plan.has_sums = has_sums
    return PYOPT_OK


cdef uint64_t key_of_row(const pyopt_slot *given, int64_t place) noexcept nogil:
    """What chance follows from in a row: as in an optimizer's step."""
    cdef int64_t step = given.step - 1 if given.rounding_step < 0 else given.rounding_step
    return key_of_block(key_of_block(mixed(given.seed), step), place)


cdef int check_joint(const Plan *plan, const pyopt_slot *slots, Py_ssize_t first, Py_ssize_t i, char *message,
                     size_t size) noexcept nogil:
    """What is made of joint sums must be the same in all slots."""
    cdef const rules.Prodigy *a = <const rules.Prodigy *>plan.prepared[first].value
    cdef const rules.Prodigy *b = <const rules.Prodigy *>plan.prepared[i].value
    cdef const char *name = NULL
    cdef pyopt_slot own[2]
    if slot_at(slots, first, &own[0]).options[9] != slot_at(slots, i, &own[1]).options[9]:
        name = "d0"
    elif a.d != b.d or a.d_numerator != b.d_numerator:
        name = "kept"
    elif a.beta3 != b.beta3:
        name = "beta3"
    elif a.d_coef != b.d_coef:
        name = "d_coef"
    if name != NULL:
        snprintf(message, size, "slot %zd: its %s must be as in slot %zd: Prodigy has one d", i, name, first)
        return PYOPT_INVALID
    return PYOPT_OK


cdef int reserve_sums(Plan *plan, char *message, size_t size) noexcept nogil:
    """Memory for the sums of blocks, and for numbers of each row."""
    cdef Numbers *longer = <Numbers *>calloc(plan.n_slots + plan.count + 1, sizeof(Numbers))
    cdef double *sums = <double *>calloc(number_blocks(plan.work, plan.count) * SUMS + 1, sizeof(double))
    if longer == NULL or sums == NULL:
        free(longer)
        free(sums)
        return no_memory(message, size)
    free(plan.numbers)
    plan.numbers, plan.sums, plan.prepares_sums = longer, sums, True
    return PYOPT_OK


cdef void assign_numbers(Plan *plan, Py_ssize_t k) noexcept nogil:
    """A row whose rule needs sums makes numbers of its own; the others have those of their slot."""
    cdef Work *w = &plan.work[k]
    cdef Py_ssize_t slot = plan.slot_of[k]
    w.slot = slot
    if plan.numbers[slot].kernel.finish != NULL:
        w.slot = plan.n_slots + k
        plan.numbers[w.slot] = plan.numbers[slot]


# --- the step ---------------------------------------------------------------------------------------------------------

cdef Pass pass_over(const Plan *plan, bint sums) noexcept nogil:
    cdef Pass a
    memset(&a, 0, sizeof(Pass))
    a.work, a.count, a.numbers, a.cost, a.parts = plan.work, plan.count, plan.numbers, plan.cost, 1
    a.sums = plan.sums if sums else NULL
    return a


cdef void run_chunks(const Pass *a, int64_t first, int64_t last) noexcept nogil:
    cdef int64_t begin = max(first, 0), end = min(last, (a.cost + CHUNK - 1) // CHUNK)
    if begin < end:
        run_in_mode(a, begin * CHUNK, min(end * CHUNK, a.cost))


cdef int64_t chunks(const pyopt_plan *plan) noexcept nogil:
    return 0 if plan == NULL else ((<const Plan *>plan).cost + CHUNK - 1) // CHUNK


cdef int has_sums(const pyopt_plan *plan) noexcept nogil:
    return plan != NULL and (<const Plan *>plan).has_sums


cdef void sum_chunks(pyopt_plan *plan, int64_t first, int64_t last) noexcept nogil:
    cdef Pass a
    if has_sums(plan):
        a = pass_over(<Plan *>plan, True)
        run_chunks(&a, first, last)


cdef void combine(pyopt_plan *handle, const pyopt_slot *_) noexcept nogil:
    """Make the sums to numbers. What it is given is not looked at: `prepare` has checked where the kept ones are."""
    cdef Plan *plan = <Plan *>handle
    cdef const Work *w
    cdef const Numbers *n
    cdef Pass a
    cdef Py_ssize_t k
    if not has_sums(handle):
        return
    a = pass_over(plan, True)
    finish(&a, plan.numbers)
    for k in range(plan.count):
        w = &plan.work[k]
        n = &plan.numbers[w.slot]
        if n.kernel.joint:  # of Prodigy
            memcpy(plan.slots[plan.slot_of[k]].kept, &n.value[1], 2 * sizeof(double))


cdef void run_all(pyopt_plan *plan, int64_t first, int64_t last) noexcept nogil:
    cdef Pass a
    if plan != NULL:
        a = pass_over(<Plan *>plan, False)
        run_chunks(&a, first, last)


cdef int step(pyopt_plan *handle, const pyopt_slot *slots, size_t count, int threads, char *message,
              size_t size) noexcept nogil:
    cdef int status
    if threads < 1:
        snprintf(message, 0 if message == NULL else size, "threads == %d, must be >= 1", threads)
        return PYOPT_INVALID
    status = take(handle, message, size)
    if status == PYOPT_OK:
        status = prepare_taken(<Plan *>handle, slots, count, message, size)
        if status == PYOPT_OK:
            step_taken(<Plan *>handle, threads)
        leave(&(<Plan *>handle).used)
    return status


cdef void step_taken(Plan *plan, int threads) noexcept nogil:
    cdef Pass a = pass_over(plan, plan.has_sums)
    a.parts = threads_of(threads, plan.cost)
    if plan.has_sums:
        sweep_on(&a)
        combine(<pyopt_plan *>plan, NULL)
        a.sums = NULL
    sweep_on(&a)


# --- the table --------------------------------------------------------------------------------------------------------

cdef pyopt_functions table

ctypedef bint (*Find)(const char *name, Kernel *found) noexcept nogil


cdef const pyopt_functions *fill_table() noexcept nogil:
    fill_kinds()
    table.size = sizeof(pyopt_functions)
    table.major, table.minor = PYOPT_MAJOR, PYOPT_MINOR
    table.count_rules, table.rule, table.find_rule, table.find_option = count_rules, rule_at, find_rule, find_option
    table.fill_defaults, table.initial_state, table.fill_kept = fill_defaults, initial_state, fill_kept
    table.create, table.destroy, table.step = create, destroy, step
    table.prepare, table.chunks, table.has_sums = prepare, chunks, has_sums
    table.sum, table.combine, table.run = sum_chunks, combine, run_all
    return &table


cdef bint find_kernels(Find find) noexcept nogil:
    """Fill the table of kernels; whether there are all of them."""
    cdef int i
    for i in range(RULES):
        if not find(catalogue[i].kernel, &kernels[i][0]):
            return False
        if catalogue[i].summing != NULL and not find(catalogue[i].summing, &kernels[i][1]):
            return False
    return True


# --- with Python ------------------------------------------------------------------------------------------------------

from cpython.pycapsule cimport PyCapsule_New

from pathlib import Path

from pyopt._isa import kernels as level


cdef bint find_in_level(const char *name, Kernel *found) noexcept nogil:
    with gil:
        found[0] = (<Rule>getattr(level, name.decode())).kernel
    return True


find_kernels(find_in_level)
c_api_v1 = PyCapsule_New(<void *>fill_table(), PYOPT_CAPSULE, NULL)


def get_include():
    """The directory of pyopt.h, the header of the C functions, for a C or C++ compiler.

    Example:
        >>> import os, pyopt
        >>> os.path.exists(os.path.join(pyopt.get_include(), "pyopt.h"))
        True
    """
    return str(Path(__file__).parent / "include")
