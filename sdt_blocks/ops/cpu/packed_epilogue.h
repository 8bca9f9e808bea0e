// What follows the sums of a product while they are in the cache: norm, shortcut, membrane, neuron, spikes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "neuron.h"

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, VECTORS = 2, ROWS = 8;
#elif defined(__AVX__)
constexpr int WIDTH = 8, VECTORS = 2, ROWS = 4;
#else
constexpr int WIDTH = 4, VECTORS = 4, ROWS = 4;
#endif
constexpr int LANES = WIDTH * VECTORS;
constexpr int SIDE_BY_SIDE = 2;  // pixels whose neurons are computed together
constexpr int64_t STREAM_BYTES = 16 << 20;  // a larger membrane would be evicted from the caches before it is read

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Whole __attribute__((vector_size(4 * WIDTH)));

inline Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
// Integers, converted to the nearest float32.
inline Vector load(const int32_t* from) {
    Whole v;
    std::memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, Vector);
}
inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }
// Stores bypassing the caches, at a multiple of the vector's size; call `finish_streams` before others read it.
inline void stream(float* to, Vector v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, v);
#elif defined(__AVX__)
    _mm256_stream_ps(to, v);
#else
    store(to, v);
#endif
}
inline void finish_streams() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}
inline Vector broadcast(float x) { return x - Vector{}; }

// a * b + c with one rounding.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    for (int i = 0; i < WIDTH; i++) a[i] = std::fma(a[i], b[i], c[i]);
    return a;
#endif
}

