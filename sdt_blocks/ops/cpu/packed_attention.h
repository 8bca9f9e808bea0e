// Attention on packed spikes: what combines q, k and v, which are rows of words for each step, image and token.

#pragma once

#include <vector>

#include "packed_planes.h"

namespace {

// Rows [steps, images, tokens] of `planes` planes of words; consecutive rows are `step` words apart.
struct Rows {
    const uint64_t* words;
    int64_t step, channels, planes;
    int64_t plane() const { return (channels + 63) / 64; }
    const uint64_t* row(int64_t at) const { return words + at * step; }
};

// Calls `use(word, bits)` for every word that holds some of the channels from `first` up to `last`, with a mask of these.
template <class F> void each_word(int64_t first, int64_t last, F use) {
    for (int64_t c = first, next; c < last; c = next) {
        next = std::min(last, (c / 64 + 1) * 64);
        use(c / 64, ~uint64_t(0) >> (64 - (next - c)) << c % 64);
    }
}

// passed & neuron(sum over tokens of a & b). `standing` is as in `Epilogue`, [images, 64 * words] or null; so are the time
// constants, [64 * words].
void mask_over_tokens(const Rows& passed, const Rows& a, const Rows& b, uint64_t* out, int64_t steps, int64_t images,
                      int64_t tokens, const float* inv_tau, const Neuron& neuron, float* standing, int64_t threads) {
    const Dynamics<float> dynamics(neuron);
    const int64_t words = passed.plane();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < images * words; column++) {
        const int64_t image = column / words, word = column % words;
        float h[64] = {};
        if (standing) std::copy_n(standing + column * 64, 64, h);
        for (int64_t t = 0; t < steps; t++) {
            const int64_t first = (t * images + image) * tokens;
            // Counters of 64 channels in bit planes: plane i holds bit i of every count.
            uint64_t planes[40] = {};
            int used = 0;
            for (int64_t row = first; row < first + tokens; row++) {
                uint64_t carry = a.row(row)[word] & b.row(row)[word];
                for (int i = 0; carry; i++) {
                    const uint64_t both = planes[i] & carry;
                    planes[i] ^= carry;
                    carry = both;
                    used = std::max(used, i + 1);
                }
            }
            uint64_t fired = 0;
            for (int c = 0; c < 64; c++) {
                int64_t count = 0;
                for (int i = 0; i < used; i++) count |= int64_t(planes[i] >> c & 1) << i;
                h[c] = step(dynamics, float(count), h[c], dynamics.fires(h[c]), inv_tau[word * 64 + c]);
                fired |= uint64_t(dynamics.fires(h[c])) << c;
            }
            for (int64_t row = first; row < first + tokens; row++) out[row * words + word] = passed.row(row)[word] & fired;
        }
        if (standing) std::copy_n(h, 64, standing + column * 64);
    }
}

// k & neuron(number of spikes of q in a token's head). `tokens` are those of all images; `standing` is [tokens, heads] or null.
void mask_over_heads(const Rows& q, const Rows& k, uint64_t* out, int64_t steps, int64_t tokens, int64_t heads,
                     const float* inv_tau, const Neuron& neuron, float* standing, int64_t threads) {
    const Dynamics<float> dynamics(neuron);
    const int64_t words = q.plane(), size = q.channels / heads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token++) {
        static thread_local Buffer<float> states;
        float* h = states.reserve(heads);
        if (standing) std::copy_n(standing + token * heads, heads, h);
        else std::fill_n(h, heads, 0.f);
        for (int64_t row = token; row < steps * tokens; row += tokens) {
            uint64_t* to = out + row * words;
            std::fill_n(to, words, 0);
            for (int64_t head = 0; head < heads; head++) {
                const int64_t first = head * size;
                int64_t count = 0;
                each_word(first, first + size, [&](int64_t w, uint64_t bits) {
                    count += __builtin_popcountll(q.row(row)[w] & bits);
                });
                h[head] = step(dynamics, float(count), h[head], dynamics.fires(h[head]), inv_tau[head]);
                if (!dynamics.fires(h[head])) continue;
                each_word(first, first + size, [&](int64_t w, uint64_t bits) { to[w] |= k.row(row)[w] & bits; });
            }
        }
        if (standing) std::copy_n(h, heads, standing + token * heads);
    }
}

