// The activations of masked nets: tarflow_fast/made/net.py has them in PyTorch.
#pragma once
#include "../../tarflow.h"
#include "lanes.h"

namespace tf::TF_ISA {
namespace {

// f of `count` numbers, a multiple of the lanes. `to` may be `from`.
template <class T, class Function>
inline void each(const T* from, T* to, int64_t count, Function f) {
    for (int64_t k = 0; k < count; k += LanesOf<T>::COUNT) store(to + k, f(load(from + k)));
}

template <class T>
void activate(int activation, double slope, const T* from, T* to, int64_t count) {
    typedef typename LanesOf<T>::Vector V;
    const V below = all<V>(slope);
    switch (activation) {
        case TF_MADE_RELU: return each(from, to, count, [](V x) { return x < V{} ? V{} : x; });
        case TF_MADE_LEAKY_RELU: return each(from, to, count, [&](V x) { return x < V{} ? x * below : x; });
        case TF_MADE_ELU: return each(from, to, count, [&](V x) { return x < V{} ? below * expm1(x) : x; });
        case TF_MADE_TANH: return each(from, to, count, [](V x) { return tanh(x); });
        case TF_MADE_SIGMOID: return each(from, to, count, [](V x) { return sigmoid(x); });
        case TF_MADE_SILU: return each(from, to, count, [](V x) { return x / (all<V>(1) + exp(-x)); });
        case TF_MADE_GELU: return each(from, to, count, [](V x) { return gelu(x); });
        default: return each(from, to, count, [](V x) { return x; });
    }
}

}  // namespace
}  // namespace tf::TF_ISA
