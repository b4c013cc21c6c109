// The forward's product for few tokens (m <= 32), bound by reading the codes once.
//
//   out [m, n] = scale ⊙ (x · Wᵀ + bias + add + Σᵢ scalingᵢ · sᵢ · lora_Bᵢᵀ)
//
// A CTA makes kRows columns of out, for all tokens; its warps share the reduction and meet in shared memory at the end,
// so that no sum goes through global memory. Of 64 columns there may be too few for all multiprocessors: then several
// CTAs share the reduction too, and the last to arrive adds their sums, in the order of the reduction.
//
// The weight is the left operand of the matrix unit, whose 16 rows it fills; tokens are the 8 columns. A warp goes
// through k in chunks of 256, every kWarps-th one. In a chunk lane 4 g + t owns block t of rows g and g + 8, of 64
// elements each, and decodes it with one pair of planes a row, or (kTable) those of rows g + 8 by a table of pairs:
//
//              k:   0 ... 63 | 64 ... 127 | 128 ... 191 | 192 ... 255         the matrix unit takes 4 elements of each
//     row g         lane 4 g | lane 4 g + 1 | 4 g + 2   | 4 g + 3             of the 4 blocks as its 16 steps: an order
//     row g + 8     lane 4 g | ...                                            of k that x, the right operand, follows
//
// With LoRA the kernel may overlap the one that makes s, which at so few tokens leaves most multiprocessors idle: the
// terms are added behind the main loop, and nothing is written before.
//
// Several products of the same x may be one launch, in which the CTAs of one follow those of another: at so few tokens
// a small weight has too few CTAs to fill the device, and a launch takes as long as some megabytes of codes.
//
// Codes and x come by cp.async, into buffers of the warp's own: codes a chunk ahead, x a quarter of one (16 elements of
// each block). Both are whole sectors of global memory.
#pragma once

#include <type_traits>

#include "matmul/cuda/few_rows_absmax.cuh"
#include "matmul/cuda/few_rows_terms.cuh"
#include "matmul/cuda/kernel_plan.h"

namespace peft_kernels::cuda {

template <class T_, int kTokens_, int kRows_, bool kTable_ = false>
struct FewRowsTraits {
    using T = T_;
    static constexpr int kTokens = kTokens_;  // 8, 16 or 32
    static constexpr int kRows = kRows_;      // of the weight: 16, 32 or 64
    static constexpr bool kTable = kTable_;   // by which half of the rows are decoded
    static constexpr int kWarps = few_rows_warps(kRows);
    static constexpr int kThreads = 32 * kWarps;
    static constexpr bool kIsShared = kRows == kWideOutputs;  // several CTAs may have a part of the reduction each
    static constexpr int kTokenTiles = kTokens / 8, kRowTiles = kRows / 16;
    static constexpr int kLaneRows = 2 * kRowTiles;  // rows of which a lane decodes a block
    static constexpr int kQuads = (kRows * kTokens / 4 + kThreads - 1) / kThreads;  // of outputs, of a thread
    static constexpr bool kAllQuads = kQuads * kThreads * 4 == kRows * kTokens;     // else of some threads
    static constexpr int kSpan = 4 * kWarps;                     // chunks whose absmax lies in shared memory
    static constexpr int kAbsmaxPitch = 4 * kSpan + 4;           // 8 rows of 4 blocks are in 32 banks
    static constexpr int kPairsAtOnce = kTokens == 8 ? 16 : 32;  // of s: as many as there are free registers

    // Rows of the partial sums: writes of a fragment and reads of 32 neighbours are without conflicts.
    static constexpr int kSumPitch = kRows + 4;

