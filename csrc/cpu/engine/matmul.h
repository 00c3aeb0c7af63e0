// Activations times packed weights.
//
// Each sum of a product runs over the inputs in order, one fused multiply-add after another. (vdpbf16ps takes one pair
// of bf16 after another; plain x86-64 has neither and takes a product and a sum.) The sum goes from run to run of a
// fixed length, and from part to part of the matrix, whatever the tile and the number of rows or threads. So a result
// never depends on its neighbours.
#pragma once
#include "sizes.h"

namespace tf::TF_ISA {

enum Storage { STORE_F32, STORE_BF16, STORE_INT8 };

// A packed Linear. Its weights lie as [panels][inputs][PANEL], and in bf16 as [panels][inputs / 2][PANEL][2]. Columns
// and inputs are padded with zeros. y = (sum over k of x[k] w[k]) * scale + bias, where the sum adds the sums of the
// parts, first to last.
struct Matrix {
    int64_t inputs, columns;   // in bf16 `inputs` is even
    int64_t parts;             // at least 1
    int64_t ends[MOST_PARTS];  // the inputs at which the parts end, the last at `inputs`; in bf16 even
    Storage storage;
    void* weights;
    float* scale;  // [panels][PANEL] in int8, otherwise nullptr
    float* bias;   // [panels][PANEL]
};

// One finished tile: rows row .. row + rows, columns panel * PANEL .. (panel + 1) * PANEL. y is (rows, PANEL).
struct Tile {
    int64_t row, rows, panel;
    const float* y;
};

typedef void (*Finish)(void* context, const Tile& tile);

constexpr int64_t ALL = -1;

// Rows of activations times panels of a matrix. Each tile is handed to `finish`.
struct Product {
    const Matrix* matrix;
    const void* operands;  // `rows` rows, `stride` apart, of the matrix's kind
    int64_t stride;
    int64_t row, rows;    // the number of the first row, for `finish`; how many there are, at most ROW_BLOCK
    int64_t first, last;  // panels first .. last
    int64_t part;         // ALL, or the one part whose sum alone is asked for, without scale and bias
    float* y;             // room for 2 * rows * PANEL floats
    Finish finish;
    void* context;  // of `finish`
};

void matmul(const Product& product);

}  // namespace tf::TF_ISA
