// AMX's tile unit in software: the sources for amx, compiled with this header before them, run where AVX-512 with bf16
// does and AMX does not. It shows what the kernels compute, and nothing about their speed. `make test-amx`.
//
// Pseudocode: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TDPBF16PS.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulator {

// Palette 1: eight tiles of at most 16 rows of 64 bytes.
struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
};

struct Tile {
    alignas(64) uint8_t bytes[16][64];

    template <class T>
    T get(int row, int column) const {
        T value;
        memcpy(&value, &bytes[row][column * sizeof(T)], sizeof(T));
        return value;
    }
};

inline thread_local Config config;  // palette 0: the unit is released
inline thread_local Tile tiles[8];

// The processor raises #UD or #GP.
inline void demand(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "amx_emulator: %s\n", what);
    abort();
}

inline void load_config(const void* from) {
    memcpy(&config, from, sizeof config);
    demand(config.palette == 1 && config.start_row == 0, "a palette or row that there is not");
    for (int tile = 0; tile < 8; ++tile)
        demand(config.rows[tile] <= 16 && config.bytes_per_row[tile] <= 64, "a tile larger than 16 rows of 64 bytes");
    memset(tiles, 0, sizeof tiles);
}

inline void release() { config.palette = 0; }

inline Tile& configured(int tile) {
    demand(config.palette == 1 && config.rows[tile] > 0, "a tile is used that is not configured");
    return tiles[tile];
}

inline void zero(int tile) { memset(&configured(tile), 0, sizeof(Tile)); }

inline void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int row = 0; row < config.rows[tile]; ++row)
        memcpy(tiles[tile].bytes[row], static_cast<const char*>(from) + row * stride, config.bytes_per_row[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
    const Tile& sums = configured(tile);
    for (int row = 0; row < config.rows[tile]; ++row)
        memcpy(static_cast<char*>(to) + row * stride, sums.bytes[row], config.bytes_per_row[tile]);
}

// Denormal numbers count as zero, going in and coming out.
inline float flushed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7f800000) == 0 ? __builtin_copysignf(0, value) : value;
}

inline float widened(uint16_t bf16) {
    const uint32_t bits = uint32_t{bf16} << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return flushed(value);
}

// sums[m][n] += Σ_k left[m][k] right[k / 2][n][k % 2], even and odd k in sums of their own.
inline void product(int sums, int left, int right) {
    Tile& to = configured(sums);
    const Tile &a = configured(left), &b = configured(right);
    const int pairs = config.bytes_per_row[left] / 4, columns = config.bytes_per_row[sums] / 4;
    demand(config.rows[left] == config.rows[sums] && config.rows[right] == pairs &&
               config.bytes_per_row[right] == config.bytes_per_row[sums],
           "tiles that do not fit each other");
    for (int row = 0; row < config.rows[sums]; ++row) {
        float even[16] = {}, odd[16] = {};
        for (int pair = 0; pair < pairs; ++pair) {
            const float left_even = widened(a.get<uint16_t>(row, 2 * pair));
            const float left_odd = widened(a.get<uint16_t>(row, 2 * pair + 1));
            for (int column = 0; column < columns; ++column) {
                even[column] =
                    flushed(__builtin_fmaf(left_even, widened(b.get<uint16_t>(pair, 2 * column)), even[column]));
                odd[column] =
                    flushed(__builtin_fmaf(left_odd, widened(b.get<uint16_t>(pair, 2 * column + 1)), odd[column]));
            }
        }
        for (int column = 0; column < columns; ++column) {
            const float sum = flushed(flushed(to.get<float>(row, column)) + flushed(even[column] + odd[column]));
            memcpy(&to.bytes[row][4 * column], &sum, sizeof sum);
        }
    }
}

}  // namespace amx_emulator

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulator::load_config
#define _tile_release amx_emulator::release
#define _tile_zero amx_emulator::zero
#define _tile_loadd amx_emulator::load
#define _tile_stream_loadd amx_emulator::load
#define _tile_stored amx_emulator::store
#define _tile_dpbf16ps amx_emulator::product
