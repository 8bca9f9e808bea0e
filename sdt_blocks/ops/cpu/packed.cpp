// Products, neurons, pooling and attention on packed spikes: one bit each, 64 channels per word, lowest channel first.
//
// Levels 0..D take D such planes per pixel, one after the other; the level is the number of planes whose bit is set.

#include "packed_attention.h"
#include "packed_dense.h"
#include "packed_events.h"
#include "packed_pool.h"
#include "packed_rows.h"

namespace {

// The sums over planes divided by `norm`, row by row, without the padding of the words.
template <class T>
void expand(const uint64_t* words, T* out, int64_t rows, int64_t planes, int64_t channels, T norm, int64_t threads) {
    const int64_t plane = ceil_divide(channels, 64);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t word = 0; word < plane; word++) {
            const int64_t count = std::min<int64_t>(64, channels - word * 64);
            T* to = out + row * channels + word * 64;
            expand_levels(words + row * planes * plane + word, plane, planes, count, to);
            if (norm != 1)
                for (int64_t c = 0; c < count; c++) to[c] /= norm;
        }
}

// Bit c is whether value c of 64 is at least the limit.
inline uint64_t at_least_each(const float* values, float limit) {
    uint64_t word = 0;
    for (int v = 0; v < 64 / WIDTH; v++)
        word |= uint64_t(bits(at_least(load(values + v * WIDTH), broadcast(limit)))) << (v * WIDTH);
    return word;
}

}  // namespace

extern "C" {

int64_t spike_lanes() { return LANES; }

// `kind` is the type of the weights: 0 for float32, 1 for integers of 32 bits, 2 for integers of 8 bits.
void spike_product(const Frames* spikes, int64_t radius, int64_t kind, const void* weights, const Epilogue* epilogue,
                   int64_t threads) {
    switch (kind) {
    case 0: return product_by_events(*spikes, radius, static_cast<const float*>(weights), *epilogue, threads);
    case 1: return product_by_events(*spikes, radius, static_cast<const int32_t*>(weights), *epilogue, threads);
    default: return product_by_events(*spikes, radius, static_cast<const int8_t*>(weights), *epilogue, threads);
    }
}

// Multiplies all inputs, active or not; the weights are integers of 1 or 3 digits (`pieces`) of 8 bits.
void spike_product_dense(const Frames* spikes, const Windows* windows, int64_t pieces, const int8_t* weights,
                         const Epilogue* epilogue, int64_t threads) {
    const Bits in{*spikes};
    if (pieces == 1)
        dense_product<1>(in, *windows, weights, *epilogue, threads);
    else
        dense_product<3>(in, *windows, weights, *epilogue, threads);
}

// Every output is summed over taps, then channels, in ascending order, with one rounding per product added: the same bits for
// any batch, number of threads and machine. `by_rows` is for few inputs; without it x must be contiguous. `pool`, only by rows:
// the only result is spikes, pooled.
void real_product(const Picture* x, const Windows* windows, const float* weights, const Epilogue* epilogue, int64_t steps,
                  int64_t by_rows, int64_t pool, int64_t threads) {
    if (by_rows) return rows_product(*x, *windows, weights, *epilogue, steps, pool, threads);
    const Reals in{{x->x, x->frames, x->images, x->height, x->width, x->channels, steps}};
    dense_product<1>(in, *windows, weights, *epilogue, threads);
}

// The input is bytes up to 128 instead of packed spikes, and has one step.
void byte_product(const uint8_t* x, const int64_t* sizes, const Windows* windows, int64_t pieces, const int8_t* weights,
                  const Epilogue* epilogue, int64_t threads) {
    const Bytes in{{x, 1, sizes[0], sizes[1], sizes[2], sizes[3], 1}};
    if (pieces == 1)
        dense_product<1>(in, *windows, weights, *epilogue, threads);
    else
        dense_product<3>(in, *windows, weights, *epilogue, threads);
}

// As above for a convolution with one weight per input channel and tap; `sizes` are frames, height, width and channels.
void depthwise_product(const float* x, const int64_t* sizes, const Windows* windows, const float* weights, float* out,
                       int64_t threads) {
    depthwise(x, sizes[0], sizes[1], sizes[2], sizes[3], *windows, weights, out, threads);
}

// Only the epilogue: x is [frames, pixels, channels], where frames = steps, or one frame is shown at every step (with step =
// 0); consecutive frames are `step` values apart.
void spike_neuron(const float* x, int64_t frames, int64_t step, int64_t steps, int64_t pixels, const Epilogue* epilogue,
                  int64_t threads) {
    const Epilogue& e = *epilogue;
    const int64_t channels = e.channels;
    constexpr int64_t BLOCK = 32;
    const bool streams = e.streams(pixels * steps);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < ceil_divide(pixels, BLOCK); block++) {
        static thread_local Buffer<float> copies;
        const int64_t first = block * BLOCK, count = std::min(BLOCK, pixels - first);
        for (int64_t tile = 0; tile < e.tiles(); tile++) {
            const float* from = x + first * channels + tile * LANES;
            const int64_t lanes = std::min<int64_t>(LANES, channels - tile * LANES);
            if (lanes == LANES) {
                finish<float>(e, tile, steps, first, count, {from, channels, step}, streams);
                continue;
            }
            float* copy = copies.reserve(frames * count * LANES);
            for (int64_t t = 0; t < frames; t++)
                for (int64_t q = 0; q < count; q++)
                    std::memcpy(copy + (t * count + q) * LANES, from + t * step + q * channels, lanes * sizeof(float));
            finish<float>(e, tile, steps, first, count, {copy, LANES, step ? count * LANES : 0}, streams);
        }
        if (streams) finish_streams();
    }
}

