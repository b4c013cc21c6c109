// Code that nobody here wrote: block primitives of cub, and cooperative groups.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

namespace cg = cooperative_groups;

constexpr int kThreads = 128, kItems = 4;

extern "C" __global__ void cub_reduce(const float* in, float* out) {
    using Reduce = cub::BlockReduce<float, kThreads>;
    __shared__ typename Reduce::TempStorage storage;
    const float sum = Reduce(storage).Sum(in[blockIdx.x * kThreads + threadIdx.x]);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

extern "C" __global__ void cub_scan(const int* in, int* out) {
    using Scan = cub::BlockScan<int, kThreads>;
    __shared__ typename Scan::TempStorage storage;
    int items[kItems];
    for (int i = 0; i < kItems; ++i) items[i] = in[threadIdx.x * kItems + i];
    Scan(storage).ExclusiveSum(items, items);
    for (int i = 0; i < kItems; ++i) out[threadIdx.x * kItems + i] = items[i];
}

extern "C" __global__ void cub_sort(const unsigned* in, unsigned* out) {
    using Sort = cub::BlockRadixSort<unsigned, kThreads, kItems>;
    __shared__ typename Sort::TempStorage storage;
    unsigned items[kItems];
    for (int i = 0; i < kItems; ++i) items[i] = in[threadIdx.x * kItems + i];
    Sort(storage).Sort(items);
    for (int i = 0; i < kItems; ++i) out[threadIdx.x * kItems + i] = items[i];
}

extern "C" __global__ void groups(const int* in, int* sums, int* scans, int* odd) {
    const cg::thread_block block = cg::this_thread_block();
    const auto tile = cg::tiled_partition<8>(block);
    const int value = in[block.thread_rank()];
    sums[block.thread_rank()] = cg::reduce(tile, value, cg::plus<int>());
    scans[block.thread_rank()] = cg::inclusive_scan(tile, value, cg::plus<int>());
    block.sync();
    odd[block.thread_rank()] = -1;
    if (value % 2) {
        const auto active = cg::coalesced_threads();
        odd[block.thread_rank()] = active.size() * 100 + active.shfl(active.thread_rank(), 0) + active.thread_rank();
    }
}
