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

// exp for |x| < 87 with an error of about 2e-7, in a form that compilers vectorize.
inline float exponential(float x) {
    x = x < -87.f ? -87.f : (x > 87.f ? 87.f : x);
    const float magic = 12582912.f;
    float k = (x * 1.44269504f + magic) - magic;
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    int32_t bits = (int32_t(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}
inline double exponential(double x) { return std::exp(x); }

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

struct Block { int64_t start, x_start, length, channel; };

struct Blocks {
    const Layout& l;
    bool by_row;                  // a block lies within one channel
    int64_t width, run, per_run, count;

    explicit Blocks(const Layout& layout, int64_t rows) : l(layout) {
        by_row = l.channels > 1 && l.inner > 1;
        run = by_row ? l.inner : l.chunk;
        width = std::max<int64_t>(64, 1024 / std::max<int64_t>(1, rows / 16));
        if (l.channels > 1 && !by_row) width = std::max<int64_t>(1, width / l.channels) * l.channels;
        width = std::min(width, run);
        per_run = (run + width - 1) / width;
        count = l.size / run * per_run;
    }
    Block operator[](int64_t id) const {
        int64_t within = id % per_run * width, start = id / per_run * run + within;
        return {start, start / l.chunk * l.chunk_stride + start % l.chunk, std::min(width, run - within),
                by_row ? start / l.inner % l.channels : 0};
    }
    template <class F> void share(int thread, int threads, F body) const {
        for (int64_t id = count * thread / threads; id < count * (thread + 1) / threads; ++id) body((*this)[id]);
    }
};

// A value for each neuron of a block, from one number or one for each channel.
template <class S> struct PerNeuron {
    const Blocks& blocks;
    const S* values;
    int64_t shown = -1;
    std::vector<S> tile;

    PerNeuron(const Blocks& b, const S* v, int64_t count, S otherwise) : blocks(b), values(v), tile(b.width, otherwise) {
        if (!values) return;
        if (count == 1 || b.l.channels == 1) {
            std::fill(tile.begin(), tile.end(), values[0]);
            values = nullptr;
        } else if (!b.by_row) {
            for (int64_t i = 0; i < b.width; ++i) tile[i] = values[i % count];
            values = nullptr;
        }
    }
    const S* operator()(const Block& block) {
        if (values && block.channel != shown) {
            shown = block.channel;
            std::fill(tile.begin(), tile.end(), values[shown]);
        }
        return tile.data();
    }
};

// Sums over neurons, one for each channel, float64 from block to block.
template <class S> struct PerChannel {
    const Blocks& blocks;
    std::vector<S> block_sum;
    std::vector<double> tile;

    explicit PerChannel(const Blocks& b)
        : blocks(b), block_sum(b.width, S(0)), tile(b.by_row ? b.l.channels : b.width, 0.0) {}
    void flush(const Block& block) {
        if (blocks.by_row) {
            double sum = 0;
            for (int64_t i = 0; i < block.length; ++i) sum += block_sum[i];
            tile[block.channel] += sum;
        } else {
            SIMD for (int64_t i = 0; i < block.length; ++i) tile[i] += block_sum[i];
        }
        std::fill(block_sum.begin(), block_sum.end(), S(0));
    }
    void add_to(double* sums) const {
        for (size_t i = 0; i < tile.size(); ++i) sums[i % blocks.l.channels] += tile[i];
    }
};

// ---- the neuron

template <class S, class X>
void read_input(int64_t n, const X* x, const S* scale, const S* shift, S* y) {
    if (scale)
        SIMD for (int64_t i = 0; i < n; ++i) y[i] = load(x[i]) * scale[i] + shift[i];
    else
        SIMD for (int64_t i = 0; i < n; ++i) y[i] = load(x[i]);
}

// h and r (what fired) of one step to those of the next; the arrays may be the same.
template <class S>
void advance(const Neuron& neuron, int64_t n, const S* y, const S* inv_tau, const S* h_before, const S* r_before, S* h, S* r) {
    const S threshold = S(neuron.threshold);
    const S fires_at = neuron.strict ? std::nextafter(threshold, std::numeric_limits<S>::infinity()) : threshold;
    if (neuron.reset == ZERO) {
        SIMD for (int64_t i = 0; i < n; ++i) {
            S u = h_before[i] * (1 - r_before[i]);
            S next = u + (y[i] - u) * inv_tau[i];
            h[i] = next;
            r[i] = next >= fires_at ? S(1) : S(0);
        }
        return;
    }
    const S taken = neuron.reset == SUBTRACT ? threshold : S(0);
    SIMD for (int64_t i = 0; i < n; ++i) {
        S u = h_before[i];
        S next = u + (y[i] - u) * inv_tau[i];
        next -= r_before[i] * taken;
        h[i] = next;
        r[i] = next >= fires_at ? S(1) : S(0);
    }
}

template <class S>
void begin(const Neuron& neuron, const Block& block, const S* membrane, S* h, S* r) {
    const S threshold = S(neuron.threshold);
    SIMD for (int64_t i = 0; i < block.length; ++i) {
        S m = membrane ? membrane[block.start + i] : S(0);
        h[i] = m;
        r[i] = membrane && (neuron.strict ? m > threshold : m >= threshold) ? S(1) : S(0);
    }
}

template <class S> void surrogate(const Neuron& neuron, int64_t n, const S* h, S* out) {
    const S a = S(neuron.alpha), threshold = S(neuron.threshold);
    switch (neuron.surrogate) {
    case SIGMOID:
        SIMD for (int64_t i = 0; i < n; ++i) {
            S p = 1 / (1 + exponential(a * (threshold - h[i])));
            out[i] = a * p * (1 - p);
        }
        break;
    case ATAN: {
        const S slope = S(1.5707963267948966) * a;
        SIMD for (int64_t i = 0; i < n; ++i) {
            S scaled = slope * (h[i] - threshold);
            out[i] = a / 2 / (1 + scaled * scaled);
        }
        break;
    }
    case FAST_SIGMOID:
        SIMD for (int64_t i = 0; i < n; ++i) {
            S d = a * std::abs(h[i] - threshold) + 1;
            out[i] = 1 / (d * d);
        }
        break;
    case TRIANGULAR:
        SIMD for (int64_t i = 0; i < n; ++i) out[i] = a * std::max(S(0), 1 - a * std::abs(h[i] - threshold));
        break;
    default:
        std::fill(out, out + n, S(1));
    }
}

template <class X, class Out, class S>
void forward(const Layout& l, const Neuron& neuron, const X* x, const S* scale, const S* shift, const S* inv_tau,
             int64_t time_constants, const S* membrane, Out* spikes, S* last) {
    const Blocks blocks(l, 1);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> scales(blocks, scale, l.channels, S(1)), shifts(blocks, shift, l.channels, S(0));
        PerNeuron<S> time(blocks, inv_tau, time_constants, S(neuron.inv_tau));
        std::vector<S> y(blocks.width), h(blocks.width), r(blocks.width);
        blocks.share(thread, threads, [&](const Block& b) {
            const S* block_scale = scale ? scales(b) : nullptr;
            const S* block_shift = shifts(b);
            const S* block_time = time(b);
            begin(neuron, b, membrane, h.data(), r.data());
            for (int64_t t = 0; t < l.steps; ++t) {
                if (t == 0 || !l.repeat) read_input(b.length, x + t * l.x_step + b.x_start, block_scale, block_shift, y.data());
                advance(neuron, b.length, y.data(), block_time, h.data(), r.data(), h.data(), r.data());
                Out* out = spikes + t * l.size + b.start;
                SIMD for (int64_t i = 0; i < b.length; ++i) store(r[i], out[i]);
            }
            if (last) std::copy_n(h.data(), b.length, last + b.start);
        });
    });
}

