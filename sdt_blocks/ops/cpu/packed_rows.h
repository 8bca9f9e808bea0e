// Products of few real values, such as an image's channels: row by row of the result, directly from a zero-padded copy of the
// input rows. Sums, neurons and the pooling that follows stay in the cache.

#pragma once

#include "packed_dense.h"
#include "packed_pool.h"

namespace {

constexpr int64_t COPIED_BYTES = 128 << 10;  // of input rows that a task copies
constexpr int64_t POOLED_ROWS = 16;          // of a task: two neighboring tasks both compute the row of neurons between them

// Real values with arbitrary strides, in elements. `frames` is the number of steps, or 1 if a frame is shown at every step.
struct Picture {
    const float* x;
    int64_t frames, images, height, width, channels;
    int64_t to_frame, to_image, to_row, to_column, to_channel;

    // Copies rows from `top` and columns from `left` on, channels innermost, with zeros outside the picture.
    void copy(int64_t frame, int64_t image, int64_t top, int64_t rows, int64_t left, int64_t columns, float* to) const {
        const int64_t begin = std::clamp<int64_t>(-left, 0, columns), end = std::clamp<int64_t>(width - left, begin, columns);
        for (int64_t y = top; y < top + rows; y++, to += columns * channels) {
            if (y < 0 || y >= height || begin == end) {
                std::fill(to, to + columns * channels, 0.f);
                continue;
            }
            const float* from = x + frame * to_frame + image * to_image + y * to_row + (left + begin) * to_column;
            std::fill(to, to + begin * channels, 0.f);
            for (int64_t c = 0; c < channels; c++)
                for (int64_t column = begin; column < end; column++)
                    to[column * channels + c] = from[(column - begin) * to_column + c * to_channel];
            std::fill(to + end * channels, to + columns * channels, 0.f);
        }
    }
};

// The size of a zero-padded copy of the picture's rows that `results` rows of the result need.
struct Copied {
    const Windows& w;
    int64_t channels, columns, rows;  // `rows` rows of `columns` pixels for each step
    Copied(const Picture& in, const Windows& windows, int64_t results)
        : w(windows), channels(in.channels), columns((w.width - 1) * w.stride_x + (w.kernel_width - 1) * w.dilation_x + 1),
          rows((results - 1) * w.stride_y + (w.kernel_height - 1) * w.dilation_y + 1) {}
    int64_t row() const { return columns * channels; }
    int64_t size() const { return rows * row(); }
};

// The sums of `count` neighboring pixels in the first COUNT vectors of a tile, over taps, then channels, in ascending order,
// with one rounding per product added.
template <int COUNT>
__attribute__((noinline)) void multiply_row(const float* values, const Copied& of, const float* weights, int64_t count, float* sums) {
    const Windows& w = of.w;
    // Adjacent taps without a gap are treated as one.
    const int64_t length = (w.dilation_x == 1 ? w.kernel_width : 1) * of.channels, gap = w.dilation_x * of.channels;
    const int64_t segments = w.dilation_x == 1 ? 1 : w.kernel_width, pixel = w.stride_x * of.channels;
    for (int64_t q = 0; q < count; q += GROUP) {
        Vector sum[GROUP][COUNT] = {};
        const float *row[GROUP], *weight = weights;
        // The last pixel is repeated to fill a group.
        for (int64_t r = 0; r < GROUP; r++) row[r] = values + std::min(q + r, count - 1) * pixel;
        for (int64_t i = 0; i < w.kernel_height; i++)
            for (int64_t j = 0; j < segments; j++) {
                const int64_t first = i * w.dilation_y * of.row() + j * gap;
                for (int64_t k = first; k < first + length; k++, weight += LANES)
#pragma GCC unroll 12
                    for (int r = 0; r < GROUP; r++)
#pragma GCC unroll 4
                        for (int v = 0; v < COUNT; v++)
                            sum[r][v] = multiply_add(broadcast(row[r][k]), load(weight + v * WIDTH), sum[r][v]);
            }
#pragma GCC unroll 12
        for (int r = 0; r < GROUP; r++)
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; v++) store(sums + std::min(q + r, count - 1) * LANES + v * WIDTH, sum[r][v]);
    }
}

