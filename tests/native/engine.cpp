// The engine without Python, for the sanitizers. It packs two small blocks, inverts them token by token and by windows,
// and runs passes, in every precision, split and number of threads, in one call and piece by piece. The bits must always
// be those of one thread, and those of windows without tolerance the bits of one token after another.
//
// The arguments are the instruction sets to run. Those that the machine lacks are left out. Exit status 0 means that
// all is well.
#include <stdio.h>
#include <string.h>

#include <vector>

#include "../../csrc/tarflow.h"

#define CHECK(condition)                                   \
    do {                                                   \
        if (!(condition)) {                                \
            printf("line %d: %s\n", __LINE__, #condition); \
            return 1;                                      \
        }                                                  \
    } while (0)

int check_made();  // made.cpp

namespace {

uint32_t state = 1;

std::vector<float> draw(int64_t n, float scale) {
    std::vector<float> values(n);
    for (float& value : values) {
        state = state * 1664525u + 1013904223u;
        value = scale * float(int32_t(state)) / 2147483648.0f;
    }
    return values;
}

std::vector<std::vector<float>> draw_weights(const tf_block& s) {
    const int64_t C = s.channels, D = s.token_size, F = s.hidden, out = D * (1 + s.transform);
    std::vector<std::vector<float>> tensors;
    const auto add = [&](int64_t n, float scale) { tensors.push_back(draw(n, scale)); };
    add(C * D, 0.5f), add(C, 0.1f), add(s.tokens * C, 0.1f), add(out * C, 0.05f), add(out, 0.05f);
    for (int64_t l = 0; l < s.layers; ++l) {
        add(C, 1.0f), add(C, 0.1f), add(3 * C * C, 0.1f), add(3 * C, 0.1f), add(C * C, 0.1f), add(C, 0.1f);
        add(C, 1.0f), add(C, 0.1f), add(F * C, 0.1f), add(F, 0.1f), add(C * F, 0.05f), add(C, 0.1f);
    }
    add(s.classes * C, 0.3f);
    return tensors;
}

struct Case {
    tf_block block;
    int64_t batch;
    bool guided;
    int split;
    std::vector<float> z, scale, strength;
    std::vector<int64_t> labels;
    std::vector<int32_t> order;  // if it is empty, the order is that of z
    int64_t rows() const { return batch * (guided ? 2 : 1); }
    int64_t place(int64_t i) const { return order.empty() ? i : order[i]; }
    const int32_t* places() const { return order.empty() ? nullptr : order.data(); }
};

// Gives log_det, x and what was done in an inversion by windows of up to three tokens.
int run_windows(const Case& c, const tf_plan* plan, tf_workspace* space, tf_inversion in, int threads, double seconds,
                float tolerance, std::vector<double>& result) {
    const int64_t B = c.batch, T = c.block.tokens;
    std::vector<float> x(B * T * c.block.token_size), residual(B);
    std::vector<double> log_det(B);
    std::vector<int64_t> accepted((T - 1) * B);
    std::vector<tf_window_row> rows(B);
    in.x = x.data(), in.log_det = log_det.data();
    tf_windows state = {};
    state.rows = rows.data(), state.accepted = accepted.data(), state.residual = residual.data();
    state.window = 3, state.call_tokens = 8, state.tolerance = tolerance;
    do {
        CHECK(tf_invert_windows(plan, space, &in, &state, seconds, threads) == TF_OK);
    } while (state.solved < B * (T - 1));
    CHECK(state.passes > 0 && state.passes < T && state.width == 0);
    result.insert(result.end(), log_det.begin(), log_det.end());
    result.insert(result.end(), x.begin(), x.end());
    if (tolerance == 0.0f) return 0;
    result.insert(result.end(), accepted.begin(), accepted.end());
    result.insert(result.end(), residual.begin(), residual.end());
    for (const tf_window_row& row : rows) CHECK(row.final_place == T - 1);
    return 0;
}

// Gives log_det and x of the inverse, the same of inversions by windows, and then a and b of passes over windows of up to three tokens of x.
int run(const Case& c, const tf_plan* plan, int threads, double seconds, std::vector<double>& result) {
    const tf_block& s = c.block;
    const int64_t B = c.batch, T = s.tokens, D = s.token_size, R = c.rows(), out = D * (1 + s.transform), window = 3;
    tf_workspace* space;
    CHECK(tf_workspace_create(&s, R, window, threads, &space) == TF_OK);
    std::vector<float> x(B * T * D);
    std::vector<double> log_det(B), clock(threads * TF_PARTS);
    tf_inversion in = {};
    in.z = c.z.data(), in.x = x.data(), in.log_det = log_det.data();
    in.labels = c.labels.data(), in.query_scale = c.scale.data();
    in.guidance = c.guided ? c.strength.data() : nullptr;
    in.order = c.places(), in.clock = clock.data(), in.batch = B;
    in.guided_parts = 3, in.annealed = 1, in.split = c.split;
    const int64_t stages = (T - 1) * (s.layers + 2);
    for (int64_t stage = 0; stage < stages;) CHECK(tf_invert(plan, space, &in, &stage, seconds, threads) == TF_OK);
    result.assign(log_det.begin(), log_det.end());
    result.insert(result.end(), x.begin(), x.end());
    const size_t exact = result.size();
    if (run_windows(c, plan, space, in, threads, seconds, 0.0f, result)) return 1;
    CHECK(memcmp(result.data(), result.data() + exact, exact * sizeof(double)) == 0);
    if (run_windows(c, plan, space, in, threads, seconds, 0.5f, result)) return 1;
    for (int64_t position = 0; position < T; position += window) {
        const int64_t W = T - position < window ? T - position : window;
        std::vector<float> tokens, ab(R * W * out);
        for (int64_t b = 0; b < B; ++b)
            for (int64_t i = position; i < position + W; ++i) {
                const float* from = x.data() + (b * T + c.place(i)) * D;
                tokens.insert(tokens.end(), from, from + D);
            }
        tf_pass_arguments pass = {};
        pass.tokens = tokens.data(), pass.labels = c.labels.data(), pass.query_scale = c.scale.data();
        pass.order = c.places(), pass.ab = ab.data();
        pass.rows = R, pass.window = W, pass.position = position;
        pass.guided = c.guided, pass.split = c.split;
        CHECK(tf_pass(plan, space, &pass, threads) == TF_OK);
        result.insert(result.end(), ab.begin(), ab.end());
    }
    tf_workspace_destroy(space);
    return 0;
}

int check(const Case& c, const std::vector<const void*>& weights) {
    std::vector<double> right, result;
    for (int threads : {1, 2, 5}) {
        tf_plan* plan;
        int64_t bad = -1;
        CHECK(tf_plan_create(&c.block, &plan) == TF_OK);
        CHECK(tf_plan_pack(plan, weights.data(), TF_F32, threads, &bad) == TF_OK);
        for (double seconds : {1e9, 0.0}) {  // with 0, a call does as few stages as it can
            if (run(c, plan, threads, seconds, result)) return 1;
            if (right.empty()) right = result;
            CHECK(right.size() == result.size());
            CHECK(memcmp(right.data(), result.data(), right.size() * sizeof(double)) == 0);
        }
        tf_plan_destroy(plan);
    }
    return 0;
}

}  // namespace

int main(int count, char** isas) {
    int cases = 0;
    for (int k = 1; k < count; ++k) {
        const int status = tf_select_isa(isas[k]);
        if (status == TF_ISA_UNSUPPORTED) continue;
        CHECK(status == TF_OK);
        const int made = check_made();
        CHECK(made > 0);
        cases += made;
        for (int precision = 0; precision < 3; ++precision)
            for (tf_block block : {tf_block{5, 5, 128, 2, 64, 512, 3, 1, 0}, tf_block{4, 3, 96, 1, 32, 100, 0, 0, 0}}) {
                block.precision = precision;
                const auto tensors = draw_weights(block);
                std::vector<const void*> weights;
                for (const auto& tensor : tensors) weights.push_back(tensor.data());
                for (int64_t batch : {1, 2, 9})
                    for (bool guided : {false, true})
                        for (int split : {TF_SPLIT_AUTO, TF_SPLIT_COLUMNS, TF_SPLIT_ROWS}) {
                            Case c = {block, batch, guided, split, {}, {}, std::vector<float>(batch, 0.7f), {}, {}};
                            c.z = draw(batch * block.tokens * block.token_size, 1.0f);
                            c.scale = draw(c.rows(), 1.0f);
                            for (int64_t b = 0; b < batch; ++b) c.labels.push_back(b % 4 - 1);
                            // In batches of 2 and 9, the last token comes first, and the others follow in order.
                            for (int64_t i = 0; batch > 1 && i < block.tokens; ++i)
                                c.order.push_back(int32_t((i + block.tokens - 1) % block.tokens));
                            if (check(c, weights)) return 1;
                            ++cases;
                        }
            }
    }
    printf("%d cases\n", cases);
    return 0;
}
