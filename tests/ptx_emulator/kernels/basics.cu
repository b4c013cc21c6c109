// Kernels whose results numpy can say.
#include <cstdint>

extern "C" __global__ void add(const float* a, const float* b, float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = a[i] + b[i];
}

// The sum of a block by a tree in shared memory.
extern "C" __global__ void block_sum(const float* a, float* out, int n) {
    extern __shared__ float part[];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    part[threadIdx.x] = i < n ? a[i] : 0.0f;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

// Steps to 1 in Collatz' sequence: every lane loops as often as its number wants.
extern "C" __global__ void collatz(const uint32_t* start, uint32_t* steps, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint32_t count = 0;
    for (uint64_t x = start[i]; x != 1; ++count) x = x % 2 ? 3 * x + 1 : x / 2;
    steps[i] = count;
}

constexpr int kTile = 32;

// kPad 1 avoids the bank conflicts that kPad 0 has.
template <int kPad>
__device__ void transpose_tile(const float* in, float* out, int rows, int columns) {
    __shared__ float tile[kTile][kTile + kPad];
    const int x = blockIdx.x * kTile + threadIdx.x;
    for (int y = threadIdx.y; y < kTile; y += blockDim.y) {
        const int row = blockIdx.y * kTile + y;
        if (row < rows && x < columns) tile[y][threadIdx.x] = in[row * columns + x];
    }
    __syncthreads();
    const int row = blockIdx.y * kTile + threadIdx.x;
    for (int y = threadIdx.y; y < kTile; y += blockDim.y) {
        const int column = blockIdx.x * kTile + y;
        if (row < rows && column < columns) out[column * rows + row] = tile[threadIdx.x][y];
    }
}
extern "C" __global__ void transpose(const float* in, float* out, int rows, int columns) {
    transpose_tile<1>(in, out, rows, columns);
}
extern "C" __global__ void transpose_conflicts(const float* in, float* out, int rows, int columns) {
    transpose_tile<0>(in, out, rows, columns);
}

// One warp a row: maximum and sum by shuffles.
extern "C" __global__ void warp_softmax(const float* in, float* out, int columns) {
    const float* row = in + int64_t{blockIdx.x} * columns;
    float top = -INFINITY;
    for (int i = threadIdx.x; i < columns; i += 32) top = fmaxf(top, row[i]);
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    float sum = 0;
    for (int i = threadIdx.x; i < columns; i += 32) sum += expf(row[i] - top);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    for (int i = threadIdx.x; i < columns; i += 32) out[int64_t{blockIdx.x} * columns + i] = expf(row[i] - top) / sum;
}

extern "C" __global__ void histogram(const uint8_t* in, uint32_t* bins, int n) {
    __shared__ uint32_t local[256];
    local[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) atomicAdd(&local[in[i]], 1);
    __syncthreads();
    if (local[threadIdx.x]) atomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
}

// A lock within a warp: without independent thread scheduling it would never end.
extern "C" __global__ void warp_lock(int* lock, int* counter) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            atomicExch(counter, atomicAdd(counter, 0) + 1);
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}

// Blocks that take turns: each waits for the one before it.
extern "C" __global__ void turns(int* turn, int* order) {
    while (atomicAdd(turn, 0) != blockIdx.x) {
    }
    order[blockIdx.x] = atomicAdd(turn, 1);
}

__device__ __noinline__ float polynomial(float x, const float* coefficients, int count) {
    float y = 0;
    for (int i = 0; i < count; ++i) y = fmaf(y, x, coefficients[i]);
    return y;
}

struct Pair {
    float first;
    int second;
};
__device__ __noinline__ Pair scaled(Pair pair, float by) { return {pair.first * by, pair.second + 1}; }

__constant__ float kCoefficients[4] = {1.0f, -2.0f, 0.5f, 3.0f};
__device__ int device_offset = 7;

// Calls, by-value structs, constants, local arrays with a dynamic index, and a jump table.
extern "C" __global__ void features(const float* in, float* out, const __grid_constant__ Pair pair) {
    const int i = threadIdx.x;
    float local[4];
    for (int k = 0; k < 4; ++k) local[k] = in[i] * k;
    Pair mine = scaled(pair, in[i]);
    float value = polynomial(in[i], kCoefficients, 4) + local[i % 4] + mine.first + mine.second + device_offset;
    switch (i % 7) {
        case 0: value += 1; break;
        case 1: value *= 2; break;
        case 2: value -= in[(i + 1) % 32]; break;
        case 3: value = sqrtf(fabsf(value)); break;
        case 4: value = value > 0 ? value * value : value; break;
        case 5: value = __int_as_float(__float_as_int(value) ^ 0x80000000); break;
        default: value += 0.5f; break;
    }
    out[i] = value;
}

// The last block to finish adds what the others have written, as in the toolkit's threadFenceReduction sample.
template <bool kFence>
__device__ void last_block(const float* in, float* parts, unsigned* done, float* out) {
    __shared__ bool last;
    parts[blockIdx.x * 32 + threadIdx.x] = in[blockIdx.x * 32 + threadIdx.x];
    if (kFence) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(done, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += parts[block * 32 + threadIdx.x];
    out[threadIdx.x] = sum;
}
extern "C" __global__ void last_block_adds(const float* in, float* parts, unsigned* done, float* out) {
    last_block<true>(in, parts, done, out);
}
extern "C" __global__ void last_block_adds_unfenced(const float* in, float* parts, unsigned* done, float* out) {
    last_block<false>(in, parts, done, out);
}