// Which lanes' neurons fired.
#if defined(__AVX512F__)
typedef __mmask16 Fired;
inline Fired at_least(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Vector choose(Fired fired, Vector a, Vector b) { return _mm512_mask_blend_ps(fired, b, a); }
inline uint32_t bits(Fired fired) { return fired; }
#else
typedef decltype(Vector{} >= Vector{}) Fired;
inline Fired at_least(Vector a, Vector b) { return a >= b; }
inline Vector choose(Fired fired, Vector a, Vector b) { return fired ? a : b; }
inline uint32_t bits(Fired fired) {
#if defined(__AVX__)
    return _mm256_movemask_ps(__m256(fired));
#else
    uint32_t bits = 0;
    for (int i = 0; i < WIDTH; i++) bits |= uint32_t(fired[i] & 1) << i;
    return bits;
#endif
}
#endif

// A thread's memory that outlives the call: mapping fresh pages would cost more than the work itself.
template <class T>
struct Buffer {
    T* data = nullptr;
    int64_t size = 0;
    T* reserve(int64_t wanted) {
        if (wanted > size) {
            std::free(data);
            size = (wanted * int64_t(sizeof(T)) + 4095) / 4096 * 4096 / int64_t(sizeof(T));
            data = static_cast<T*>(std::aligned_alloc(4096, (size * sizeof(T) + 4095) / 4096 * 4096));
        }
        return data;
    }
    ~Buffer() { std::free(data); }
};

// Spikes [steps, images, height, width, planes, words of channels]; consecutive steps are `step` words apart.
struct Frames {
    const uint64_t* words;
    int64_t step, steps, images, height, width, channels, planes;
    int64_t plane() const { return (channels + 63) / 64; }
    int64_t stride() const { return planes * plane(); }
    int64_t pixels() const { return images * height * width; }
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What follows a sum: u = residual + (sum + bias) * scale + shift, stored in `membrane` and passed to a neuron, each only if
// wanted. `constants` holds bias, scale, shift and 1 / tau of every tile.
struct Epilogue {
    const float* constants;
    int64_t channels;
    const float* residual;
    int64_t residual_step;
    float* membrane;
    int64_t membrane_step;
    uint64_t* spikes;
    int64_t spikes_step;  // from one time step to the next, in elements, like the other steps
    Neuron neuron;
    float* standing;  // [pixels, channels]: membranes before the first step, replaced by those after the last; may be null
    const float* limits;  // of an integer neuron, else null: plane i of its spikes is where u is at least limit i
    int64_t planes;       // of the spikes; one without limits
    int64_t plane() const { return (channels + 63) / 64; }
    int64_t stride() const { return planes * plane(); }
    int64_t tiles() const { return (channels + LANES - 1) / LANES; }
    // Whether a membrane of this many rows should bypass the caches, and is aligned for that.
    bool streams(int64_t rows) const {
        const bool aligned = reinterpret_cast<uintptr_t>(membrane) % (4 * WIDTH) == 0 && membrane_step % WIDTH == 0;
        return membrane && !residual && aligned && channels % LANES == 0 && 4 * rows * channels > STREAM_BYTES;
    }
};

// `Dynamics` for a vector of neurons.
struct VectorDynamics {
    Vector fires_at, left, taken;  // `left`: the factor by which a spike scales the membrane

    explicit VectorDynamics(const Dynamics<float>& d)
        : fires_at(broadcast(d.fires_at)), left(broadcast(1 - d.to_zero)), taken(broadcast(d.taken)) {}
    Fired fires(Vector h) const { return at_least(h, fires_at); }
#if defined(__AVX512F__)
    Vector scaled(Vector h, Fired fired) const { return _mm512_mask_mul_ps(h, fired, h, left); }
    Vector lowered(Vector h, Fired fired) const { return _mm512_mask_sub_ps(h, fired, h, taken); }
#else
    Vector scaled(Vector h, Fired fired) const { return h * choose(fired, left, broadcast(1)); }
    Vector lowered(Vector h, Fired fired) const { return h - choose(fired, taken, Vector{}); }
#endif
};

using Mask = std::conditional_t<LANES == 32, uint32_t, uint16_t>;

constexpr int LEVELS = ANY + 1;  // in place of a reset: an integer neuron, which has no state

// Real values by pixel and time step, at these distances in elements; null if there are none.
template <class T>
struct Strided {
    T* data;
    int64_t pixel, step;
};

// Constants of a tile's channels, for its first COUNT vectors.
template <int COUNT>
struct Constants {
    Vector bias[COUNT], scale[COUNT], shift[COUNT], inv_tau[COUNT];

    explicit Constants(const float* rows) {
        for (int v = 0; v < COUNT; v++, rows += WIDTH) {
            bias[v] = load(rows);
            scale[v] = load(rows + LANES);
            shift[v] = load(rows + 2 * LANES);
            inv_tau[v] = load(rows + 3 * LANES);
        }
    }
};

// The epilogue of PIXELS pixels in one tile; several together, since each step of a neuron waits for the one before.
template <int PIXELS, int RESET, bool STREAM, int COUNT, class Sum>
inline void finish_pixels(const Epilogue& e, const VectorDynamics& c, const Constants<COUNT>& of, int64_t steps,
                          Strided<const Sum> sums, Strided<const float> residual, Strided<float> membrane,
                          Strided<char> spikes, Strided<float> standing) {
    Vector h[PIXELS][COUNT] = {};
    Fired fired[PIXELS][COUNT] = {};
    for (int q = 0; standing.data && q < PIXELS; q++)
        for (int v = 0; v < COUNT; v++) {
            h[q][v] = load(standing.data + q * standing.pixel + v * WIDTH);
            fired[q][v] = c.fires(h[q][v]);
        }
    for (int64_t t = 0; t < steps; t++) {
#pragma GCC unroll 4
        for (int q = 0; q < PIXELS; q++) {
            Mask mask = 0;
            Vector u[COUNT];
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; v++) {
                Vector x = multiply_add(load(sums.data + q * sums.pixel + v * WIDTH) + of.bias[v], of.scale[v], of.shift[v]);
                if (residual.data) x = load(residual.data + q * residual.pixel + v * WIDTH) + x;
                if (STREAM)
                    stream(membrane.data + q * membrane.pixel + v * WIDTH, x);
                else if (membrane.data)
                    store(membrane.data + q * membrane.pixel + v * WIDTH, x);
                if constexpr (RESET == LEVELS) {
                    u[v] = x;
                    continue;
                }
                h[q][v] = step<RESET>(c, x, h[q][v], fired[q][v], of.inv_tau[v]);
                fired[q][v] = c.fires(h[q][v]);
                mask |= Mask(bits(fired[q][v])) << (v * WIDTH);
            }
            if (!spikes.data) continue;
            char* to = spikes.data + q * spikes.pixel;
            if constexpr (RESET == LEVELS)
                for (int64_t plane = 0; plane < e.planes; plane++, to += 8 * e.plane()) {
                    mask = 0;
                    for (int v = 0; v < COUNT; v++) mask |= Mask(bits(at_least(u[v], broadcast(e.limits[plane])))) << (v * WIDTH);
                    std::memcpy(to, &mask, sizeof mask);
                }
            else
                std::memcpy(to, &mask, sizeof mask);
        }
        sums.data += sums.step;
        if (residual.data) residual.data += residual.step;
        if (membrane.data) membrane.data += membrane.step;
        if (spikes.data) spikes.data += spikes.step;
    }
    for (int q = 0; standing.data && q < PIXELS; q++)
        for (int v = 0; v < COUNT; v++) store(standing.data + q * standing.pixel + v * WIDTH, h[q][v]);
}

template <class T> Strided<T> pixels_on(Strided<T> x, int64_t count) {
    if (x.data) x.data += count * x.pixel;
    return x;
}

// The epilogue of `count` pixels in the first COUNT vectors of one tile.
template <int RESET, bool STREAM, int COUNT, class Sum>
void finish_tile(const Epilogue& e, int64_t tile, int64_t steps, int64_t count, Strided<const Sum> sums,
                 Strided<const float> residual, Strided<float> membrane, Strided<char> spikes, Strided<float> standing) {
    const VectorDynamics c{Dynamics<float>(e.neuron)};
    const Constants<COUNT> of(e.constants + tile * 4 * LANES);
    const auto pixels = [&](auto finish, int64_t q) {
        finish(e, c, of, steps, pixels_on(sums, q), pixels_on(residual, q), pixels_on(membrane, q), pixels_on(spikes, q),
               pixels_on(standing, q));
    };
    int64_t q = 0;
    for (; q + SIDE_BY_SIDE <= count; q += SIDE_BY_SIDE) pixels(finish_pixels<SIDE_BY_SIDE, RESET, STREAM, COUNT, Sum>, q);
    for (; q < count; q++) pixels(finish_pixels<1, RESET, STREAM, COUNT, Sum>, q);
}

template <bool STREAM, int COUNT, class Sum>
auto finish_tile_of(int64_t reset) {
    return reset == ZERO       ? finish_tile<ZERO, STREAM, COUNT, Sum>
           : reset == SUBTRACT ? finish_tile<SUBTRACT, STREAM, COUNT, Sum>
           : reset == LEVELS   ? finish_tile<LEVELS, STREAM, COUNT, Sum>
                               : finish_tile<NONE, STREAM, COUNT, Sum>;
}

// Copies the first `lanes` lanes of a tile's real values, if both pointers are given.
template <class From>
void copy_lanes(Strided<float> to, Strided<From> from, int64_t lanes, int64_t steps, int64_t count) {
    for (int64_t t = 0; to.data && from.data && t < steps; t++)
        for (int64_t q = 0; q < count; q++)
            std::memcpy(to.data + q * to.pixel + t * to.step, from.data + q * from.pixel + t * from.step,
                        lanes * sizeof(float));
}

// The epilogue in one tile of `count` pixels from `first` on.
template <class Sum>
void finish(const Epilogue& e, int64_t tile, int64_t steps, int64_t first, int64_t count, Strided<const Sum> sums,
            bool streams) {
    static thread_local Buffer<float> copies;
    const int64_t at = first * e.channels + tile * LANES, lanes = std::min(int64_t(LANES), e.channels - tile * LANES);
    const int64_t reset = e.limits ? LEVELS : e.neuron.reset;
    const auto finish_tile = streams             ? finish_tile_of<true, VECTORS, Sum>(reset)
                             : lanes > LANES / 2 ? finish_tile_of<false, VECTORS, Sum>(reset)
                                                 : finish_tile_of<false, VECTORS / 2, Sum>(reset);
    Strided<const float> residual{e.residual ? e.residual + at : nullptr, e.channels, e.residual_step};
    Strided<float> membrane{e.membrane ? e.membrane + at : nullptr, e.channels, e.membrane_step};
    const Strided<float> standing{e.standing ? e.standing + at : nullptr, e.channels, 0};
    Strided<char> spikes{nullptr, 8 * e.stride(), 8 * e.spikes_step};
    if (e.spikes) spikes.data = reinterpret_cast<char*>(e.spikes + first * e.stride()) + tile * sizeof(Mask);
    if (lanes == LANES || (!e.residual && !e.membrane && !e.standing)) {
        finish_tile(e, tile, steps, count, sums, residual, membrane, spikes, standing);
        return;
    }
    // The last tile may be narrower than LANES: then its real values go through copies.
    const Strided<float> wide{copies.reserve(count * (steps + 1) * LANES), LANES, count * LANES};
    const Strided<float> stands{standing.data ? wide.data + steps * wide.step : nullptr, LANES, 0};
    // The unused lanes of a narrow tile must not fire. With 1 / tau = 0 a neuron stays at rest; levels need zeros.
    if (residual.data && e.limits) std::fill_n(wide.data, count * steps * LANES, 0.f);
    if (stands.data) std::fill_n(stands.data, count * LANES, 0.f);
    copy_lanes(wide, residual, lanes, steps, count);
    copy_lanes(stands, standing, lanes, 1, count);
    finish_tile(e, tile, steps, count, sums, {residual.data ? wide.data : nullptr, wide.pixel, wide.step}, wide, spikes, stands);
    copy_lanes(membrane, wide, lanes, steps, count);
    copy_lanes(standing, stands, lanes, 1, count);
}

}  // namespace
