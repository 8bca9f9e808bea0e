// Levels and counts from their planes of bits.

#pragma once

#include "packed_epilogue.h"

namespace {

// The sums over planes of the first `count` channels of a word, whose planes are `plane` words apart.
template <class T>
inline void expand_levels(const uint64_t* word, int64_t plane, int64_t planes, int64_t count, T* to) {
    for (int64_t p = 0; p < planes; p++) {
        const uint64_t bits = word[p * plane];
#if defined(__AVX512F__)
        if constexpr (std::is_same_v<T, float>)
            if (count == 64) {
                for (int v = 0; v < 64 / WIDTH; v++) {
                    const Vector before = p ? load(to + v * WIDTH) : Vector{};
                    store(to + v * WIDTH, _mm512_mask_add_ps(before, __mmask16(bits >> v * WIDTH), before, broadcast(1)));
                }
                continue;
            }
#endif
        const auto add = [&](int64_t n, bool first) {
            for (int64_t c = 0; c < n; c++) to[c] = T(bits >> c & 1) + (first ? T(0) : to[c]);
        };
        if (count < 64) add(count, p == 0);
        else if (p == 0) add(64, true);
        else add(64, false);
    }
}

}  // namespace
