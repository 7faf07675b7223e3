# The lock around the steps of one optimizer.

cdef class Lock:
    cdef void *lock
    cdef unsigned long owner  # who holds it
    cdef int depth, forks  # how often it was taken by the same thread
    cdef bint stepping, walking  # in a step; in that or a look, which take the rows

    cdef int begin(self, bint wait) except -1
    cdef int give_back(self) noexcept
    cdef int acquire(self, bint alone, bint wait) except -1
    cdef int end(self) noexcept
