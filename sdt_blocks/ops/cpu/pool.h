// 3x3 maxima of stride 2, with padding 1: the place of each within its window, 0 to 8, is all that the gradient needs.

#pragma once

#include <limits>

#include "blocks.h"

namespace {

// Frames [count, channels, height, width] in that order, or with the channels innermost.
struct Planes {
    int64_t count, channels, height, width, channels_last, threads;
    int64_t rows_out() const { return (height + 1) / 2; }
    int64_t width_out() const { return (width + 1) / 2; }
};

constexpr int64_t POOLED = 256;  // results that are computed together

// Compares n candidates of one place, `Stride` apart, with the best so far. A NaN wins, the last of several, as in PyTorch.
template <int Stride, class X, class S> void challenge(int64_t n, const X* x, int32_t place, S* best, int32_t* places) {
    SIMD for (int64_t i = 0; i < n; ++i) {
        const S v = load(x[i * Stride]);
        const bool better = v > best[i] || v != v;
        best[i] = better ? v : best[i];
        places[i] = better ? place : places[i];
    }
}

template <class X, class S> void max_pool(const Planes& f, const X* x, X* out, uint8_t* places) {
    const int64_t rows = f.rows_out(), wide = f.width_out(), planes = f.channels_last ? f.count : f.count * f.channels;
    const int64_t row_in = f.channels_last ? f.width * f.channels : f.width;
    const int64_t row_out = f.channels_last ? wide * f.channels : wide;
    parallel(f.threads, [&](int thread, int threads) {
        S best[POOLED];
        int32_t place[POOLED];
        const auto write = [&](int64_t n, int64_t at) {
            SIMD for (int64_t i = 0; i < n; ++i) store(best[i], out[at + i]);
            if (places)
                SIMD for (int64_t i = 0; i < n; ++i) places[at + i] = uint8_t(place[i]);
        };
        for (int64_t row = planes * rows * thread / threads; row < planes * rows * (thread + 1) / threads; ++row) {
            const int64_t y = row % rows * 2, at = row * row_out;
            const X* middle = x + (row / rows * f.height + y) * row_in;
            const int64_t top = y > 0 ? 0 : 1, bottom = y + 1 < f.height ? 2 : 1;
            if (f.channels_last) {
                for (int64_t column = 0; column < wide; ++column)
                    for (int64_t c = 0; c < f.channels; c += POOLED) {
                        const int64_t n = std::min(POOLED, f.channels - c), left = column > 0 ? 0 : 1;
                        const int64_t right = 2 * column + 1 < f.width ? 2 : 1;
                        std::fill_n(best, n, -std::numeric_limits<S>::infinity());
                        std::fill_n(place, n, int32_t(3 * top + left));
                        for (int64_t dy = top; dy <= bottom; ++dy)
                            for (int64_t dx = left; dx <= right; ++dx)
                                challenge<1>(n, middle + (dy - 1) * row_in + (2 * column + dx - 1) * f.channels + c,
                                             int32_t(3 * dy + dx), best, place);
                        write(n, at + column * f.channels + c);
                    }
                continue;
            }
            for (int64_t start = 0; start < wide; start += POOLED) {
                const int64_t n = std::min(POOLED, wide - start), first = start == 0;
                const int64_t whole = std::min(start + n, f.width / 2) - start;  // windows that end within the row
                std::fill_n(best, n, -std::numeric_limits<S>::infinity());
                std::fill_n(place, n, int32_t(3 * top));
                if (first) place[0] = int32_t(3 * top + 1);
                for (int64_t dy = top; dy <= bottom; ++dy) {
                    const X* in = middle + (dy - 1) * row_in + 2 * start;
                    challenge<2>(n - first, in + 2 * first - 1, int32_t(3 * dy), best + first, place + first);
                    challenge<2>(n, in, int32_t(3 * dy + 1), best, place);
                    challenge<2>(whole, in + 1, int32_t(3 * dy + 2), best, place);
                }
                write(n, at + start);
            }
        }
    });
}

// Every input gathers from the one, two or four windows that it lies in.
template <class X, class S> void max_pool_backward(const Planes& f, const X* grad, const uint8_t* places, X* grad_x) {
    const int64_t rows = f.rows_out(), wide = f.width_out(), planes = f.channels_last ? f.count : f.count * f.channels;
    const int64_t row_in = f.channels_last ? f.width * f.channels : f.width;
    const int64_t row_out = f.channels_last ? wide * f.channels : wide;
    parallel(f.threads, [&](int thread, int threads) {
        S even[POOLED], odd[POOLED];
        for (int64_t row = planes * f.height * thread / threads; row < planes * f.height * (thread + 1) / threads; ++row) {
            const int64_t plane = row / f.height, y = row % f.height;
            X* to = grad_x + row * row_in;
            // The windows' rows, and the input's place in them: the middle one, or the last of one and the first of the next.
            const int64_t windows = y % 2 && y / 2 + 1 < rows ? 2 : 1;
            const int64_t from[2] = {(plane * rows + y / 2) * row_out, (plane * rows + y / 2 + 1) * row_out};
            const int32_t dy[2] = {y % 2 ? 2 : 1, 0};
            const auto add = [&](int64_t n, int64_t at, int32_t place, S* sum) {
                const X* g = grad + at;
                const uint8_t* p = places + at;
                SIMD for (int64_t i = 0; i < n; ++i) sum[i] += p[i] == place ? S(load(g[i])) : S(0);
            };
            if (f.channels_last) {
                for (int64_t column = 0; column < f.width; ++column)
                    for (int64_t c = 0; c < f.channels; c += POOLED) {
                        const int64_t n = std::min(POOLED, f.channels - c);
                        std::fill_n(even, n, S(0));
                        for (int64_t w = 0; w < windows; ++w) {
                            const int64_t at = from[w] + column / 2 * f.channels + c;
                            add(n, at, 3 * dy[w] + (column % 2 ? 2 : 1), even);
                            if (column % 2 && column / 2 + 1 < wide) add(n, at + f.channels, 3 * dy[w], even);
                        }
                        SIMD for (int64_t i = 0; i < n; ++i) store(even[i], to[column * f.channels + c + i]);
                    }
                continue;
            }
            for (int64_t start = 0; start < wide; start += POOLED) {
                const int64_t n = std::min(POOLED, wide - start), next = std::min(n, wide - 1 - start);
                const int64_t pairs = std::min(start + n, f.width / 2) - start;
                std::fill_n(even, n, S(0));
                std::fill_n(odd, n, S(0));
                for (int64_t w = 0; w < windows; ++w) {
                    add(n, from[w] + start, 3 * dy[w] + 1, even);
                    add(n, from[w] + start, 3 * dy[w] + 2, odd);
                    add(next, from[w] + start + 1, 3 * dy[w], odd);
                }
                X* pair = to + 2 * start;
                SIMD for (int64_t i = 0; i < pairs; ++i) {
                    store(even[i], pair[2 * i]);
                    store(odd[i], pair[2 * i + 1]);
                }
                if (pairs < n) store(even[pairs], pair[2 * pairs]);
            }
        }
    });
}

}  // namespace
