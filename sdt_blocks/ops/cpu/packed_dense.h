// Products with all inputs, whatever their values: spikes and levels as bytes times integers, or real values.
//
// The inputs of a block of output pixels are gathered, one row per pixel with the taps of its window one after the other. Then,
// tile by tile, groups of rows are multiplied with all sums in registers. The neurons follow while the sums are in the cache.

#pragma once

#include "packed_epilogue.h"
#include "packed_tiles.h"

namespace {

// Geometry of the windows, and the size of the result.
struct Windows {
    int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width;
    int64_t taps() const { return kernel_height * kernel_width; }
};

#if defined(__AVX512F__)
constexpr int GROUP = 12;  // rows multiplied together: their sums fill the registers
#elif defined(__AVX__)
constexpr int GROUP = 6;
#else
constexpr int GROUP = 2;
#endif
constexpr int64_t GATHERED_BYTES = 192 << 10;  // of the rows of a block, to fit the second-level cache
constexpr int64_t GATHERED_ROWS = 252;         // of a block at most, so that its sums stay in the cache too
constexpr int64_t SLACK = 64;                  // bytes that may be overwritten behind the end of a tap

// Expands 64 bits to 64 bytes of 0 or 1, stored or added to what is there.
inline void expand_word(uint64_t bits, uint8_t* to, bool add) {
#if defined(__AVX512BW__)
    const __m512i ones = _mm512_maskz_set1_epi8(bits, 1);
    _mm512_storeu_si512(to, add ? _mm512_add_epi8(_mm512_loadu_si512(to), ones) : ones);
#else
    for (int i = 0; i < 8; i++) {
        // Isolates bit j of a byte in byte j of eight, then moves it to the lowest bit.
        uint64_t spread = (bits >> (8 * i) & 0xff) * 0x0101010101010101ull & 0x8040201008040201ull, before = 0;
        spread = (spread + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
        if (add) std::memcpy(&before, to + 8 * i, 8);
        spread += before;
        std::memcpy(to + 8 * i, &spread, 8);
    }
#endif
}

// Adds the sum of four products to each lane: the four values are the same for all lanes, the four weights differ.
inline Whole dot(Whole sum, const uint8_t* values, const int8_t* weights) {
    int32_t four;
    std::memcpy(&four, values, 4);
#if defined(__AVX512VNNI__)
    return Whole(_mm512_dpbusd_epi32(__m512i(sum), _mm512_set1_epi32(four), _mm512_loadu_si512(weights)));
#elif defined(__AVX512BW__)
    // Two products of a level up to 128 and a weight fit 16 bits.
    const __m512i two = _mm512_maddubs_epi16(_mm512_set1_epi32(four), _mm512_loadu_si512(weights));
    return Whole(_mm512_add_epi32(__m512i(sum), _mm512_madd_epi16(two, _mm512_set1_epi16(1))));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i of = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    const __m256i two = _mm256_maddubs_epi16(_mm256_set1_epi32(four), of);
    return Whole(_mm256_add_epi32(__m256i(sum), _mm256_madd_epi16(two, _mm256_set1_epi16(1))));
#else
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < 4; j++) sum[i] = int32_t(uint32_t(sum[i]) + uint32_t(values[j] * weights[4 * i + j]));
    return sum;
#endif
}

// Spikes or levels, gathered as bytes and multiplied with 8-bit weights, four at a time.
struct Bits {
    typedef uint8_t Value;
    typedef int8_t Weight;
    typedef int32_t Sum;
    typedef Whole Sums;
    static constexpr int TOGETHER = 4;
    Frames in;

    int64_t images() const { return in.images; }
    int64_t steps() const { return in.steps; }
    int64_t shown() const { return in.steps; }
    int64_t height() const { return in.height; }
    int64_t width() const { return in.width; }
    int64_t tap() const { return (in.channels + 3) / 4 * 4; }
    // Gathers one pixel; the bytes written behind its end are overwritten by the next.
    void gather(int64_t step, int64_t pixel, uint8_t* to) const {
        const uint64_t* words = in.words + step * in.step + pixel * in.stride();
        for (int64_t plane = 0; plane < in.planes; plane++)
            for (int64_t word = 0; word < in.plane(); word++)
                expand_word(words[plane * in.plane() + word], to + 64 * word, plane > 0);
    }
    static Sums multiply_add(Whole sum, const uint8_t* values, const int8_t* weights) { return dot(sum, values, weights); }
};

// Unpacked values [frames, images, rows, columns, channels].
template <class T>
struct Values {
    typedef T Value;
    const T* x;
    int64_t frames, image_count, rows, columns, channels, step_count;

