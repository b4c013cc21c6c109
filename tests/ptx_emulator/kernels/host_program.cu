// A program as it is written for a GPU, host code and all, linked to the software runtime. It prints what it finds.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

__constant__ float factors[4];
__device__ int total;

__global__ void scale(const float* in, float* out, int n) {
    extern __shared__ float buffer[];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    buffer[threadIdx.x] = i < n ? in[i] : 0;
    __syncthreads();
    if (i < n) out[i] = buffer[threadIdx.x] * factors[i % 4];
    if (i < n) atomicAdd(&total, 1);
    if (i == 0) printf("scale of %d elements, factor %.2f\n", n, factors[0]);
}

__global__ void past_end(float* out) { out[threadIdx.x + 1] = 0; }

#define CHECK(call)                                                                  \
    if (cudaError_t error = (call); error != cudaSuccess) {                          \
        std::printf("%s: %s\n", cudaGetErrorName(error), cudaGetErrorString(error)); \
        return 1;                                                                    \
    }

int main() {
    constexpr int n = 300;
    float host[n], back[n], f[4] = {1, 2, 3, 4};
    for (int i = 0; i < n; ++i) host[i] = i;
    float *in, *out;
    cudaStream_t stream;
    cudaEvent_t event;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&event));
    CHECK(cudaMalloc(&in, sizeof host));
    CHECK(cudaMalloc(&out, sizeof host));
    CHECK(cudaMemcpyAsync(in, host, sizeof host, cudaMemcpyHostToDevice, stream));
    CHECK(cudaMemcpyToSymbol(factors, f, sizeof f));
    scale<<<3, 128, 512, stream>>>(in, out, n);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(event, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(back, out, sizeof host, cudaMemcpyDeviceToHost));
    int counted = 0, wrong = 0;
    CHECK(cudaMemcpyFromSymbol(&counted, total, sizeof counted));
    for (int i = 0; i < n; ++i) wrong += back[i] != i * f[i % 4];
    std::printf("wrong %d, counted %d\n", wrong, counted);

    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    int blocks, optin;
    CHECK(cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale, 128, 60 * 1024));
    std::printf("%s, %d multiprocessors, %d bytes, %d blocks\n", properties.name, properties.multiProcessorCount, optin,
                blocks);

    scale<<<1, 128, 60 * 1024>>>(in, out, 0);
    std::printf("%s\n", cudaGetErrorString(cudaGetLastError()));
    CHECK(cudaFuncSetAttribute(scale, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 * 1024));
    scale<<<1, 128, 60 * 1024>>>(in, out, 0);
    CHECK(cudaGetLastError());
    scale<<<1, 2048, 8192>>>(in, out, n);
    std::printf("%s\n", cudaGetErrorString(cudaPeekAtLastError()));
    (void)cudaGetLastError();
    past_end<<<1, n>>>(out);
    std::printf("%s\n", cudaGetErrorString(cudaGetLastError()));
    CHECK(cudaFree(in));
    CHECK(cudaFree(out));
    return 0;
}