    // 64 rows keep a warp busy for so long that half of a chunk is time enough for the next one's codes, in the same
    // buffer: two CTAs then fit a multiprocessor. Of 16 rows, three would fit one of an A100, rather than two; but of
    // 4096 elements a warp has two chunks, whose codes are all under way from the start with two buffers.
    static constexpr int kSlots = kRows < kWideOutputs ? 2 : 1;
    static constexpr uint32_t kSlot = kRows * 128;  // bytes of a chunk's codes
    struct WarpBuffers {
        uint4 codes[kSlots][kSlot / 16];  // [kRows][128 bytes]
        uint4 x[2][kTokens * 8];          // [kTokens][4 blocks][16 elements]
    };
    struct NoTable {};
    struct Shared : std::conditional_t<kTable, PairTable, NoTable> {
        union {
            WarpBuffers warps[kWarps];
            float sums[kWarps][kTokens * kSumPitch];
        };
        float nested_code[256];
        float4 outputs[kRows * kTokens / 4];  // what is added to the product, each thread's in places of its own
        alignas(16) float absmax[kRows * kAbsmaxPitch];
        bool is_last;
    };
    static constexpr int64_t kSharedBytes = sizeof(Shared);
    static_assert(kRows < kWideOutputs || kSharedBytes == kWideBytes + (kTable ? kTableBytes : 0));

    // A thread's outputs: four rows of kQuads tokens. Rows run along the lanes. With 16 rows the other half of eight
    // lanes takes the token 4 further on, which is in other banks.
    __device__ static int output_row() { return threadIdx.x % (kRows / 4) * 4; }
    __device__ static int output_token(int quad) {
        const int token = (threadIdx.x + quad * kThreads) / (kRows / 4);
        return kRows == 16 ? token / 8 * 8 + token % 2 * 4 + token / 2 % 4 : token;
    }
};

// Where unit `unit` of 16 bytes of a row of 128 bytes lies, in bytes. The 8 lanes of a wavefront meet 8 different banks
// when they have a pair of units of 4 rows, every second unit of 2 rows, or a whole row.
__device__ inline uint32_t swap_units(int row, int unit) { return row * 128 + (unit ^ (row % 4 * 2 + row % 2)) * 16; }

template <class Traits>
class FewRowsWarp {
public:
    using T = typename Traits::T;
    static constexpr int kTokens = Traits::kTokens, kRows = Traits::kRows, kLaneRows = Traits::kLaneRows;
    static constexpr int kWarps = Traits::kWarps;
    // A copy of x takes a sector (16 elements) of one block of this many tokens, or of two blocks of 8.
    static constexpr int kCopyTokens = kTokens < 16 ? kTokens : 16;
    static constexpr int kBlocksAtOnce = 16 / kCopyTokens;
    static constexpr int kGroups = kTokens / kCopyTokens, kCopies = 4 / kBlocksAtOnce;

    __device__ FewRowsWarp(const FusedMatmulKernelParams& params, typename Traits::WarpBuffers& buffers,
                           int64_t first_row, int first_chunk, int end_step)
        : rows(static_cast<int>(min(params.outputs - first_row, int64_t{kRows}))),
          blocks_left_(end_step - 4 * first_chunk) {
        const int lane = threadIdx.x % 32;
        // Copies of codes: unit lane % 8 of rows lane / 8, lane / 8 + 4, ...
        const int64_t pitch = int64_t{32} * params.steps;
        code_step_ = 4 * pitch;
        codes_ = params.weight.codes + (first_row + lane / 8) * pitch + lane % 8 * 16 + first_chunk * 128;
        write_codes_ = shared_address(buffers.codes) + swap_units(lane / 8, lane % 8);
        // Copies of x: half lane % 2 of a sector. The last token stands for those that x does not have.
        const int token = lane / 2 % kCopyTokens;
        const ConstMatrix& x = params.operands.x;
        first_block_ = lane / 2 / kCopyTokens;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int row = min(token + group * kCopyTokens, static_cast<int>(params.operands.m) - 1);
            x_[group] = static_cast<const char*>(x.data) + row * x.stride * sizeof(T) + first_block_ * 128 +
                        lane % 2 * 16 + first_chunk * 512;
        }
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
            write_x_[i] =
                shared_address(buffers.x) + (swap_units(token, first_block_ * 2 + lane % 2) ^ i * kBlocksAtOnce * 32);
        // The product: row or token lane / 4 of eight, block lane % 4.
        read_codes_ = shared_address(buffers.codes) + swap_units(lane / 4, lane % 4 * 2);
#pragma unroll
        for (int word = 0; word < 2; ++word)
            read_x_[word] = shared_address(buffers.x) + swap_units(lane / 4, lane % 4 * 2 + word);
        keep(codes_);
        keep(write_codes_);
        keep(read_codes_);
#pragma unroll
        for (uint32_t& read : read_x_) keep(read);
#pragma unroll
        for (uint32_t& write : write_x_) keep(write);
#pragma unroll
        for (const char*& x : x_) keep(x);
    }

