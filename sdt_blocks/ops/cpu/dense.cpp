// What runs between two products when an optimized model is evaluated, for dense.py: neurons fused with the shortcut's
// addition, with max pooling and with the attention's mask. Frames are channels-last and contiguous.
//
// Neurons are computed in float32, in blocks whose state stays in the first-level cache: all time steps of a block before the
// next block. The build disables floating-point contraction, so the spikes match the reference bit for bit.

#include <algorithm>
#include <cmath>
#include <vector>

#include "neuron.h"
#include "storage.h"

namespace {

// Stores a spike, 0 or 1, which every type represents exactly.
inline void store(float spike, float& out) { out = spike; }
inline void store(float spike, uint8_t& out) { out = uint8_t(spike); }
inline void store(float spike, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &spike, 4);
    out.bits = uint16_t(bits >> 16);
}

}  // namespace

// The same fields in the same order as in bindings.py.
struct Layer {
    Neuron neuron;
    const float* inv_tau;  // one per channel, or a single one
    int64_t constants;     // how many these are
    const float* before;   // membranes before the first step; null if all are zero
    float* after;          // membranes after the last step; null if not wanted
};

namespace {

struct Cells : Dynamics<float> {
    const float* inv_tau;
    int64_t constants;
    const float* before;
    float* after;

