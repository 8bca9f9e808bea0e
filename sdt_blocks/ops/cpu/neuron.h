// The neuron: what Python tells of it, and one step of it, for numbers and for vectors of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace {

enum Reset { ZERO, SUBTRACT, NONE, ANY };  // ANY: told apart when running
enum Kind { SIGMOID, ATAN, FAST_SIGMOID, TRIANGULAR, STRAIGHT_THROUGH };

// The same fields in the same order as in bindings.py. `inv_tau` stands where no tensor gives it.
struct Neuron {
    double inv_tau, threshold, alpha;
    int64_t reset, detach_reset, strict, surrogate;
};

// The equations' constants; resets are told apart by factors, so that every loop has one form.
template <class S> struct Dynamics {
    S threshold, fires_at, to_zero, taken, alpha;
    bool follows;  // the gradient runs through the reset

    explicit Dynamics(const Neuron& neuron)
        : threshold(S(neuron.threshold)),
          fires_at(neuron.strict ? std::nextafter(threshold, std::numeric_limits<S>::infinity()) : threshold),
          to_zero(neuron.reset == ZERO ? S(1) : S(0)),
          taken(neuron.reset == SUBTRACT ? threshold : S(0)), alpha(S(neuron.alpha)),
          follows(!neuron.detach_reset && neuron.reset != NONE) {}
    bool fires(S h) const { return h >= fires_at; }
    // What the reset keeps of the membrane, as a factor, and what it takes. As arithmetic: loops with choices do not all
    // vectorize.
    S kept(bool fired) const { return 1 - to_zero * (fired ? S(1) : S(0)); }
    S lost(bool fired) const { return (fired ? S(1) : S(0)) * taken; }
    S scaled(S h, bool fired) const { return h * kept(fired); }
    S lowered(S h, bool fired) const { return h - lost(fired); }
};

// The membrane after one step with input y, from the one before, which may have `fired`. As in the equations, both are
// before their reset. Constants is `Dynamics`, or the like of it for vectors.
template <int RESET = ANY, class Constants, class V, class Fired>
inline V step(const Constants& c, V y, V h, Fired fired, V inv_tau) {
    const V u = RESET == ZERO || RESET == ANY ? c.scaled(h, fired) : h;
    const V next = u + (y - u) * inv_tau;
    return RESET == SUBTRACT || RESET == ANY ? c.lowered(next, fired) : next;
}

}  // namespace