    // Copies of all 16 bytes of a unit save four instructions each, which would compute how many bytes exist.

    // The codes of the chunk at hand (kAhead = 0), then of the one after it (1). Rows and blocks that the weight does
    // not have become zeros.
    template <int kAhead>
    __device__ void copy_codes(uint32_t slot) {
        const int lane = threadIdx.x % 32, blocks = blocks_left_ - kAhead * kWarps * 4;
        const auto copy = [&](auto whole) {
            const uint32_t to = write_codes_ + slot;
            const uint8_t* from = codes_;
            unroll<kRows / 4>([&](auto i) {
                if constexpr (whole.value)
                    copy_async16<i.value * 512>(to, from);
                else
                    copy_async16<i.value * 512>(to, from, 4 * i + lane / 8 < rows && lane % 8 / 2 < blocks ? 16 : 0);
                from += code_step_;
            });
        };
        if (__builtin_expect(blocks >= 4 && rows == kRows, true))
            copy(Index<true>{});
        else if (blocks > 0)
            copy(Index<false>{});
        codes_ += kWarps * 128;
    }

    // Elements 16 kQuarter to 16 kQuarter + 15 of each block of the chunk at hand; zeros for blocks that x does not
    // have.
    template <int kQuarter>
    __device__ void copy_x() const {
        const auto copy = [&](auto whole) {
            unroll<kGroups>([&](auto group) {
                unroll<kCopies>([&](auto i) {
                    constexpr int kTo = (kQuarter % 2 * kTokens + group.value * kCopyTokens) * 128;
                    constexpr int kBlock = i.value * kBlocksAtOnce, kFrom = kQuarter * 32 + kBlock * 128;
                    if constexpr (whole.value)
                        copy_async16<kTo, kFrom>(write_x_[i], x_[group]);
                    else
                        copy_async16<kTo, kFrom>(write_x_[i], x_[group], first_block_ + kBlock < blocks_left_ ? 16 : 0);
                });
            });
        };
        if (__builtin_expect(blocks_left_ >= 4, true))
            copy(Index<true>{});
        else if (blocks_left_ > 0)
            copy(Index<false>{});
    }

    // Goes on to this warp's next chunk, whose codes are on their way.
    __device__ void advance() {
        blocks_left_ -= kWarps * 4;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) x_[group] += kWarps * 512;
    }

    using Upper = PlaneDecoder<T>;
    using Lower = std::conditional_t<Traits::kTable, TableDecoder<T>, PlaneDecoder<T>>;

    // absmax: of this lane's block of row lane / 4, which is followed by the other rows'.
    __device__ void begin_chunk(const Upper& upper, const Lower& lower, const float* absmax) {
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i) {
            upper_[i] = upper.block(absmax[i * 16 * Traits::kAbsmaxPitch]);
            lower_[i] = lower.block(absmax[(i * 16 + 8) * Traits::kAbsmaxPitch]);
        }
    }

    // Two quarters' codes of this lane's blocks.
    __device__ void load_codes(uint32_t slot, int half) {
        const uint32_t from = (read_codes_ ^ half * 16) + slot;
        unroll<kLaneRows>([&](auto i) { load_shared<decltype(i)::value * 1024>(lane_codes_[i], from); });
    }

    template <int kQuarter>
    __device__ void multiply_quarter() {
#pragma unroll
        for (int word = 0; word < 2; ++word) {
            uint32_t x[Traits::kTokenTiles][4];
            unroll<Traits::kTokenTiles>([&](auto tile) {
                constexpr int kFrom = kQuarter % 2 * kTokens * 128 + decltype(tile)::value * 1024;
                load_shared<kFrom>(x[tile], read_x_[word]);
            });
#pragma unroll
            for (int row_tile = 0; row_tile < Traits::kRowTiles; ++row_tile) {
                uint32_t upper[4], lower[4];
                constexpr int kFirstWord = kQuarter % 2 * 2;
                decode(upper_[row_tile], lane_codes_[2 * row_tile][kFirstWord + word], upper);
                decode(lower_[row_tile], lane_codes_[2 * row_tile + 1][kFirstWord + word], lower);
                const uint32_t first[4] = {upper[0], lower[0], upper[1], lower[1]};
                const uint32_t second[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
                for (int tile = 0; tile < Traits::kTokenTiles; ++tile) {
                    multiply(sums[row_tile][tile], first, x[tile][0], x[tile][1], T{});
                    multiply(sums[row_tile][tile], second, x[tile][2], x[tile][3], T{});
                }
            }
        }
    }

    const int rows;  // that the weight has
    float sums[Traits::kRowTiles][Traits::kTokenTiles][4] = {};

private:
    int blocks_left_;  // from the chunk at hand on
    int64_t code_step_;
    const uint8_t* codes_;
    const char* x_[kGroups];
    int first_block_;  // of the four of a chunk, in a copy of x
    uint32_t write_codes_, write_x_[kCopies], read_codes_, read_x_[2];
    typename Upper::Block upper_[Traits::kRowTiles];  // rows lane / 4 of 16, and those 8 further
    typename Lower::Block lower_[Traits::kRowTiles];
    uint32_t lane_codes_[kLaneRows][4];
};

