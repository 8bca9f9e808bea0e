// The training kernels for CPUs, built once per machine by build.py and called through ctypes by bindings.py.
//
// Every kernel runs all time steps of a block of neurons before the next block. Blocks stay in the first-level cache: an input
// is read once and a spike written once, whatever T. The state is float32 (float64 for float64 input). The build disables
// contraction into fused multiply-adds, so the membrane is rounded as in the reference and the spikes match it bit for bit.

#include <atomic>

#include "attention.h"
#include "blocks.h"
#include "depthwise.h"
#include "levels.h"
#include "pool.h"

namespace {

template <class X, class S>
void forward(const Layout& l, const Neuron& neuron, const X* x, const S* scale, const S* shift, const S* inv_tau,
             int64_t time_constants, const S* membrane, X* spikes, S* last) {
    const Blocks blocks(l);
    const Dynamics<S> dynamics(neuron);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> scales(blocks, scale, l.channels, S(1)), shifts(blocks, shift, l.channels, S(0));
        PerNeuron<S> time(blocks, inv_tau, time_constants, S(neuron.inv_tau));
        Buffer<S> wide(blocks.width), h(blocks.width), fired(blocks.width);
        blocks.share(thread, threads, [&](const Block& b) {
            const int64_t n = b.length;
            const S *block_scale = scales(b), *block_shift = shifts(b), *block_time = time(b), *x_t = nullptr;
            if (membrane) std::copy_n(membrane + b.start, n, h.data());
            else std::fill_n(h.data(), n, S(0));
            for (int64_t t = 0; t < l.steps; ++t) {
                if (t == 0 || !l.repeat) x_t = widen(n, x + t * l.x_step + b.x_start, wide);
                X* out = spikes + t * l.size + b.start;
                if (!l.repeat) prefetch<0>(x + t * l.x_step + b.x_start + AHEAD * n, n);
                prefetch<1>(out + AHEAD * n, n);
                with_flags([&](auto affine) {
                    advance<affine, true>(dynamics, n, x_t, block_scale, block_shift, block_time, h.data(), h.data(),
                                          target(out, fired));
                }, scale != nullptr);
                narrow(n, fired, out);
            }
            if (last) std::copy_n(h.data(), n, last + b.start);
        });
    });
}

