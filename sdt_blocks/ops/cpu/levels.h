// Integer neurons: they round the input to whole numbers within a window, and pass the gradient inside it.

#pragma once

#include "blocks.h"

namespace {

// The same fields in the same order as in bindings.py.
struct Levels { double levels, norm, threshold; int64_t up; };

// Whether division by the number can be replaced by multiplication with its inverse, bit for bit: true of powers of two.
inline bool has_inverse(double number) {
    int exponent;
    return std::frexp(number, &exponent) == 0.5 && std::abs(exponent) < 120;
}

// EXACT: both divisors have an exact inverse.
template <bool UP, bool EXACT, class S> struct Window {
    S limit, norm, threshold;

    explicit Window(const Levels& neuron, S upper)
        : limit(upper), norm(S(EXACT ? 1 / neuron.norm : neuron.norm)),
          threshold(S(EXACT ? 1 / neuron.threshold : neuron.threshold)) {}
    static S divided(S v, S by) { return EXACT ? v * by : v / by; }
    // v >= 0 rounded to the nearest whole number, halves to even.
    static S nearest(S v) {
        const S big = std::is_same_v<S, float> ? S(8388608.0) : S(4503599627370496.0);  // from here on all numbers are whole
        return v < big ? (v + big) - big : v;
    }
    // v = x / threshold. The comparisons are written so that NaN stays NaN.
    bool inside(S v) const { return UP ? (v > 0) & (v < limit) : (v >= 0) & (v <= limit); }
    S raised(S v) const {
        const S clamped = v < 0 ? S(0) : v > limit ? limit : v;
        return UP ? clamped + S(0.5) : clamped;
    }
    S whole(S raised) const {
        const S near = nearest(raised);
        return UP && near > raised ? near - 1 : near;
    }
    S value(S x) const { return divided(whole(raised(divided(x, threshold))), norm); }
    bool passes(S x) const { return inside(divided(x, threshold)); }
    // Masked by a product, so that a gradient that is not finite still shows.
    S gradient(S grad, bool passes) const { return divided(divided(grad, norm) * (passes ? S(1) : S(0)), threshold); }
};

// A part of a tensor of type X, in the type S that is computed in; each equation is a pass over it, and rounds to X.
template <class X, class S> struct Part {
    S v[BYTES];
    X stored[BYTES];

    void load_from(const X* x, int64_t n) { SIMD for (int64_t i = 0; i < n; ++i) v[i] = load(x[i]); }
    void store_to(X* x, int64_t n) { SIMD for (int64_t i = 0; i < n; ++i) store(v[i], x[i]); }
    void round(int64_t n) {
        if constexpr (!std::is_same_v<X, S>) store_to(stored, n), load_from(stored, n);
    }
    template <class F> void each(int64_t n, F f) { SIMD for (int64_t i = 0; i < n; ++i) v[i] = f(v[i]); }
};

template <bool UP, bool EXACT, class X, class S>
void levels(const Levels& neuron, const X* x, int64_t count, int64_t threads, X* values, uint8_t* inside) {
    X limit;
    store(S(neuron.levels), limit);
    const Window<UP, EXACT, S> window(neuron, load(limit));
    in_bytes(count, threads, [&](int64_t start, int64_t n, uint8_t* passes) {
        Part<X, S> part;
        part.load_from(x + start, n);
        if (neuron.threshold != 1) part.each(n, [window](S v) { return window.divided(v, window.threshold); }), part.round(n);
        if (inside) {
            SIMD for (int64_t i = 0; i < n; ++i) passes[i] = window.inside(part.v[i]);
            to_bits(passes, n, inside + start / 8);
        }
        part.each(n, [window](S v) { return window.raised(v); });
        if (UP) part.round(n);
        part.each(n, [window](S v) { return window.divided(window.whole(v), window.norm); });
        part.store_to(values + start, n);
    });
}

template <bool UP, bool EXACT, class X, class S>
void levels_backward(const Levels& neuron, const X* grad, const uint8_t* inside, int64_t count, int64_t threads, X* grad_x) {
    const Window<UP, EXACT, S> window(neuron, S(neuron.levels));
    in_bytes(count, threads, [&](int64_t start, int64_t n, uint8_t* passes) {
        Part<X, S> part;
        from_bits(inside + start / 8, n, passes);
        part.load_from(grad + start, n);
        part.each(n, [window](S v) { return window.divided(v, window.norm); });
        part.round(n);
        SIMD for (int64_t i = 0; i < n; ++i) part.v[i] *= S(passes[i]);
        if (neuron.threshold != 1) part.each(n, [window](S v) { return window.divided(v, window.threshold); });
        part.store_to(grad_x + start, n);
    });
}

// Scale and shift of a normalization, with the rounding of PyTorch, which uses a fused multiply-add.
template <class S> struct Normalization {
    const S* scale;
    Buffer<S> shift;

    Normalization(int64_t channels, const S* of_scale, const S* mean, const S* bias) : scale(of_scale), shift(channels) {
        for (int64_t c = 0; c < channels; ++c) shift[c] = multiply_add(-mean[c], scale[c], bias ? bias[c] : S(0));
    }
};

template <bool UP, bool EXACT, class X, class S>
void norm_levels(const Layout& l, const Levels& neuron, const X* x, const S* scale, const S* mean, const S* bias, X* values) {
    const Blocks blocks(l);
    const Window<UP, EXACT, S> window(neuron, S(neuron.levels));
    const Normalization<S> norm(l.channels, scale, mean, bias);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> scales(blocks, scale, l.channels, S(1)), shifts(blocks, norm.shift.data(), l.channels, S(0));
        Buffer<S> wide(blocks.width), found(blocks.width);
        blocks.share(thread, threads, [&](const Block& b) {
            const int64_t n = b.length;
            const S *block_scale = scales(b), *block_shift = shifts(b);
            for (int64_t t = 0; t < l.steps; ++t) {
                const X* in = x + t * l.x_step + b.x_start;
                X* out = values + t * l.size + b.start;
                prefetch<0>(in + AHEAD * n, n);
                const S* x_t = widen(n, in, wide);
                S* to = target(out, found);
                SIMD for (int64_t i = 0; i < n; ++i)
                    to[i] = window.value(multiply_add(x_t[i], block_scale[i], block_shift[i]));
                narrow(n, found, out);
            }
        });
    });
}

