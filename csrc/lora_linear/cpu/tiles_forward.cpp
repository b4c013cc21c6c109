// lora_linear's forward on AMX, in bf16: yᵀ = [W B] [x s]ᵀ + b, one reduction.
#include "lora_linear/cpu/kernels.h"

#if defined(__AMX_BF16__)

#include "lora/cpu/tiles_forward.h"
#include "matmul/cpu/epilogue.h"
#include "matmul/cpu/tiles.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

class TileForward {
public:
    explicit TileForward(const LoraLinearForwardParams& params)
        : p_(params),
          branch_(params, params.x, params.k),
          product_(params, true, has_weight(params), branch_.tail_steps()) {}

    void run() {
        Arena arena(p_.workspace);
        branch_.lay_out(arena);
        product_.lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        if (p_.num_adapters > 0)
            parallel_for_each(ceil_div(p_.k, kPackDepth), [&](int64_t task, int worker) {
                branch_.pack_A(task * kPackDepth, scratch(worker).branch);
            });
        for (int64_t first = 0; first < p_.m; first += product_.chunk_rows()) {
            const int64_t rows = min_of(product_.chunk_rows(), p_.m - first);
            product_.for_each_panel(first, rows, [&](int64_t row, int64_t count, int worker) {
                const Scratch s = scratch(worker);
                BFloat16* panel = product_.input_panel(first, row);
                const Bf16Rows x = bf16_rows(p_.x, row, count, 0, p_.k, kRounded, p_.scale_k, s.branch.rows);
                pack_interleaved_columns(x.data, x.stride, count, p_.k, nullptr, 0, panel);
                branch_.shrink(row, count, p_.s, panel, product_.input_tail(first, row), s.branch);
            });
            product_.for_each_task(first, rows,
                                   [&](int64_t n0, int64_t outputs, int64_t row, int64_t count, int worker) {
                                       make_y(first, n0, outputs, row, count, scratch(worker));
                                   });
        }
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const TileForward& f)
            : arena(base),
              weight(arena.take<BFloat16>(f.product_.weight_size())),
              absmax(arena.take<float>(f.product_.has_base() ? f.product_.task_outputs() * (f.p_.k / kBlock) : 0)),
              bias(arena.take<float>(f.product_.task_outputs())),
              branch(arena, f.branch_, f.product_.tile_size(), f.p_.scale_k),
              bytes(arena.used()) {}
        Arena arena;
        BFloat16* weight;  // left panels of W and B
        float* absmax;     // [output of the task][run of 64 elements]
        float* bias;
        TileForwardBranch::Scratch branch;
        int64_t bytes;
    };

    // y = x Wᵀ + b + scaling s Bᵀ, or y = scale_n ⊙ (x Wᵀ + b), for some outputs of some rows
    void make_y(int64_t first, int64_t n0, int64_t outputs, int64_t row0, int64_t rows, const Scratch& scratch) const {
        const float* bias = widen_bias(p_.bias, n0, outputs, scratch.bias);
        const int64_t runs = p_.k / kBlock;
        if (p_.weight && has_aligned_blocks(*p_.weight))
            runs_absmax(*p_.weight, n0 * p_.k, outputs * runs, scratch.absmax);
        const auto make = [&](int64_t step, int64_t steps, int64_t count, BFloat16* panel, int64_t stride) {
            const int64_t k = step * kTileDepth;
            dispatch_weight(p_, [&](const auto& weight) {
                for (int64_t n = 0; n < count; n += kPanelSide, panel += stride)
                    decode_left(weight, n0 + n, min_of<int64_t>(kPanelSide, count - n), k,
                                min_of(steps * kTileDepth, p_.k - k), scratch.absmax + n * runs,
                                product_.task_outputs() * p_.threads, panel);
            });
        };
        const auto make_tail = [&](int64_t n, int64_t some, BFloat16* panel) { branch_.pack_B(n0 + n, some, panel); };
        const auto finish = [&](int64_t row, int64_t count, int64_t n, int64_t some, const float* sums) {
            transpose_sums(count, sums, scratch.branch.tile);
            store_y(p_, p_.scale_n, scratch.branch.tile, kPanelSide, row, count, n0 + n, some,
                    bias ? bias + n : nullptr);
        };
        product_.multiply_task<Streams::kLeft>(first, outputs, row0, rows, branch_.tail_steps(), scratch.weight,
                                               scratch.branch.sums, make, make_tail, finish);
    }

    // sums holds yᵀ.
    static void transpose_sums(int64_t rows, const float* sums, float* tile) {
        for (int i = 0; i < kPanelSide; i += kTileSide)
            for (int j = 0; j < min_of<int64_t>(rows, kPanelSide); j += kTileSide) {
                U32 square[kLanes];
                for (int l = 0; l < kLanes; ++l) square[l] = load_vector<U32>(sums + (i + l) * kPanelSide + j);
                transpose(square);
                for (int l = 0; l < kLanes; ++l) store_vector(tile + (j + l) * kPanelSide + i, square[l]);
            }
    }

    const LoraLinearForwardParams& p_;
    TileForwardBranch branch_;
    TileProduct product_;
};

}  // namespace

void forward_tiles(const LoraLinearForwardParams& params) { TileForward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA

#endif
