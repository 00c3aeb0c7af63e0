#include "sizes.h"

#include <stdlib.h>
#include <string.h>

#include "transforms/transforms.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tf::TF_ISA {

int64_t Shape::operand_bytes() const { return precision == TF_PRECISION_BF16 && BF16_MATH ? 2 : 4; }

int64_t Shape::cache_bytes() const { return precision == TF_PRECISION_FP32 ? 4 : 2; }

bool make_shape(const tf_block& b, Shape* s) {
    const int64_t most =
        int64_t(1) << 31;  // this keeps every sum of a few sizes, and every product of two, within range
    const int64_t sizes[] = {b.tokens, b.token_size, b.channels, b.layers, b.head_size, b.hidden};
    for (int64_t size : sizes)
        if (size < 1 || size >= most) return false;
    if (b.classes < 0 || b.classes >= most) return false;
    if (b.layers > 65536 || b.head_size > b.channels || b.channels % b.head_size) return false;
    if (b.precision < TF_PRECISION_FP32 || b.precision > TF_PRECISION_INT8) return false;
    s->T = b.tokens, s->D = b.token_size, s->C = b.channels, s->L = b.layers, s->E = b.head_size, s->F = b.hidden;
    s->classes = b.classes, s->transform = b.transform, s->precision = b.precision;
    s->H = s->C / s->E;
    s->Ep = round_up(s->E, 16);
    s->Tp = round_up(s->T, KEYS);
    s->out = s->D * with_transform(s->transform, [](auto transform) -> int64_t { return transform.PARTS; });
    if (s->out == 0) return false;  // no transform has this number
    s->group = 1;
    while (s->group < 4 && s->group < s->H && 3 * s->Ep * s->group % PANEL) s->group *= 2;
    s->groups = (s->H + s->group - 1) / s->group;
    s->group_panels = panels(3 * s->Ep * s->group);
    s->parts = s->groups < MOST_PARTS ? s->groups : MOST_PARTS;
    if (panels(s->F) < s->parts) s->parts = panels(s->F);
    if (s->E % 2) s->parts = 1;  // because the inputs of bf16 come in pairs
    return true;
}

#if defined(__linux__)
constexpr int64_t HUGE_PAGE = int64_t(2) << 20;

void* allocate(int64_t bytes) {
    void* memory = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    if (bytes >= HUGE_PAGE) madvise(memory, size_t(bytes), MADV_HUGEPAGE);
    return memory;
}

void release(void* memory, int64_t bytes) {
    if (!memory) return;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory, size_t(bytes));
#endif
    munmap(memory, size_t(bytes));
}

bool rest(void* memory, int64_t header, int64_t bytes) {
    if (bytes < 8 * HUGE_PAGE) return false;  // the call would cost more than the memory is worth
    const int64_t first = round_up(int64_t(memory) + header, HUGE_PAGE);
    const int64_t end = (int64_t(memory) + bytes) / HUGE_PAGE * HUGE_PAGE;
    return madvise(reinterpret_cast<void*>(first), size_t(end - first), MADV_FREE) == 0;
}
#else
void* allocate(int64_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size_t(bytes))) return nullptr;
    return memset(memory, 0, size_t(bytes));
}

void release(void* memory, int64_t) { free(memory); }

bool rest(void*, int64_t, int64_t) { return false; }
#endif

}  // namespace tf::TF_ISA
