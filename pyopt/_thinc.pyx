# A call of thinc's optimizer: the step of one array, where it is a plain one: C-contiguous arrays of one type, apart
# from each other. Whatever is not plain, a first call included, is left to the step of an optimizer (pyopt/_step.pyx),
# which copes with it, or says what is wrong with it. Both have their numbers from here.

from cpython.dict cimport PyDict_SetItem
from cpython.object cimport PyObject
from libc.math cimport fabs, isfinite, sqrt
from libc.string cimport memset

from pyopt cimport _rules as rules
from pyopt._engine cimport Averaged, Extras, Numbers, Rule, Work, sweep
from pyopt._libm cimport pow
from pyopt._norms cimport power_sums
from pyopt._numpy_arrays cimport (
    NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE, NPY_DOUBLE, NPY_FLOAT, PyArray_DATA, PyArray_DIMS,
    PyArray_FLAGS, PyArray_NDIM, PyArray_TYPE, PyArrayObject, is_native,
)

from numpy import ndarray

from pyopt._isa import kernels
from pyopt._norms import clip_factor

cdef object array_type = ndarray
cdef Rule AVERAGE = kernels.average
cdef list RULES = [kernels.adam, kernels.radam, kernels.sgd]

cdef enum Kind:
    ADAM
    RADAM
    SGD

KINDS = {"Adam": ADAM, "RAdam": RADAM, "SGD": SGD}


cdef class Hyper:
    """The hyper-parameters of a call, in double: decay is L2 where it is weight decay, else 0."""
    cdef readonly double lr, b1, b2, eps, l2, decay, grad_clip

    def __init__(self, double lr, double b1, double b2, double eps, double l2, bint is_decay, double grad_clip):
        self.lr, self.b1, self.b2, self.eps, self.l2 = lr, b1, b2, eps, l2
        self.decay, self.grad_clip = l2 if is_decay else 0, grad_clip


# --- the numbers of a step --------------------------------------------------------------------------------------------

cdef rules.Adam adam_numbers(Hyper h, double lr, Py_ssize_t t) noexcept:
    """Adam whose eps stands beside the root before its bias is corrected, and whose decay comes after the step."""
    cdef rules.Adam n
    memset(&n, 0, sizeof(n))
    n.gradient_factor = n.inverse_sqrt_bias_correction2 = 1
    n.decay_factor = 1 - lr * h.decay
    n.step_size = lr * sqrt(1 - pow(h.b2, t)) / (1 - pow(h.b1, t)) * n.decay_factor
    n.weight1, n.beta2, n.weight2, n.eps = 1 - h.b1, h.b2, 1 - h.b2, h.eps
    return n


cdef rules.RAdam radam_numbers(Hyper h, double lr, Py_ssize_t t) noexcept:
    """RAdam whose step count is ahead by one, and whose decay comes after the step."""
    cdef rules.RAdam n
    cdef double power2 = pow(h.b2, t + 1), longest = 2 / (1 - h.b2) - 1
    cdef double length = longest - 2 * (t + 1) * power2 / (1 - power2)
    memset(&n, 0, sizeof(n))
    n.gradient_factor = 1
    n.decay_factor = 1 - lr * h.decay
    n.step_size = lr / (1 - pow(h.b1, t + 1)) * n.decay_factor
    n.rectified = length >= 5
    if n.rectified:
        n.step_size *= sqrt((1 - power2) * (length - 4) * (length - 2) * longest
                            / ((longest - 4) * (longest - 2) * length))
    n.weight1, n.beta2, n.weight2, n.eps = 1 - h.b1, h.b2, 1 - h.b2, h.eps
    return n


cdef rules.SGD sgd_numbers(Hyper h, double lr) noexcept:
    """(1 - lr * decay) * (p - lr * g), as a step with an L2 penalty."""
    cdef rules.SGD n
    cdef double decay_factor = 1 - lr * h.decay
    memset(&n, 0, sizeof(n))
    n.gradient_factor = n.one_minus_dampening = 1
    n.lr = lr * decay_factor
    n.weight_decay = h.decay / decay_factor
    return n


def scalars(int kind, Hyper hyper, double lr, Py_ssize_t t):
    """The numbers of step t, from 1, with this learning rate, as an optimizer's `scalars` returns them."""
    if kind == ADAM:
        return adam_numbers(hyper, lr, t)
    if kind == RADAM:
        return radam_numbers(hyper, lr, t)
    return sgd_numbers(hyper, lr)


# --- the step ---------------------------------------------------------------------------------------------------------

