// A workspace: everything a run writes except its results. One a call; all blocks of equal sizes may use it in turn.
#pragma once
#include "sizes.h"

namespace tf::TF_ISA {

// What one thread alone writes.
struct Scratch {
    void* operands;    // [min(rows, ROW_BLOCK)][stride(C or D)]: a block of rows normalised, or of tokens
    float* y;          // [2][ROW_BLOCK][PANEL]
    float* h;          // [min(rows, PART_ROWS)][stride(C)]: its own copy of Workspace::h, where threads share sums
    float* attention;  // attention_scratch()
};

struct Workspace {
    Shape shape;
    int64_t rows, window;  // R and W it has room for
    int threads;
    float* h;          // [R W][stride(C)]
    void* q;           // [R W][stride(H Ep)], floats or bf16
    void* mixed;       // [R W][stride(C)], operands: what attention gives
    void* hidden;      // [R W][stride(F)], operands
    float* ab;         // [R W][stride(out)]
    float* sums[2];    // of proj, of fc2: [parts][R W][stride(C)] for up to PART_ROWS
    void* cache;       // [L][R][H]: keys [Tp][Ep], then values [Tp][Ep]
    Scratch* scratch;  // [threads]
    void* memory;
    int64_t header, bytes;  // what describes the workspace, at the start of its memory; all of it
    double unit_seconds;    // of the last run, a stage of a token; 0 when there was none
    double met, waited;     // seconds several threads have worked together, and waited for one another, of late
    double alone_until;     // when one thread stops working by itself, the others having had no core
};

// Whether a pass of this shape, rows and window may use the workspace.
bool fits(const Shape& plan, const Workspace& space, int64_t rows, int64_t window);

}  // namespace tf::TF_ISA
