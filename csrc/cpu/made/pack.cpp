// Packs the weights of a masked net in the order of the sweep: of the units of a block the biases (with those of their
// term and gate) and the weights of the context, and the weights of every product; weights PANEL units at a time,
// [input][unit].
#include <stdlib.h>

#include "../parallel.h"
#include "../table.h"
#include "sweep.h"

namespace tf::TF_ISA {
namespace {

// A part of the packed weights, and the place of its first number. Where part.from is below 0, it is what `pack_begin`
// writes for the units, and otherwise a product.
struct Place {
    Part part;
    int64_t at;
};

int64_t count_begin(const tf_made& made, int l, int64_t units) {
    const tf_made_layer& layer = made.layers[l];
    const int64_t of_context = (layer.term.weight ? 1 : 0) + (layer.gate.weight ? 1 : 0);
    return units * (1 + of_context * (1 + made.context));
}

// The biases of a layer's units, and the same of its term and gate with their weights.
template <class T>
void pack_begin(const tf_made& made, const Part& part, T* to) {
    const tf_made_layer& layer = made.layers[part.l];
    const auto biases = [&](const void* bias) {
        for (int64_t u = part.first; u < part.last; ++u)
            *to++ = bias ? static_cast<const T*>(bias)[layer.places[u]] : T(0);
    };
    biases(layer.bias);
    const tf_made_context* const functions[] = {&layer.term, &layer.gate};
    for (const tf_made_context* of_context : functions) {
        if (!of_context->weight) continue;
        biases(of_context->bias);
        for (int64_t u = part.first; u < part.last; u += PANEL) {
            const int width = int(part.last - u < PANEL ? part.last - u : PANEL);
            for (int64_t k = 0; k < made.context; ++k)
                for (int j = 0; j < width; ++j)
                    *to++ = static_cast<const T*>(of_context->weight)[layer.places[u + j] * of_context->stride + k];
        }
    }
}

template <class T>
void pack_part(const tf_made& made, const Part& part, T* to) {
    const tf_made_layer& layer = made.layers[part.l];
    const int32_t* columns = layer.source == 0 ? made.places : made.layers[layer.source - 1].places;
    for (int64_t u = part.first; u < part.last; u += PANEL) {
        const int width = int(part.last - u < PANEL ? part.last - u : PANEL);
        const T* rows[PANEL];
        const uint8_t* seen[PANEL];
        for (int j = 0; j < width; ++j) {
            const int64_t unit = layer.places[u + j];
            rows[j] = static_cast<const T*>(layer.weight) + unit * layer.weight_stride;
            seen[j] = layer.mask + unit * layer.mask_stride;
        }
        for (int64_t k = part.from; k < part.to; ++k)
            for (int j = 0; j < width; ++j) *to++ = seen[j][columns[k]] ? rows[j][columns[k]] : T(0);
    }
}

template <class T>
int pack(const tf_made& made, T* to, int threads) {
    const int64_t most = (2 * made.block_count + made.steps) * made.layer_count;
    Place* places = static_cast<Place*>(malloc(size_t(most) * sizeof(Place)));
    if (!places) return TF_NO_MEMORY;
    int64_t count = 0, at = 0;
    const auto nothing = [](auto...) {};
    const auto product = [&](const Part& part) {
        places[count++] = {part, at};
        at += (part.last - part.first) * (part.to - part.from);
    };
    const auto begin = [&](int l, int64_t first, int64_t last) {
        places[count++] = {{l, first, last, -1, -1}, at};
        at += count_begin(made, l, last - first);
    };
    walk(made, nothing, begin, product, nothing, nothing);
    if (at < 1 << 14) threads = 1;  // 15 us of work: waking a thread costs as much
    parallel_for(threads, count, [&](int64_t k) {
        const Place& place = places[k];
        place.part.from < 0 ? pack_begin(made, place.part, to + place.at) : pack_part(made, place.part, to + place.at);
    });
    free(places);
    return TF_OK;
}

}  // namespace

int64_t made_numbers(const tf_made* made) {
    int64_t numbers = 0;
    const auto nothing = [](auto...) {};
    const auto product = [&](const Part& part) { numbers += (part.last - part.first) * (part.to - part.from); };
    const auto begin = [&](int l, int64_t first, int64_t last) { numbers += count_begin(*made, l, last - first); };
    walk(*made, nothing, begin, product, nothing, nothing);
    return numbers;
}

int made_pack(const tf_made* made, void* packed, int threads) {
    if (made->dtype == TF_F64) return pack(*made, static_cast<double*>(packed), threads);
    return pack(*made, static_cast<float*>(packed), threads);
}

}  // namespace tf::TF_ISA
