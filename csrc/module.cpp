// The Python module `peft_kernels._C`. Importing it registers the ops; its functions are build_info() and unchanged().
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "common/cpu/isa.h"

// Raised whenever a schema changes, together with EXPECTED_OPS_VERSION in peft_kernels/_extension.py:
// an old binary beside new Python code is then refused at import.
#define PEFT_KERNELS_OPS_VERSION 16

namespace {

using peft_kernels::Isa;

std::string cpu_isa() { return peft_kernels::isa_name(peft_kernels::current_isa()); }

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (Isa isa : peft_kernels::supported_isas()) names.push_back(peft_kernels::isa_name(isa));
    return names;
}

bool cpu_is_intel() { return peft_kernels::is_intel(); }

void set_cpu_isa(std::string name) { peft_kernels::set_isa(name.c_str()); }

PyObject* build_info(PyObject*, PyObject*) {
    return Py_BuildValue("{s:i,s:s,s:O}", "ops_version", PEFT_KERNELS_OPS_VERSION, "compiler", __VERSION__, "cuda",
#ifdef PEFT_KERNELS_CUDA
                         Py_True
#else
                         Py_False
#endif
    );
}

// Whether what a method without arguments (`called`) or an attribute of an object gives equals a value; -1 on an error.
int gives(PyObject* object, PyObject* name, bool called, PyObject* value) {
    PyObject* found = called ? PyObject_CallMethodObjArgs(object, name, nullptr) : PyObject_GetAttr(object, name);
    if (!found) return -1;
    const int equal = found == value ? 1 : PyObject_RichCompareBool(found, value, Py_EQ);
    Py_DECREF(found);
    return equal;
}

// Whether places are as they were: [dict, key, value, ...] are still those very values (None: or missing), the types of
// [object, type, ...] are those, [container, length, ...] have those lengths, and [tensor, address, strides, shape,
// dtype, ...] lie there like that (where strides are None, only the address counts). In Python it takes four times as
// long; and as all this has left the caches when it is looked at, the processor should have many looks under way at
// once.
PyObject* unchanged(PyObject*, PyObject* lists) {
    PyObject *values, *types, *lengths, *tensors;
    if (!PyArg_ParseTuple(lists, "O!O!O!O!", &PyList_Type, &values, &PyList_Type, &types, &PyList_Type, &lengths,
                          &PyList_Type, &tensors))
        return nullptr;
    static PyObject* const names[] = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("stride"),
                                      PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("dtype")};
    const Py_ssize_t num_values = PyList_Size(values), num_types = PyList_Size(types);
    const Py_ssize_t num_lengths = PyList_Size(lengths), num_tensors = PyList_Size(tensors);
    for (Py_ssize_t i = 0; i < num_values; ++i) __builtin_prefetch(PyList_GetItem(values, i));
    for (Py_ssize_t i = 0; i < num_types; i += 2) __builtin_prefetch(PyList_GetItem(types, i));
    for (Py_ssize_t i = 0; i < num_lengths; i += 2) __builtin_prefetch(PyList_GetItem(lengths, i));
    for (Py_ssize_t i = 0; i < num_tensors; i += 5) __builtin_prefetch(PyList_GetItem(tensors, i));
    for (Py_ssize_t i = 0; i + 2 < num_values; i += 3) {
        PyObject* found = PyDict_GetItemWithError(PyList_GetItem(values, i), PyList_GetItem(values, i + 1));
        if (!found && PyErr_Occurred()) return nullptr;
        if ((found ? found : Py_None) != PyList_GetItem(values, i + 2)) Py_RETURN_FALSE;
    }
    for (Py_ssize_t i = 0; i + 1 < num_types; i += 2)
        if (reinterpret_cast<PyObject*>(Py_TYPE(PyList_GetItem(types, i))) != PyList_GetItem(types, i + 1))
            Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i + 1 < num_lengths; i += 2) {
        const Py_ssize_t length = PyObject_Size(PyList_GetItem(lengths, i));
        if (length < 0) return nullptr;
        if (length != PyLong_AsSsize_t(PyList_GetItem(lengths, i + 1))) Py_RETURN_FALSE;
    }
    for (Py_ssize_t i = 0; i + 4 < num_tensors; i += 5) {
        PyObject* tensor = PyList_GetItem(tensors, i);
        const int looks = PyList_GetItem(tensors, i + 2) == Py_None ? 1 : 4;
        for (int look = 0; look < looks; ++look) {
            const int equal = gives(tensor, names[look], look < 2, PyList_GetItem(tensors, i + 1 + look));
            if (equal < 0) return nullptr;
            if (!equal) Py_RETURN_FALSE;
        }
    }
    Py_RETURN_TRUE;
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, "How this binary was built."},
                         {"unchanged", unchanged, METH_VARARGS, "Whether places in a model are as they were."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The compiled half of peft_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY(peft_kernels, m) {
    m.def("cpu_isa() -> str");
    m.def("cpu_isas() -> str[]");
    m.def("cpu_is_intel() -> bool");
    m.def("set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
    m.impl("cpu_is_intel", TORCH_BOX(&cpu_is_intel));
    m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

extern "C" PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
