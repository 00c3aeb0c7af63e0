// The order in which a sweep computes, and so the order of its packed weights.
//
// A step is a few units in each layer: too few for a good product of matrices. So steps come in blocks. When a block
// starts, all units of earlier blocks are final, and their share in the block's units is one product for each layer. What
// the units of a block need of each other is added step by step.
#pragma once
#include "../../tarflow.h"

namespace tf::TF_ISA {
namespace {

constexpr int PANEL = 6;  // units that a product computes together; with 4 vectors of rows it has 24 accumulators

// One product: units [first, last) of layer l, from inputs [from, to) of its source.
struct Part {
    int l;
    int64_t first, last, from, to;
};

struct Schedule {
    const tf_made& made;

    const int32_t* starts(int vector) const { return vector == 0 ? made.starts : made.layers[vector - 1].starts; }

    // How many units of a vector are known when layers compute step s, and how many of them before any layer does.
    int64_t known(int vector, int64_t s) const { return starts(vector)[vector == 0 ? s : s + 1]; }
    int64_t known_before(int vector, int64_t s) const { return starts(vector)[s]; }

    // The share of earlier blocks in a block of steps [s0, s1).
    Part before(int l, int64_t s0, int64_t s1) const {
        const int32_t* own = starts(l + 1);
        return {l, own[s0], own[s1], 0, known_before(made.layers[l].source, s0)};
    }
    // The share of the block itself in step s.
    Part within(int l, int64_t s, int64_t s0) const {
        const int32_t* own = starts(l + 1);
        return {l, own[s], own[s + 1], known_before(made.layers[l].source, s0), known(made.layers[l].source, s)};
    }
};

// Calls what follows in the order of the sweep. For each block: block(s0, s1), then for each layer begin(l, first, last)
// of its units in the block and the product with earlier blocks. For each of its steps: the product within and
// layer(l, s) of each layer, then step(s).
template <class Block, class Begin, class Product, class Layer, class Step>
inline void walk(const tf_made& made, Block block, Begin begin, Product product, Layer layer, Step step) {
    const Schedule schedule = {made};
    for (int64_t k = 0; k < made.block_count; ++k) {
        const int64_t s0 = made.blocks[k], s1 = made.blocks[k + 1];
        block(s0, s1);
        for (int l = 0; l < made.layer_count; ++l) {
            const Part before = schedule.before(l, s0, s1);
            begin(l, before.first, before.last);
            product(before);
        }
        for (int64_t s = s0; s < s1; ++s) {
            for (int l = 0; l < made.layer_count; ++l) {
                product(schedule.within(l, s, s0));
                layer(l, s);
            }
            step(s);
        }
    }
}

}  // namespace
}  // namespace tf::TF_ISA