// Maximum over 3x3 windows, stride 2, padding 1, of `frames` frames: OR of words of spikes, or of real values.
void spike_pool(const uint64_t* in, uint64_t* out, int64_t frames, int64_t height, int64_t width, int64_t words,
                int64_t threads) {
    pool_spikes(in, out, frames, height, width, words, threads);
}

void real_pool(const float* in, float* out, int64_t frames, int64_t height, int64_t width, int64_t channels, int64_t threads) {
    pool_reals(in, out, frames, height, width, channels, threads);
}

// Whether a fused multiply-add is one instruction.
int64_t real_product_is_fast() {
#if defined(__AVX512F__) || defined(__FP_FAST_FMAF)
    return 1;
#else
    return 0;
#endif
}

void spike_attention(const Rows* passed, const Rows* a, const Rows* b, uint64_t* out, int64_t steps, int64_t images,
                     int64_t tokens, const float* inv_tau, const Neuron* neuron, float* standing, int64_t threads) {
    mask_over_tokens(*passed, *a, *b, out, steps, images, tokens, inv_tau, *neuron, standing, threads);
}

void spike_token_attention(const Rows* q, const Rows* k, uint64_t* out, int64_t steps, int64_t tokens, int64_t heads,
                           const float* inv_tau, const Neuron* neuron, float* standing, int64_t threads) {
    mask_over_heads(*q, *k, out, steps, tokens, heads, inv_tau, *neuron, standing, threads);
}

void spike_linear_attention(const Rows* q, const Rows* k, const Rows* v, float* out, int64_t frames, int64_t tokens,
                            int64_t heads, float scale, int64_t threads) {
    linear_attention(*q, *k, *v, out, frames, tokens, heads, scale, threads);
}

// Plane i of a row [planes, words] holds which of its whole numbers [channels] are above i.
void spike_pack(const float* x, uint64_t* words, int64_t rows, int64_t planes, int64_t channels, int64_t threads) {
    const int64_t plane = ceil_divide(channels, 64);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t word = 0; word < plane; word++) {
            float padded[64] = {};
            const float* values = x + row * channels + word * 64;
            const int64_t count = channels - word * 64;
            if (count < 64) {
                std::copy_n(values, count, padded);
                values = padded;
            }
            for (int64_t p = 0; p < planes; p++) words[(row * planes + p) * plane + word] = at_least_each(values, float(p) + 0.5f);
        }
}

void spike_expand_float(const uint64_t* words, float* out, int64_t rows, int64_t planes, int64_t channels, float norm,
                        int64_t threads) {
    expand(words, out, rows, planes, channels, norm, threads);
}

void spike_expand_byte(const uint64_t* words, uint8_t* out, int64_t rows, int64_t planes, int64_t channels, float norm,
                       int64_t threads) {
    expand(words, out, rows, planes, channels, uint8_t(norm), threads);
}

int64_t spike_count(const uint64_t* words, int64_t count, int64_t threads) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t i = 0; i < count; i++) total += __builtin_popcountll(words[i]);
    return total;
}

}  // extern "C"
