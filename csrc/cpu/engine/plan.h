// A plan holds one block's weights as the kernels read them. It does not change between two calls of tf_plan_pack.
#pragma once
#include "matmul.h"
#include "sizes.h"

namespace tf::TF_ISA {

struct Norm {
    float *gain, *shift;
};

struct Layer {
    Norm norm1, norm2;
    // qkv: heads come in groups. Each head has its query, key and value columns, each padded to Ep, and each group is
    // padded to whole panels. So a thread that owns a group needs no other thread's columns for its attention.
    Matrix qkv, proj, fc1, fc2;
};

struct Plan {
    Shape shape;
    Matrix in, out;
    Layer* layers;
    float* pos;      // [T][C]
    float* classes;  // [1 + classes][C]: the mean of the class embeddings, then each; nullptr without classes
    void* memory;
    int64_t header, bytes;  // of what describes the plan, at the start of its memory; of all its memory
};

}  // namespace tf::TF_ISA
