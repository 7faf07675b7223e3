# HOW a rule runs over a stretch of memory: one loop, which Cython writes out for each rule and element type, and at its
# end the table of the rules with the names of their states. Cutting into parts, threads and buffers are the engine's.
# Every condition of a rule is constant over a span, so the compiler makes one vectorised loop per combination of
# options; tests/test_object_code.py holds it to that.

from libc.math cimport isinf
from libc.stdint cimport int16_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strcmp

from pyopt cimport _rules as rules
from pyopt cimport _storage as storage
from pyopt._engine cimport (
    ALL, BFLOAT16, BLOCK, CHANCE_BFLOAT16, CHANCE_FLOAT16, CODECS, FLOAT16, KAHAN_BFLOAT16, KAHAN_FLOAT16,
    PARAMETER, PLAIN, SIGNED_CODES, SPLIT, STATE, UNSIGNED_CODES, Codec, Direct, Finish, FinishRow32, FinishRow64,
    Kernel, Pack, Reduce32, Reduce64, Rule, Span32, Span64,
)
from pyopt._libm cimport pow
from pyopt._matrix cimport LANES, Matrices, Pass, Tile, tile_at
from pyopt._rules cimport floating

ctypedef fused Numbers:  # of each rule: their struct says which one it is
    rules.SGD
    rules.Lion
    rules.Adagrad
    rules.ASGD
    rules.Rprop
    rules.Adadelta
    rules.RMSprop
    rules.Adamax
    rules.Adam
    rules.SparseAdam
    rules.RowwiseAdagrad
    rules.AdaBelief
    rules.RAdam
    rules.NAdam
    rules.ADOPT
    rules.AdEMAMix
    rules.Adan
    rules.FTRL
    rules.SGDScheduleFree
    rules.AdamWScheduleFree
    rules.AdamScaled
    rules.LARS
    rules.LAMB
    rules.Prodigy
    rules.Average
    rules.Scale
    rules.Clamp
    rules.Interpolation
    rules.Muon
    rules.Adafactor
    rules.Roof

ctypedef fused Summing:  # of the rules that need sums over whole tensors
    rules.AdamScaled
    rules.LARS
    rules.LAMB
    rules.Prodigy


# --- elements of other types than rules compute in --------------------------------------------------------------------

