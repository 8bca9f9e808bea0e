// 3x3 maxima of stride 2, padding 1: the place of each maximum in its window, 0 to 8, is all that the gradient needs.

#pragma once

#include <limits>

#include "blocks.h"

namespace {

// Frames [count, channels, height, width], in this order in memory or with the channels innermost.
struct Planes {
    int64_t count, channels, height, width, channels_last, threads;
    int64_t rows_out() const { return (height + 1) / 2; }
    int64_t width_out() const { return (width + 1) / 2; }
};

constexpr int64_t POOLED = 512;  // about how many results are computed together
constexpr uint8_t NOWHERE = 9;   // no place in a window

// The largest of nine candidates for each of n windows, and its place. Candidates in the padding are -infinity; on entry
// `places` holds the first place outside the padding. A NaN wins, the last one if several, as in PyTorch.
template <class S> void largest(int64_t n, const S* const* candidates, S* best, int32_t* places) {
    const S *a = candidates[0], *b = candidates[1], *c = candidates[2], *d = candidates[3], *e = candidates[4],
            *f = candidates[5], *g = candidates[6], *h = candidates[7], *k = candidates[8];
    SIMD for (int64_t i = 0; i < n; ++i) {
        S top = -std::numeric_limits<S>::infinity();
        int32_t place = places[i];
        const auto challenge = [&](S v, int32_t of) {
            const bool better = v > top || v != v;
            top = better ? v : top;
            place = better ? of : place;
        };
        challenge(a[i], 0), challenge(b[i], 1), challenge(c[i], 2);
        challenge(d[i], 3), challenge(e[i], 4), challenge(f[i], 5);
        challenge(g[i], 6), challenge(h[i], 7), challenge(k[i], 8);
        best[i] = top;
        places[i] = place;
    }
}

template <class X, class S> void write(int64_t n, const S* best, const int32_t* place, X* out, uint8_t* places) {
    SIMD for (int64_t i = 0; i < n; ++i) store(best[i], out[i]);
    if (places)
        SIMD for (int64_t i = 0; i < n; ++i) places[i] = uint8_t(place[i]);
}

// Channels innermost: neighboring windows of a row are computed together.
template <class X, class S> void max_pool_channels(const Planes& f, const X* x, X* out, uint8_t* places) {
    const int64_t rows = f.rows_out(), wide = f.width_out(), lanes = f.channels, row_in = f.width * lanes;
    const int64_t together = std::min(wide, std::max<int64_t>(1, POOLED / lanes)), pieces = (wide + together - 1) / together;
    const int64_t count = f.count * rows * pieces;
    parallel(f.threads, [&](int thread, int threads) {
        Buffer<S> buffers[3], best(together * lanes), padding(lanes, -std::numeric_limits<S>::infinity());
        for (Buffer<S>& buffer : buffers) buffer.resize((2 * together + 1) * lanes);
        Buffer<int32_t> place(together * lanes);
        for (int64_t piece = count * thread / threads; piece < count * (thread + 1) / threads; ++piece) {
            const int64_t row = piece / pieces, y = row % rows * 2, first = piece % pieces * together;
            const int64_t windows = std::min(together, wide - first), n = windows * lanes, at = (row * wide + first) * lanes;
            const int64_t from = std::max<int64_t>(0, 2 * first - 1), to = std::min(f.width, 2 * (first + windows));
            const S* in[3];  // the rows above, at and below the center of the windows, starting at column `from`
            for (int64_t dy = 0; dy < 3; ++dy) {
                const bool within = y + dy > 0 && y + dy <= f.height;
                const X* start = x + (row / rows * f.height + y + dy - 1) * row_in + from * lanes;
                in[dy] = within ? widen((to - from) * lanes, start, buffers[dy]) : nullptr;
            }
            std::fill_n(place.data(), n, int32_t(3 * (y == 0)));
            if (first == 0) std::fill_n(place.data(), lanes, int32_t(3 * (y == 0) + 1));
            for (int64_t window = 0; window < windows; ++window) {
                const S* candidates[9];
                for (int64_t k = 0; k < 9; ++k) {
                    const int64_t column = 2 * (first + window) + k % 3 - 1;
                    const bool within = in[k / 3] && column >= 0 && column < f.width;
                    candidates[k] = within ? in[k / 3] + (column - from) * lanes : padding.data();
                }
                largest(lanes, candidates, &best[window * lanes], &place[window * lanes]);
            }
            write(n, best.data(), place.data(), out + at, places ? places + at : nullptr);
        }
    });
}

// Columns innermost: several rows of windows are computed together. Each candidate is read from a copy of the rows that holds
// only every second column.
template <class X, class S> void max_pool_columns(const Planes& f, const X* x, X* out, uint8_t* places) {
    const int64_t rows = f.rows_out(), wide = f.width_out(), planes = f.count * f.channels;
    const int64_t together = std::min(rows, std::max<int64_t>(1, POOLED / wide)), pieces = (rows + together - 1) / together;
    parallel(f.threads, [&](int thread, int threads) {
        const int64_t size = together * wide;
        Buffer<S> left(2 * size + wide), middle(2 * size + wide), right(2 * size + wide), best(size);
        Buffer<int32_t> place(size);
        for (int64_t piece = planes * pieces * thread / threads; piece < planes * pieces * (thread + 1) / threads; ++piece) {
            const int64_t plane = piece / pieces, first = piece % pieces * together, count = std::min(together, rows - first);
            // First the odd input rows, including the one above, then the even ones.
            const auto spread = [&](int64_t y, int64_t to) {
                S *l = &left[to], *m = &middle[to], *r = &right[to];
                if (y < 0 || y >= f.height) {
                    for (S* row : {l, m, r}) std::fill_n(row, wide, -std::numeric_limits<S>::infinity());
                    return;
                }
                const X* in = x + (plane * f.height + y) * f.width;
                const int64_t pairs = f.width / 2;
                SIMD for (int64_t i = 0; i < pairs; ++i) {
                    m[i] = load(in[2 * i]);
                    r[i] = load(in[2 * i + 1]);
                }
                if (pairs < wide) m[pairs] = load(in[2 * pairs]), r[pairs] = -std::numeric_limits<S>::infinity();
                l[0] = -std::numeric_limits<S>::infinity();
                std::copy_n(r, wide - 1, l + 1);
            };
            const int64_t even = (count + 1) * wide;
            for (int64_t row = 0; row <= count; ++row) spread(2 * (first + row) - 1, row * wide);
            for (int64_t row = 0; row < count; ++row) spread(2 * (first + row), even + row * wide);
            for (int64_t row = 0; row < count; ++row) {
                std::fill_n(&place[row * wide], wide, int32_t(3 * (first + row == 0)));
                ++place[row * wide];
            }
            const S* candidates[9];
            for (int64_t k = 0; k < 9; ++k) {
                const Buffer<S>& of = k % 3 == 0 ? left : k % 3 == 1 ? middle : right;
                candidates[k] = of.data() + (k / 3 == 0 ? 0 : k / 3 == 1 ? even : wide);
            }
            const int64_t at = (plane * rows + first) * wide;
            largest(count * wide, candidates, best.data(), place.data());
            write(count * wide, best.data(), place.data(), out + at, places ? places + at : nullptr);
        }
    });
}

template <class X, class S> void max_pool(const Planes& f, const X* x, X* out, uint8_t* places) {
    if (f.channels_last) max_pool_channels<X, S>(f, x, out, places); else max_pool_columns<X, S>(f, x, out, places);
}

// The gradient that n windows give to four inputs each: in the upper row their center and the input to its right, in the lower
// row the two below these. The two of a row are stored side by side, or all right ones behind all left ones. No place is in the
// padding, so no window gives to an input that does not exist.
template <bool SideBySide, class S, class X>
void give_back(int64_t n, const X* grad, const uint8_t* places, int64_t right, int64_t below, X* upper, X* lower) {
    const int64_t stride = SideBySide ? 2 : 1, beside = SideBySide ? 1 : n;
    SIMD for (int64_t i = 0; i < n; ++i) {
        const auto of = [&](int64_t at, int32_t place) { return places[i + at] == place ? S(load(grad[i + at])) : S(0); };
        store(of(0, 4), upper[stride * i]);
        store(S(of(0, 5) + of(right, 3)), upper[stride * i + beside]);
        store(S(of(0, 7) + of(below, 1)), lower[stride * i]);
        store(S(of(0, 8) + of(right, 6) + of(below, 2) + of(below + right, 0)), lower[stride * i + beside]);
    }
}

template <class X, class S> void max_pool_backward(const Planes& f, const X* grad, const uint8_t* places, X* grad_x) {
    const int64_t rows = f.rows_out(), wide = f.width_out(), lanes = f.channels_last ? f.channels : 1;
    const int64_t windows = f.count * f.channels / lanes * rows * wide, together = std::max<int64_t>(1, POOLED / lanes);
    const int64_t right = lanes, below = wide * lanes, blocks = (windows + together - 1) / together;
    parallel(f.threads, [&](int thread, int threads) {
        Buffer<X> pairs[2], last_grad;  // two rows of inputs
        for (Buffer<X>& pair : pairs) pair.resize(2 * together * lanes);
        Buffer<uint8_t> last_places;
        for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block) {
            const int64_t start = block * together, count = std::min(together, windows - start), n = count * lanes;
            const X* g = grad + start * lanes;
            const uint8_t* p = places + start * lanes;
            const int64_t read = n + below + right, left = (windows - start) * lanes;
            if (read > left) {  // nothing may be read behind the last window
                last_grad.assign(g, g + left), last_grad.resize(read);
                last_places.assign(p, p + left), last_places.resize(read, NOWHERE);
                g = last_grad.data(), p = last_places.data();
            }
            if (f.channels_last) give_back<false, S>(n, g, p, right, below, &pairs[0][0], &pairs[1][0]);
            else give_back<true, S>(n, g, p, right, below, &pairs[0][0], &pairs[1][0]);
            for (int64_t i = 0, whole; i < count; i += whole) {
                const int64_t row = (start + i) / wide, column = (start + i) % wide * 2, y = row % rows * 2;
                whole = f.channels_last ? 1 : std::min(count - i, wide - column / 2);
                const int64_t columns = std::min(2 * whole, f.width - column);
                for (int64_t dy = 0; dy < 2 && y + dy < f.height; ++dy) {
                    X* to = grad_x + ((row / rows * f.height + y + dy) * f.width + column) * lanes;
                    if (!f.channels_last) std::memcpy(to, &pairs[dy][2 * i], columns * sizeof(X));
                    else
                        for (int64_t dx = 0; dx < columns; ++dx)
                            std::memcpy(to + dx * lanes, &pairs[dy][dx * n + i * lanes], lanes * sizeof(X));
                }
            }
        }
    });
}

}  // namespace
