# The lock around the steps of one optimizer: one thread at a time, which a fork does not leave held.

cimport cython
from cpython.exc cimport PyErr_CheckSignals

import os


cdef extern from "Python.h" nogil:
    enum: PY_LOCK_INTR
    void *PyThread_allocate_lock()
    void PyThread_free_lock(void *)
    int PyThread_acquire_lock(void *, int wait)
    int PyThread_acquire_lock_timed(void *, long long microseconds, int interruptible)
    void PyThread_release_lock(void *)
    unsigned long PyThread_get_thread_ident()

cdef extern from *:
    """
    #define load_word(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
    #define store_word(at, x) __atomic_store_n(at, x, __ATOMIC_RELEASE)
    """
    unsigned long load_word(unsigned long *at) noexcept nogil
    void store_word(unsigned long *at, unsigned long x) noexcept nogil


cdef unsigned long forks = 0
cdef unsigned long survivor = 0  # the thread that goes on in a forked child


def _after_fork():
    global forks, survivor
    forks += 1
    survivor = PyThread_get_thread_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


cdef class Lock:
    """As a context manager it is held for reading: `with lock:` waits until no other thread is in a step."""

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError("no memory for a lock")
        self.forks = forks

    def __dealloc__(self):
        PyThread_free_lock(self.lock)

    def __enter__(self):
        self.acquire(False, True)
        return self

    def __exit__(self, *exc):
        self.give_back()

    cdef int begin(self, bint wait) except -1:
        """Enter a step; RuntimeError if one has begun already, in another thread unless it waits for its end."""
        self.acquire(True, wait)
        self.walking = True
        store_word(&self.stepping, not wait)  # who only looks is waited for
        return 0

    cdef int acquire(self, bint alone, bint wait) except -1:
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef int got
        if load_word(&self.forks) != forks:
            self.renew()
        if load_word(&self.owner) == me:  # other threads never write this thread's name
            if alone and self.walking:
                raise RuntimeError("step() of this optimizer is already running: it was called from inside itself")
            self.depth += 1
            return 0
        if not PyThread_acquire_lock(self.lock, 0):
            if load_word(&self.stepping) and not wait:
                raise RuntimeError("step() of this optimizer is already running in another thread")
            while True:
                with nogil:
                    got = PyThread_acquire_lock_timed(self.lock, -1, 1)
                if got != PY_LOCK_INTR:
                    break
                PyErr_CheckSignals()
        store_word(&self.owner, me)
        self.depth = 1
        if self.left_behind:
            self.left_behind = False
            self.end()
        return 0

    @cython.critical_section
    cdef int renew(self) except -1:
        """Be free in a forked child, whose threads find this one after the other, unless its one holds it."""
        cdef void *lock
        if self.forks == forks:
            return 0
        if self.owner != survivor:  # who held it does not exist here
            lock = PyThread_allocate_lock()  # the old one may be held: it is not freed
            if lock == NULL:
                raise MemoryError("no memory for a lock")
            self.lock = lock
            self.left_behind = True
            store_word(&self.stepping, False)
            store_word(&self.owner, 0)
        store_word(&self.forks, forks)
        return 0

    cdef int give_back(self) noexcept:
        self.depth -= 1
        if self.depth == 0:
            store_word(&self.owner, 0)
            PyThread_release_lock(self.lock)
        return 0

    cdef int end(self) noexcept:
        """Let go of all that the walk has held."""
        self.walking = False
        store_word(&self.stepping, False)
        return 0