// What the gradient needs of one block, all steps.
template <class S> struct Trace {
    std::vector<S> y, h, r, slope, carry, fired;
    Trace(int64_t steps, int64_t width)
        : y(width), h((steps + 1) * width), r((steps + 1) * width), slope(width), carry(width), fired(width) {}
};

// One step back: from the gradient of the spikes (in `carry` that of h, in `fired` that of r) to that of y, left in `gradient`.
template <class S>
void retreat(const Neuron& neuron, int64_t n, const S* y, const S* inv_tau, const S* h_before, const S* r_before, const S* slope,
             S* carry, S* fired, S* gradient, S* time_sum) {
    const S reset_to_zero = neuron.reset == ZERO ? S(1) : S(0);
    const S taken = neuron.reset == SUBTRACT ? S(neuron.threshold) : S(0);
    const S follows = neuron.detach_reset ? S(0) : S(1);
    SIMD for (int64_t i = 0; i < n; ++i) {
        S of_h = (gradient[i] + fired[i]) * slope[i] + carry[i];
        S kept = 1 - reset_to_zero * r_before[i];
        S of_y = of_h * inv_tau[i];
        S of_u = of_h - of_y;
        time_sum[i] += of_h * (y[i] - h_before[i] * kept);
        gradient[i] = of_y;
        carry[i] = of_u * kept;
        fired[i] = -follows * (reset_to_zero * of_u * h_before[i] + taken * of_h);
    }
}