// An active channel of a head, and its level.
struct Active {
    int64_t channel;
    float level;
};

// Lists the active ones among the channels from `first` up to `last` of a row, numbered from `first`.
inline int64_t list_active(const Rows& of, int64_t row, int64_t first, int64_t last, Active* to) {
    const uint64_t* words = of.row(row);
    Active* const start = to;
    each_word(first, last, [&](int64_t word, uint64_t mask) {
        // Levels are packed as which of them are above i: every one but zero is above 0.
        for (uint64_t bits = words[word] & mask; bits; bits &= bits - 1) {
            const int bit = __builtin_ctzll(bits);
            int64_t level = 1;
            for (int64_t plane = 1; plane < of.planes; plane++) level += words[plane * of.plane() + word] >> bit & 1;
            *to++ = {word * 64 + bit - first, float(level)};
        }
    });
    return to - start;
}

// Calls `use` for parts of a row of `width` values, a multiple of two vectors, with their place and their number of vectors.
template <class F> void in_vectors(int64_t width, F use) {
    int64_t at = 0;
    for (; at + 4 * WIDTH <= width; at += 4 * WIDTH) use(at, std::integral_constant<int, 4>());
    if (at < width) use(at, std::integral_constant<int, 2>());
}

// scale * q (k^T v) for each of the `frames` and heads, [frames, tokens, channels of v]. Sums are whole numbers in float32.
void linear_attention(const Rows& q, const Rows& k, const Rows& v, float* out, int64_t frames, int64_t tokens, int64_t heads,
                      float scale, int64_t threads) {
    const int64_t size = q.channels / heads, values = v.channels / heads;
    const int64_t width = ceil_divide(values, 2 * WIDTH) * 2 * WIDTH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < frames * heads; task++) {
        static thread_local Buffer<float> products, rows;
        static thread_local std::vector<Active> active;
        const int64_t head = task % heads, first = task / heads * tokens;
        const int64_t from = head * values / 64, end = ceil_divide((head + 1) * values, 64);
        active.resize(size);
        float *kv = products.reserve(size * width), *levels = rows.reserve((end - from) * 64 + width);
        // Behind the head's own values are those of the next head, or of what was there before: nothing reads their sums.
        float* row = levels + head * values % 64;
        std::fill_n(kv, size * width, 0.f);
        for (int64_t at = first; at < first + tokens; at++) {
            const int64_t of_k = list_active(k, at, head * size, (head + 1) * size, active.data());
            if (!of_k) continue;
            for (int64_t word = from; word < end; word++)
                expand_levels(v.row(at) + word, v.plane(), v.planes, 64, levels + (word - from) * 64);
            in_vectors(width, [&](int64_t begin, auto vectors) {
                Vector of_v[vectors];
                for (int i = 0; i < vectors; i++) of_v[i] = load(row + begin + i * WIDTH);
                for (int64_t n = 0; n < of_k; n++) {
                    float* to = kv + active[n].channel * width + begin;
                    for (int i = 0; i < vectors; i++, to += WIDTH)
                        store(to, multiply_add(broadcast(active[n].level), of_v[i], load(to)));
                }
            });
        }
        for (int64_t at = first; at < first + tokens; at++) {
            const int64_t of_q = list_active(q, at, head * size, (head + 1) * size, active.data());
            in_vectors(width, [&](int64_t begin, auto vectors) {
                Vector sum[vectors] = {};
                for (int64_t n = 0; n < of_q; n++) {
                    const float* from = kv + active[n].channel * width + begin;
                    for (int i = 0; i < vectors; i++, from += WIDTH)
                        sum[i] = multiply_add(broadcast(active[n].level), load(from), sum[i]);
                }
                for (int i = 0; i < vectors; i++) store(row + begin + i * WIDTH, sum[i] * broadcast(scale));
            });
            std::copy_n(row, values, out + at * v.channels + head * values);
        }
    }
}

}  // namespace
