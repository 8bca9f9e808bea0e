// What all CPU kernels on dense tensors share: bfloat16 as raw bits, loops and threads.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

// Iterations of such a loop are independent, even if arrays are the same.
#define SIMD _Pragma("omp simd")
#define PRAGMA(text) _Pragma(#text)
// Such a loop may add up `sum` in any order.
#define SUM(sum) PRAGMA(omp simd reduction(+ : sum))

namespace {

// Allocates at cache-line boundaries, so that no aligned vector access crosses a line.
template <class T> struct Aligned {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    Aligned() = default;
    template <class U> Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
    void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
    template <class U> bool operator==(const Aligned<U>&) const { return true; }
    template <class U> bool operator!=(const Aligned<U>&) const { return false; }
};
template <class T> using Buffer = std::vector<T, Aligned<T>>;

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