// sums: [3, channels], for 1 / tau, for the shift, and for the scale around `center`.
template <class X, class S>
void backward(const Layout& l, const Neuron& neuron, const Upstream<X, S>& upstream, const S* grad_last, const X* x,
              const S* scale, const S* shift, const S* center, const S* inv_tau, int64_t time_constants, const S* membrane,
              X* grad_x, S* grad_membrane, double* sums) {
    const Blocks blocks(l);
    const Dynamics<S> dynamics(neuron);
    std::vector<double> all(std::max<int64_t>(1, l.threads) * 3 * l.channels, 0.0);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> scales(blocks, scale, l.channels, S(1)), shifts(blocks, shift, l.channels, S(0));
        PerNeuron<S> centers(blocks, center, l.channels, S(0)), time(blocks, inv_tau, time_constants, S(neuron.inv_tau));
        PerChannel<S> of_time(blocks), of_shift(blocks), of_scale(blocks);
        const int64_t w = blocks.width;
        Buffer<S> trace((l.steps + 1) * w), carry(w), fired(w), wide(w), wide_grad(w), of_y(w), total(w);
        blocks.share(thread, threads, [&](const Block& b) {
            const int64_t n = b.length;
            const S *block_scale = scales(b), *block_shift = shifts(b), *block_center = centers(b), *block_time = time(b);
            const S* x_t = nullptr;
            S* h = trace.data();
            if (membrane) std::copy_n(membrane + b.start, n, h);
            else std::fill_n(h, n, S(0));
            for (int64_t t = 0; t < l.steps; ++t, h += w) {
                if (!l.repeat) prefetch<0>(x + t * l.x_step + b.x_start + AHEAD * n, n);
                if (upstream.grad) prefetch<0>(upstream.grad + t * upstream.step + b.start + AHEAD * n, n);
                if (t == 0 || !l.repeat) x_t = widen(n, x + t * l.x_step + b.x_start, wide);
                with_flags([&](auto affine) {
                    advance<affine, false>(dynamics, n, x_t, block_scale, block_shift, block_time, h, h + w, (S*)nullptr);
                }, scale != nullptr);
            }
            if (grad_last) std::copy_n(grad_last + b.start, n, carry.data());
            else std::fill_n(carry.data(), n, S(0));
            std::fill_n(fired.data(), n, S(0));
            for (int64_t t = l.steps - 1; t >= 0; --t, h -= w) {
                if (!l.repeat) prefetch<1>(grad_x + t * l.size + b.start + AHEAD * n, n);
                if (!l.repeat) x_t = widen(n, x + t * l.x_step + b.x_start, wide);
                const S* of_spikes = upstream(blocks, b, t, wide_grad);
                X* out = grad_x + t * l.size + b.start;
                S* of_input = l.repeat ? of_y.data() : target(out, of_y);
                with_surrogate(neuron.surrogate, [&](auto surrogate) {
                    with_flags([&](auto sum, auto follows) {
                        retreat<surrogate, sum, follows>(dynamics, n, x_t, block_scale, block_shift, block_time, h - w, h,
                                                         of_spikes, carry.data(), fired.data(), of_input,
                                                         of_time.block_sum.data());
                    }, inv_tau != nullptr, dynamics.follows);
                });
                if (center)
                    SIMD for (int64_t i = 0; i < n; ++i) {
                        of_shift.block_sum[i] += of_input[i];
                        of_scale.block_sum[i] += of_input[i] * (x_t[i] - block_center[i]);
                    }
                if (!l.repeat) narrow(n, of_y, out);
                else
                    SIMD for (int64_t i = 0; i < n; ++i) total[i] = (t == l.steps - 1 ? S(0) : total[i]) + of_y[i];
            }
            if (l.repeat)
                SIMD for (int64_t i = 0; i < n; ++i) store(total[i], grad_x[b.start + i]);
            if (grad_membrane) {
                with_surrogate(neuron.surrogate, [&](auto surrogate) {
                    SIMD for (int64_t i = 0; i < n; ++i)
                        grad_membrane[b.start + i] = carry[i] + fired[i] * slope<surrogate>(dynamics, h[i]);
                });
            }
            if (inv_tau) of_time.flush(b);
            if (center) of_shift.flush(b), of_scale.flush(b);
        });
        double* own = all.data() + thread * 3 * l.channels;
        of_time.add_to(own), of_shift.add_to(own + l.channels), of_scale.add_to(own + 2 * l.channels);
    });
    std::fill(sums, sums + 3 * l.channels, 0.0);
    for (size_t i = 0; i < all.size(); ++i) sums[i % (3 * l.channels)] += all[i];
}

// ---- batch normalization

// Mean and biased variance of every channel, summed around its first value so that a large mean costs no precision.
template <class X, class S> void statistics(const Layout& l, const X* x, double* mean, double* variance) {
    const Blocks blocks(l);
    Buffer<S> first(l.channels);
    for (int64_t c = 0; c < l.channels; ++c) {
        const int64_t i = c * l.inner;
        first[c] = load(x[i / l.chunk * l.chunk_stride + i % l.chunk]);
    }
    std::vector<double> all(std::max<int64_t>(1, l.threads) * 2 * l.channels, 0.0);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> firsts(blocks, first.data(), l.channels, S(0));
        PerChannel<S> sum(blocks), squares(blocks);
        blocks.share(thread, threads, [&](const Block& b) {
            const S* origin = firsts(b);
            for (int64_t t = 0; t < l.steps; ++t) {
                const X* x_t = x + t * l.x_step + b.x_start;
                prefetch<0>(x_t + AHEAD * b.length, b.length);
                SIMD for (int64_t i = 0; i < b.length; ++i) {
                    S d = load(x_t[i]) - origin[i];
                    sum.block_sum[i] += d;
                    squares.block_sum[i] += d * d;
                }
            }
            sum.flush(b), squares.flush(b);
        });
        sum.add_to(&all[thread * 2 * l.channels]), squares.add_to(&all[(thread * 2 + 1) * l.channels]);
    });
    const double count = double(l.steps) * double(l.size / l.channels);
    for (int64_t c = 0; c < l.channels; ++c) {
        double s = 0, q = 0;
        for (int64_t k = 0; k < std::max<int64_t>(1, l.threads); ++k)
            s += all[2 * k * l.channels + c], q += all[(2 * k + 1) * l.channels + c];
        mean[c] = first[c] + s / count;
        variance[c] = std::max(q / count - (s / count) * (s / count), 0.0);  // in this order NaN stays NaN
    }
}

