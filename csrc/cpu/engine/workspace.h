// A workspace holds everything that a run writes except its results. A call has one, and all blocks of equal sizes may
// use it in turn.
#pragma once
#include "sizes.h"

namespace tf::TF_ISA {

// What only one thread writes.
struct Scratch {
    void* operands;    // [min(rows, ROW_BLOCK)][stride(C or D)]: a block of normalised rows, or of tokens
    float* y;          // [2][ROW_BLOCK][PANEL]
    float* h;          // [min(rows, PART_ROWS)][stride(C)]: where threads share sums, its copy of Workspace::h
    float* attention;  // of attention_scratch() floats
};

struct Workspace {
    Shape shape;
    int64_t rows, window;  // the R and W that it has room for
    int threads;
    float* h;          // [R W][stride(C)]
    void* q;           // [R W][stride(H Ep)], floats or bf16
    void* mixed;       // [R W][stride(C)], operands: the results of attention
    void* hidden;      // [R W][stride(F)], operands
    float* ab;         // [R W][stride(out)]
    float* sums[2];    // of proj and of fc2, [parts][R W][stride(C)] for R W up to PART_ROWS
    void* cache;       // [L][R][H]: keys [Tp][Ep], then values [Tp][Ep]
    Scratch* scratch;  // [threads]
    void* memory;
    int64_t header, bytes;  // of what describes the workspace, at the start of its memory; of all its memory
    double unit_seconds;    // what a stage took in the last run; 0 when there was none
    double met, waited;     // seconds that threads have lately worked together, and waited for one another
    double alone_until;     // until then one thread works alone, because the others had no core
};

// Whether a pass of this shape, with so many rows and this window, may use the workspace.
bool fits(const Shape& plan, const Workspace& space, int64_t rows, int64_t window);

}  // namespace tf::TF_ISA
