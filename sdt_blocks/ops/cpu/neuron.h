// The neuron: its description as Python passes it, and one step of it, for single numbers and for vectors.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace {

enum Reset { ZERO, SUBTRACT, NONE, ANY };  // ANY: decided at run time
enum Kind { SIGMOID, ATAN, FAST_SIGMOID, TRIANGULAR, STRAIGHT_THROUGH };

// The same fields in the same order as in bindings.py. `inv_tau` is used where no tensor is given for it.
struct Neuron {
    double inv_tau, threshold, alpha;
    int64_t reset, detach_reset, strict, surrogate;
};

// Constants of the equations; the reset is expressed by factors, so that every loop has the same form.
template <class S> struct Dynamics {
    S threshold, fires_at, to_zero, taken, alpha;
    bool follows;  // whether the gradient passes through the reset

    explicit Dynamics(const Neuron& neuron)
        : threshold(S(neuron.threshold)),
          fires_at(neuron.strict ? std::nextafter(threshold, std::numeric_limits<S>::infinity()) : threshold),
          to_zero(neuron.reset == ZERO ? S(1) : S(0)),
          taken(neuron.reset == SUBTRACT ? threshold : S(0)), alpha(S(neuron.alpha)),
          follows(!neuron.detach_reset && neuron.reset != NONE) {}
    bool fires(S h) const { return h >= fires_at; }
    // The factor by which the reset scales the membrane, and what it subtracts. As arithmetic, because not all loops with
    // branches vectorize.
    S kept(bool fired) const { return 1 - to_zero * (fired ? S(1) : S(0)); }
    S lost(bool fired) const { return (fired ? S(1) : S(0)) * taken; }
    S scaled(S h, bool fired) const { return h * kept(fired); }
    S lowered(S h, bool fired) const { return h - lost(fired); }
};

// The membrane after one step with input y, from that of the step before, whose neuron may have `fired`. Both are taken before
// their reset, as in the equations. Constants is `Dynamics`, or its counterpart for vectors.
template <int RESET = ANY, class Constants, class V, class Fired>
inline V step(const Constants& c, V y, V h, Fired fired, V inv_tau) {
    const V u = RESET == ZERO || RESET == ANY ? c.scaled(h, fired) : h;
    const V next = u + (y - u) * inv_tau;
    return RESET == SUBTRACT || RESET == ANY ? c.lowered(next, fired) : next;
}

}  // namespace
