// A plan: one block's weights as the kernels read them. Immutable between two calls of tf_plan_pack.
#pragma once
#include "matmul.h"
#include "sizes.h"

namespace tf::TF_ISA {

struct Norm {
    float *gain, *shift;
};

struct Layer {
    Norm norm1, norm2;
    // qkv: heads in groups, each head its query, key and value columns, each padded to Ep, each group to whole panels:
    // a thread that owns a group needs no other thread's columns to attend.
    Matrix qkv, proj, fc1, fc2;
};

struct Plan {
    Shape shape;
    Matrix in, out;
    Layer* layers;
    float* pos;      // [T][C]
    float* classes;  // [1 + classes][C]: the mean of the class embeddings, then these; nullptr without classes
    void* memory;
    int64_t header, bytes;  // what describes the plan, at the start of its memory; all of it
};

}  // namespace tf::TF_ISA
