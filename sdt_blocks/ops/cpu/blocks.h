// What the training kernels share: conversions, blocks of neurons, and the forward and backward step of a row of neurons.

#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "neuron.h"
#include "storage.h"

namespace {

// ---- conversions on loading and storing

#ifdef __FLT16_MANT_DIG__
using float16 = _Float16;
#endif

template <class T> struct State { using type = float; };
template <> struct State<double> { using type = double; };

inline double load(double v) { return v; }
inline void store(float v, float& out) { out = v; }
inline void store(double v, double& out) { out = v; }
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

// x itself if it has the state's type, otherwise x converted into the buffer.
template <class X, class S> const S* widen(int64_t n, const X* x, Buffer<S>& buffer) {
    if constexpr (std::is_same_v<X, S>) {
        return x;
    } else {
        S* out = buffer.data();
        SIMD for (int64_t i = 0; i < n; ++i) out[i] = load(x[i]);
        return out;
    }
}
// Where to compute the values of `out`: in place, or in the buffer, from which `narrow` converts them.
template <class X, class S> S* target(X* out, Buffer<S>& buffer) {
    if constexpr (std::is_same_v<X, S>) return out; else return buffer.data();
}
template <class X, class S> void narrow(int64_t n, const Buffer<S>& buffer, X* out) {
    if constexpr (!std::is_same_v<X, S>) {
        const S* in = buffer.data();
        SIMD for (int64_t i = 0; i < n; ++i) store(in[i], out[i]);
    }
}

// ---- what Python passes; the same fields in the same order as in bindings.py

struct Layout {
    int64_t steps, size;           // time steps, neurons of a frame
    int64_t chunk, chunk_stride;   // x lies in chunks of consecutive elements, chunk_stride apart
    int64_t x_step;                // from one time step to the next in x
    int64_t repeat;                // whether x is one frame, shown at every step
    int64_t channels, inner;       // the channel of neuron i is (i / inner) % channels
    int64_t threads;
};

// ---- blocks of neurons

constexpr int64_t WIDTH = 128;  // neurons per block: with all their steps they fit the first-level cache

// Consecutive neurons. `channel` is their common channel, or that of the first.
struct Block { int64_t start, x_start, length, channel; };

// How channels map to blocks: one channel for all neurons, one channel per block, part of the channels per block (many
// innermost channels), or all channels several times per block (few innermost channels).
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

// A value for each neuron of a block, from a single number or one per channel.
template <class S> struct PerNeuron {
    const S* values;
    Meeting meeting;
    int64_t shown = -1;
    Buffer<S> tile;

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

// Sums over neurons, one per channel; across blocks they are added up in float64.
template <class S> struct PerChannel {
    const Blocks& blocks;
    Buffer<S> block_sum;
    std::vector<double> sums;

    explicit PerChannel(const Blocks& b)
        : blocks(b), block_sum(b.width, S(0)), sums(std::max(b.width, b.l.channels), 0.0) {}
    void flush(const Block& block) {
        double* to = sums.data() + block.channel;
        if (blocks.meeting == SHARED) {
            double sum = 0;
            SUM(sum) for (int64_t i = 0; i < block.length; ++i) sum += block_sum[i];
            *to += sum;
        } else
            SIMD for (int64_t i = 0; i < block.length; ++i) to[i] += block_sum[i];
        std::fill(block_sum.begin(), block_sum.end(), S(0));
    }
    void add_to(double* totals) const {
        for (size_t i = 0; i < sums.size(); ++i) totals[i % blocks.l.channels] += sums[i];
    }
};

constexpr int64_t AHEAD = 2;  // prefetch distance, in blocks

template <int Write, class X> inline void prefetch(const X* p, int64_t n) {
    for (const char *c = (const char*)p, *end = (const char*)(p + n); c < end; c += 64) __builtin_prefetch(c, Write, 2);
}

// ---- a row of neurons

inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline double multiply_add(double a, double b, double c) {
#ifdef __FP_FAST_FMA
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// exp for -87 <= x <= 0 with a relative error of about 1e-7, in a form that compilers vectorize.
inline float exponential(float x) {
    x = x < -87.f ? -87.f : x;
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float rounded = multiply_add(x, 1.44269504f, magic);
    const float k = rounded - magic;
    const float r = multiply_add(k, 2.12194440e-4f, multiply_add(k, -0.693359375f, x));
    float p = 1.3981999e-3f;
    p = multiply_add(p, r, 8.3333333e-3f);
    p = multiply_add(p, r, 4.1666667e-2f);
    p = multiply_add(p, r, 1.6666667e-1f);
    p = multiply_add(p, r, 0.5f);
    p = multiply_add(p, r * r, r + 1.f);
    // The low bits of `rounded` are k, which becomes the exponent of `scale`; a NaN is passed on by p.
    uint32_t bits;
    std::memcpy(&bits, &rounded, 4);
    bits = (bits + 127u) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}
inline double exponential(double x) { return std::exp(x); }

// The membrane h after one step, from that of the step before (maybe the same array), and the spikes.
template <bool Affine, bool Fire, class S>
void advance(const Dynamics<S>& d, int64_t n, const S* x, const S* scale, const S* shift, const S* inv_tau, const S* h_before,
             S* h, S* spikes) {
    const Dynamics<S> c = d;
    SIMD for (int64_t i = 0; i < n; ++i) {
        const S y = Affine ? x[i] * scale[i] + shift[i] : x[i];
        h[i] = step(c, y, h_before[i], c.fires(h_before[i]), inv_tau[i]);
        if (Fire) spikes[i] = c.fires(h[i]) ? S(1) : S(0);
    }
}

// The surrogate gradient at h.
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
        return a * std::max(1 - a * std::abs(shift), S(0));  // in this order NaN stays NaN
    } else {
        return S(1);
    }
}

// One backward step, from the gradient of the spikes to that of the neuron's input. On entry `carry` holds the gradient of h
// from later steps, and `fired` that of the spikes; on return both hold what the step before needs. `time` accumulates the
// gradient of 1 / tau.
template <int Surrogate, bool Time, bool Follows, class S>
void retreat(const Dynamics<S>& d, int64_t n, const S* x, const S* scale, const S* shift, const S* inv_tau, const S* h_before,
             const S* h, const S* of_spikes, S* carry, S* fired, S* of_y, S* time) {
    const Dynamics<S> c = d;
    SIMD for (int64_t i = 0; i < n; ++i) {
        const S of_fired = Follows ? of_spikes[i] + fired[i] : of_spikes[i];
        const S of_h = of_fired * slope<Surrogate>(c, h[i]) + carry[i];
        const S kept = 1 - c.to_zero * (c.fires(h_before[i]) ? S(1) : S(0));
        const S of_input = of_h * inv_tau[i];
        const S of_u = of_h - of_input;
        if (Time) time[i] += of_h * (x[i] * scale[i] + shift[i] - h_before[i] * kept);
        of_y[i] = of_input;
        carry[i] = of_u * kept;
        if (Follows) fired[i] = -(c.to_zero > 0 ? of_u * h_before[i] : c.taken * of_h);
    }
}

// Calls f with the neuron's surrogate as a compile-time constant.
template <class F> void with_surrogate(int64_t surrogate, F f) {
    switch (surrogate) {
    case SIGMOID: return f(std::integral_constant<int, SIGMOID>());
    case ATAN: return f(std::integral_constant<int, ATAN>());
    case FAST_SIGMOID: return f(std::integral_constant<int, FAST_SIGMOID>());
    case TRIANGULAR: return f(std::integral_constant<int, TRIANGULAR>());
    default: return f(std::integral_constant<int, STRAIGHT_THROUGH>());
    }
}

// Calls f with each of the flags as a compile-time constant.
template <class F> void with_flags(F f) { f(); }
template <class F, class... Flags> void with_flags(F f, bool flag, Flags... flags) {
    if (flag) with_flags([&](auto... known) { f(std::true_type(), known...); }, flags...);
    else with_flags([&](auto... known) { f(std::false_type(), known...); }, flags...);
}

// ---- bits: each byte packs eight bytes of 0 or 1

constexpr int64_t BYTES = 512;

// Calls body for each block of `count` elements with its start, its length and a buffer of BYTES bytes.
template <class F> void in_bytes(int64_t count, int64_t threads, F body) {
    const int64_t blocks = (count + BYTES - 1) / BYTES;
    parallel(threads, [&](int thread, int team) {
        uint8_t bytes[BYTES] = {};
        for (int64_t block = blocks * thread / team; block < blocks * (thread + 1) / team; ++block)
            body(block * BYTES, std::min(BYTES, count - block * BYTES), bytes);
    });
}

// Overwrites up to seven bytes behind the last one.
inline void to_bits(uint8_t* bytes, int64_t n, uint8_t* bits) {
    std::memset(bytes + n, 0, -n & 7);
    for (int64_t i = 0; i < (n + 7) / 8; ++i) {
        uint64_t eight;
        std::memcpy(&eight, bytes + 8 * i, 8);
        bits[i] = uint8_t(eight * 0x0102040810204080u >> 56);
    }
}

inline void from_bits(const uint8_t* bits, int64_t n, uint8_t* bytes) {
    for (int64_t i = 0; i < (n + 7) / 8; ++i) {
        // Moves bit k of the byte to bit 0 of byte k.
        uint64_t eight = bits[i] * 0x0101010101010101u & 0x8040201008040201u;
        eight = (eight + 0x00406070787c7e7fu) >> 7 & 0x0101010101010101u;
        std::memcpy(bytes + 8 * i, &eight, 8);
    }
}

}  // namespace