cdef class PlainSteps:
    """Steps of one array, with its moments (None where there are none)."""
    cdef int kind
    cdef object m, v

    def __init__(self, int kind, m, v):
        self.kind, self.m, self.v = kind, m, v

    def step(self, weights, gradient, Hyper hyper, double lr_scale, Py_ssize_t t, average, dict entry, counts, key):
        """Step t, its gradient filled with zeros and its count stored; False where that is no plain case.

        average: the array to be averaged into, or None. entry, counts: where the count is stored, by "step" and by key.
        """
        cdef Work w
        cdef Numbers numbers
        cdef Averaged averaged
        cdef Extras extras
        cdef Rule rule = RULES[self.kind]
        cdef double total, lr = hyper.lr * lr_scale, decay
        cdef Py_ssize_t i, j
        cdef PyArrayObject *p = <PyArrayObject *>weights
        cdef PyObject *arrays[5]
        cdef int n = 2
        if type(weights) is not array_type or not isfinite(lr) or lr < 0 or hyper.l2 != hyper.decay:
            return False
        arrays[0], arrays[1] = <PyObject *>weights, <PyObject *>gradient
        memset(&w, 0, sizeof(w))
        w.is_double = PyArray_TYPE(p) == NPY_DOUBLE
        for array in (self.m, self.v, average):
            if array is not None:
                arrays[n] = <PyObject *>array
                n += 1
        w.size = 1
        for i in range(PyArray_NDIM(p)):
            w.size *= PyArray_DIMS(p)[i]
        for i in range(n):
            if not is_plain(arrays[i], p):
                return False
            for j in range(i):
                if lie_together(arrays[i], arrays[j], w.size * (8 if w.is_double else 4)):
                    return False
        w.stream[0], w.stream[1] = PyArray_DATA(p), PyArray_DATA(<PyArrayObject *>gradient)
        if self.m is not None:
            w.stream[2], w.stream[3] = PyArray_DATA(<PyArrayObject *>self.m), PyArray_DATA(<PyArrayObject *>self.v)
        numbers.kernel = &rule.kernel
        if self.kind == ADAM:
            (<rules.Adam *>numbers.value)[0] = adam_numbers(hyper, lr, t)
        elif self.kind == RADAM:
            (<rules.RAdam *>numbers.value)[0] = radam_numbers(hyper, lr, t)
        else:
            (<rules.SGD *>numbers.value)[0] = sgd_numbers(hyper, lr)
        decay = 1 - lr * hyper.decay
        if fabs(numbers.value[1]) > 3e38 or not isfinite(numbers.value[1]) or decay == 0 or fabs(decay) > 3e38:
            return False
        if hyper.grad_clip > 0:
            total = power_sums(&w, 1, 2, 1)[0]
            if not 1e-290 < total < 1e290 and total != 0:
                return False
            total = sqrt(total)
            if total >= hyper.grad_clip:
                numbers.value[0] = clip_factor(hyper.grad_clip, total)
        memset(&extras, 0, sizeof(extras))
        memset(&averaged, 0, sizeof(averaged))
        if average is not None:
            averaged.data = PyArray_DATA(<PyArrayObject *>average)
            averaged.weight = average_weight(t)
            extras.averages, extras.kernel = 1, &AVERAGE.kernel
            w.averaged = &averaged
        w.clears = True
        count = t
        with nogil:
            sweep(&w, 1, &numbers, NULL, &extras)
        if self.kind != SGD:
            PyDict_SetItem(entry, "step", count)
        PyDict_SetItem(counts, key, count)
        return True


cpdef double average_weight(Py_ssize_t t):
    """How far thinc's average moves towards the array in its update t."""
    return 1 - min((1.0 + t) / (10.0 + t), 0.9999)


cdef bint is_plain(PyObject *array, const PyArrayObject *like) noexcept:
    """Whether this is an array that can be walked beside another one."""
    cdef int needed = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_WRITEABLE, i
    cdef PyArrayObject *a = <PyArrayObject *>array
    if type(<object>array) is not array_type or PyArray_FLAGS(a) & needed != needed or not is_native(a):
        return False
    if PyArray_TYPE(a) != PyArray_TYPE(like) or PyArray_NDIM(a) != PyArray_NDIM(like):
        return False
    if PyArray_TYPE(a) != NPY_FLOAT and PyArray_TYPE(a) != NPY_DOUBLE:
        return False
    for i in range(PyArray_NDIM(a)):
        if PyArray_DIMS(a)[i] != PyArray_DIMS(like)[i]:
            return False
    return True


cdef bint lie_together(PyObject *first, PyObject *second, Py_ssize_t size) noexcept:
    """Whether two contiguous arrays of so many bytes share any."""
    cdef char *a = <char *>PyArray_DATA(<PyArrayObject *>first)
    cdef char *b = <char *>PyArray_DATA(<PyArrayObject *>second)
    return a < b + size and b < a + size