// One row of the result, which the epilogue stores from `pixel` on; `values` are the input rows it needs, for every frame.
void product_row(const Picture& in, const Copied& of, const float* values, int64_t frame_size, const float* weights,
                 const Epilogue& e, int64_t steps, int64_t pixel, Buffer<float>& buffer, bool streams) {
    const int64_t width = of.w.width, inputs = of.w.taps() * of.channels;
    const int64_t block = std::max<int64_t>(1, GATHERED_ROWS / GROUP / in.frames) * GROUP;
    float* sums = buffer.reserve(in.frames * std::min(block, width) * LANES);
    for (int64_t x = 0; x < width; x += block)
        for (int64_t tile = 0; tile < e.tiles(); tile++) {
            const int64_t count = std::min(block, width - x);
            const bool wide = e.channels - tile * LANES > LANES / 2;
            const float* of_tile = weights + tile * inputs * LANES;
            for (int64_t t = 0; t < in.frames; t++) {
                const float* at = values + t * frame_size + x * of.w.stride_x * of.channels;
                float* to = sums + t * count * LANES;
                wide ? multiply_row<VECTORS>(at, of, of_tile, count, to)
                     : multiply_row<VECTORS / 2>(at, of, of_tile, count, to);
            }
            finish<float>(e, tile, steps, pixel + x, count, {sums, LANES, in.frames == 1 ? 0 : count * LANES}, streams);
        }
}

// With `pool`, the spikes are replaced by their maxima over 3x3 windows, stride 2, padding 1.
void rows_product(const Picture& in, const Windows& w, const float* weights, const Epilogue& e, int64_t steps, bool pool,
                  int64_t threads) {
    const bool streams = e.streams(in.images * w.height * w.width * steps);
    const int64_t results = pool ? pooled(w.height) : w.height, words = e.stride(), row_words = w.width * words;
    const int64_t row_bytes = Copied(in, w, 1).row() * in.frames * w.stride_y * int64_t(sizeof(float));
    int64_t band = std::max<int64_t>(1, pool ? std::min(POOLED_ROWS, COPIED_BYTES / row_bytes / 2) : COPIED_BYTES / row_bytes);
    band = std::min(band, ceil_divide(in.images * results, threads));
    const int64_t bands = ceil_divide(results, band);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < in.images * bands; task++) {
        static thread_local Buffer<float> copies, summed;
        static thread_local Buffer<uint64_t> fired, columns;
        const int64_t image = task / bands, first = task % bands * band, last = std::min(first + band, results);
        const int64_t top = pool ? std::max<int64_t>(2 * first - 1, 0) : first;
        const int64_t bottom = pool ? std::min(2 * last, w.height) : last;
        const Copied of(in, w, bottom - top);
        float* values = copies.reserve(in.frames * of.size());
        for (int64_t t = 0; t < in.frames; t++)
            in.copy(t, image, top * w.stride_y - w.padding_y, of.rows, -w.padding_x, of.columns, values + t * of.size());
        Epilogue own = e;
        if (pool) {
            // A ring of the last three rows of neurons.
            own.spikes = fired.reserve(3 * row_words * steps);
            own.spikes_step = 3 * row_words;
            std::fill(own.spikes, own.spikes + 3 * row_words * steps, 0);
            columns.reserve(row_words);
        }
        for (int64_t y = top; y < bottom; y++) {
            const int64_t pixel = pool ? y % 3 * w.width : (image * w.height + y) * w.width;
            const float* from = values + (y - top) * w.stride_y * of.row();
            product_row(in, of, from, of.size(), weights, own, steps, pixel, summed, streams);
            // A window is complete with the row below its center, or with its center at the lower edge.
            const int64_t center = y + 1 == w.height ? y / 2 * 2 : y - 1;
            if (!pool || center % 2 || center < 2 * first) continue;
            for (int64_t t = 0; t < steps; t++) {
                const auto row = [&](int64_t at) -> const uint64_t* {
                    return at < 0 || at >= w.height ? nullptr : own.spikes + t * own.spikes_step + at % 3 * row_words;
                };
                uint64_t* to = e.spikes + t * e.spikes_step + (image * results + center / 2) * pooled(w.width) * words;
                pool_spikes(row(center - 1), row(center), row(center + 1), w.width, words, columns.data, to);
            }
        }
        if (streams) finish_streams();
    }
}

}  // namespace