cdef void load_bfloat16(float *restrict to, const uint16_t *restrict x, const void *_, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.from_bfloat16(x[i])


cdef void store_bfloat16(const float *restrict x, uint16_t *restrict to, void *_1, Py_ssize_t n, uint64_t _2,
                         Py_ssize_t _3) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.to_bfloat16(x[i])


cdef void load_float16(float *restrict to, const uint16_t *restrict x, const void *_, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.from_float16(x[i])


cdef void store_float16(const float *restrict x, uint16_t *restrict to, void *_1, Py_ssize_t n, uint64_t _2,
                        Py_ssize_t _3) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.to_float16(x[i])


cdef void load_split(float *restrict to, const uint16_t *restrict x, const int16_t *restrict low,
                     Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.from_split(x[i], low[i])


cdef void store_split(const float *restrict x, uint16_t *restrict to, int16_t *restrict low, Py_ssize_t n, uint64_t _1,
                      Py_ssize_t _2) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.to_split(x[i], &low[i])


cdef void load_kahan_bfloat16(float *restrict to, const uint16_t *restrict x, const uint16_t *restrict rest,
                              Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.from_bfloat16(x[i]) + storage.from_bfloat16(rest[i])


cdef void store_kahan_bfloat16(const float *restrict x, uint16_t *restrict to, uint16_t *restrict rest, Py_ssize_t n,
                               uint64_t _1, Py_ssize_t _2) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.to_bfloat16(x[i])
        rest[i] = storage.to_bfloat16(storage.rest_of(x[i], storage.from_bfloat16(to[i])))


cdef void load_kahan_float16(float *restrict to, const uint16_t *restrict x, const uint16_t *restrict rest,
                             Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.from_float16(x[i]) + storage.from_float16(rest[i])


cdef void store_kahan_float16(const float *restrict x, uint16_t *restrict to, uint16_t *restrict rest, Py_ssize_t n,
                              uint64_t _1, Py_ssize_t _2) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = storage.to_float16(x[i])
        rest[i] = storage.to_float16(storage.rest_of(x[i], storage.from_float16(to[i])))


cdef void store_chance_bfloat16(const float *restrict x, uint16_t *restrict to, void *_, Py_ssize_t n, uint64_t key,
                                Py_ssize_t first) noexcept nogil:
    cdef uint64_t own = storage.key_of_block(key, first // BLOCK)
    cdef uint32_t at = first % BLOCK, i
    for i in range(<uint32_t>n):
        to[i] = storage.to_bfloat16_by_chance(x[i], storage.random_bits(at + i, own))


cdef void store_chance_float16(const float *restrict x, uint16_t *restrict to, void *_, Py_ssize_t n, uint64_t key,
                               Py_ssize_t first) noexcept nogil:
    cdef uint64_t own = storage.key_of_block(key, first // BLOCK)
    cdef uint32_t at = first % BLOCK, i
    for i in range(<uint32_t>n):
        to[i] = storage.to_float16_by_chance(x[i], storage.random_bits(at + i, own))


cdef storage.Map signed_map, unsigned_map


cdef inline float edge(int i, int parts) noexcept nogil:
    """The i-th of the edges of equal parts from 0.1 to 1, as of torch.linspace: from the nearer end, rounded once."""
    cdef float low = <float>0.1, high = 1
    cdef float step = (high - low) / parts
    if i < (parts + 1) // 2:
        return <float>(<double>low + <double>step * i)
    return <float>(<double>high - <double>step * (parts - i))


cdef void fill_map(storage.Map *map, bint is_signed) noexcept nogil:
    """The 256 numbers of 8 bits, ascending: those of bitsandbytes; and the cells that find the nearest.

    Seven decades up to 1, each of twice as many numbers as the one below it, in the middles of equal parts; and 0 and
    1. Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 1.3.
    """
    cdef double *top = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]
    cdef float size[256]  # of the numbers, from 0 to 1
    cdef uint32_t bound[256]  # between a size and the next; one on a bound is of the smaller code
    cdef uint32_t least, beyond
    cdef int count = 1, below = 127 if is_signed else 0, decade, parts, code, i
    cdef float two = 2
    size[0] = 0
    for decade in range(7):
        parts = 1 << decade if is_signed else 2 << decade
        for i in range(parts):
            size[count] = <float>top[decade] * ((edge(i, parts) + edge(i + 1, parts)) / two)
            count += 1
    size[count] = 1
    count += 1
    map.signed = is_signed
    for i in range(count):
        map.value[below + i] = storage.bits_of(size[i])
    for i in range(1, below + 1):
        map.value[below - i] = storage.bits_of(-size[i])
    for i in range(count - 1):
        bound[i] = storage.bits_of((size[i] + size[i + 1]) / two)
    code = 0
    for i in range(storage.CELLS):
        least = <uint32_t>(storage.FIRST_CELL + i) << 16
        while code < count - 1 and bound[code] < least:
            code += 1
        beyond = bound[code] - least if code < count - 1 else 0xffff
        map.cell[i] = <uint32_t>(code - storage.FIRST_CELL - i) << 16 | (0xffff - beyond if beyond < 0xffff else 0)


def numbers_of_codes(bint is_signed):
    """The bits of the 256 numbers of 8 bits."""
    cdef storage.Map *map = &signed_map if is_signed else &unsigned_map
    return [map.value[i] for i in range(256)]


ctypedef fused place_type:
    uint8_t
    uint16_t


cdef void look_up(uint32_t *restrict to, const place_type *restrict x, const uint32_t *restrict table,
                  Py_ssize_t n) noexcept nogil:
    """The entries of a table at n places: 8 bytes of them at once, and one by one, faster than vectors of places."""
    cdef Py_ssize_t i = 0, j
    cdef uint64_t places
    while i + 8 // <int>sizeof(place_type) <= n:
        memcpy(&places, x + i, sizeof(places))
        for j in range(8 // <int>sizeof(place_type)):
            to[i + j] = table[storage.PART_AT(places, j, 8 * sizeof(place_type))]
        i += 8 // <int>sizeof(place_type)
    while i < n:
        to[i] = table[x[i]]
        i += 1


cdef void load_codes(float *restrict to, const uint8_t *restrict x, float scale, Py_ssize_t n,
                     const storage.Map *map) noexcept nogil:
    cdef uint32_t bits[storage.GROUP]
    cdef Py_ssize_t i
    look_up(bits, x, map.value, n)
    for i in range(n):
        to[i] = storage.float_of(bits[i]) * scale


cdef int32_t largest_size(const float *restrict x, Py_ssize_t n) noexcept nogil:
    """The bits of the largest |x|, of NaN where there is one."""
    cdef int32_t most = 0, size
    cdef Py_ssize_t i
    for i in range(n):
        size = storage.bits_of(x[i]) & 0x7fffffff
        most = size if size > most else most
    return most


cdef float store_codes(const float *restrict x, uint8_t *restrict to, Py_ssize_t n,
                       const storage.Map *map) noexcept nogil:
    """Returns the scale."""
    cdef float scale = storage.float_of(largest_size(x, n)), inverse
    cdef float one = 1, least = <float>1e-38
    cdef uint32_t bits[storage.GROUP]
    cdef uint16_t place[storage.GROUP]
    cdef uint32_t cell[storage.GROUP]
    cdef bint is_signed = map.signed
    cdef Py_ssize_t i
    inverse = one / (least if scale < least else scale)
    for i in range(n):
        bits[i] = storage.in_cells(x[i] * inverse, is_signed)
        place[i] = storage.cell_of(bits[i])
    look_up(cell, place, map.cell, n)
    for i in range(n):
        to[i] = storage.to_code(bits[i], cell[i], is_signed)
    return scale


cdef void load_signed(float *restrict to, const uint8_t *restrict x, const float *restrict scale,
                      Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range((n + storage.GROUP - 1) // storage.GROUP):
        load_codes(to + i * storage.GROUP, x + i * storage.GROUP, scale[i],
                   min(<Py_ssize_t>storage.GROUP, n - i * storage.GROUP), &signed_map)


cdef void load_unsigned(float *restrict to, const uint8_t *restrict x, const float *restrict scale,
                        Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range((n + storage.GROUP - 1) // storage.GROUP):
        load_codes(to + i * storage.GROUP, x + i * storage.GROUP, scale[i],
                   min(<Py_ssize_t>storage.GROUP, n - i * storage.GROUP), &unsigned_map)


cdef void store_signed(const float *restrict x, uint8_t *restrict to, float *restrict scale, Py_ssize_t n, uint64_t _1,
                       Py_ssize_t _2) noexcept nogil:
    cdef Py_ssize_t i
    for i in range((n + storage.GROUP - 1) // storage.GROUP):
        scale[i] = store_codes(x + i * storage.GROUP, to + i * storage.GROUP,
                               min(<Py_ssize_t>storage.GROUP, n - i * storage.GROUP), &signed_map)


cdef void store_unsigned(const float *restrict x, uint8_t *restrict to, float *restrict scale, Py_ssize_t n,
                         uint64_t _1, Py_ssize_t _2) noexcept nogil:
    cdef Py_ssize_t i
    for i in range((n + storage.GROUP - 1) // storage.GROUP):
        scale[i] = store_codes(x + i * storage.GROUP, to + i * storage.GROUP,
                               min(<Py_ssize_t>storage.GROUP, n - i * storage.GROUP), &unsigned_map)


ctypedef void (*Load)(float *restrict, const void *, const void *, Py_ssize_t) noexcept nogil
ctypedef void (*Store)(const float *restrict, void *, void *, Py_ssize_t, uint64_t, Py_ssize_t) noexcept nogil

cdef Codec codecs[CODECS]


cdef void fill_codecs() noexcept nogil:
    fill_map(&signed_map, True)
    fill_map(&unsigned_map, False)
    codecs[PLAIN] = Codec(NULL, NULL, 4, 0, 1)
    codecs[BFLOAT16] = Codec(<Load>load_bfloat16, <Store>store_bfloat16, 2, 0, 1)
    codecs[FLOAT16] = Codec(<Load>load_float16, <Store>store_float16, 2, 0, 1)
    codecs[SPLIT] = Codec(<Load>load_split, <Store>store_split, 2, 2, 1)
    codecs[KAHAN_BFLOAT16] = Codec(<Load>load_kahan_bfloat16, <Store>store_kahan_bfloat16, 2, 2, 1)
    codecs[KAHAN_FLOAT16] = Codec(<Load>load_kahan_float16, <Store>store_kahan_float16, 2, 2, 1)
    codecs[CHANCE_BFLOAT16] = Codec(<Load>load_bfloat16, <Store>store_chance_bfloat16, 2, 0, 1)
    codecs[CHANCE_FLOAT16] = Codec(<Load>load_float16, <Store>store_chance_float16, 2, 0, 1)
    codecs[SIGNED_CODES] = Codec(<Load>load_signed, <Store>store_signed, 1, 4, storage.GROUP)
    codecs[UNSIGNED_CODES] = Codec(<Load>load_unsigned, <Store>store_unsigned, 1, 4, storage.GROUP)


fill_codecs()


# --- rules ------------------------------------------------------------------------------------------------------------

cdef void span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict t,
               floating *restrict u, floating *restrict v, Py_ssize_t n, const Numbers *numbers) noexcept nogil:
    """A rule over n elements; s, t, u, v are its states, in the order of the table. `is` is decided when compiled."""
    cdef Numbers h = numbers[0]
    cdef Py_ssize_t i
    for i in range(n):
        if Numbers is rules.SGD:
            p[i] = rules.sgd(p[i], g[i], &s[i], &h)
        elif Numbers is rules.Lion:
            p[i] = rules.lion(p[i], g[i], &s[i], &h)
        elif Numbers is rules.Adagrad:
            p[i] = rules.adagrad(p[i], g[i], &s[i], &h)
        elif Numbers is rules.ASGD:
            p[i] = rules.asgd(p[i], g[i], &s[i], &h)
        elif Numbers is rules.Rprop:
            p[i] = rules.rprop(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.Adadelta:
            p[i] = rules.adadelta(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.RMSprop:
            p[i] = rules.rmsprop(p[i], g[i], &s[i], &t[i], &u[i], &h)
        elif Numbers is rules.Adamax:
            p[i] = rules.adamax(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.Adam:
            p[i] = rules.adam(p[i], g[i], &s[i], &t[i], &u[i], &h)
        elif Numbers is rules.SparseAdam:
            p[i] = rules.sparse_adam(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.RowwiseAdagrad:
            p[i] = rules.rowwise_adagrad(p[i], g[i], &h)
        elif Numbers is rules.AdaBelief:
            p[i] = rules.adabelief(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.RAdam:
            p[i] = rules.radam(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.NAdam:
            p[i] = rules.nadam(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.ADOPT:
            p[i] = rules.adopt(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.AdEMAMix:
            p[i] = rules.ademamix(p[i], g[i], &s[i], &t[i], &u[i], &h)
        elif Numbers is rules.Adan:
            p[i] = rules.adan(p[i], g[i], &s[i], &t[i], &u[i], &v[i], &h)
        elif Numbers is rules.FTRL:
            p[i] = rules.ftrl(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.SGDScheduleFree:
            p[i] = rules.sgd_schedule_free(p[i], g[i], &s[i], &h)
        elif Numbers is rules.AdamWScheduleFree:
            p[i] = rules.adamw_schedule_free(p[i], g[i], &s[i], &t[i], &h)
        elif Numbers is rules.AdamScaled:
            p[i] = rules.adam_scaled(p[i], g[i], &s[i], &t[i], &u[i], &h)
        elif Numbers is rules.LARS:
            p[i] = rules.lars(p[i], g[i], &s[i], &h)
        elif Numbers is rules.LAMB:
            p[i] = rules.lamb(p[i], s[i], t[i], &h)
        elif Numbers is rules.Prodigy:
            p[i] = rules.prodigy(p[i], s[i], t[i], &h)
        elif Numbers is rules.Average:
            p[i] = rules.average(p[i], g[i], &h)
        elif Numbers is rules.Scale:
            p[i] = rules.scale(p[i], &h)
        elif Numbers is rules.Clamp:
            p[i] = rules.clamp(p[i], &h)
        elif Numbers is rules.Interpolation:
            p[i] = rules.interpolation(p[i], g[i], &h)
        elif Numbers is rules.Muon:
            p[i] = rules.muon(p[i], g[i], &s[i], t[i], &h)
        elif Numbers is rules.Adafactor:
            p[i] = rules.adafactor(p[i], g[i], &s[i], &h)
        elif Numbers is rules.Roof:
            p[i] = rules.roof(p[i], g[i], &s[i], &t[i], &u[i], &v[i], &h)


ctypedef fused first_type:  # of parameter and gradient; uint16_t is bfloat16
    float
    uint16_t

ctypedef fused state_type:
    float
    uint16_t


cdef inline float loaded(first_type x) noexcept nogil:
    if first_type is float:
        return x
    else:
        return storage.from_bfloat16(x)


cdef inline void put(first_type *to, float x) noexcept nogil:
    if first_type is float:
        to[0] = x
    else:
        to[0] = storage.to_bfloat16(x)


cdef void adam_direct(first_type *restrict p, const first_type *restrict g, state_type *restrict s,
                      state_type *restrict t, state_type *restrict u, state_type *restrict _1, Py_ssize_t n,
                      const rules.Adam *numbers, int16_t *restrict low) noexcept nogil:
    """The rule of Adam on a mix of types."""
    cdef rules.Adam h = numbers[0]
    cdef float x, m, v, v_max
    cdef Py_ssize_t i
    for i in range(n):
        m = loaded(s[i])
        v = loaded(t[i])
        v_max = 0
        if h.amsgrad:
            v_max = loaded(u[i])
        x = loaded(p[i])
        if first_type is uint16_t:
            if low != NULL:
                x = storage.from_split(p[i], low[i])
        x = rules.adam(x, loaded(g[i]), &m, &v, &v_max, &h)
        put(&s[i], m)
        put(&t[i], v)
        if h.amsgrad:
            put(&u[i], v_max)
        if first_type is uint16_t:
            if low != NULL:
                p[i] = storage.to_split(x, &low[i])
            else:
                put(&p[i], x)
        else:
            put(&p[i], x)


cdef int pack(dict scalars, Numbers *numbers) except -1:
    if Numbers is rules.AdamScaled:
        numbers[0] = {**scalars, "mask_factor": 1}
    else:
        numbers[0] = scalars
    return 0


cdef Kernel kernel(const Numbers *_) noexcept nogil:
    """What runs for a rule; the engine, which does not know the struct of its numbers, hands them on as void *."""
    cdef Kernel found = spans(<Span32>span[float, Numbers], <Span64>span[double, Numbers])
    if Numbers is rules.Adam:  # the commonest mixes of types
        found.direct[ALL] = <Direct>adam_direct[uint16_t, uint16_t]
        found.direct[PARAMETER] = <Direct>adam_direct[uint16_t, float]
        found.direct[STATE] = <Direct>adam_direct[float, uint16_t]
    return found


cdef Kernel spans(Span32 span32, Span64 span64) noexcept nogil:
    cdef Kernel found
    memset(&found, 0, sizeof(Kernel))
    found.span32, found.span64, found.codecs = span32, span64, codecs
    return found


cdef Rule rule(str name, tuple states, const Numbers *_):
    return Rule.make(name, states, kernel(_), <Pack>pack[Numbers])


# --- the rules that need sums over whole tensors ----------------------------------------------------------------------
# In blocks of BLOCK elements: the terms of each element in double, then their sum. No vector's width is in its order.

cdef double folded(double *x, Py_ssize_t n) noexcept nogil:
    """The sum of n terms: those behind the largest power of 2 below n onto the first, until one is left."""
    cdef Py_ssize_t half = 1
    if n & (n - 1):
        while 2 * half < n:
            half *= 2
        fold(x, x + half, n - half)
        n = half
    while n >= 8:
        n //= 8
        fold_thrice(x, x + n, n)
    while n > 1:
        n //= 2
        fold(x, x + n, n)
    return x[0] if n > 0 else 0


cdef void fold(double *restrict x, const double *restrict y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = x[i] + y[i]


cdef void fold_thrice(double *restrict x, const double *restrict y, Py_ssize_t n) noexcept nogil:
    """8 * n terms at once, with each loaded once."""
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = (((x[i] + y[i + 3 * n]) + (y[i + n] + y[i + 5 * n]))
                + ((y[i] + y[i + 4 * n]) + (y[i + 2 * n] + y[i + 6 * n])))


cdef void block_sums(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict t,
                     floating *restrict u, floating *restrict v, Py_ssize_t n, const Summing *numbers,
                     double *sums) noexcept nogil:
    cdef Summing h = numbers[0]
    cdef double x[BLOCK]
    cdef double y[BLOCK]
    cdef Py_ssize_t i
    for i in range(n):
        if Summing is rules.AdamScaled:
            rules.adam_scaled_terms(p[i], g[i], &s[i], &t[i], &u[i], &x[i], &y[i], &h)
        elif Summing is rules.LARS:
            rules.lars_terms(p[i], g[i], &x[i], &y[i], &h)
        elif Summing is rules.LAMB:
            rules.lamb_terms(p[i], g[i], &s[i], &t[i], &x[i], &y[i], &h)
        elif Summing is rules.Prodigy:
            rules.prodigy_terms(p[i], g[i], &s[i], &t[i], &u[i], &v[i], &x[i], &y[i], &h)
    if Summing is rules.AdamScaled:
        sums[0] = folded(x, n) if h.update_clip else 0  # x is not made then
    else:
        sums[0] = folded(x, n)
    sums[1] = folded(y, n)
    if Summing is rules.Prodigy:
        sums[0] *= h.numerator_weight


cdef void finish(Summing *numbers, const double *sums, Py_ssize_t size) noexcept nogil:
    if Summing is rules.AdamScaled:
        rules.adam_scaled_finish(numbers, sums, size)
    elif Summing is rules.LARS:
        rules.lars_finish(numbers, sums, size)
    elif Summing is rules.LAMB:
        rules.lamb_finish(numbers, sums, size)
    elif Summing is rules.Prodigy:
        rules.prodigy_finish(numbers, sums, size)


cdef Kernel summing_kernel(const Summing *_) noexcept nogil:
    cdef bint moves_state = Summing is rules.LAMB or Summing is rules.Prodigy
    return with_sums(kernel(_), <Reduce32>block_sums[float, Summing], <Reduce64>block_sums[double, Summing],
                     <Finish>finish[Summing], Summing is rules.Prodigy, moves_state)


cdef Kernel with_sums(Kernel found, Reduce32 reduce32, Reduce64 reduce64, Finish finish, bint joint,
                      bint moves_state) noexcept nogil:
    found.reduce32, found.reduce64, found.finish, found.joint = reduce32, reduce64, finish, joint
    found.moves_state = moves_state
    return found


cdef Rule summing_rule(str name, tuple states, const Summing *_):
    return Rule.make(name, states, summing_kernel(_), <Pack>pack[Summing])


# --- the rules that need sums over rows -------------------------------------------------------------------------------

cdef void row_sums(floating *restrict p, const floating *restrict g, floating *restrict _1, floating *restrict _2,
                   floating *restrict _3, floating *restrict _4, Py_ssize_t n, const rules.RowwiseAdagrad *numbers,
                   double *sums) noexcept nogil:
    cdef rules.RowwiseAdagrad h = numbers[0]
    cdef double x[BLOCK]
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = rules.rowwise_adagrad_term(p[i], g[i], &h)
    sums[0] = folded(x, n)
    sums[1] = 0


cdef void finish_row(rules.RowwiseAdagrad *numbers, const double *sums, Py_ssize_t size, floating *s) noexcept nogil:
    rules.rowwise_adagrad_finish(numbers, sums[0], size, s)


cdef Kernel row_by_row(Kernel found, Reduce32 reduce32, Reduce64 reduce64, FinishRow32 finish32,
                       FinishRow64 finish64) noexcept nogil:
    found.reduce32, found.reduce64, found.finish_row32, found.finish_row64 = reduce32, reduce64, finish32, finish64
    return found


# --- no rules ---------------------------------------------------------------------------------------------------------

cdef void exchange_span(floating *restrict p, const floating *restrict g, floating *restrict _1, floating *restrict _2,
                        floating *restrict _3, floating *restrict _4, Py_ssize_t n, const void *_5) noexcept nogil:
    """An average in p and its parameter, which here is written too, change places."""
    cdef floating *restrict q = <floating *>g
    cdef floating x
    cdef Py_ssize_t i
    for i in range(n):
        x = p[i]
        p[i] = q[i]
        q[i] = x


cdef int pack_nothing(dict scalars, void *out) except -1:
    return 0


cdef enum:
    ROW = 128  # a divisor of BLOCK


cdef inline double square(floating x) noexcept nogil:
    return <double>x * <double>x


cdef void add_squares(double *restrict x, const floating *restrict g, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = x[i] + square(g[i])


cdef void norm_sums(floating *restrict _0, const floating *restrict g, floating *restrict _1, floating *restrict _2,
                    floating *restrict _3, floating *restrict _4, Py_ssize_t n, const rules.Norm *numbers,
                    double *sums) noexcept nogil:
    """The sum of (|g| * scale)**power, the largest |g| for inf."""
    cdef rules.Norm h = numbers[0]
    cdef double x[BLOCK]
    cdef floating most[LANES]
    cdef Py_ssize_t i, j
    if isinf(h.power):
        memset(most, 0, sizeof(most))
        i = 0
        while i < n:
            for j in range(min(<Py_ssize_t>LANES, n - i)):
                most[j] = rules.larger(most[j], rules.magnitude(g[i + j]))
            i += LANES
        for j in range(1, LANES):
            most[0] = rules.larger(most[0], most[j])
        sums[0] = most[0]
        return
    if h.power == 2 and h.scale == 1:
        # Memory in its order, which it is fastest in: ROW sums side by side, then those.
        memset(x, 0, min(<Py_ssize_t>ROW, n) * sizeof(double))
        i = 0
        while i < n:
            add_squares(x, g + i, min(<Py_ssize_t>ROW, n - i))
            i += ROW
        n = min(<Py_ssize_t>ROW, n)
    elif h.power == 1 and h.scale == 1:
        for i in range(n):
            x[i] = rules.magnitude(g[i])
    else:
        for i in range(n):
            x[i] = pow(rules.magnitude(g[i]) * h.scale, h.power)
    sums[0] = folded(x, n)


cdef int pack_norm(dict scalars, rules.Norm *numbers) except -1:
    numbers[0] = scalars
    return 0


exchange = Rule.make("exchange", (), spans(exchange_span[float], exchange_span[double]), pack_nothing)
(<Rule>exchange).kernel.writes_both = True
nothing = Rule.make("nothing", (), spans(NULL, NULL), pack_nothing)
norm = Rule.make("norm", (), with_sums(
    (<Rule>nothing).kernel, <Reduce32>norm_sums[float], <Reduce64>norm_sums[double], NULL, False, False),
    <Pack>pack_norm)


# --- the table: each rule's name and the names of its states ----------------------------------------------------------

sgd = rule("sgd", ("momentum_buffer",), <rules.SGD *>NULL)
lion = rule("lion", ("exp_avg",), <rules.Lion *>NULL)
adagrad = rule("adagrad", ("sum",), <rules.Adagrad *>NULL)
asgd = rule("asgd", ("ax",), <rules.ASGD *>NULL)
rprop = rule("rprop", ("prev", "step_size"), <rules.Rprop *>NULL)
adadelta = rule("adadelta", ("square_avg", "acc_delta"), <rules.Adadelta *>NULL)
rmsprop = rule("rmsprop", ("square_avg", "momentum_buffer", "grad_avg"), <rules.RMSprop *>NULL)
adamax = rule("adamax", ("exp_avg", "exp_inf"), <rules.Adamax *>NULL)
adam = rule("adam", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), <rules.Adam *>NULL)
sparse_adam = rule("sparse_adam", ("exp_avg", "exp_avg_sq"), <rules.SparseAdam *>NULL)
adabelief = rule("adabelief", ("exp_avg", "exp_avg_var"), <rules.AdaBelief *>NULL)
radam = rule("radam", ("exp_avg", "exp_avg_sq"), <rules.RAdam *>NULL)
nadam = rule("nadam", ("exp_avg", "exp_avg_sq"), <rules.NAdam *>NULL)
adopt = rule("adopt", ("exp_avg", "exp_avg_sq"), <rules.ADOPT *>NULL)
ademamix = rule("ademamix", ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"), <rules.AdEMAMix *>NULL)
adan = rule("adan", ("exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad"), <rules.Adan *>NULL)
ftrl = rule("ftrl", ("z", "n"), <rules.FTRL *>NULL)
sgd_schedule_free = rule("sgd_schedule_free", ("z",), <rules.SGDScheduleFree *>NULL)
adamw_schedule_free = rule("adamw_schedule_free", ("z", "exp_avg_sq"), <rules.AdamWScheduleFree *>NULL)
adam_scaled = summing_rule("adam_scaled", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), <rules.AdamScaled *>NULL)
(<Rule>adam).summing = adam_scaled
lars = summing_rule("lars", ("momentum_buffer",), <rules.LARS *>NULL)
lamb = summing_rule("lamb", ("exp_avg", "exp_avg_sq"), <rules.LAMB *>NULL)
prodigy = summing_rule("prodigy", ("exp_avg", "exp_avg_sq", "s", "p0"), <rules.Prodigy *>NULL)
rowwise_adagrad = Rule.make(
    "rowwise_adagrad", ("sum",),
    row_by_row(kernel(<rules.RowwiseAdagrad *>NULL), <Reduce32>row_sums[float], <Reduce64>row_sums[double],
               <FinishRow32>finish_row[float], <FinishRow64>finish_row[double]),
    <Pack>pack[rules.RowwiseAdagrad])
average = rule("average", (), <rules.Average *>NULL)
scale = rule("scale", (), <rules.Scale *>NULL)
clamp = rule("clamp", (), <rules.Clamp *>NULL)
interpolation = rule("interpolation", (), <rules.Interpolation *>NULL)
muon = rule("muon", ("momentum_buffer", "direction"), <rules.Muon *>NULL)
adafactor = rule("adafactor", ("variance",), <rules.Adafactor *>NULL)
roof = rule("roof", ("s", "t", "u", "v"), <rules.Roof *>NULL)


cdef bint find_kernel(const char *name, Kernel *found) noexcept nogil:
    """What runs for a rule, by its name, without Python: for tools/build_c_library. Whether there is such a rule."""
    if codecs[PLAIN].size == 0:
        fill_codecs()
    if strcmp(name, "sgd") == 0:
        found[0] = kernel(<rules.SGD *>NULL)
    elif strcmp(name, "lion") == 0:
        found[0] = kernel(<rules.Lion *>NULL)
    elif strcmp(name, "adagrad") == 0:
        found[0] = kernel(<rules.Adagrad *>NULL)
    elif strcmp(name, "asgd") == 0:
        found[0] = kernel(<rules.ASGD *>NULL)
    elif strcmp(name, "rprop") == 0:
        found[0] = kernel(<rules.Rprop *>NULL)
    elif strcmp(name, "adadelta") == 0:
        found[0] = kernel(<rules.Adadelta *>NULL)
    elif strcmp(name, "rmsprop") == 0:
        found[0] = kernel(<rules.RMSprop *>NULL)
    elif strcmp(name, "adamax") == 0:
        found[0] = kernel(<rules.Adamax *>NULL)
    elif strcmp(name, "adam") == 0:
        found[0] = kernel(<rules.Adam *>NULL)
    elif strcmp(name, "adabelief") == 0:
        found[0] = kernel(<rules.AdaBelief *>NULL)
    elif strcmp(name, "radam") == 0:
        found[0] = kernel(<rules.RAdam *>NULL)
    elif strcmp(name, "nadam") == 0:
        found[0] = kernel(<rules.NAdam *>NULL)
    elif strcmp(name, "adopt") == 0:
        found[0] = kernel(<rules.ADOPT *>NULL)
    elif strcmp(name, "ademamix") == 0:
        found[0] = kernel(<rules.AdEMAMix *>NULL)
    elif strcmp(name, "adan") == 0:
        found[0] = kernel(<rules.Adan *>NULL)
    elif strcmp(name, "ftrl") == 0:
        found[0] = kernel(<rules.FTRL *>NULL)
    elif strcmp(name, "sgd_schedule_free") == 0:
        found[0] = kernel(<rules.SGDScheduleFree *>NULL)
    elif strcmp(name, "adamw_schedule_free") == 0:
        found[0] = kernel(<rules.AdamWScheduleFree *>NULL)
    elif strcmp(name, "adam_scaled") == 0:
        found[0] = summing_kernel(<rules.AdamScaled *>NULL)
    elif strcmp(name, "lars") == 0:
        found[0] = summing_kernel(<rules.LARS *>NULL)
    elif strcmp(name, "lamb") == 0:
        found[0] = summing_kernel(<rules.LAMB *>NULL)
    elif strcmp(name, "prodigy") == 0:
        found[0] = summing_kernel(<rules.Prodigy *>NULL)
    else:
        return False
    return True


# --- passes over matrices: the tiles of pyopt/_matrix.pxd -------------------------------------------------------------
# Sums are taken in double, LANES side by side along a row and each lane in order, so that they depend on the shape
# alone. A lane comes back after LANES elements, so that its loop is an elementwise one, for the compiler to vectorise.

cdef double total(double *lanes) noexcept nogil:
    """The sum of lanes, by halves."""
    cdef Py_ssize_t half = LANES // 2, i
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[half + i]
        half = half // 2
    return lanes[0]


cdef void squares_lanes(const floating *restrict p, const floating *restrict g, double *restrict columns,
                        double *restrict row, double *restrict own, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef double x, y
    for i in range(n):
        x = g[i]
        y = p[i]
        x = x * x
        columns[i] += x
        row[i] += x
        own[i] += y * y


cdef void squares_tile(floating *p, const floating *g, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """Sums of g**2 along the rows and the columns of a tile, and of p**2."""
    cdef Tile t = tile_at(job, index)
    cdef double *columns = job.column_sums + (t.matrix * job.row_tiles + t.row_tile) * job.columns
    cdef double row[LANES]
    cdef double own[LANES]
    cdef Py_ssize_t i, j, at
    memset(&columns[t.first_column], 0, (t.end_column - t.first_column) * sizeof(double))
    memset(own, 0, sizeof(own))
    for i in range(t.first_row, t.end_row):
        at = (t.matrix * job.rows + i) * job.columns
        memset(row, 0, sizeof(row))
        j = t.first_column
        while j + LANES <= t.end_column:
            squares_lanes(p + at + j, g + at + j, columns + j, row, own, LANES)
            j += LANES
        squares_lanes(p + at + j, g + at + j, columns + j, row, own, t.end_column - j)
        job.row_sums[(t.matrix * job.rows + i) * job.column_tiles + t.column_tile] = total(row)
    job.sums[index] = total(own)


cdef void update_lanes(const floating *restrict g, const floating *restrict b, double *restrict own, floating a,
                       floating most, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef double u
    for i in range(n):
        u = rules.factored(g[i], a, b[i], most)
        own[i] += u * u


cdef void update_squares_tile(floating *_1, const floating *g, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """The sum of the squares of the updates of a tile."""
    cdef Tile t = tile_at(job, index)
    cdef const floating *a = <const floating *>job.row_factors + t.matrix * job.rows
    cdef const floating *b = <const floating *>job.column_factors + t.matrix * job.columns
    cdef floating most = <floating>job.most
    cdef double own[LANES]
    cdef Py_ssize_t i, j, at
    memset(own, 0, sizeof(own))
    for i in range(t.first_row, t.end_row):
        at = (t.matrix * job.rows + i) * job.columns
        j = t.first_column
        while j + LANES <= t.end_column:
            update_lanes(g + at + j, b + j, own, a[i], most, LANES)
            j += LANES
        update_lanes(g + at + j, b + j, own, a[i], most, t.end_column - j)
    job.sums[index] = total(own)


cdef void update_row(floating *restrict p, const floating *restrict g, const floating *restrict b, floating a,
                     floating most, floating decay_factor, floating step_size, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = p[i] * decay_factor - step_size * rules.factored(g[i], a, b[i], most)


cdef void update_tile(floating *p, const floating *g, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """The step of a tile."""
    cdef Tile t = tile_at(job, index)
    cdef const floating *a = <const floating *>job.row_factors + t.matrix * job.rows
    cdef const floating *b = <const floating *>job.column_factors + t.matrix * job.columns + t.first_column
    cdef Py_ssize_t i, at
    for i in range(t.first_row, t.end_row):
        at = (t.matrix * job.rows + i) * job.columns + t.first_column
        update_row(p + at, g + at, b, a[i], <floating>job.most, <floating>job.decay_factor, <floating>job.step_size,
                   t.end_column - t.first_column)


cdef void product_lanes(const floating *restrict x, const floating *restrict y, double *restrict own,
                        Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        own[i] += <double>x[i] * <double>y[i]


cdef void product_tile(floating *x, const floating *y, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """The sum of x * y, of a single row."""
    cdef Tile t = tile_at(job, index)
    cdef double own[LANES]
    cdef Py_ssize_t j = t.first_column
    memset(own, 0, sizeof(own))
    while j + LANES <= t.end_column:
        product_lanes(x + j, y + j, own, LANES)
        j += LANES
    product_lanes(x + j, y + j, own, t.end_column - j)
    job.sums[index] = total(own)


squares = Pass.make(squares_tile[float], squares_tile[double])
update_squares = Pass.make(update_squares_tile[float], update_squares_tile[double])
update = Pass.make(update_tile[float], update_tile[double])
product = Pass.make(product_tile[float], product_tile[double])
