// The sweep through a masked net without Python, for the sanitizers: a small net with a context, a gate and a residual
// connection, both kinds of univariate transform, both types, batches that fill tiles and that do not. The bits on
// several threads must be those on one.
#include <stdio.h>
#include <string.h>

#include <vector>

#include "../../csrc/tarflow.h"

namespace {

constexpr int64_t D = 7, E = 2, H = 11;  // features, numbers of a context, hidden units

template <class T>
std::vector<T> draw(int64_t n, double scale) {
    static uint32_t state = 1;
    std::vector<T> values(n);
    for (T& value : values) {
        state = state * 1664525u + 1013904223u;
        value = T(scale * double(int32_t(state)) / 2147483648.0);
    }
    return values;
}

// Units in the order of their steps: unit u of n is final at step u D / n (hidden), and sees what is final before.
std::vector<int32_t> starts_of(int64_t units) {
    std::vector<int32_t> starts;
    for (int64_t s = 0; s <= D; ++s) starts.push_back(int32_t((s * units + D - 1) / D));
    return starts;
}

std::vector<int32_t> count_up(int64_t n) {
    std::vector<int32_t> values(n);
    for (int64_t k = 0; k < n; ++k) values[k] = int32_t(k);
    return values;
}

template <class T>
int check(bool spline, int64_t rows) {
    const int64_t P = spline ? 11 : 2, units[] = {H, H, D * P}, inputs[] = {D, H, H};
    std::vector<std::vector<T>> weights, biases;
    std::vector<std::vector<uint8_t>> masks;
    std::vector<std::vector<int32_t>> places, starts;
    const auto term = draw<T>(H * E, 0.3), gate = draw<T>(H * E, 0.3), function_bias = draw<T>(H, 0.3);
    const auto same = count_up(H), features = count_up(D), feature_starts = count_up(D + 1);
    for (int l = 0; l < 3; ++l) {
        weights.push_back(draw<T>(units[l] * inputs[l], 0.3));
        biases.push_back(draw<T>(units[l], 0.1));
        places.push_back(count_up(units[l]));
        starts.push_back(starts_of(units[l]));
        masks.emplace_back(units[l] * inputs[l]);
        for (int64_t u = 0; u < units[l]; ++u)
            for (int64_t k = 0; k < inputs[l]; ++k) {
                const int64_t step = u * D / units[l], of_input = l == 0 ? k + 1 : k * D / inputs[l];
                masks[l][u * inputs[l] + k] = of_input <= step;
            }
    }
    tf_made_layer layers[3] = {};
    for (int l = 0; l < 3; ++l) {
        tf_made_layer& layer = layers[l];
        layer.weight = weights[l].data(), layer.mask = masks[l].data(), layer.bias = biases[l].data();
        layer.places = places[l].data(), layer.starts = starts[l].data();
        layer.units = units[l], layer.weight_stride = layer.mask_stride = inputs[l];
        layer.source = l, layer.residual = -1, layer.activation = l == 0 ? TF_MADE_ELU : TF_MADE_IDENTITY;
        layer.slope = 1, layer.reads_raw = l != 1, layer.keeps_raw = 1;
    }
    layers[0].term = {term.data(), function_bias.data(), E, 0, TF_MADE_TANH};
    layers[1].gate = {gate.data(), nullptr, E, 0, TF_MADE_SIGMOID};
    layers[1].residual = 1, layers[1].residual_at = same.data();

    const int32_t blocks[] = {0, 3, int32_t(D)};
    tf_made made = {};
    made.layers = layers, made.places = features.data(), made.starts = feature_starts.data(), made.blocks = blocks;
    made.features = made.steps = D, made.block_count = 2, made.parameters = P, made.context = E, made.layer_count = 3;
    made.univariate = spline ? TF_MADE_SPLINE_ZUKO : TF_MADE_AFFINE_ZUKO;
    made.dtype = sizeof(T) == 8 ? TF_F64 : TF_F32;
    const double constants[] = {spline ? 4.0 : -7.0, 3.0, -7.0};
    memcpy(made.constants, constants, sizeof constants);

    const auto y = draw<T>(rows * D, 2.0), context = draw<T>(rows * E, 1.0);
    std::vector<T> first;
    for (int threads = 1; threads <= 3; ++threads) {
        std::vector<T> packed(tf_made_numbers(&made)), result(rows * (D + 1));
        if (tf_made_pack(&made, packed.data(), threads) != TF_OK) return 1;
        tf_made_rows run = {y.data(), result.data(), result.data() + rows * D, context.data(), E, rows};
        if (tf_made_invert(&made, packed.data(), &run, threads) != TF_OK) return 2;
        for (T value : result)
            if (value != value) return 3;
        if (threads == 1) first = result;
        if (memcmp(first.data(), result.data(), result.size() * sizeof(T)) != 0) return 4;
    }
    return 0;
}

}  // namespace

// The number of cases that passed, or minus what `check` returned for one that did not.
int check_made() {
    int cases = 0;
    for (bool spline : {false, true})
        for (int64_t rows : {1, 40, 300}) {
            if (const int wrong = check<float>(spline, rows)) return -wrong;
            if (const int wrong = check<double>(spline, rows)) return -wrong;
            cases += 2;
        }
    return cases;
}
