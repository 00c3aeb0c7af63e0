#include "plan.h"

namespace tf::TF_ISA {
namespace {

void place(Arena& arena, Matrix& m, Storage storage, int64_t inputs, int64_t column_panels) {
    const int64_t size = storage == STORE_F32 ? 4 : storage == STORE_BF16 ? 2 : 1;
    m.inputs = storage == STORE_BF16 ? round_up(inputs, 2) : inputs;
    m.columns = column_panels * PANEL;
    m.storage = storage;
    m.parts = 1, m.ends[0] = m.inputs;
    m.weights = arena.take<char>(Bytes{m.inputs, false} * m.columns * size);
    m.scale = storage == STORE_INT8 ? arena.take<float>(m.columns) : nullptr;
    m.bias = arena.take<float>(m.columns);
}

void place(Arena& arena, Norm& norm, int64_t C) {
    norm.gain = arena.take<float>(C);
    norm.shift = arena.take<float>(C);
}

void place(Arena& arena, Plan& plan) {
    const Shape& s = plan.shape;
    const Storage storage = s.precision == TF_PRECISION_FP32   ? STORE_F32
                            : s.precision == TF_PRECISION_BF16 ? STORE_BF16
                                                               : STORE_INT8;
    // The two ends touch the tokens themselves and are a small part of the bytes, so they stay fp32.
    const Storage ends = STORE_F32;
    plan.layers = arena.take<Layer>(s.L);
    plan.header = arena.used.value;
    plan.pos = arena.take<float>(Bytes{s.T, false} * s.C);
    plan.classes = s.classes ? arena.take<float>((Bytes{s.classes, false} + Bytes{1, false}) * s.C) : nullptr;
    place(arena, plan.in, ends, s.D, panels(s.C));
    place(arena, plan.out, ends, s.C, panels(s.out));
    Layer counted;
    for (int64_t l = 0; l < s.L; ++l) {
        Layer& layer = arena.base ? plan.layers[l] : counted;
        place(arena, layer.norm1, s.C);
        place(arena, layer.qkv, storage, s.C, s.groups * s.group_panels);
        place(arena, layer.proj, storage, s.C, panels(s.C));
        place(arena, layer.norm2, s.C);
        place(arena, layer.fc1, storage, s.C, panels(s.F));
        place(arena, layer.fc2, storage, s.F, panels(s.C));
        layer.proj.parts = layer.fc2.parts = s.parts;
        for (int64_t part = 0; part < s.parts; ++part) {
            const bool last = part + 1 == s.parts;
            layer.proj.ends[part] = last ? layer.proj.inputs : s.groups * (part + 1) / s.parts * s.group * s.E;
            layer.fc2.ends[part] = last ? layer.fc2.inputs : panels(s.F) * (part + 1) / s.parts * PANEL;
        }
    }
}

}  // namespace

int64_t plan_bytes(const tf_block* block) {
    Plan plan = {};
    if (!make_shape(*block, &plan.shape)) return -1;
    Arena arena;
    arena.take<Plan>(int64_t(1));
    place(arena, plan);
    return arena.used.bad ? -1 : arena.used.value;
}

int plan_create(const tf_block* block, tf_plan** out) {
    const int64_t bytes = plan_bytes(block);
    if (bytes < 0) return TF_BAD_SIZE;
    void* memory = allocate(bytes);
    if (!memory) return TF_NO_MEMORY;
    Arena arena;
    arena.base = static_cast<char*>(memory);
    Plan* plan = arena.take<Plan>(int64_t(1));
    make_shape(*block, &plan->shape);
    plan->memory = memory, plan->bytes = bytes;
    place(arena, *plan);
    *out = reinterpret_cast<tf_plan*>(plan);
    return TF_OK;
}

int plan_rest(tf_plan* plan) {
    const Plan* p = reinterpret_cast<Plan*>(plan);
    return rest(p->memory, p->header, p->bytes);
}

void plan_destroy(tf_plan* plan) {
    const Plan* p = reinterpret_cast<Plan*>(plan);
    if (p) release(p->memory, p->bytes);
}

}  // namespace tf::TF_ISA