// sums: [3, channels]; the first row is 0, the other two are for the shift and for the scale around the mean.
template <bool UP, bool EXACT, class X, class S>
void norm_levels_backward(const Layout& l, const Levels& neuron, const X* grad, int64_t grad_step, const X* x, const S* scale,
                          const S* mean, const S* bias, X* grad_x, double* sums) {
    const Blocks blocks(l);
    const Window<UP, EXACT, S> window(neuron, S(neuron.levels));
    const Normalization<S> norm(l.channels, scale, mean, bias);
    std::vector<double> all(std::max<int64_t>(1, l.threads) * 2 * l.channels, 0.0);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> scales(blocks, scale, l.channels, S(1)), shifts(blocks, norm.shift.data(), l.channels, S(0));
        PerNeuron<S> means(blocks, mean, l.channels, S(0));
        PerChannel<S> of_shift(blocks), of_scale(blocks);
        Buffer<S> wide(blocks.width), wide_grad(blocks.width), found(blocks.width);
        blocks.share(thread, threads, [&](const Block& b) {
            const int64_t n = b.length;
            const S *block_scale = scales(b), *block_shift = shifts(b), *block_mean = means(b);
            for (int64_t t = 0; t < l.steps; ++t) {
                const X *in = x + t * l.x_step + b.x_start, *of_values = grad + t * grad_step + b.start;
                X* out = grad_x + t * l.size + b.start;
                prefetch<0>(in + AHEAD * n, n);
                prefetch<0>(of_values + AHEAD * n, n);
                const S *x_t = widen(n, in, wide), *of = widen(n, of_values, wide_grad);
                S* to = target(out, found);
                SIMD for (int64_t i = 0; i < n; ++i) {
                    const bool passes = window.passes(multiply_add(x_t[i], block_scale[i], block_shift[i]));
                    const S of_y = window.gradient(of[i], passes);
                    of_shift.block_sum[i] += of_y;
                    of_scale.block_sum[i] += of_y * (x_t[i] - block_mean[i]);
                    to[i] = of_y;
                }
                narrow(n, found, out);
            }
            of_shift.flush(b), of_scale.flush(b);
        });
        double* own = all.data() + thread * 2 * l.channels;
        of_shift.add_to(own), of_scale.add_to(own + l.channels);
    });
    std::fill(sums, sums + 3 * l.channels, 0.0);
    for (size_t i = 0; i < all.size(); ++i) sums[l.channels + i % (2 * l.channels)] += all[i];
}

// Calls f with two compile-time constants: the rounding, and whether both divisors have an exact inverse.
template <class F> void with_rounding(const Levels& neuron, F f) {
    with_flags(f, neuron.up != 0, has_inverse(neuron.norm) && has_inverse(neuron.threshold));
}

}  // namespace
