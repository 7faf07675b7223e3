# The lock around the steps of one optimizer.

cdef class Lock:
    cdef void *lock
    # Read and written at once by threads that do not hold it: who does, the forks it has seen, whether it is in a step.
    cdef unsigned long owner, forks, stepping
    cdef int depth  # how often it was taken by the same thread
    cdef bint walking  # in a step or a look, which take the rows
    cdef bint left_behind  # by a thread that a forked child has not, maybe in the middle of a step

    cdef int renew(self) except -1
    cdef int begin(self, bint wait) except -1
    cdef int give_back(self) noexcept
    cdef int acquire(self, bint alone, bint wait) except -1
    cdef int end(self) noexcept
