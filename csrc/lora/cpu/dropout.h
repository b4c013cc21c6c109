// The dropout of adapters.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/philox.h"
#include "common/cpu/workspace.h"
#include "lora/lora.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

inline Dropout dropout_of(const LoraAdapter& adapter) {
    return {adapter.seed ? static_cast<uint64_t>(*adapter.seed) : 0, adapter.dropout};
}

// The dropout masks of a backward, made once of each row and read by dx and dA.
class KeptBits {
public:
    // Of a matrix [m, k].
    KeptBits(const LoraAdapters& adapters, int64_t m, int64_t k) : p_(adapters), m_(m), k_(k) {}

    void lay_out(Arena& arena) {
        int64_t dropping = 0;
        for (int a = 0; a < p_.num_adapters; ++a) dropping += drops(a);
        if (dropping > 0) bits_ = arena.take<uint8_t>(dropping * m_ * stride());
    }
    bool any() const { return bits_ != nullptr; }
    int64_t stride() const { return keep_bytes(k_); }  // bytes from row to row

    // The bits of an adapter, from a row and a column (a multiple of 8) on; null where it drops nothing.
    uint8_t* at(int adapter, int64_t row, int64_t column) const {
        if (!drops(adapter)) return nullptr;
        int64_t index = 0;
        for (int a = 0; a < adapter; ++a) index += drops(a);
        return bits_ + (index * m_ + row) * stride() + column / 8;
    }
    void make(int adapter, int64_t row, int64_t rows) const {
        if (!drops(adapter)) return;
        const Dropout dropout = dropout_of(p_.adapters[adapter]);
        for (int64_t i = 0; i < rows; ++i) dropout_keep_bits(dropout, row + i, 0, k_, at(adapter, row + i, 0));
    }

private:
    bool drops(int adapter) const { return dropout_of(p_.adapters[adapter]).threshold > 0; }

    const LoraAdapters& p_;
    const int64_t m_, k_;
    uint8_t* bits_ = nullptr;  // [dropping adapter][m][stride]
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
