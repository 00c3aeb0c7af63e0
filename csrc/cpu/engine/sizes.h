// The sizes of a plan and a workspace, which are counted before anything is allocated. Arithmetic on sizes is checked:
// a product that does not fit is an error, and never a small number.
#pragma once
#include "../table.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace tf::TF_ISA {

constexpr int PANEL = 64;  // output columns packed together, which are one cache line of int8 or four of fp32
constexpr int KEYS = 16;   // keys that are stored together
// The sums of proj and fc2 have at most so many parts, and as many threads can share them.
constexpr int64_t MOST_PARTS = 4;
// Threads share sums for up to so many activation rows. With more rows the sums cost what the meetings did.
constexpr int64_t PART_ROWS = 2;
// So many activation rows are worked on at a time. Together with one panel they fit the L2 cache.
constexpr int64_t ROW_BLOCK = 96;

#if defined(__AVX512BF16__)
// Whether the operands of a bf16 product are stored as bf16. Elsewhere they are floats rounded to bf16.
constexpr bool BF16_MATH = true;
#else
constexpr bool BF16_MATH = false;
#endif

namespace {

struct Bytes {
    int64_t value = 0;
    bool bad = false;
};

inline Bytes operator*(Bytes a, int64_t b) {
    Bytes out;
    out.bad = __builtin_mul_overflow(a.value, b, &out.value) || a.bad;
    return out;
}

inline Bytes operator+(Bytes a, Bytes b) {
    Bytes out;
    out.bad = __builtin_add_overflow(a.value, b.value, &out.value) || a.bad || b.bad;
    return out;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// The distance between rows of activations, in numbers. It is 64 bytes of floats more than a row takes: with a distance
// that is a power of two the rows would share cache sets.
inline int64_t stride(int64_t width) { return round_up(width, 16) + 16; }

// Hands out 64-byte aligned pieces of one block of memory. Without a base it only counts them.
struct Arena {
#ifdef __SANITIZE_ADDRESS__
    static constexpr int64_t GAP = 128;  // bytes behind every piece that nobody may touch
#else
    static constexpr int64_t GAP = 0;
#endif
    char* base = nullptr;
    Bytes used;

    template <class Type>
    Type* take(Bytes count) {
        const int64_t at = used.value;
        const Bytes end = used + count * int64_t(sizeof(Type));
        used = end + Bytes{63 + GAP, false};
        used.value &= ~int64_t(63);
        if (!base || used.bad) return nullptr;
#ifdef __SANITIZE_ADDRESS__
        __asan_poison_memory_region(base + end.value, size_t(used.value - end.value));
#endif
        return reinterpret_cast<Type*>(base + at);
    }
    template <class Type>
    Type* take(int64_t count) {
        return take<Type>(Bytes{count, false});
    }
};

}  // namespace

// What tf_block says, and what follows from it.
struct Shape {
    int64_t T, D, C, L, E, F;
    int64_t classes;
    int64_t H;      // heads
    int64_t Ep;     // the head size as stored, a multiple of 16
    int64_t out;    // the columns of proj_out, D for each part of the transform's parameters
    int64_t Tp;     // T as stored, a multiple of KEYS
    int64_t group;  // so many heads fill whole panels with their queries, keys and values
    int64_t groups;
    int64_t group_panels;
    int64_t parts;  // of the sums of proj and fc2; they split no group of heads and no panel of hidden
    int transform, precision;

    int64_t operand_bytes() const;
    int64_t cache_bytes() const;  // of one cached number
};

// Returns false when a size is out of range.
bool make_shape(const tf_block& block, Shape* shape);

// Returns zeroed memory in whole pages (huge ones where it is worth it), or nullptr when there is none.
void* allocate(int64_t bytes);
void release(void* memory, int64_t bytes);
// From now on the system may take bytes header .. bytes away when it is short of memory, until they are written again.
// They then keep their values or are zero. Returns false where nothing was done.
bool rest(void* memory, int64_t header, int64_t bytes);

}  // namespace tf::TF_ISA
