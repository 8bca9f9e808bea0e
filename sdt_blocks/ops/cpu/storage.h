// What all CPU kernels on dense tensors share: bfloat16 as its bits, loops and threads.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

// Each pass of such a loop is on its own, though arrays may be the same.
#define SIMD _Pragma("omp simd")
#define PRAGMA(text) _Pragma(#text)
// In such a loop `sum` is added up in any order.
#define SUM(sum) PRAGMA(omp simd reduction(+ : sum))

namespace {

struct bfloat16 { uint16_t bits; };

inline float load(float v) { return v; }
inline float load(bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

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

}  // namespace