    int64_t images() const { return image_count; }
    int64_t steps() const { return step_count; }
    int64_t shown() const { return frames; }  // one frame may be shown at every step
    int64_t height() const { return rows; }
    int64_t width() const { return columns; }
    void gather(int64_t step, int64_t pixel, T* to) const {
        std::memcpy(to, x + (step * image_count * rows * columns + pixel) * channels, channels * sizeof(T));
    }
};

// Bytes; the padding of a tap meets weights of zero.
struct Bytes : Values<uint8_t> {
    typedef int8_t Weight;
    typedef int32_t Sum;
    typedef Whole Sums;
    static constexpr int TOGETHER = 4;
    int64_t tap() const { return (channels + 3) / 4 * 4; }
    static Sums multiply_add(Whole sum, const uint8_t* values, const int8_t* weights) { return dot(sum, values, weights); }
};

// Real values, multiplied one at a time.
struct Reals : Values<float> {
    typedef float Weight;
    typedef float Sum;
    typedef Vector Sums;
    static constexpr int TOGETHER = 1;
    int64_t tap() const { return channels; }
    static Sums multiply_add(Vector sum, const float* value, const float* weights) {
        return ::multiply_add(broadcast(*value), load(weights), sum);
    }
};

inline Vector shifted(Vector sums) { return sums; }

// Gathers the inputs of one output pixel, tap after tap.
template <class In>
void gather(const In& in, const Windows& w, int64_t step, int64_t pixel, typename In::Value* to) {
    const int64_t x = pixel % w.width * w.stride_x - w.padding_x;
    const int64_t y = pixel / w.width % w.height * w.stride_y - w.padding_y;
    const int64_t image = pixel / (w.width * w.height) * in.height() * in.width(), tap = in.tap();
    for (int64_t i = 0; i < w.kernel_height; i++)
        for (int64_t j = 0; j < w.kernel_width; j++, to += tap) {
            const int64_t row = y + i * w.dilation_y, column = x + j * w.dilation_x;
            if (row < 0 || row >= in.height() || column < 0 || column >= in.width())
                std::fill(to, to + tap, typename In::Value(0));
            else
                in.gather(step, image + row * in.width() + column, to);
        }
}

// The sums of GROUP rows of `length` groups of values each. Several pieces are the weights' digits of 8 bits, highest first:
// intermediate overflow of the 32 bits cancels out, as long as the final sum fits.
template <int PIECES, class In>
void multiply(const typename In::Value* const* rows, const typename In::Weight* weights, int64_t length,
              typename In::Sum* const* sums) {
    typename In::Sums sum[GROUP][VECTORS] = {};
    const typename In::Value* row[GROUP];
    for (int r = 0; r < GROUP; r++) row[r] = rows[r];
    for (int piece = 0; piece < PIECES; piece++) {
        if (piece)
            for (int r = 0; r < GROUP; r++)
                for (int v = 0; v < VECTORS; v++) sum[r][v] = shifted(sum[r][v]);
        for (int64_t i = 0; i < length; i++, weights += LANES * In::TOGETHER)
#pragma GCC unroll 12
            for (int r = 0; r < GROUP; r++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sum[r][v] = In::multiply_add(sum[r][v], row[r] + i * In::TOGETHER, weights + v * WIDTH * In::TOGETHER);
    }
#pragma GCC unroll 12
    for (int r = 0; r < GROUP; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) std::memcpy(sums[r] + v * WIDTH, &sum[r][v], sizeof sum[r][v]);
}

// The sums [n, LANES] of n rows, `stride` values apart, for one tile of weights.
template <int PIECES, class In>
void multiply_by_vectors(const typename In::Value* values, int64_t stride, int64_t n, const typename In::Weight* weights,
                         int64_t length, typename In::Sum* sums) {
    for (int64_t r = 0; r < n; r += GROUP) {
        const typename In::Value* row[GROUP];
        typename In::Sum* to[GROUP];
        for (int64_t i = 0; i < GROUP; i++) {
            // The last row is repeated to fill a group.
            const int64_t at = std::min(r + i, n - 1);
            row[i] = values + at * stride;
            to[i] = sums + at * LANES;
        }
        multiply<PIECES, In>(row, weights, length, to);
    }
}

// `weights` are [tiles, pieces, inputs / TOGETHER, LANES, TOGETHER], where the inputs of a tap are padded with zeros.
template <int PIECES, class In>
void dense_product(const In& in, const Windows& w, const typename In::Weight* weights, const Epilogue& e, int64_t threads) {
    typedef typename In::Value Value;
    typedef typename In::Sum Sum;
    const int64_t pixels = in.images() * w.height * w.width, steps = in.steps(), shown = in.shown();
    const int64_t length = w.taps() * in.tap() / In::TOGETHER;
    const int64_t stride = (length * In::TOGETHER + 63) / 64 * 64 + SLACK / int64_t(sizeof(Value));
    constexpr bool BYTES = std::is_same_v<Value, uint8_t>;
    const int64_t depth = BYTES ? tile_depth(length) : 0, whole = depth ? TILED_ROWS : 1;
    const int64_t fitting = GATHERED_BYTES / (stride * int64_t(sizeof(Value)));
    const int64_t rows = std::clamp<int64_t>(ceil_divide(fitting, whole) * whole, 1, GATHERED_ROWS / whole * whole);
    int64_t blocks = ceil_divide(pixels, std::max<int64_t>(1, rows / shown));
    blocks = std::min(pixels, ceil_divide(blocks, threads) * threads);
    const int64_t share = ceil_divide(pixels, blocks);
    const bool streams = e.streams(pixels * steps);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
        static thread_local Buffer<Value> gathered;
        static thread_local Buffer<Sum> summed;
        const int64_t first = block * share, count = std::min(share, pixels - first), n = shown * count;
        if (count <= 0) continue;
        // The rows behind the last one, up to whole tiles, hold anything, and so do their sums.
        const int64_t multiplied = ceil_divide(n, whole) * whole;
        Value* values = gathered.reserve(multiplied * stride);
        Sum* sums = summed.reserve(multiplied * LANES);
        for (int64_t t = 0; t < shown; t++)
            for (int64_t q = 0; q < count; q++) gather(in, w, t, first + q, values + (t * count + q) * stride);
        const Tiles tiles(depth);
        for (int64_t tile = 0; tile < e.tiles(); tile++) {
            const typename In::Weight* of_tile = weights + tile * PIECES * length * LANES * In::TOGETHER;
            if (!depth) multiply_by_vectors<PIECES, In>(values, stride, n, of_tile, length, sums);
            if constexpr (BYTES)
                if (depth) multiply_by_tiles<PIECES>(values, stride, multiplied, of_tile, length, depth, sums);
            finish<Sum>(e, tile, steps, first, count, {sums, LANES, shown == 1 ? 0 : count * LANES}, streams);
        }
        if (streams) finish_streams();
    }
}

// One weight per input channel and tap, [taps, channels], on real values [frames, height, width, channels].
void depthwise(const float* x, int64_t frames, int64_t height, int64_t width, int64_t channels, const Windows& w,
               const float* weights, float* out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t pixel = 0; pixel < frames * w.height * w.width; pixel++) {
        const int64_t left = pixel % w.width * w.stride_x - w.padding_x;
        const int64_t top = pixel / w.width % w.height * w.stride_y - w.padding_y;
        const float* frame = x + pixel / (w.width * w.height) * height * width * channels;
        float* to = out + pixel * channels;
        std::fill(to, to + channels, 0.f);
        for (int64_t tap = 0; tap < w.taps(); tap++) {
            const int64_t row = top + tap / w.kernel_width * w.dilation_y;
            const int64_t column = left + tap % w.kernel_width * w.dilation_x;
            if (row < 0 || row >= height || column < 0 || column >= width) continue;
            const float *from = frame + (row * width + column) * channels, *weight = weights + tap * channels;
            int64_t c = 0;
            for (; c + WIDTH <= channels; c += WIDTH)
                store(to + c, multiply_add(load(from + c), load(weight + c), load(to + c)));
            for (; c < channels; c++) to[c] = std::fma(from[c], weight[c], to[c]);
        }
    }
}

}  // namespace