struct FewRowsPlace {
    uint32_t tile;
    int split;
};

// Adds the sums of all CTAs that share a tile, in the order of the reduction; false for those that are not the last to
// arrive.
template <class Traits>
__device__ bool gather_sums(const FusedMatmulKernelParams& params, typename Traits::Shared& shared,
                            const FewRowsPlace& place, float4 (&sums)[Traits::kQuads]) {
    float4* const parts = reinterpret_cast<float4*>(params.partial_sums) +
                          int64_t{place.tile} * params.splits * Traits::kQuads * Traits::kThreads + threadIdx.x;
    const auto part_at = [&](int split, int i) -> float4& {
        return parts[(split * Traits::kQuads + i) * Traits::kThreads];
    };
    const auto store = [&] {
#pragma unroll
        for (int i = 0; i < Traits::kQuads; ++i) part_at(place.split, i) = sums[i];
    };
    if (!is_last_to_arrive(params, shared.is_last, place.tile, store)) return false;
    float4 total[Traits::kQuads] = {};
    for (int split = 0; split < params.splits; ++split)
#pragma unroll
        for (int i = 0; i < Traits::kQuads; ++i) {
            const float4 part = split == place.split ? sums[i] : part_at(split, i);
            total[i].x += part.x, total[i].y += part.y, total[i].z += part.z, total[i].w += part.w;
        }
#pragma unroll
    for (int i = 0; i < Traits::kQuads; ++i) sums[i] = total[i];
    return true;
}

// What a launch multiplies: one product, of which all CTAs are; or several, whose CTAs follow one another.
struct OneProduct {
    const FusedMatmulKernelParams& params;

    __device__ const float (&codebook() const)[16] { return params.codebook; }
    __device__ uint32_t block() const { return blockIdx.x; }
    static constexpr bool kMayWait = false;
};
struct OneOfSeveral {
    const FusedMatmulsKernelParams& all;
    const int index = all.index_of(blockIdx.x);
    const FusedMatmulKernelParams& params = all.products[index];

    // All have one. That of the first is where each instruction can name it as an operand.
    __device__ const float (&codebook() const)[16] { return all.products[0].codebook; }
    __device__ uint32_t block() const { return blockIdx.x - all.first_block(index); }
    static constexpr bool kMayWait = true;  // without terms of its own, for the launch that makes those of another
};

