// The Python module: load, launch, checks, counters, memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "tensor_map.h"

namespace py = pybind11;

namespace ptx_emulator {
namespace {

Dim3 dim3_of(const std::vector<uint32_t>& sizes) {
    Dim3 dim;
    if (!sizes.empty()) dim.x = sizes[0];
    if (sizes.size() > 1) dim.y = sizes[1];
    if (sizes.size() > 2) dim.z = sizes[2];
    return dim;
}

py::dict traffic(const GlobalTraffic& traffic) {
    py::dict out;
    out["requests"] = traffic.requests;
    out["sectors"] = traffic.sectors;
    out["ideal_sectors"] = traffic.ideal_sectors;
    out["bytes"] = traffic.bytes;
    return out;
}

py::dict traffic(const SharedTraffic& traffic) {
    py::dict out;
    out["requests"] = traffic.requests;
    out["wavefronts"] = traffic.wavefronts;
    out["ideal_wavefronts"] = traffic.ideal_wavefronts;
    return out;
}

py::dict record_of(const LaunchRecord& record) {
    const Counters& counters = record.counters;
    py::dict out, instructions;
    uint64_t warp_instructions = 0;
    for (int i = 0; i < static_cast<int>(InstructionClass::kCount); ++i) {
        instructions[kClassNames[i]] = counters.warp_instructions[i];
        warp_instructions += counters.warp_instructions[i];
    }
    out["kernel"] = record.kernel;
    out["grid"] = py::make_tuple(record.grid.x, record.grid.y, record.grid.z);
    out["block"] = py::make_tuple(record.threads.x, record.threads.y, record.threads.z);
    out["instructions"] = instructions;
    out["warp_instructions"] = warp_instructions;
    out["thread_instructions"] = counters.thread_instructions;
    out["global_load"] = traffic(counters.global_load);
    out["global_store"] = traffic(counters.global_store);
    out["sectors_read"] = record.sectors_read;
    out["overlaps"] = record.overlaps;
    out["unique_bytes_read"] = counters.unique_bytes_read;
    out["unique_bytes_written"] = counters.unique_bytes_written;
    out["shared_load"] = traffic(counters.shared_load);
    out["shared_store"] = traffic(counters.shared_store);
    out["ldmatrix"] = traffic(counters.ldmatrix);
    out["cp_async"] = traffic(counters.cp_async);
    out["mma"] = counters.mma;
    out["instructions_per_mma"] = counters.mma ? static_cast<double>(warp_instructions) / counters.mma : 0.0;
    out["wgmma"] = counters.wgmma;
    out["wgmma_columns"] = counters.wgmma_columns;
    out["bulk_copies"] = counters.bulk_copies;
    out["barriers"] = counters.barriers;
    out["shared_bytes"] = counters.shared_bytes;
    out["order_dependent_atomics"] = counters.order_dependent_atomics;
    out["lines"] = record.lines;
    return out;
}

// The arguments one after the other, each where its parameter lies.
std::vector<uint8_t> lay_out(const Program& program, const std::vector<py::bytes>& arguments) {
    if (arguments.size() != program.params.size())
        throw EmulatorError(program.name + ": got " + std::to_string(arguments.size()) + " arguments, wanted " +
                            std::to_string(program.params.size()));
    std::vector<uint8_t> params(program.param_bytes);
    for (size_t i = 0; i < arguments.size(); ++i) {
        const std::string bytes = arguments[i];
        if (static_cast<int64_t>(bytes.size()) != program.params[i].bytes)
            throw EmulatorError(program.name + ": argument " + std::to_string(i) + ": got " +
                                std::to_string(bytes.size()) + " bytes, wanted " +
                                std::to_string(program.params[i].bytes));
        std::copy(bytes.begin(), bytes.end(), params.begin() + program.param_offsets[i]);
    }
    return params;
}

}  // namespace
}  // namespace ptx_emulator

PYBIND11_MODULE(_ptx_emulator, m) {
    using namespace ptx_emulator;
    py::register_exception<EmulatorError>(m, "EmulatorError", PyExc_RuntimeError);

    py::class_<LoadedModule, std::shared_ptr<LoadedModule>>(m, "Module")
        .def("kernels", &LoadedModule::kernels)
        .def("registers",
             [](LoadedModule& self, const std::string& kernel) { return self.program(kernel).register_bytes; })
        .def("launch", [](LoadedModule& self, const std::string& kernel, const std::vector<uint32_t>& grid,
                          const std::vector<uint32_t>& block, uint64_t shared, const std::vector<py::bytes>& arguments,
                          bool overlaps) {
            Device& device = Device::instance();
            LaunchRequest request{dim3_of(grid), dim3_of(block), shared, {}, 0, overlaps};
            request.params = lay_out(self.program(kernel), arguments);
            {
                py::gil_scoped_release release;
                device.launch(self, kernel, request);
            }
            py::dict record = record_of(device.records.back());
            device.records.pop_back();
            return record;
        });

    m.def("load", [](const std::string& ptx) { return Device::instance().load(ptx); });
    m.def("profiles", profile_names);
    m.def("set_profile", [](const std::string& name) { Device::instance().profile = profile_named(name); });
    m.def("profile", [] { return std::string(Device::instance().profile.name); });
    m.def("set_multiprocessors", [](int count) { Device::instance().profile.sm_count = count; });
    m.def("multiprocessors", [] { return Device::instance().profile.sm_count; });
    m.def("set_driver_version", [](int version) { Device::instance().driver_version = version; });
    m.def("driver_version", [] { return Device::instance().driver_version; });
    m.def("set_failing", [](const std::set<std::string>& functions) { Device::instance().failing = functions; });
    m.def("failing", [] { return Device::instance().failing; });
    m.def(
        "set_checks",
        [](bool initialized, bool races, bool random_order, uint64_t seed, uint64_t max_instructions) {
            Device::instance().checks = {initialized, races, random_order, seed, max_instructions};
        },
        py::kw_only(), py::arg("initialized") = true, py::arg("races") = true, py::arg("random_order") = true,
        py::arg("seed") = 0, py::arg("max_instructions") = Checks{}.max_instructions);
    m.def("add_memory", [](uint64_t address, uint64_t bytes, const std::string& name, bool fresh) {
        Device::instance().global.add(reinterpret_cast<const void*>(address), bytes, name, fresh);
    });
    m.def("make_tensor_map", [](uint64_t address, int element_bytes, const std::vector<uint64_t>& sizes,
                                const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, int swizzle) {
        char bytes[kTensorMapBytes] = {};
        const TensorMap map = make_tensor_map(address, element_bytes, sizes, strides, box, swizzle);
        std::memcpy(bytes, &map, sizeof map);
        return py::bytes(bytes, sizeof bytes);
    });
    m.def("remove_memory",
          [](uint64_t address) { Device::instance().global.remove(reinterpret_cast<const void*>(address)); });
    m.def("take_records", [] {
        py::list out;
        for (const LaunchRecord& record : Device::instance().records) out.append(record_of(record));
        Device::instance().records.clear();
        return out;
    });
}
