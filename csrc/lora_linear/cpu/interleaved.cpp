// lora_linear of some rows in bf16 pairs: the branch is added to the product's sums before their lanes are added up.
#include "lora_linear/cpu/kernels.h"

#if defined(__AVX512BF16__)

#include "lora/cpu/dot.h"
#include "matmul/cpu/epilogue.h"
#include "matmul/cpu/interleaved.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

class InterleavedForward {
public:
    explicit InterleavedForward(const LoraLinearForwardParams& params)
        : p_(params), product_(params, params.x), branch_(params, params.x, params.m, params.k, 1 << 13) {
        // Tasks of at most a quarter of a million products and lookups, some five microseconds on one core; the first
        // lines of each come late. Decoding takes as long as four rows.
        const int64_t row_cost = max_of<int64_t>(1, p_.k * (4 + p_.m) / 5);
        const int64_t most = max_of(kInterleavedOutputs, round_down((int64_t{1} << 18) / row_cost, kLanes));
        const int64_t tasks = max_of<int64_t>(1, ceil_div(p_.n, most));  // of the same size
        task_outputs_ = round_up(ceil_div(p_.n, tasks), kLanes);
    }

    void run() {
        Arena arena(p_.workspace);
        product_.lay_out(arena);
        branch_.lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        product_.make_rows();
        const int64_t tasks = ceil_div(p_.n, task_outputs_);
        int64_t shrinks = branch_.prepare_shrink();
        if (tasks == 1)  // waking a thread takes longer
            while (shrinks > 0) shrink(--shrinks);
        Gate shrunk(shrinks);
        parallel_for_each(shrinks + tasks, [&](int64_t task, int worker) {
            if (task < shrinks) {
                shrink(task);
                return shrunk.arrive();
            }
            const Scratch scratch(workers + worker * worker_bytes, *this);
            const int64_t first = (task - shrinks) * task_outputs_, end = min_of(first + task_outputs_, p_.n);
            product_.prefetch(first);
            for (int64_t n = 0; n < product_.rows_ahead(); ++n) prefetch_B(first + n);
            for (int64_t n = first; n < end; n += kInterleavedOutputs)
                make_y(n, min_of(kInterleavedOutputs, end - n), scratch, shrunk);
        });
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const InterleavedForward& f) : arena(base), product(arena, f.product_) {
            tile = arena.take<float>(f.p_.m * kInterleavedOutputs);
            bias = arena.take<float>(kInterleavedOutputs);
            bytes = arena.used();
        }
        Arena arena;
        InterleavedProduct::Scratch product;
        float* tile;
        float* bias;
        int64_t bytes;
    };

    void shrink(int64_t task) const {
        branch_.shrink(task, p_.s, [](const F32(&sums)[kQuad], float (&out)[kQuad]) { add_lanes<kQuad>(sums, out); });
    }

    // B is read as far ahead as the codes are.
    void prefetch_B(int64_t n) const { branch_.prefetch_B(min_of(n, p_.n - 1)); }

    // y = x Wᵀ + b + scaling s Bᵀ, or y = scale_n ⊙ (x Wᵀ + b), for some outputs of all rows
    void make_y(int64_t n0, int64_t outputs, const Scratch& scratch, const Gate& shrunk) const {
        const int64_t begin = product_.first_row(n0);
        product_.multiply(n0, outputs, scratch.product, [&](auto weights, int64_t first, F32* sums) {
            constexpr int kWeights = decltype(weights)::kValue;
            for (int64_t j = 0; j < kWeights; ++j) prefetch_B(first + j + product_.rows_ahead());
            shrunk.wait();
            branch_.expand<kWeights>(first, 0, p_.m, sums, kWeights, 1);
            for (int64_t i = 0; i < p_.m; ++i)
                add_lanes<kWeights>(sums + i * kWeights, scratch.tile + i * kInterleavedOutputs + first - begin);
        });
        store_y(p_, p_.scale_n, scratch.tile + n0 - begin, kInterleavedOutputs, 0, p_.m, n0, outputs,
                widen_bias(p_.bias, n0, outputs, scratch.bias));
    }

    const LoraLinearForwardParams& p_;
    InterleavedProduct product_;
    DotBranch branch_;
    int64_t task_outputs_;
};

}  // namespace

void forward_interleaved(const LoraLinearForwardParams& params) { InterleavedForward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA

#endif