// gradient = a * gradient + b * x + d for each channel, in place: the last step of a normalization's gradient.
template <class X, class S>
void combine(const Layout& l, X* gradient, const X* x, const S* a, const S* b, const S* d) {
    const Blocks blocks(l);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> as(blocks, a, l.channels, S(0)), bs(blocks, b, l.channels, S(0)), ds(blocks, d, l.channels, S(0));
        blocks.share(thread, threads, [&](const Block& block) {
            const S *a_i = as(block), *b_i = bs(block), *d_i = ds(block);
            for (int64_t t = 0; t < l.steps; ++t) {
                X* out = gradient + t * l.size + block.start;
                const X* x_t = x + t * l.x_step + block.x_start;
                SIMD for (int64_t i = 0; i < block.length; ++i)
                    store(S(a_i[i] * load(out[i]) + (b_i[i] * load(x_t[i]) + d_i[i])), out[i]);
            }
        });
    });
}

// ---- spikes as bits

// Packs one bit for each of `count` values; returns false if a value is neither 0 nor 1.
template <class X> bool pack(const X* x, int64_t count, int64_t threads, uint8_t* bits) {
    std::atomic<bool> binary(true);
    in_bytes(count, threads, [&](int64_t start, int64_t n, uint8_t* fired) {
        const X* in = x + start;
        uint8_t others[BYTES] = {}, other = 0;
        SIMD for (int64_t i = 0; i < n; ++i) {
            auto v = load(in[i]);
            fired[i] = v != 0;
            others[i] = v != 0 && v != 1;
        }
        for (int64_t i = 0; i < BYTES; ++i) other |= others[i];
        if (other) binary = false;
        to_bits(fired, n, bits + start / 8);
    });
    return binary;
}

template <class X> void unpack(const uint8_t* bits, int64_t count, int64_t threads, X* x) {
    in_bytes(count, threads, [&](int64_t start, int64_t n, uint8_t* fired) {
        from_bits(bits + start / 8, n, fired);
        SIMD for (int64_t i = 0; i < n; ++i) store(typename State<X>::type(fired[i]), x[start + i]);
    });
}

}  // namespace

// Runs `call` with X, the type in memory, and S, that of the state, for a dtype as numbered in training.py.
#define WITH(x, s, call) { using X = x; using S [[maybe_unused]] = s; call; return 0; }
#ifdef __FLT16_MANT_DIG__
#define FOR_FLOAT16(call) case 3: WITH(float16, float, call)
#else
#define FOR_FLOAT16(call)
#endif
#define FOR_DTYPE(dtype, call)               \
    switch (dtype) {                         \
    case 0: WITH(float, float, call)         \
    case 1: WITH(double, double, call)       \
    case 2: WITH(bfloat16, float, call)      \
    FOR_FLOAT16(call)                        \
    default: return -1;                      \
    }

