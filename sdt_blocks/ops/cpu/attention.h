// Spike-driven self-attention in one pass: normalization and neurons of q, k and v, the sum over tokens, its neuron and the
// mask; also what the gradient needs of it.
//
// Frames are dense, images outermost; either a channel's tokens lie side by side (`inner` > 1) or a token's channels do. Spikes
// are kept as one byte per token, step and channel: q in bit 0, k in bit 1, v in bit 2.

#pragma once

#include "blocks.h"

namespace {

// A part of a frame that keeps the tokens of a channel together: one channel of an image, or some neighboring channels.
struct Piece {
    int64_t image, channel, channels;  // the first channel, and how many
    int64_t start, rows, stride;       // rows of consecutive neurons
};

struct Pieces {
    const Layout& l;
    int64_t images, tokens;
    bool together;  // whether a row holds tokens of one channel; otherwise it holds channels of one token
    int64_t lanes, per_image;

    Pieces(const Layout& layout, int64_t images)
        : l(layout), images(images), tokens(l.size / (images * l.channels)), together(l.inner > 1), lanes(together ? 128 : 64),
          per_image(together ? l.channels : (l.channels + lanes - 1) / lanes) {}
    int64_t width(const Piece& p, int64_t row) const { return together ? std::min(lanes, tokens - row * lanes) : p.channels; }
    template <class F> void share(int thread, int threads, F body) const {
        const int64_t count = images * per_image;
        for (int64_t id = count * thread / threads; id < count * (thread + 1) / threads; ++id) {
            const int64_t image = id / per_image, channel = id % per_image * (together ? 1 : lanes);
            const int64_t start = image * tokens * l.channels + channel * (together ? tokens : 1);
            if (together) body(Piece{image, channel, 1, start, (tokens + lanes - 1) / lanes, lanes});
            else body(Piece{image, channel, std::min(lanes, l.channels - channel), start, tokens, l.channels});
        }
    }
    // Writes into `row` the value of each of its neurons, from one value per channel.
    template <class S> void spread(const Piece& p, const S* values, S* row) const {
        if (together) std::fill_n(row, lanes, values[p.channel]);
        else std::copy_n(values + p.channel, p.channels, row);
    }
    // Turns sums per neuron of a row into sums per channel.
    template <class S> void gather(const Piece& p, S* row) const {
        if (together) row[0] = std::accumulate(row, row + lanes, S(0));
    }
};

// scale and shift: [3, channels], for q, k and v. neurons: four, and inv_tau: [4, channels], the last for the sum. results: the
// sums and the spikes of their neurons, [2, steps, images, channels].
template <class X, class S>
void attend(const Layout& l, int64_t images, const Neuron* neurons, const X* q, const X* k, const X* v, const S* scale,
            const S* shift, const S* inv_tau, X* out, uint8_t* codes, S* results) {
    const Pieces pieces(l, images);
    const X* const x[] = {q, k, v};
    const Dynamics<S> dynamics[] = {Dynamics<S>(neurons[0]), Dynamics<S>(neurons[1]), Dynamics<S>(neurons[2]),
                                    Dynamics<S>(neurons[3])};
    parallel(l.threads, [&](int thread, int threads) {
        const int64_t w = pieces.lanes;
        Buffer<S> scales(3 * w), shifts(3 * w), times(4 * w), h(3 * w), fired(3 * w), wide(w);
        Buffer<S> sums(l.steps * w), masks(l.steps * w);
        std::vector<uint8_t> own;
        pieces.share(thread, threads, [&](const Piece& p) {
            for (int64_t i = 0; i < 4; ++i) {
                if (i < 3) pieces.spread(p, scale + i * l.channels, &scales[i * w]);
                if (i < 3) pieces.spread(p, shift + i * l.channels, &shifts[i * w]);
                if (inv_tau) pieces.spread(p, inv_tau + i * l.channels, &times[i * w]);
                else std::fill_n(&times[i * w], w, S(neurons[i].inv_tau));
            }
            if (!codes) own.resize(p.rows * l.steps * w);
            const auto code = [&](int64_t row, int64_t t) {
                return codes ? codes + t * l.size + p.start + row * p.stride : own.data() + (row * l.steps + t) * w;
            };
            std::fill(sums.begin(), sums.end(), S(0));
            for (int64_t row = 0; row < p.rows; ++row) {
                const int64_t n = pieces.width(p, row), at = p.start + row * p.stride;
                std::fill(h.begin(), h.end(), S(0));
                for (int64_t t = 0; t < l.steps; ++t) {
                    for (int64_t i = 0; i < 3; ++i) {
                        const X* in = x[i] + t * l.size + at;
                        prefetch<0>(in + AHEAD * p.stride, n);
                        advance<true, true>(dynamics[i], n, widen(n, in, wide), &scales[i * w], &shifts[i * w], &times[i * w],
                                            &h[i * w], &h[i * w], &fired[i * w]);
                    }
                    const S *fired_q = fired.data(), *fired_k = fired_q + w, *fired_v = fired_k + w;
                    S* sum = &sums[t * w];
                    uint8_t* to = code(row, t);
                    SIMD for (int64_t i = 0; i < n; ++i) sum[i] += fired_k[i] * fired_v[i];
                    SIMD for (int64_t i = 0; i < n; ++i) to[i] = uint8_t(int32_t(fired_q[i] + 2 * fired_k[i] + 4 * fired_v[i]));
                }
            }
            std::fill(h.begin(), h.end(), S(0));
            for (int64_t t = 0; t < l.steps; ++t) {
                S *sum = &sums[t * w], *mask = &masks[t * w];
                pieces.gather(p, sum);
                S* const to = results + (t * images + p.image) * l.channels + p.channel;
                std::copy_n(sum, p.channels, to);
                advance<false, true>(dynamics[3], p.channels, sum, (S*)nullptr, (S*)nullptr, &times[3 * w], h.data(), h.data(),
                                     mask);
                std::copy_n(mask, p.channels, to + l.steps * images * l.channels);
                if (pieces.together) std::fill_n(mask, w, mask[0]);
            }
            for (int64_t row = 0; row < p.rows; ++row)
                for (int64_t t = 0; t < l.steps; ++t) {
                    const int64_t n = pieces.width(p, row);
                    const uint8_t* from = code(row, t);
                    const S* mask = &masks[t * w];
                    X* to = out + t * l.size + p.start + row * p.stride;
                    prefetch<1>(to + AHEAD * p.stride, n);
                    SIMD for (int64_t i = 0; i < n; ++i) store(S(from[i] & 1) * mask[i], to[i]);
                }
        });
    });
}

// The gradient of the mask: grad * q summed over tokens, [steps, images, channels].
template <class X, class S>
void mask_gradient(const Layout& l, int64_t images, const X* grad, int64_t grad_step, const uint8_t* codes, S* result) {
    const Pieces pieces(l, images);
    parallel(l.threads, [&](int thread, int threads) {
        Buffer<S> sums(pieces.lanes);
        pieces.share(thread, threads, [&](const Piece& p) {
            for (int64_t t = 0; t < l.steps; ++t) {
                std::fill(sums.begin(), sums.end(), S(0));
                for (int64_t row = 0; row < p.rows; ++row) {
                    const int64_t n = pieces.width(p, row), at = p.start + row * p.stride;
                    const X* of = grad + t * grad_step + at;
                    const uint8_t* code = codes + t * l.size + at;
                    SIMD for (int64_t i = 0; i < n; ++i) sums[i] += load(of[i]) * S(code[i] & 1);
                }
                pieces.gather(p, sums.data());
                std::copy_n(sums.data(), p.channels, result + (t * images + p.image) * l.channels + p.channel);
            }
        });
    });
}

// Where the gradient of spikes comes from: given; given and multiplied by a mask; or a channel's gradient where another neuron
// fired.
template <class X, class S> struct Upstream {
    const X* grad;
    int64_t step;        // from one time step to the next in grad
    const S* mask;       // [steps, images, channels]
    const uint8_t* codes;
    int64_t images, bit;

    // The gradient for a block at step t, in `buffer` unless it can be used where it lies.
    const S* operator()(const Blocks& blocks, const Block& b, int64_t t, Buffer<S>& buffer) const {
        const Layout& l = blocks.l;
        S* row = buffer.data();
        if (grad && !mask) return widen(b.length, grad + t * step + b.start, buffer);
        if (!mask) {
            std::fill_n(row, b.length, S(0));
            return row;
        }
        const int64_t size = l.size / images;
        const S* values = mask + t * images * l.channels + b.start / size * l.channels + b.channel;
        if (blocks.meeting == SHARED) {
            std::fill_n(row, b.length, *values);
        } else if (blocks.meeting == PART) {
            std::copy_n(values, b.length, row);
        } else {
            for (int64_t i = 0; i < b.length; i += l.channels)
                std::copy_n(mask + (t * images + (b.start + i) / size) * l.channels, l.channels, row + i);
        }
        if (codes) {
            const uint8_t* code = codes + t * l.size + b.start;
            SIMD for (int64_t i = 0; i < b.length; ++i) row[i] *= S(code[i] >> bit & 1);
        } else {
            const X* of = grad + t * step + b.start;
            SIMD for (int64_t i = 0; i < b.length; ++i) row[i] *= load(of[i]);
        }
        return row;
    }
};

}  // namespace
