# The fields of a NumPy array, read where they lie: inline functions and macros of NumPy's headers that look into the
# struct and call nothing. They need neither import_array nor the C API's table, hence no particular NumPy at run time
# (2.0 and later), and they go with the limited API of Python.
#
# `array` must be a numpy.ndarray or of a subclass: nothing here looks at the type.

cdef extern from "numpy/ndarraytypes.h" nogil:
    ctypedef struct PyArrayObject
    ctypedef Py_ssize_t npy_intp  # of the same size; NumPy calls it its own

    enum:
        NPY_UBYTE
        NPY_SHORT
        NPY_HALF
        NPY_INT
        NPY_LONG
        NPY_LONGLONG
        NPY_FLOAT
        NPY_DOUBLE
        NPY_ARRAY_ALIGNED
        NPY_ARRAY_WRITEABLE
        NPY_ARRAY_C_CONTIGUOUS
        NPY_ARRAY_F_CONTIGUOUS

    void *PyArray_DATA(const PyArrayObject *array)
    int PyArray_NDIM(const PyArrayObject *array)
    npy_intp *PyArray_DIMS(const PyArrayObject *array)
    npy_intp *PyArray_STRIDES(const PyArrayObject *array)
    int PyArray_FLAGS(const PyArrayObject *array)
    int PyArray_TYPE(const PyArrayObject *array)


cdef extern from * nogil:
    """
    /* In the byte order of the machine. NumPy's own macro for it calls, from 2.5 on, what its table is needed for. */
    static inline int is_native(const PyArrayObject *array) {
        return PyArray_ISNBO(PyArray_DESCR((PyArrayObject *)array)->byteorder);
    }
    """
    bint is_native(const PyArrayObject *array)
