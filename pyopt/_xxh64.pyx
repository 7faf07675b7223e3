"""XXH64, the checksum of files: as fast as memory, and known to other tools (xxhsum -H1).

The algorithm: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:  # as variables they would be loaded anew in each round
    """
    #define P1 0x9E3779B185EBCA87ULL
    #define P2 0xC2B2AE3D27D4EB4FULL
    #define P3 0x165667B19E3779F9ULL
    #define P4 0x85EBCA77C2B2AE63ULL
    #define P5 0x27D4EB2F165667C5ULL
    """
    const uint64_t P1, P2, P3, P4, P5


cdef inline uint64_t rotated(uint64_t x, int n) noexcept nogil:
    return (x << n) | (x >> (64 - n))


cdef inline uint64_t word(const unsigned char *at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return value


cdef inline uint64_t lane(uint64_t accumulator, uint64_t value) noexcept nogil:
    return rotated(accumulator + value * P2, 31) * P1


cdef inline uint64_t merged(uint64_t h, uint64_t accumulator) noexcept nogil:
    return (h ^ lane(0, accumulator)) * P1 + P4


cdef uint64_t checksum(const unsigned char *at, size_t size) noexcept nogil:
    cdef const unsigned char *end = at + size
    cdef uint64_t a = P1 + P2, b = P2, c = 0, d = 0 - P1
    cdef uint64_t h = P5
    cdef uint32_t half
    if size >= 32:
        while end - at >= 32:
            a = lane(a, word(at))
            b = lane(b, word(at + 8))
            c = lane(c, word(at + 16))
            d = lane(d, word(at + 24))
            at += 32
        h = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18)
        h = merged(merged(merged(merged(h, a), b), c), d)
    h += size
    while end - at >= 8:
        h = rotated(h ^ lane(0, word(at)), 27) * P1 + P4
        at += 8
    if end - at >= 4:
        memcpy(&half, at, 4)
        h = rotated(h ^ (half * P1), 23) * P2 + P3
        at += 4
    while at < end:
        h = rotated(h ^ (at[0] * P5), 11) * P1
        at += 1
    h = (h ^ (h >> 33)) * P2
    h = (h ^ (h >> 29)) * P3
    return h ^ (h >> 32)


def xxh64(const unsigned char[::1] data):
    """The XXH64 of bytes with seed 0, as an int; without the GIL."""
    cdef size_t size = data.shape[0]
    cdef const unsigned char *at = &data[0] if size else NULL
    cdef uint64_t result
    with nogil:
        result = checksum(at, size)
    return result
