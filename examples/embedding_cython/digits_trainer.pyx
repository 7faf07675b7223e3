# cython: boundscheck=False, wraparound=False, cdivision=True
# The digits network in Cython: forward, backward and Adam of a whole epoch without Python, the GIL released.
#
# pyopt.api is the C door. All memory is NumPy's; the plan points into it, so the trainer keeps it.

from libc.math cimport expf, logf
from libc.string cimport memset

cimport pyopt.api as pyopt

import numpy as np

cdef const pyopt.pyopt_functions *door = pyopt.pyopt_api()

cdef enum:
    PIXELS = 64
    HIDDEN = 256
    DIGITS = 10
    BATCH = 32


cdef class Trainer:
    """A network of 64 pixels, a hidden layer with ReLU and 10 logits, and Adam for it.

    Args:
        seed: of the initial weights.
        lr: learning rate.
        threads: of a step, at most.
    """

    cdef readonly list parameters, gradients, states
    cdef float[:, ::1] w1, w2, dw1, dw2
    cdef float[::1] b1, b2, db1, db2
    cdef float h[HIDDEN]
    cdef float logits[DIGITS]
    cdef double options[pyopt.PYOPT_MOST_OPTIONS]
    cdef pyopt.pyopt_slot slot
    cdef pyopt.pyopt_plan *plan
    cdef int threads
    cdef char message[256]

    def __init__(self, int seed=0, double lr=2e-3, int threads=1):
        cdef pyopt.pyopt_row rows[4]
        cdef int adam = door.find_rule("Adam"), i, j
        rng = np.random.default_rng(seed)

        def he(*shape):
            return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / shape[0]))

        self.parameters = [he(PIXELS, HIDDEN), np.zeros(HIDDEN, np.float32), he(HIDDEN, DIGITS),
                           np.zeros(DIGITS, np.float32)]
        self.gradients = [np.zeros_like(p) for p in self.parameters]
        self.states = [[np.zeros_like(p), np.zeros_like(p)] for p in self.parameters]
        self.w1, self.b1, self.w2, self.b2 = self.parameters
        self.dw1, self.db1, self.dw2, self.db2 = self.gradients
        for i in range(4):
            rows[i] = pyopt.PYOPT_ROW
            rows[i].rule = adam
            rows[i].n = self.parameters[i].size
            rows[i].parameter.data = address(self.parameters[i])
            rows[i].gradient.data = address(self.gradients[i])
            for j in range(2):
                rows[i].state[j].data = address(self.states[i][j])
        door.fill_defaults(adam, self.options)
        self.options[door.find_option(adam, "lr")] = lr
        self.slot = pyopt.PYOPT_SLOT
        self.slot.options = self.options
        self.threads = threads
        if self.plan != NULL:  # __init__ once more
            door.destroy(self.plan)
            self.plan = NULL
        if door.create(rows, 4, 0, &self.plan, self.message, sizeof(self.message)) != pyopt.PYOPT_OK:
            raise ValueError(self.message.decode())

    def __dealloc__(self):
        door.destroy(self.plan)

    def epoch(self, const float[:, ::1] x, const int[::1] labels, const int[::1] order):
        """Train on all full batches in this order; returns the mean loss."""
        cdef double loss = 0
        cdef int b, i, image, steps = order.shape[0] // BATCH, status = pyopt.PYOPT_OK
        with nogil:
            for b in range(steps):
                self.clear()
                for i in range(BATCH):
                    image = order[b * BATCH + i]
                    self.forward(&x[image, 0])
                    loss += self.backward(&x[image, 0], labels[image])
                status = door.step(self.plan, &self.slot, 1, self.threads, self.message, sizeof(self.message))
                if status != pyopt.PYOPT_OK:
                    break
                self.slot.step += 1
        if status != pyopt.PYOPT_OK:
            raise ValueError(self.message.decode())
        return loss / (steps * BATCH)

    def accuracy(self, const float[:, ::1] x, const int[::1] labels):
        """The share of images that are read right."""
        cdef int i, right = 0
        with nogil:
            for i in range(x.shape[0]):
                right += self.forward(&x[i, 0]) == labels[i]
        return right / <double>x.shape[0]

    cdef int forward(self, const float *x) noexcept nogil:
        """The logits of an image, and the digit that it is taken for."""
        cdef int i, j, k, best = 0
        for j in range(HIDDEN):
            self.h[j] = self.b1[j]
        for i in range(PIXELS):
            for j in range(HIDDEN):
                self.h[j] += x[i] * self.w1[i, j]
        for k in range(DIGITS):
            self.logits[k] = self.b2[k]
        for j in range(HIDDEN):
            self.h[j] = self.h[j] if self.h[j] > 0 else 0
            for k in range(DIGITS):
                self.logits[k] += self.h[j] * self.w2[j, k]
        for k in range(1, DIGITS):
            if self.logits[k] > self.logits[best]:
                best = k
        return best

    cdef double backward(self, const float *x, int label) noexcept nogil:
        """The loss of the image of the last `forward`; its share of the gradients of a batch is added to them."""
        cdef float p[DIGITS]
        cdef float most = self.logits[0], total = 0, dh
        cdef int i, j, k
        for k in range(1, DIGITS):
            most = max(most, self.logits[k])
        for k in range(DIGITS):
            p[k] = expf(self.logits[k] - most)
            total += p[k]
        for k in range(DIGITS):
            p[k] = (p[k] / total - (k == label)) / BATCH
            self.db2[k] += p[k]
        for j in range(HIDDEN):
            if self.h[j] == 0:
                continue
            dh = 0
            for k in range(DIGITS):
                self.dw2[j, k] += self.h[j] * p[k]
                dh += self.w2[j, k] * p[k]
            self.db1[j] += dh
            for i in range(PIXELS):
                self.dw1[i, j] += x[i] * dh
        return logf(total) + most - self.logits[label]

    cdef void clear(self) noexcept nogil:
        memset(&self.dw1[0, 0], 0, PIXELS * HIDDEN * sizeof(float))
        memset(&self.db1[0], 0, HIDDEN * sizeof(float))
        memset(&self.dw2[0, 0], 0, HIDDEN * DIGITS * sizeof(float))
        memset(&self.db2[0], 0, DIGITS * sizeof(float))


cdef void *address(array) except NULL:
    """Where the elements of a C-ordered float32 array lie."""
    cdef float[::1] flat = array.reshape(-1)
    return &flat[0]