    explicit Cells(const Layer& l)
        : Dynamics<float>(l.neuron), inv_tau(l.inv_tau), constants(l.constants), before(l.before), after(l.after) {}
    // Sets the membranes before the first step, of n neurons from `start` on.
    void begin(int64_t start, int64_t n, float* h) const {
        if (before) std::copy_n(before + start, n, h);
        else std::fill_n(h, n, 0.f);
    }
    void end(int64_t start, int64_t n, const float* h) const {
        if (after) std::copy_n(h, n, after + start);
    }
    // The time constants of `width` consecutive neurons, the first of which belongs to channel `first`.
    std::vector<float> row(int64_t width, int64_t first = 0) const {
        std::vector<float> values(width);
        for (int64_t i = 0; i < width; ++i) values[i] = inv_tau[constants == 1 ? 0 : (first + i) % constants];
        return values;
    }
};

inline float spike(const Cells& d, float h) { return d.fires(h) ? 1.f : 0.f; }

// The membrane h after one step, from that of the step before.
template <class X> inline float advance(const Cells& d, X x, float h, float inv_tau) {
    return step(d, load(x), h, d.fires(h), inv_tau);
}

constexpr int64_t BLOCK = 512;

// ---- spikes of x, or of u + x, which is stored in `total`

template <class X, class Out>
void fire(int64_t steps, int64_t size, const X* x, int64_t x_step, const float* u, float* total, const Layer& layer,
          Out* out, int64_t threads) {
    const Cells d(layer);
    const int64_t width = d.constants == 1 ? BLOCK : std::max<int64_t>(1, BLOCK / d.constants) * d.constants;
    const int64_t count = (size + width - 1) / width;
    parallel(threads, [&](int64_t thread, int64_t all) {
        const std::vector<float> row = d.row(width);
        std::vector<float> state(2 * width);
        const float* inv_tau = row.data();
        float *h = state.data(), *spikes = h + width;
        for (int64_t id = count * thread / all; id < count * (thread + 1) / all; ++id) {
            const int64_t start = id * width, n = std::min(width, size - start);
            d.begin(start, n, h);
            for (int64_t t = 0; t < steps; ++t) {
                const X* in = x + t * x_step + start;
                Out* fired = out + t * size + start;
                if (u) {
                    const float* before = u + t * size + start;
                    float* sum = total + t * size + start;
                    SIMD for (int64_t i = 0; i < n; ++i) {
                        sum[i] = before[i] + load(in[i]);
                        h[i] = advance(d, sum[i], h[i], inv_tau[i]);
                        spikes[i] = spike(d, h[i]);
                    }
                } else {
                    SIMD for (int64_t i = 0; i < n; ++i) {
                        h[i] = advance(d, in[i], h[i], inv_tau[i]);
                        spikes[i] = spike(d, h[i]);
                    }
                }
                // Apart from the arithmetic: for some types compilers do not vectorize the two together.
                SIMD for (int64_t i = 0; i < n; ++i) store(spikes[i], fired[i]);
            }
            d.end(start, n, h);
        }
    });
}

// ---- spikes of x after a 3x3 maximum of stride 2: the spikes of eight time steps share a byte and are pooled together

struct Frames { int64_t steps, batch, height, width, channels; };

// `row` counts through the frames of all images; `own` tells whether this call stores the row's last membranes.
template <class X>
void fire_row(const Frames& f, const X* x, int64_t x_step, const Cells& d, const float* inv_tau, int64_t row, bool own,
              uint8_t* bits) {
    const int64_t size = f.width * f.channels;
    float h[BLOCK];
    int32_t byte[BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t n = std::min(BLOCK, size - start);
        d.begin(row * size + start, n, h);
        for (int64_t t = 0; t < f.steps; t += 8) {
            std::fill_n(byte, n, 0);
            for (int64_t i = t; i < std::min(t + 8, f.steps); ++i) {
                const X* in = x + i * x_step + row * size + start;
                const int32_t bit = 1 << (i - t);
                SIMD for (int64_t j = 0; j < n; ++j) {
                    h[j] = advance(d, in[j], h[j], inv_tau[start + j]);
                    byte[j] |= d.fires(h[j]) ? bit : 0;
                }
            }
            uint8_t* to = bits + t / 8 * size + start;
            SIMD for (int64_t j = 0; j < n; ++j) to[j] = uint8_t(byte[j]);
        }
        if (own) d.end(row * size + start, n, h);
    }
}

// Pools a row of pixels horizontally: every second pixel OR its two neighbors.
void pool_row(int64_t width, int64_t channels, const uint8_t* row, uint8_t* out) {
    for (int64_t x = 0; x < (width + 1) / 2; ++x) {
        const uint8_t* middle = row + 2 * x * channels;
        const uint8_t* left = x > 0 ? middle - channels : middle;
        const uint8_t* right = 2 * x + 1 < width ? middle + channels : middle;
        uint8_t* to = out + x * channels;
        SIMD for (int64_t c = 0; c < channels; ++c) to[c] = middle[c] | left[c] | right[c];
    }
}

template <class X, class Out>
void fire_and_pool(const Frames& f, const X* x, int64_t x_step, const Layer& layer, Out* out, int64_t threads) {
    const Cells d(layer);
    const int64_t rows_out = (f.height + 1) / 2, size_out = (f.width + 1) / 2 * f.channels, row_in = f.width * f.channels;
    const int64_t bytes = (f.steps + 7) / 8, rows = f.batch * rows_out, frame_out = rows * size_out;
    parallel(threads, [&](int64_t thread, int64_t all) {
        const std::vector<float> inv_tau = d.row(row_in);
        std::vector<uint8_t> bits(bytes * row_in), ring(3 * bytes * size_out);
        int64_t ready = -1;  // the last row, counted through all images, that is in the ring
        const int64_t begin = rows * thread / all;
        for (int64_t row = begin; row < rows * (thread + 1) / all; ++row) {
            const int64_t image = row / rows_out, y = row % rows_out * 2, top = image * f.height;
            const int64_t first = top + std::max<int64_t>(y - 1, 0), last = top + std::min(y + 1, f.height - 1);
            for (int64_t r = std::max(first, ready + 1); r <= last; ++r, ready = r - 1) {
                // The thread before fires this thread's first row too, as the last of its last window, and stores its
                // membranes.
                const bool own = image * rows_out + (r - top) / 2 >= begin;
                fire_row(f, x, x_step, d, inv_tau.data(), r, own, bits.data());
                for (int64_t byte = 0; byte < bytes; ++byte)
                    pool_row(f.width, f.channels, bits.data() + byte * row_in,
                             ring.data() + (r % 3 * bytes + byte) * size_out);
            }
            for (int64_t t = 0; t < f.steps; ++t) {
                const auto pooled = [&](int64_t r) { return ring.data() + (r % 3 * bytes + t / 8) * size_out; };
                const uint8_t *above = pooled(first), *middle = pooled(top + y), *below = pooled(last);
                Out* to = out + t * frame_out + row * size_out;
                SIMD for (int64_t i = 0; i < size_out; ++i)
                    store(float(((above[i] | middle[i] | below[i]) >> (t % 8)) & 1), to[i]);
            }
        }
    });
}

// ---- the attention's mask: q where enough tokens of the channel had spikes in both k and v

struct Tokens { int64_t steps, batch, tokens, channels; };

template <class X, class Out>
void attend(const Tokens& f, const X* qkv, const Layer* layers, Out* out, int64_t threads) {
    constexpr int64_t WIDTH = 64;
    const Cells of_q(layers[0]), of_k(layers[1]), of_v(layers[2]), of_a(layers[3]);
    const int64_t per_image = (f.channels + WIDTH - 1) / WIDTH, count = f.batch * per_image, stride = 3 * f.channels;
    const int64_t step_in = f.batch * f.tokens * stride, step_out = f.batch * f.tokens * f.channels;
    parallel(threads, [&](int64_t thread, int64_t all) {
        std::vector<float> counts(f.steps * WIDTH);
        std::vector<float> mask(f.steps * WIDTH);
        for (int64_t id = count * thread / all; id < count * (thread + 1) / all; ++id) {
            const int64_t image = id / per_image, first = id % per_image * WIDTH, n = std::min(WIDTH, f.channels - first);
            const X* in = qkv + image * f.tokens * stride + first;
            const std::vector<float> q_tau = of_q.row(n, first), k_tau = of_k.row(n, first), v_tau = of_v.row(n, first);
            const std::vector<float> a_tau = of_a.row(n, first);
            const float *kt = k_tau.data(), *vt = v_tau.data(), *qt = q_tau.data();
            std::fill(counts.begin(), counts.end(), 0.f);
            float hk[WIDTH], hv[WIDTH];
            for (int64_t token = 0; token < f.tokens; ++token) {
                const int64_t at = (image * f.tokens + token) * f.channels + first;
                of_k.begin(at, n, hk);
                of_v.begin(at, n, hv);
                for (int64_t t = 0; t < f.steps; ++t) {
                    const X *k = in + t * step_in + token * stride + f.channels, *v = k + f.channels;
                    float* sum = counts.data() + t * WIDTH;
                    SIMD for (int64_t c = 0; c < n; ++c) {
                        hk[c] = advance(of_k, k[c], hk[c], kt[c]);
                        hv[c] = advance(of_v, v[c], hv[c], vt[c]);
                        sum[c] += spike(of_k, hk[c]) * spike(of_v, hv[c]);
                    }
                }
                of_k.end(at, n, hk);
                of_v.end(at, n, hv);
            }
            of_a.begin(image * f.channels + first, n, hk);
            for (int64_t t = 0; t < f.steps; ++t)
                for (int64_t c = 0; c < n; ++c) {
                    hk[c] = advance(of_a, counts[t * WIDTH + c], hk[c], a_tau[c]);
                    mask[t * WIDTH + c] = spike(of_a, hk[c]);
                }
            of_a.end(image * f.channels + first, n, hk);
            for (int64_t token = 0; token < f.tokens; ++token) {
                const int64_t at = (image * f.tokens + token) * f.channels + first;
                of_q.begin(at, n, hk);
                for (int64_t t = 0; t < f.steps; ++t) {
                    const X* q = in + t * step_in + token * stride;
                    const float* open = mask.data() + t * WIDTH;
                    Out* to = out + t * step_out + at;
                    SIMD for (int64_t c = 0; c < n; ++c) {
                        hk[c] = advance(of_q, q[c], hk[c], qt[c]);
                        store(spike(of_q, hk[c]) * open[c], to[c]);
                    }
                }
                of_q.end(at, n, hk);
            }
        }
    });
}

}  // namespace