extern "C" {

int64_t lif_forward(int64_t dtype, const Layout* l, const Neuron* n, const void* x, const void* scale, const void* shift,
                const void* inv_tau, int64_t time_constants, const void* membrane, void* spikes, void* last) {
    FOR_DTYPE(dtype, (forward(*l, *n, (const X*)x, (const S*)scale, (const S*)shift, (const S*)inv_tau, time_constants,
                              (const S*)membrane, (X*)spikes, (S*)last)))
}

int64_t lif_backward(int64_t dtype, const Layout* l, const Neuron* n, const void* grad, int64_t grad_step, const void* mask,
                 const uint8_t* codes, int64_t images, int64_t bit, const void* grad_last, const void* x, const void* scale,
                 const void* shift, const void* center, const void* inv_tau, int64_t time_constants, const void* membrane,
                 void* grad_x, void* grad_membrane, double* sums) {
    FOR_DTYPE(dtype, (backward(*l, *n, Upstream<X, S>{(const X*)grad, grad_step, (const S*)mask, codes, images, bit},
                               (const S*)grad_last, (const X*)x, (const S*)scale, (const S*)shift, (const S*)center,
                               (const S*)inv_tau, time_constants, (const S*)membrane, (X*)grad_x, (S*)grad_membrane, sums)))
}

int64_t levels(int64_t dtype, const Levels* neuron, const void* x, int64_t count, int64_t threads, void* values,
               uint8_t* inside) {
    FOR_DTYPE(dtype, with_rounding(*neuron, [&](auto up, auto exact) {
        levels<up, exact, X, S>(*neuron, (const X*)x, count, threads, (X*)values, inside);
    }))
}

int64_t levels_backward(int64_t dtype, const Levels* neuron, const void* grad, const uint8_t* inside, int64_t count,
                        int64_t threads, void* grad_x) {
    FOR_DTYPE(dtype, with_rounding(*neuron, [&](auto up, auto exact) {
        levels_backward<up, exact, X, S>(*neuron, (const X*)grad, inside, count, threads, (X*)grad_x);
    }))
}

int64_t norm_levels(int64_t dtype, const Layout* l, const Levels* neuron, const void* x, const void* scale, const void* mean,
                    const void* bias, void* values) {
    FOR_DTYPE(dtype, with_rounding(*neuron, [&](auto up, auto exact) {
        norm_levels<up, exact, X, S>(*l, *neuron, (const X*)x, (const S*)scale, (const S*)mean, (const S*)bias, (X*)values);
    }))
}

int64_t norm_levels_backward(int64_t dtype, const Layout* l, const Levels* neuron, const void* grad, int64_t grad_step,
                             const void* x, const void* scale, const void* mean, const void* bias, void* grad_x, double* sums) {
    FOR_DTYPE(dtype, with_rounding(*neuron, [&](auto up, auto exact) {
        norm_levels_backward<up, exact, X, S>(*l, *neuron, (const X*)grad, grad_step, (const X*)x, (const S*)scale,
                                              (const S*)mean, (const S*)bias, (X*)grad_x, sums);
    }))
}

int64_t attend(int64_t dtype, const Layout* l, int64_t images, const Neuron* n, const void* q, const void* k, const void* v,
           const void* scale, const void* shift, const void* inv_tau, void* out, uint8_t* codes, void* sums) {
    FOR_DTYPE(dtype, (attend(*l, images, n, (const X*)q, (const X*)k, (const X*)v, (const S*)scale, (const S*)shift,
                             (const S*)inv_tau, (X*)out, codes, (S*)sums)))
}

int64_t mask_gradient(int64_t dtype, const Layout* l, int64_t images, const void* grad, int64_t grad_step, const uint8_t* codes,
                  void* result) {
    FOR_DTYPE(dtype, (mask_gradient(*l, images, (const X*)grad, grad_step, codes, (S*)result)))
}

int64_t channel_statistics(int64_t dtype, const Layout* l, const void* x, double* mean, double* variance) {
    FOR_DTYPE(dtype, (statistics<X, S>(*l, (const X*)x, mean, variance)))
}

int64_t channel_combine(int64_t dtype, const Layout* l, void* gradient, const void* x, const void* a, const void* b, const void* d) {
    FOR_DTYPE(dtype, (combine(*l, (X*)gradient, (const X*)x, (const S*)a, (const S*)b, (const S*)d)))
}

int64_t max_pool(int64_t dtype, const Planes* planes, const void* x, void* out, uint8_t* places) {
    FOR_DTYPE(dtype, (max_pool<X, S>(*planes, (const X*)x, (X*)out, places)))
}

int64_t max_pool_backward(int64_t dtype, const Planes* planes, const void* grad, const uint8_t* places, void* grad_x) {
    FOR_DTYPE(dtype, (max_pool_backward<X, S>(*planes, (const X*)grad, places, (X*)grad_x)))
}

int64_t depthwise_weights(int64_t dtype, const Planes* planes, int64_t taps, const void* x, const void* grad, void* weights) {
    FOR_DTYPE(dtype, depthwise_weights(*planes, taps, (const X*)x, (const X*)grad, (S*)weights))
}

// Sets `binary` to 1 if every value was 0 or 1, else to 0.
int64_t pack_bits(int64_t dtype, const void* x, int64_t count, int64_t threads, uint8_t* bits, int* binary) {
    FOR_DTYPE(dtype, *binary = pack((const X*)x, count, threads, bits))
}

int64_t unpack_bits(int64_t dtype, const uint8_t* bits, int64_t count, int64_t threads, void* x) {
    FOR_DTYPE(dtype, unpack(bits, count, threads, (X*)x))
}
}