// sums: [3, channels] for 1 / tau, the shift, and the scale around `center`.
template <class X, class S>
void backward(const Layout& l, const Neuron& neuron, const X* grad, int64_t grad_step, const S* grad_last, const X* x, const S* scale, const S* shift,
              const S* center, const S* inv_tau, int64_t time_constants, const S* membrane, X* grad_x, S* grad_membrane,
              double* sums) {
    const Blocks blocks(l, l.steps);
    std::vector<double> all(std::max<int64_t>(1, l.threads) * 3 * l.channels, 0.0);
    parallel(l.threads, [&](int thread, int threads) {
        PerNeuron<S> scales(blocks, scale, l.channels, S(1)), shifts(blocks, shift, l.channels, S(0));
        PerNeuron<S> centers(blocks, center, l.channels, S(0)), time(blocks, inv_tau, time_constants, S(neuron.inv_tau));
        PerChannel<S> of_time(blocks), of_shift(blocks), of_scale(blocks);
        const int64_t w = blocks.width;
        Trace<S> trace(l.steps, w);
        std::vector<S> gradient(w), total(w);
        blocks.share(thread, threads, [&](const Block& b) {
            const int64_t n = b.length;
            const S* block_scale = scale ? scales(b) : nullptr;
            const S *block_shift = shifts(b), *block_center = centers(b), *block_time = time(b);
            begin(neuron, b, membrane, trace.h.data(), trace.r.data());
            for (int64_t t = 0; t < l.steps; ++t) {
                if (t == 0 || !l.repeat)
                    read_input(n, x + t * l.x_step + b.x_start, block_scale, block_shift, trace.y.data());
                S *h = &trace.h[t * w], *r = &trace.r[t * w];
                advance(neuron, n, trace.y.data(), block_time, h, r, h + w, r + w);
            }
            SIMD for (int64_t i = 0; i < n; ++i) trace.carry[i] = grad_last ? grad_last[b.start + i] : S(0);
            std::fill(trace.fired.begin(), trace.fired.end(), S(0));
            std::fill(total.begin(), total.end(), S(0));
            for (int64_t t = l.steps - 1; t >= 0; --t) {
                const X* x_t = x + t * l.x_step + b.x_start;
                if (!l.repeat) read_input(n, x_t, block_scale, block_shift, trace.y.data());
                SIMD for (int64_t i = 0; i < n; ++i)
                    gradient[i] = grad ? load(grad[t * grad_step + b.start + i]) : S(0);
                surrogate(neuron, n, &trace.h[(t + 1) * w], trace.slope.data());
                retreat(neuron, n, trace.y.data(), block_time, &trace.h[t * w], &trace.r[t * w], trace.slope.data(),
                        trace.carry.data(), trace.fired.data(), gradient.data(), of_time.block_sum.data());
                if (center)
                    SIMD for (int64_t i = 0; i < n; ++i) {
                        of_shift.block_sum[i] += gradient[i];
                        of_scale.block_sum[i] += gradient[i] * (load(x_t[i]) - block_center[i]);
                    }
                if (!l.repeat)
                    SIMD for (int64_t i = 0; i < n; ++i) store(gradient[i], grad_x[t * l.size + b.start + i]);
                else
                    SIMD for (int64_t i = 0; i < n; ++i) total[i] += gradient[i];
            }
            if (l.repeat)
                SIMD for (int64_t i = 0; i < n; ++i) store(total[i], grad_x[b.start + i]);
            if (grad_membrane) {
                surrogate(neuron, n, trace.h.data(), trace.slope.data());
                SIMD for (int64_t i = 0; i < n; ++i)
                    grad_membrane[b.start + i] = trace.carry[i] + trace.fired[i] * trace.slope[i];
            }
            of_time.flush(b);
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
    const Blocks blocks(l, 1);
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
    const Blocks blocks(l, 1);
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