// Runs `call` with types X and Out for two dtypes as numbered in dense.py: 0 float32, 1 bfloat16, 2 bytes (only Out).
#define WITH_OUT(out, call)                                   \
    switch (out) {                                            \
    case 0: { using Out = float; call; return; }              \
    case 1: { using Out = bfloat16; call; return; }           \
    default: { using Out = uint8_t; call; return; }           \
    }
#define WITH_DTYPES(x, out, call)                             \
    if (x == 0) { using X = float; WITH_OUT(out, call) }      \
    else { using X = bfloat16; WITH_OUT(out, call) }

extern "C" {

void fire(int64_t x_dtype, int64_t out_dtype, int64_t steps, int64_t size, const void* x, int64_t x_step, const float* u, float* total,
          const Layer* layer, void* out, int64_t threads) {
    WITH_DTYPES(x_dtype, out_dtype, fire(steps, size, (const X*)x, x_step, u, total, *layer, (Out*)out, threads))
}

void fire_and_pool(int64_t x_dtype, int64_t out_dtype, const Frames* frames, const void* x, int64_t x_step, const Layer* layer,
                   void* out, int64_t threads) {
    WITH_DTYPES(x_dtype, out_dtype, fire_and_pool(*frames, (const X*)x, x_step, *layer, (Out*)out, threads))
}

void attend(int64_t x_dtype, int64_t out_dtype, const Tokens* tokens, const void* qkv, const Layer* layers, void* out,
            int64_t threads) {
    WITH_DTYPES(x_dtype, out_dtype, attend(*tokens, (const X*)qkv, layers, (Out*)out, threads))
}
}
