# How an element lies in memory where it is not of the type that rules compute in: one function per direction and type,
# in integer arithmetic, so that every level of instructions and compiler gives the same bits. Rounding is to nearest,
# ties to even; NaN becomes a quiet one; denormal numbers stay.

from libc.stdint cimport int16_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, sizeof(u)); return u; }
    /* The part, of so many bits, of 8 bytes that lies at a place in memory. */
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define PART_AT(x, place, bits) ((x) >> (64 - (bits) * ((place) + 1)) & ((1u << (bits)) - 1))
    #else
    #define PART_AT(x, place, bits) ((x) >> (bits) * (place) & ((1u << (bits)) - 1))
    #endif
    static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, sizeof(x)); return x; }
    """
    uint32_t bits_of(float x) noexcept nogil
    float float_of(uint32_t u) noexcept nogil
    int PART_AT(uint64_t x, int place, int bits) noexcept nogil


cdef inline uint32_t quiet(uint32_t u) noexcept nogil:
    """The bits without the sign, those of NaN without a payload; of a quiet one, as it comes out of arithmetic."""
    cdef uint32_t size = u & 0x7fffffff
    return size if size < 0x7fc00000 else <uint32_t>0x7fc00000


# --- bfloat16: the upper half of a float32 ----------------------------------------------------------------------------

cdef inline float from_bfloat16(uint16_t x) noexcept nogil:
    return float_of(<uint32_t>x << 16)


cdef inline uint16_t to_bfloat16(float x) noexcept nogil:
    cdef uint32_t u = bits_of(x), size = quiet(u)
    return <uint16_t>(((u & <uint32_t>0x80000000) | (size + 0x7fff + ((size >> 16) & 1))) >> 16)


# --- float16: 5 bits of exponent, 10 of fraction ----------------------------------------------------------------------

cdef inline float from_float16(uint16_t x) noexcept nogil:
    cdef uint32_t u = (<uint32_t>x & 0x7fff) << 13
    cdef uint32_t sign = (<uint32_t>x & 0x8000) << 16
    cdef uint32_t normal = u + (112 << 23)
    # The bits of a denormal one, put behind the exponent of 2**-14, are it + 2**-14.
    cdef uint32_t denormal = bits_of(float_of(u + (113 << 23)) - float_of(113 << 23))
    normal = u | 0x7f800000 if u >= 0x0f800000 else normal
    return float_of(sign | (denormal if u < 0x00800000 else normal))


cdef inline uint16_t to_float16(float x) noexcept nogil:
    cdef uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000
    u = u & 0x7fffffff
    # Added to 1/2, whose last bit is worth 2**-24, a number below 2**-14 is rounded to that of a denormal one.
    cdef uint32_t denormal = bits_of(float_of(u) + float_of(126 << 23)) - (126 << 23)
    cdef uint32_t normal = (u + 0xfff + ((u >> 13) & 1) - (112 << 23)) >> 13
    cdef uint32_t rounded = denormal if u < (113 << 23) else normal
    rounded = 0x7c00 if u >= 0x477ff000 else rounded
    return <uint16_t>(sign | (0x7e00 | ((u >> 13) & 0x1ff) if u > 0x7f800000 else rounded))


# --- parameters that keep what rounding takes from them ---------------------------------------------------------------

cdef inline float from_split(uint16_t x, int16_t low) noexcept nogil:
    """The float32 whose upper half, rounded, is x, and whose lower half, as a signed number, is low."""
    return float_of((<uint32_t>x << 16) + <uint32_t>low)


cdef inline uint16_t to_split(float x, int16_t* low) noexcept nogil:
    cdef uint32_t u = bits_of(x)
    u = (u & <uint32_t>0x80000000) | quiet(u)
    low[0] = <int16_t>u
    return <uint16_t>((u + 0x8000) >> 16)


cdef inline float rest_of(float x, float rounded) noexcept nogil:
    """What rounding has taken from x; 0 where there is no number."""
    cdef float rest = x - rounded
    return rest if rest - rest == 0 else 0


# --- 8 bits: the place of the nearest number of a map of 256, times the largest of each 256 elements ------------------

cdef enum:
    GROUP = 256  # elements that share a scale
    # The numbers of float32 from 2**-23 to 1 by the upper half of their bits; between two codes there is one bound, at
    # most.
    FIRST_CELL = 13312
    CELLS = 2945

cdef struct Map:
    uint32_t value[256]  # the bits of the number of each code
    # Of each cell what is added to the bits of a number in it for its code in the upper half: above the bound, the
    # lower half carries.
    uint32_t cell[CELLS]
    bint signed  # then 127 codes are negative and 128 positive, and both are counted from the code of 0


cdef inline uint32_t in_cells(float x, bint signed) noexcept nogil:
    """The bits of x, kept within the cells of a map. In the middle between two numbers of the map the smaller code is
    taken: for a negative one that which is further from 0, hence the 1."""
    cdef int32_t size = <int32_t>(bits_of(x) & 0x7fffffff), least = FIRST_CELL << 16
    cdef uint32_t negative = bits_of(x) >> 31 if signed else 0
    cdef int32_t most = 0x3f800000 - <int32_t>(negative << 16)  # there is no code of -1
    size = (size if size < most else most) + <int32_t>negative
    return <uint32_t>(size if size > least else least) | negative << 31


cdef inline uint16_t cell_of(uint32_t bits) noexcept nogil:
    return <uint16_t>((bits >> 16 & 0x7fff) - FIRST_CELL)


cdef inline uint8_t to_code(uint32_t bits, uint32_t cell, bint signed) noexcept nogil:
    """The code of a number by its bits in the cells of a map, and what its cell says."""
    cdef int32_t code = <int32_t>(bits + cell) >> 16
    return <uint8_t>(code if not signed else 127 - code if code < 0 else 127 + code)


# --- stochastic rounding: up as often as the number is near to what lies above ----------------------------------------

cdef inline uint64_t mixed(uint64_t x) noexcept nogil:
    """All bits of the result depend on all of x (the last steps of splitmix64)."""
    x = (x ^ (x >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    x = (x ^ (x >> 27)) * <uint64_t>0x94d049bb133111eb
    return x ^ (x >> 31)


cdef inline uint64_t key_of_block(uint64_t key, uint64_t block) noexcept nogil:
    return mixed(key + block * <uint64_t>0x9e3779b97f4a7c15)


cdef inline uint32_t random_bits(uint32_t i, uint64_t key) noexcept nogil:
    """32 bits that depend on i and the key alone."""
    cdef uint32_t u = i * <uint32_t>0x9e3779b1 + <uint32_t>key
    u = (u ^ (u >> 16)) * <uint32_t>0x7feb352d
    u = (u ^ (u >> 15) ^ <uint32_t>(key >> 32)) * <uint32_t>0x846ca68b
    return u ^ (u >> 16)


cdef inline uint16_t to_bfloat16_by_chance(float x, uint32_t random) noexcept nogil:
    cdef uint32_t u = bits_of(x)
    return to_bfloat16(x) if (u & 0x7fffffff) >= 0x7f800000 else <uint16_t>((u + (random & 0xffff)) >> 16)


cdef inline uint16_t to_float16_by_chance(float x, uint32_t random) noexcept nogil:
    cdef uint32_t sign = bits_of(x) & <uint32_t>0x80000000, u = bits_of(x) & 0x7fffffff
    cdef uint32_t normal = sign | ((u + (random & 0x1fff)) & ~<uint32_t>0x1fff)
    # In units of the smallest denormal number, 2**-24.
    cdef float count = float_of(u) * float_of(151 << 23) + <float>(random & 0x1fff) * float_of(114 << 23)
    cdef uint32_t denormal = <uint32_t><int32_t>(count if u < (113 << 23) else 0)
    normal = bits_of(x) if u >= 0x7f800000 else normal
    return <uint16_t>((sign >> 16) | denormal) if u < (113 << 23) else to_float16(float_of(normal))
