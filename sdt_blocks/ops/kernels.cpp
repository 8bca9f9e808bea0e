// The CPU kernels, built once on a machine by cpu_build.py and called through ctypes by cpu.py.
//
// Every kernel walks the neurons of a frame in blocks that stay in the first-level cache and runs all time steps of a block
// before the next: an input is read once and a spike written once, whatever T. The state is float32 (float64 for float64
// input). Contraction into fused multiply-adds is switched off when building, so that the membrane takes the same roundings as
// the reference's and the spikes are the same bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

// Each pass of such a loop is on its own, though arrays may be the same.
#define SIMD _Pragma("omp simd")

namespace {

// ---- storage types: half precision as its bits, converted on the way in and out

struct bfloat16 { uint16_t bits; };
#ifdef __FLT16_MANT_DIG__
using float16 = _Float16;
#endif

template <class T> struct State { using type = float; };
template <> struct State<double> { using type = double; };

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(uint8_t v) { return v; }
inline float load(bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline void store(float v, float& out) { out = v; }
inline void store(double v, double& out) { out = v; }
template <class S> inline void store(S v, uint8_t& out) { out = uint8_t(v); }
inline void store(float v, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t(v == v ? rounded : 0x7fc0);
}
#ifdef __FLT16_MANT_DIG__
inline float load(float16 v) { return float(v); }
inline void store(float v, float16& out) { out = float16(v); }
#endif

// x itself where it is of the state's type, else converted into the buffer.
template <class X, class S> const S* widen(int64_t n, const X* x, std::vector<S>& buffer) {
    if constexpr (std::is_same_v<X, S>) {
        return x;
    } else {
        S* out = buffer.data();
        SIMD for (int64_t i = 0; i < n; ++i) out[i] = load(x[i]);
        return out;
    }
}
// Where to compute what belongs into out: there, or in the buffer, from where `narrow` takes it.
template <class X, class S> S* target(X* out, std::vector<S>& buffer) {
    if constexpr (std::is_same_v<X, S>) return out; else return buffer.data();
}
template <class X, class S> void narrow(int64_t n, const std::vector<S>& buffer, X* out) {
    if constexpr (!std::is_same_v<X, S>) {
        const S* in = buffer.data();
        SIMD for (int64_t i = 0; i < n; ++i) store(in[i], out[i]);
    }
}

// ---- what Python hands over; the same fields in the same order as in cpu.py

struct Layout {
    int64_t steps, size;           // time steps, neurons of a frame
    int64_t chunk, chunk_stride;   // x lies in chunks of consecutive elements, chunk_stride apart
    int64_t x_step;                // from one time step to the next in x
    int64_t repeat;                // whether x is one frame, shown at every step
    int64_t channels, inner;       // the channel of neuron i is (i / inner) % channels
    int64_t threads;
};

enum Reset { ZERO, SUBTRACT, NONE };
enum Kind { SIGMOID, ATAN, FAST_SIGMOID, TRIANGULAR, STRAIGHT_THROUGH };

struct Neuron {
    double inv_tau, threshold, alpha;
    int64_t reset, detach_reset, strict, surrogate;
};

template <class F> void parallel(int64_t threads, F body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    body(0, 1);
}

// ---- blocks of neurons

constexpr int64_t WIDTH = 128;  // neurons of a block: with all their steps they fit the first-level cache

// Neurons that lie together. `channel` is theirs where they share one, else that of the first.
struct Block { int64_t start, x_start, length, channel; };

// How channels and blocks meet: one channel for all, a channel for each block, part of the channels in a block (innermost and
// many), or all channels several times over (innermost and few).
enum Meeting { SINGLE, SHARED, PART, TILED };

struct Blocks {
    const Layout& l;
    Meeting meeting;
    int64_t width = WIDTH, run, per_run, count;

    explicit Blocks(const Layout& layout) : l(layout) {
        meeting = l.channels == 1 ? SINGLE : l.inner > 1 ? SHARED : l.channels > WIDTH ? PART : TILED;
        run = meeting == SHARED ? l.inner : meeting == PART ? l.channels : l.chunk;
        if (meeting == TILED) width = WIDTH / l.channels * l.channels;
        width = std::min(width, run);
        per_run = (run + width - 1) / width;
        count = l.size / run * per_run;
    }
    template <class F> void share(int thread, int threads, F body) const {
        int64_t id = count * thread / threads, row = id / per_run, within = id % per_run * width;
        for (const int64_t end = count * (thread + 1) / threads; id < end; ++id) {
            const int64_t start = row * run + within;
            const int64_t x_start = l.chunk == l.size ? start : start / l.chunk * l.chunk_stride + start % l.chunk;
            body({start, x_start, std::min(width, run - within),
                  meeting == SHARED ? row % l.channels : meeting == PART ? within : 0});
            within += width;
            if (within >= run) within = 0, ++row;
        }
    }
};

// A value for each neuron of a block, from one number or one for each channel.
template <class S> struct PerNeuron {
    const S* values;
    Meeting meeting;
    int64_t shown = -1;
    std::vector<S> tile;

    PerNeuron(const Blocks& b, const S* v, int64_t count, S otherwise)
        : values(v), meeting(values && count > 1 ? b.meeting : SINGLE),
          tile(std::max(b.width, meeting == PART ? count : 0), values ? values[0] : otherwise) {
        if (meeting == PART || meeting == TILED)
            for (size_t i = 0; i < tile.size(); ++i) tile[i] = values[i % count];
    }
    const S* operator()(const Block& block) {
        if (meeting == PART) return tile.data() + block.channel;
        if (meeting == SHARED && block.channel != shown) {
            shown = block.channel;
            std::fill(tile.begin(), tile.end(), values[shown]);
        }
        return tile.data();
    }
};

// Sums over neurons, one for each channel, in float64 from block to block.
template <class S> struct PerChannel {
    const Blocks& blocks;
    std::vector<S> block_sum;
    std::vector<double> sums;

    explicit PerChannel(const Blocks& b)
        : blocks(b), block_sum(b.width, S(0)), sums(std::max(b.width, b.l.channels), 0.0) {}
    void flush(const Block& block) {
        double* to = sums.data() + block.channel;
        if (blocks.meeting == SHARED)
            for (int64_t i = 0; i < block.length; ++i) *to += block_sum[i];
        else
            SIMD for (int64_t i = 0; i < block.length; ++i) to[i] += block_sum[i];
        std::fill(block_sum.begin(), block_sum.end(), S(0));
    }
    void add_to(double* totals) const {
        for (size_t i = 0; i < sums.size(); ++i) totals[i % blocks.l.channels] += sums[i];
    }
};

// Asks for memory that the next block will use, while this one is computed.
template <int Write, class X> inline void prefetch(const X* p, int64_t n) {
    for (const char *c = (const char*)p, *end = (const char*)(p + n); c < end; c += 64) __builtin_prefetch(c, Write, 2);
}

// ---- the neuron

inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// exp for -87 <= x <= 0 with a relative error of about 1e-7, in a form that compilers vectorize.
inline float exponential(float x) {
    x = x < -87.f ? -87.f : x;
    const float magic = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const float k = multiply_add(x, 1.44269504f, magic) - magic;
    const float r = multiply_add(k, 2.12194440e-4f, multiply_add(k, -0.693359375f, x));
    float p = 1.3981999e-3f;
    p = multiply_add(p, r, 8.3333333e-3f);
    p = multiply_add(p, r, 4.1666667e-2f);
    p = multiply_add(p, r, 1.6666667e-1f);
    p = multiply_add(p, r, 0.5f);
    p = multiply_add(p, r * r, r + 1.f);
    const int32_t bits = (int32_t(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}
inline double exponential(double x) { return std::exp(x); }

// The equations' constants; resets are told apart by factors, so that every loop has one form.
template <class S> struct Dynamics {
    S threshold, fires_at, to_zero, taken, alpha;
    bool follows;  // the gradient runs through the reset

    explicit Dynamics(const Neuron& neuron)
        : threshold(S(neuron.threshold)),
          fires_at(neuron.strict ? std::nextafter(threshold, std::numeric_limits<S>::infinity()) : threshold),
          to_zero(neuron.reset == ZERO ? S(1) : S(0)), taken(neuron.reset == SUBTRACT ? threshold : S(0)),
          alpha(S(neuron.alpha)), follows(!neuron.detach_reset && neuron.reset != NONE) {}
};

// h of one step from that of the step before, which may be the same array, and what fired.
template <bool Affine, bool Fire, class S>
void advance(const Dynamics<S>& d, int64_t n, const S* x, const S* scale, const S* shift, const S* inv_tau, const S* h_before,
             S* h, S* spikes) {
    const S fires_at = d.fires_at, to_zero = d.to_zero, taken = d.taken;
    SIMD for (int64_t i = 0; i < n; ++i) {
        const S y = Affine ? x[i] * scale[i] + shift[i] : x[i];
        const S r = h_before[i] >= fires_at ? S(1) : S(0);
        const S u = h_before[i] * (1 - to_zero * r);
        const S next = u + (y - u) * inv_tau[i] - r * taken;
        h[i] = next;
        if (Fire) spikes[i] = next >= fires_at ? S(1) : S(0);
    }
}

// The surrogate derivative at h.
template <int Surrogate, class S> inline S slope(const Dynamics<S>& d, S h) {
    const S a = d.alpha, shift = h - d.threshold;
    if constexpr (Surrogate == SIGMOID) {
        const S e = exponential(-a * std::abs(shift));
        return a * e / ((1 + e) * (1 + e));
    } else if constexpr (Surrogate == ATAN) {
        const S scaled = S(1.5707963267948966) * a * shift;
        return a / 2 / (1 + scaled * scaled);
    } else if constexpr (Surrogate == FAST_SIGMOID) {
        const S e = a * std::abs(shift) + 1;
        return 1 / (e * e);
    } else if constexpr (Surrogate == TRIANGULAR) {
        return a * std::max(S(0), 1 - a * std::abs(shift));
    } else {
        return S(1);
    }
}

// One step back, from the gradient of the spikes to that of the neuron's input. `carry` holds the gradient of h that comes
// from later steps and `fired` that of what fired; both are left as the step before needs them. `time` sums the gradient of
// 1 / tau.
template <int Surrogate, bool Time, bool Follows, class S>
void retreat(const Dynamics<S>& d, int64_t n, const S* x, const S* scale, const S* shift, const S* inv_tau, const S* h_before,
             const S* h, const S* of_spikes, S* carry, S* fired, S* of_y, S* time) {
    const Dynamics<S> c = d;
    SIMD for (int64_t i = 0; i < n; ++i) {
        const S of_fired = Follows ? of_spikes[i] + fired[i] : of_spikes[i];
        const S of_h = of_fired * slope<Surrogate>(c, h[i]) + carry[i];
        const S kept = 1 - c.to_zero * (h_before[i] >= c.fires_at ? S(1) : S(0));
        const S of_input = of_h * inv_tau[i];
        const S of_u = of_h - of_input;
        if (Time) time[i] += of_h * (x[i] * scale[i] + shift[i] - h_before[i] * kept);
        of_y[i] = of_input;
        carry[i] = of_u * kept;
        if (Follows) fired[i] = -(c.to_zero * of_u * h_before[i] + c.taken * of_h);
    }
}

// Calls f with the neuron's surrogate as a constant of the compiler's.
template <class F> void with_surrogate(int64_t surrogate, F f) {
    switch (surrogate) {
    case SIGMOID: return f(std::integral_constant<int, SIGMOID>());
    case ATAN: return f(std::integral_constant<int, ATAN>());
    case FAST_SIGMOID: return f(std::integral_constant<int, FAST_SIGMOID>());
    case TRIANGULAR: return f(std::integral_constant<int, TRIANGULAR>());
    default: return f(std::integral_constant<int, STRAIGHT_THROUGH>());
    }
}

// Calls f with each of the flags as a constant of the compiler's.
template <class F> void with_flags(F f) { f(); }
template <class F, class... Flags> void with_flags(F f, bool flag, Flags... flags) {
    if (flag) with_flags([&](auto... known) { f(std::true_type(), known...); }, flags...);
    else with_flags([&](auto... known) { f(std::false_type(), known...); }, flags...);
}

template <class X, class Out, class S>
void forward(const Layout& l, const Neuron& neuron, const X* x, const S* scale, const S* shift, const S* inv_tau,
             int64_t time_constants, const S* membrane, Out* spikes, S* last) {
    const Blocks blocks(l);
    const Dynamics<S> dynamics(neuron);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> scales(blocks, scale, l.channels, S(1)), shifts(blocks, shift, l.channels, S(0));
        PerNeuron<S> time(blocks, inv_tau, time_constants, S(neuron.inv_tau));
        std::vector<S> wide(blocks.width), h(blocks.width), fired(blocks.width);
        blocks.share(thread, threads, [&](const Block& b) {
            const int64_t n = b.length;
            const S *block_scale = scales(b), *block_shift = shifts(b), *block_time = time(b), *x_t = nullptr;
            if (membrane) std::copy_n(membrane + b.start, n, h.data());
            else std::fill_n(h.data(), n, S(0));
            for (int64_t t = 0; t < l.steps; ++t) {
                if (t == 0 || !l.repeat) x_t = widen(n, x + t * l.x_step + b.x_start, wide);
                Out* out = spikes + t * l.size + b.start;
                if (!l.repeat) prefetch<0>(x + t * l.x_step + b.x_start + n, n);
                prefetch<1>(out + n, n);
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

// sums: [3, channels] for 1 / tau, the shift, and the scale around `center`.
template <class X, class S>
void backward(const Layout& l, const Neuron& neuron, const X* grad, int64_t grad_step, const S* grad_last, const X* x,
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
        std::vector<S> trace((l.steps + 1) * w), carry(w), fired(w), wide(w), wide_grad(w, S(0)), of_y(w), total(w);
        blocks.share(thread, threads, [&](const Block& b) {
            const int64_t n = b.length;
            const S *block_scale = scales(b), *block_shift = shifts(b), *block_center = centers(b), *block_time = time(b);
            const S* x_t = nullptr;
            S* h = trace.data();
            if (membrane) std::copy_n(membrane + b.start, n, h);
            else std::fill_n(h, n, S(0));
            for (int64_t t = 0; t < l.steps; ++t, h += w) {
                if (!l.repeat) prefetch<0>(x + t * l.x_step + b.x_start + n, n);
                if (grad) prefetch<0>(grad + t * grad_step + b.start + n, n);
                if (t == 0 || !l.repeat) x_t = widen(n, x + t * l.x_step + b.x_start, wide);
                with_flags([&](auto affine) {
                    advance<affine, false>(dynamics, n, x_t, block_scale, block_shift, block_time, h, h + w, (S*)nullptr);
                }, scale != nullptr);
            }
            if (grad_last) std::copy_n(grad_last + b.start, n, carry.data());
            else std::fill_n(carry.data(), n, S(0));
            std::fill_n(fired.data(), n, S(0));
            for (int64_t t = l.steps - 1; t >= 0; --t, h -= w) {
                if (!l.repeat) prefetch<1>(grad_x + t * l.size + b.start + n, n);
                if (!l.repeat) x_t = widen(n, x + t * l.x_step + b.x_start, wide);
                const S* of_spikes = grad ? widen(n, grad + t * grad_step + b.start, wide_grad) : wide_grad.data();
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

// Mean and biased variance of every channel, summed around the channel's first value so that a large mean costs no precision.
template <class X, class S> void statistics(const Layout& l, const X* x, double* mean, double* variance) {
    const Blocks blocks(l);
    std::vector<S> first(l.channels);
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
                prefetch<0>(x_t + b.length, b.length);
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
        variance[c] = std::max(0.0, q / count - (s / count) * (s / count));
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

// One bit for each of `count` values; false where a value is neither 0 nor 1.
template <class X> bool pack(const X* x, int64_t count, int64_t threads, uint8_t* bits) {
    const int64_t width = 512, blocks = (count + width - 1) / width;
    std::vector<uint8_t> graded(std::max<int64_t>(1, threads), 0);
    parallel(threads, [&](int thread, int team) {
        uint8_t fired[512], other = 0;
        for (int64_t block = blocks * thread / team; block < blocks * (thread + 1) / team; ++block) {
            const X* in = x + block * width;
            const int64_t n = std::min(width, count - block * width);
            std::memset(fired, 0, sizeof fired);
            uint8_t others[512] = {};
            SIMD for (int64_t i = 0; i < n; ++i) {
                auto v = load(in[i]);
                fired[i] = v != 0;
                others[i] = v != 0 && v != 1;
            }
            for (int64_t i = 0; i < width; ++i) other |= others[i];
            for (int64_t i = 0; i < (n + 7) / 8; ++i) {
                uint64_t eight;
                std::memcpy(&eight, fired + 8 * i, 8);
                bits[block * (width / 8) + i] = uint8_t(eight * 0x0102040810204080u >> 56);
            }
        }
        graded[thread] = other;
    });
    return std::none_of(graded.begin(), graded.end(), [](uint8_t g) { return g; });
}

template <class X> void unpack(const uint8_t* bits, int64_t count, int64_t threads, X* x) {
    const int64_t width = 512, blocks = (count + width - 1) / width;
    parallel(threads, [&](int thread, int team) {
        uint8_t fired[512];
        for (int64_t block = blocks * thread / team; block < blocks * (thread + 1) / team; ++block) {
            X* out = x + block * width;
            const int64_t n = std::min(width, count - block * width);
            for (int64_t i = 0; i < (n + 7) / 8; ++i) {
                // Bit k of the byte to bit 0 of byte k.
                uint64_t eight = bits[block * (width / 8) + i] * 0x0101010101010101u & 0x8040201008040201u;
                eight = (eight + 0x00406070787c7e7fu) >> 7 & 0x0101010101010101u;
                std::memcpy(fired + 8 * i, &eight, 8);
            }
            SIMD for (int64_t i = 0; i < n; ++i) store(typename State<X>::type(fired[i]), out[i]);
        }
    });
}

}  // namespace

// Runs `call` with X, the type in storage, and S, that of the state, for a dtype as numbered in cpu.py.
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

int lif_forward(int dtype, const Layout* l, const Neuron* n, const void* x, const void* scale, const void* shift,
                const void* inv_tau, int64_t time_constants, const void* membrane, void* spikes, int as_bytes, void* last) {
    if (as_bytes) {
        FOR_DTYPE(dtype, (forward(*l, *n, (const X*)x, (const S*)scale, (const S*)shift, (const S*)inv_tau, time_constants,
                                  (const S*)membrane, (uint8_t*)spikes, (S*)last)))
    }
    FOR_DTYPE(dtype, (forward(*l, *n, (const X*)x, (const S*)scale, (const S*)shift, (const S*)inv_tau, time_constants,
                              (const S*)membrane, (X*)spikes, (S*)last)))
}

int lif_backward(int dtype, const Layout* l, const Neuron* n, const void* grad, int64_t grad_step, const void* grad_last,
                 const void* x, const void* scale, const void* shift, const void* center, const void* inv_tau, int64_t time_constants,
                 const void* membrane, void* grad_x, void* grad_membrane, double* sums) {
    FOR_DTYPE(dtype, (backward(*l, *n, (const X*)grad, grad_step, (const S*)grad_last, (const X*)x, (const S*)scale,
                                     (const S*)shift, (const S*)center, (const S*)inv_tau, time_constants,
                                     (const S*)membrane, (X*)grad_x, (S*)grad_membrane, sums)))
}

int channel_statistics(int dtype, const Layout* l, const void* x, double* mean, double* variance) {
    FOR_DTYPE(dtype, (statistics<X, S>(*l, (const X*)x, mean, variance)))
}

int channel_combine(int dtype, const Layout* l, void* gradient, const void* x, const void* a, const void* b, const void* d) {
    FOR_DTYPE(dtype, (combine(*l, (X*)gradient, (const X*)x, (const S*)a, (const S*)b, (const S*)d)))
}

// 1 where every value was 0 or 1, else 0.
int pack_bits(int dtype, const void* x, int64_t count, int64_t threads, uint8_t* bits, int* binary) {
    FOR_DTYPE(dtype, *binary = pack((const X*)x, count, threads, bits))
}

int unpack_bits(int dtype, const uint8_t* bits, int64_t count, int64_t threads, void* x) {
    FOR_DTYPE(dtype, unpack(bits, count, threads, (X*)x))
}
}
