// The gradient of a depthwise convolution's weights: K x K taps, stride 1, padding K / 2. Libraries have fast kernels for 3 x 3.

#pragma once

#include "pool.h"

namespace {

constexpr int64_t PARTS = 32;  // at most; into so many sums of images is a channel's gradient split, whatever the threads

// Frames with their channels innermost; `weights` [channels, K, K]. A vector's channels are computed together: of the frame K rows
// are kept with a border of zeros, and the gradient's row is multiplied by each of them. Sums are in double from image to image.
template <int K, class X, class S> void depthwise_weights(const Planes& f, const X* x, const X* grad, S* weights) {
    constexpr int64_t LANES = 64 / sizeof(S), P = K / 2;
    typedef S Vector __attribute__((vector_size(64), may_alias));
    const int64_t blocks = (f.channels + LANES - 1) / LANES, parts = std::min(f.count, PARTS);
    const int64_t row = f.width * f.channels, wide = f.width + 2 * P;
    Buffer<double> sums(blocks * parts * K * K * LANES, 0.0);
    parallel(f.threads, [&](int thread, int threads) {
        Buffer<S> rows(K * wide * LANES, S(0)), given(f.width * LANES, S(0));
        for (int64_t job = blocks * parts * thread / threads; job < blocks * parts * (thread + 1) / threads; ++job) {
            const int64_t channel = job / parts * LANES, part = job % parts, lanes = std::min(LANES, f.channels - channel);
            double* sum = &sums[job * K * K * LANES];
            if (lanes < LANES) std::fill(rows.begin(), rows.end(), S(0)), std::fill(given.begin(), given.end(), S(0));
            const auto fetch = [&](const X* from, S* to) {
                for (int64_t i = 0; i < f.width; ++i)
                    for (int64_t l = 0; l < lanes; ++l) to[i * LANES + l] = load(from[i * f.channels + l]);
            };
            const auto kept = [&](int64_t y) { return &rows[y % K * wide * LANES]; };
            for (int64_t image = f.count * part / parts; image < f.count * (part + 1) / parts; ++image) {
                const int64_t start = image * f.height * row + channel;
                Vector taps[K][K] = {};
                for (int64_t y = 0; y < std::min(P, f.height); ++y) fetch(x + start + y * row, kept(y) + P * LANES);
                for (int64_t y = 0; y < f.height; ++y) {
                    if (y + P < f.height) fetch(x + start + (y + P) * row, kept(y + P) + P * LANES);
                    fetch(grad + start + y * row, given.data());
                    const Vector* of = (const Vector*)given.data();
                    for (int64_t dy = std::max<int64_t>(0, P - y); dy < std::min<int64_t>(K, f.height + P - y); ++dy) {
                        const Vector* in = (const Vector*)kept(y + dy - P);
                        Vector along[K];
                        for (int dx = 0; dx < K; ++dx) along[dx] = taps[dy][dx];
                        for (int64_t i = 0; i < f.width; ++i)
                            for (int dx = 0; dx < K; ++dx) along[dx] += of[i] * in[i + dx];
                        for (int dx = 0; dx < K; ++dx) taps[dy][dx] = along[dx];
                    }
                }
                const S* found = (const S*)taps;
                for (int64_t i = 0; i < K * K * LANES; ++i) sum[i] += found[i];
            }
        }
    });
    for (int64_t c = 0; c < f.channels; ++c)
        for (int64_t tap = 0; tap < K * K; ++tap) {
            double total = 0;
            for (int64_t part = 0; part < parts; ++part)
                total += sums[((c / LANES * parts + part) * K * K + tap) * LANES + c % LANES];
            weights[c * K * K + tap] = S(total);
        }
}

template <class X, class S> void depthwise_weights(const Planes& f, int64_t taps, const X* x, const X* grad, S* weights) {
    if (taps == 5) depthwise_weights<5>(f, x, grad, weights); else depthwise_weights<7>(f, x, grad, weights);
}

}  // namespace
