// The Python module `peft_kernels._C`. Importing it registers the ops; its functions are build_info(), and for guards
// recorded_layouts() and unchanged().
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/cpu/isa.h"
#include "common/torch/checks.h"

// Raised whenever a schema changes, together with EXPECTED_OPS_VERSION in peft_kernels/_extension.py:
// an old binary beside new Python code is then refused at import.
#define PEFT_KERNELS_OPS_VERSION 27

namespace {

using peft_kernels::dtype_of;
using peft_kernels::Isa;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string cpu_isa() { return peft_kernels::isa_name(peft_kernels::current_isa()); }

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (Isa isa : peft_kernels::supported_isas()) names.push_back(peft_kernels::isa_name(isa));
    return names;
}

bool cpu_is_intel() { return peft_kernels::is_intel(); }

void set_cpu_isa(std::string name) { peft_kernels::set_isa(name.c_str()); }

PyObject* build_info(PyObject*, PyObject*) {
#ifdef PEFT_KERNELS_CUDA
    PyObject* const cuda = Py_True;
    const char* const architectures = PEFT_KERNELS_CUDA_ARCHITECTURES;
#else
    PyObject* const cuda = Py_False;
    const char* const architectures = "";
#endif
    return Py_BuildValue("{s:i,s:s,s:O,s:s}", "ops_version", PEFT_KERNELS_OPS_VERSION, "compiler", __VERSION__, "cuda",
                         cuda, "cuda_architectures", architectures);
}

// A tensor, and how it lay in memory when it was recorded. It is the tensor that Python has, not a view of it: whatever
// it is given there, other memory or another shape, shows here.
struct Layout {
    explicit Layout(const Tensor& tensor)
        : tensor(tensor),
          data(tensor.const_data_ptr()),
          sizes(tensor.sizes().begin(), tensor.sizes().end()),
          strides(tensor.strides().begin(), tensor.strides().end()),
          dtype(dtype_of(tensor)) {}

    bool holds() const {
        const auto same = [](const auto& found, const std::vector<int64_t>& wanted) {
            return found.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), found.begin());
        };
        return tensor.const_data_ptr() == data && same(tensor.strides(), strides) && same(tensor.sizes(), sizes) &&
               dtype_of(tensor) == dtype;
    }

    Tensor tensor;
    const void* data;
    std::vector<int64_t> sizes, strides;
    ScalarType dtype;
};
using Layouts = std::vector<Layout>;

constexpr char kLayouts[] = "peft_kernels.layouts";

// Only an op can take tensors, and only a function can return an object: the op leaves here what the function returns.
thread_local std::unique_ptr<Layouts> recorded;

void record_layouts(std::vector<Tensor> tensors) {
    recorded = std::make_unique<Layouts>(tensors.begin(), tensors.end());
}

PyObject* recorded_layouts(PyObject*, PyObject*) {
    if (!recorded) recorded = std::make_unique<Layouts>();
    return PyCapsule_New(recorded.release(), kLayouts, [](PyObject* capsule) {
        delete static_cast<Layouts*>(PyCapsule_GetPointer(capsule, kLayouts));
    });
}

// Whether places are as they were: [dict, key, value, ...] are still those very values (None: or missing), the types of
// [object, type, ...] are those, [container, length, ...] have those lengths, and recorded tensors, if there are any,
// lie as they did. It is here because Python would take several times as long. All this has left the caches when it is
// looked at, so the processor should have many looks under way at once.
PyObject* unchanged(PyObject*, PyObject* arguments) {
    PyObject *values, *types, *lengths, *capsule = nullptr;
    if (!PyArg_ParseTuple(arguments, "O!O!O!|O", &PyList_Type, &values, &PyList_Type, &types, &PyList_Type, &lengths,
                          &capsule))
        return nullptr;
    static const Layouts none;
    const Layouts* layouts = &none;
    if (capsule) layouts = static_cast<const Layouts*>(PyCapsule_GetPointer(capsule, kLayouts));
    if (!layouts) return nullptr;
    const Py_ssize_t num_values = PyList_Size(values), num_types = PyList_Size(types);
    const Py_ssize_t num_lengths = PyList_Size(lengths);
    for (Py_ssize_t i = 0; i < num_values; ++i) __builtin_prefetch(PyList_GetItem(values, i));
    for (Py_ssize_t i = 0; i < num_types; i += 2) __builtin_prefetch(PyList_GetItem(types, i));
    for (Py_ssize_t i = 0; i < num_lengths; i += 2) __builtin_prefetch(PyList_GetItem(lengths, i));
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
    for (const Layout& layout : *layouts)
        if (!layout.holds()) Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, "How this binary was built."},
                         {"recorded_layouts", recorded_layouts, METH_NOARGS, "What the op record_layouts recorded."},
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
    m.def("record_layouts(Tensor[] tensors) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
    m.impl("cpu_is_intel", TORCH_BOX(&cpu_is_intel));
    m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
    m.impl("record_layouts", TORCH_BOX(&record_layouts));
}

extern "C" PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
