// Packs the weights of a masked net: the biases of all layers, and then, in the order of the sweep, the weights of every
// product, PANEL units at a time, [input][unit].
#include <stdlib.h>

#include "../parallel.h"
#include "../table.h"
#include "sweep.h"

namespace tf::TF_ISA {
namespace {

// A product, and where its weights begin.
struct Place {
    Part part;
    int64_t at;
};

template <class T>
void pack_part(const tf_made& made, const Part& part, T* to) {
    const tf_made_layer& layer = made.layers[part.l];
    const int32_t* columns = layer.source == 0 ? made.places : made.layers[layer.source - 1].places;
    for (int64_t u = part.first; u < part.last; u += PANEL) {
        const int width = int(part.last - u < PANEL ? part.last - u : PANEL);
        for (int j = 0; j < width; ++j) {  // a unit's row of the matrix is contiguous
            const int64_t unit = layer.places[u + j];
            const T* row = static_cast<const T*>(layer.weight) + unit * layer.weight_stride;
            const uint8_t* seen = layer.mask + unit * layer.mask_stride;
            for (int64_t k = part.from; k < part.to; ++k)
                to[(k - part.from) * width + j] = seen[columns[k]] ? row[columns[k]] : T(0);
        }
        to += (part.to - part.from) * width;
    }
}

template <class T>
int pack(const tf_made& made, T* to, int threads) {
    for (int l = 0; l < made.layer_count; ++l) {
        const tf_made_layer& layer = made.layers[l];
        const T* bias = static_cast<const T*>(layer.bias);
        for (int64_t u = 0; u < layer.units; ++u) *to++ = bias ? bias[layer.places[u]] : T(0);
    }
    const int64_t most = (made.block_count + made.steps) * made.layer_count;
    Place* places = static_cast<Place*>(malloc(size_t(most) * sizeof(Place)));
    if (!places) return TF_NO_MEMORY;
    int64_t count = 0, at = 0;
    const auto nothing = [](auto...) {};
    const auto product = [&](const Part& part) {
        places[count++] = {part, at};
        at += (part.last - part.first) * (part.to - part.from);
    };
    walk(made, nothing, product, nothing, nothing);
    if (at < 1 << 14) threads = 1;  // 15 us of work: waking a thread costs as much
    parallel_for(threads, count, [&](int64_t k) { pack_part(made, places[k].part, to + places[k].at); });
    free(places);
    return TF_OK;
}

}  // namespace

int64_t made_numbers(const tf_made* made) {
    int64_t numbers = 0;
    for (int l = 0; l < made->layer_count; ++l) numbers += made->layers[l].units;
    const auto nothing = [](auto...) {};
    const auto product = [&](const Part& part) { numbers += (part.last - part.first) * (part.to - part.from); };
    walk(*made, nothing, product, nothing, nothing);
    return numbers;
}

int made_pack(const tf_made* made, void* packed, int threads) {
    if (made->dtype == TF_F64) return pack(*made, static_cast<double*>(packed), threads);
    return pack(*made, static_cast<float*>(packed), threads);
}

}  // namespace tf::TF_ISA
