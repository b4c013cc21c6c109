// The Python module `peft_kernels._C`. Importing it registers the ops; it has one function, build_info().
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "common/isa.h"

// Raised whenever a schema changes, together with EXPECTED_OPS_VERSION in peft_kernels/_extension.py:
// an old binary beside new Python code is then refused at import.
#define PEFT_KERNELS_OPS_VERSION 9

namespace {

using peft_kernels::Isa;

std::string cpu_isa() { return peft_kernels::isa_name(peft_kernels::current_isa()); }

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (Isa isa : peft_kernels::supported_isas()) names.push_back(peft_kernels::isa_name(isa));
    return names;
}

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

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, "How this binary was built."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The compiled half of peft_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY(peft_kernels, m) {
    m.def("cpu_isa() -> str");
    m.def("cpu_isas() -> str[]");
    m.def("set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
    m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

extern "C" PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
