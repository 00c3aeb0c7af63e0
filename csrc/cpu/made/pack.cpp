// Packs the weights of a masked net: the biases of all layers, and then, in the order of the sweep, the weights of every
// product, PANEL units at a time, [input][unit].
#include "../table.h"
#include "sweep.h"

namespace tf::TF_ISA {
namespace {

template <class T>
void pack(const tf_made& made, T* to) {
    for (int l = 0; l < made.layer_count; ++l) {
        const tf_made_layer& layer = made.layers[l];
        const T* bias = static_cast<const T*>(layer.bias);
        for (int64_t u = 0; u < layer.units; ++u) *to++ = bias ? bias[layer.places[u]] : T(0);
    }
    const auto nothing = [](auto...) {};
    const auto product = [&](const Part& part) {
        const tf_made_layer& layer = made.layers[part.l];
        const int32_t* columns = layer.source == 0 ? made.places : made.layers[layer.source - 1].places;
        const T* weight = static_cast<const T*>(layer.weight);
        for (int64_t u = part.first; u < part.last; u += PANEL) {
            const int width = int(part.last - u < PANEL ? part.last - u : PANEL);
            for (int j = 0; j < width; ++j) {  // a unit's row of the matrix is contiguous
                const int64_t unit = layer.places[u + j];
                const T* row = weight + unit * layer.weight_stride;
                const uint8_t* seen = layer.mask + unit * layer.mask_stride;
                for (int64_t k = part.from; k < part.to; ++k)
                    to[(k - part.from) * width + j] = seen[columns[k]] ? row[columns[k]] : T(0);
            }
            to += (part.to - part.from) * width;
        }
    };
    walk(made, nothing, product, nothing, nothing);
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

void made_pack(const tf_made* made, void* packed) {
    if (made->dtype == TF_F64)
        pack(*made, static_cast<double*>(packed));
    else
        pack(*made, static_cast<float*>(packed));
}

}  // namespace tf::TF_ISA