template <class Traits, class Product>
__device__ __forceinline__ void multiply_few_rows(const Product& product) {
    constexpr int kWarps = Traits::kWarps;
    extern __shared__ __align__(128) unsigned char memory[];
    typename Traits::Shared& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const FusedMatmulKernelParams& params = product.params;
    const FusedMatmulParams& operands = params.operands;
    // The CTA's tile and its part of the reduction: found before the main loop and again after it, which need not keep
    // them. Tiles of one part are neighbours, since they read the same x.
    const auto find_place = [&] {
        uint32_t block = product.block();
        keep(block);
        if constexpr (Traits::kIsShared) {
            const uint32_t tiles = gridDim.x / params.splits;
            return FewRowsPlace{block % tiles, static_cast<int>(block / tiles)};
        } else {
            return FewRowsPlace{block, 0};
        }
    };
    const FewRowsPlace start = find_place();
    const int64_t first_row = int64_t{start.tile} * Traits::kRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_step = start.split * params.split_steps;
    const int end_step = Traits::kIsShared ? min(params.steps, first_step + params.split_steps) : params.steps;
    const int begin = first_step / 4, chunks = static_cast<int>((end_step + 3u) / 4);

    // load: the first chunk, absmax and all small operands are under way together, before any is waited for.
    FewRowsWarp<Traits> tile(params, shared.warps[warp], first_row, begin + warp, end_step);
    tile.template copy_codes<0>(0);
    tile.template copy_x<0>();
    commit_copies();

    FewRowsAbsmax<Traits> absmax;
    absmax.load(params, first_row, tile.rows, 4 * begin, end_step);
    const NestedCode<Traits::kThreads> table(params.weight.absmax);

    if (operands.num_terms > 0) prefetch_factors<Traits>(params, first_row, tile.rows);
    const bool adds = operands.bias.data || operands.add.data;
    if (adds) {
        const int64_t column = first_row + Traits::output_row();
        float4 outputs[Traits::kQuads];
        const int count = count_four(column, params.outputs);
        const float4 bias = load_four<true>(operands.bias, 0, column, count, has_aligned_fours(operands.bias));
#pragma unroll
        for (int i = 0; i < Traits::kQuads; ++i) {
            const int token = Traits::output_token(i);
            const bool aligned = has_aligned_fours(operands.add);
            const float4 add = load_four<true>(operands.add, token, column, token < operands.m ? count : 0, aligned);
            outputs[i] = make_float4(bias.x + add.x, bias.y + add.y, bias.z + add.z, bias.w + add.w);
        }
#pragma unroll
        for (int i = 0; i < Traits::kQuads; ++i)
            if (Traits::output_token(i) < Traits::kTokens)
                shared.outputs[threadIdx.x + i * Traits::kThreads] = outputs[i];
    }
    table.store(shared.nested_code);
    if constexpr (Traits::kTable) shared.template fill<Traits::kThreads>(product.codebook());
    __syncthreads();
    absmax.store(params, shared, table.offset);
    const PlaneDecoder<typename Traits::T> upper(product.codebook());
    const auto lower = [&] {
        if constexpr (Traits::kTable)
            return TableDecoder<typename Traits::T>(shared);
        else
            return upper;
    }();

    // compute
    for (int first_chunk = begin; first_chunk < chunks; first_chunk += Traits::kSpan) {
        if (first_chunk > begin) {
            absmax.load(params, first_row, tile.rows, 4 * first_chunk, end_step);
            __syncthreads();
            absmax.store(params, shared, table.offset);
        }
        __syncthreads();
        const float* chunk_absmax = &shared.absmax[lane / 4 * Traits::kAbsmaxPitch + 4 * warp + lane % 4];
        int end = min(first_chunk + Traits::kSpan, chunks);
        keep(end);
        uint32_t slot = 0;
        for (int chunk = first_chunk + warp; chunk < end;
             chunk += kWarps, slot ^= Traits::kSlot, chunk_absmax += 4 * kWarps) {
            tile.begin_chunk(upper, lower, chunk_absmax);
            unroll<4>([&](auto quarter) {
                constexpr int kQuarter = decltype(quarter)::value;
                // The next chunk's codes are asked for at one quarter, and may take until the next but one. They go to
                // the other buffer, or to the only one, whose second half has just been read.
                constexpr int kCodesQuarter = Traits::kSlots == 2 ? 0 : 2;
                wait_for_copies<kQuarter == kCodesQuarter + 1 ? 1 : 0>();
                __syncwarp();
                if constexpr (kQuarter == 3) tile.advance();
                tile.template copy_x<(kQuarter + 1) % 4>();
                commit_copies();
                if constexpr (Traits::kSlots == 1 && kQuarter % 2 == 0) tile.load_codes(0, kQuarter / 2);
                if constexpr (kQuarter == kCodesQuarter) {
                    if constexpr (Traits::kSlots == 1) __syncwarp();
                    tile.template copy_codes<1>(Traits::kSlots == 2 ? slot ^ Traits::kSlot : 0);
                    commit_copies();
                }
                if constexpr (Traits::kSlots == 2 && kQuarter % 2 == 0) tile.load_codes(slot, kQuarter / 2);
                tile.template multiply_quarter<kQuarter>();
            });
        }
    }

    const FewRowsPlace place = find_place();
    if (operands.num_terms > 0 && place.split == 0) {
        wait_for_last_kernel();
        add_terms<Traits>(params, int64_t{place.tile} * Traits::kRows, tile.sums);
    } else if constexpr (Product::kMayWait) {
        wait_for_last_kernel();
    }

    // reduce, in the order of the warps
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int row_tile = 0; row_tile < Traits::kRowTiles; ++row_tile)
#pragma unroll
        for (int tile_index = 0; tile_index < Traits::kTokenTiles; ++tile_index)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 16 * row_tile + lane / 4 + i / 2 * 8;
                const int token = 8 * tile_index + lane % 4 * 2 + i % 2;
                shared.sums[warp][token * Traits::kSumPitch + row] = tile.sums[row_tile][tile_index][i];
            }
    __syncthreads();

    float4 sums[Traits::kQuads] = {};
    const auto add = [&](int i, const float4& more) {
        sums[i] = make_float4(sums[i].x + more.x, sums[i].y + more.y, sums[i].z + more.z, sums[i].w + more.w);
    };
