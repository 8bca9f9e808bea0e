// Maxima over 3x3 windows, stride 2, padding 1, channels innermost: of spikes, where the maximum is OR, and of real values.

#pragma once

#include "packed_epilogue.h"

namespace {

inline int64_t pooled(int64_t size) { return (size + 1) / 2; }

// Pools three rows of words (null beyond the edges) into one; `whole` has room for a row.
inline void pool_spikes(const uint64_t* above, const uint64_t* center, const uint64_t* below, int64_t width, int64_t words,
                        uint64_t* whole, uint64_t* out) {
    for (int64_t i = 0; i < width * words; i++) whole[i] = center[i] | (above ? above[i] : 0) | (below ? below[i] : 0);
    for (int64_t x = 0; x < width; x += 2)
        for (int64_t word = 0; word < words; word++) {
            const uint64_t* at = whole + x * words + word;
            *out++ = *at | (x > 0 ? at[-words] : 0) | (x + 1 < width ? at[words] : 0);
        }
}

void pool_spikes(const uint64_t* in, uint64_t* out, int64_t frames, int64_t height, int64_t width, int64_t words,
                 int64_t threads) {
    const int64_t rows = pooled(height), length = width * words;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < frames * rows; row++) {
        static thread_local Buffer<uint64_t> whole;
        const int64_t y = row % rows * 2;
        const uint64_t* center = in + (row / rows * height + y) * length;
        pool_spikes(y > 0 ? center - length : nullptr, center, y + 1 < height ? center + length : nullptr, width, words,
                    whole.reserve(length), out + row * pooled(width) * words);
    }
}

void pool_reals(const float* in, float* out, int64_t frames, int64_t height, int64_t width, int64_t channels,
                int64_t threads) {
    const int64_t rows = pooled(height), columns = pooled(width);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < frames * rows; row++) {
        const int64_t frame = row / rows, y = row % rows;
        for (int64_t x = 0; x < columns; x++) {
            float* to = out + (row * columns + x) * channels;
            const float* center = in + ((frame * height + 2 * y) * width + 2 * x) * channels;
            std::copy(center, center + channels, to);
            for (int64_t dy = -1; dy <= 1; dy++)
                for (int64_t dx = -1; dx <= 1; dx++) {
                    if (2 * y + dy < 0 || 2 * y + dy >= height || 2 * x + dx < 0 || 2 * x + dx >= width) continue;
                    const float* from = center + (dy * width + dx) * channels;
                    for (int64_t c = 0; c < channels; c++) to[c] = to[c] > from[c] ? to[c] : from[c];
                }
        }
    }
}

}  // namespace