#pragma unroll
    for (int i = 0; i < Traits::kQuads; ++i) {
        const int token = Traits::output_token(i);
        if (!Traits::kAllQuads && token >= Traits::kTokens) break;
        const auto part_of = [&](int w) {
            const float* const from = &shared.sums[w][token * Traits::kSumPitch + Traits::output_row()];
            return *reinterpret_cast<const float4*>(from);
        };
        sums[i] = part_of(0);
#pragma unroll
        for (int w = 1; w < kWarps; ++w) add(i, part_of(w));
    }
    if constexpr (Traits::kIsShared)
        if (params.splits > 1 && !gather_sums<Traits>(params, shared, place, sums)) return;

    // store
    const int64_t column = int64_t{place.tile} * Traits::kRows + Traits::output_row();
    const int count = count_four(column, params.outputs);
    const int m = static_cast<int>(operands.m);
    float4 scale;
    if (operands.scale) scale = load_scales(operands.scale, column, count);
    const bool aligned = has_aligned_fours(operands.out);
#pragma unroll
    for (int i = 0; i < Traits::kQuads; ++i) {
        const int token = Traits::output_token(i);
        if (token >= m) continue;
        if (adds) add(i, shared.outputs[threadIdx.x + i * Traits::kThreads]);
        float4 sum = sums[i];
        if (operands.unscaled.data)
            store_four(operands.unscaled, token, column, count, has_aligned_fours(operands.unscaled), sum);
        if (operands.scale) sum = make_float4(scale.x * sum.x, scale.y * sum.y, scale.z * sum.z, scale.w * sum.w);
        store_four(operands.out, token, column, count, aligned, sum);
    }
}

template <class Traits>
constexpr int kFewRowsCtas = Traits::kTokens == 8 ? 3 : 2;  // of a multiprocessor, which registers are to allow

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kFewRowsCtas<Traits>)
    matmul_few_rows_kernel(const __grid_constant__ FusedMatmulKernelParams params) {
#if __CUDA_ARCH__ >= 800
    multiply_few_rows<Traits>(OneProduct{params});
#endif
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kFewRowsCtas<Traits>)
    matmuls_few_rows_kernel(const __grid_constant__ FusedMatmulsKernelParams params) {
#if __CUDA_ARCH__ >= 800
    multiply_few_rows<Traits>(OneOfSeveral{params});
#endif
}

}  // namespace peft_kernels::cuda
