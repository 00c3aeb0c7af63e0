// Transposes of 16 x 16 words of 32 bits, for packing.
#pragma once
#include "../vec.h"

namespace tf::TF_ISA {
namespace {

// y[j * y_stride + c] = x[c * x_stride + j] for j and c below 16.
inline void transpose16(const uint32_t* x, int64_t x_stride, uint32_t* y, int64_t y_stride) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(x + i * x_stride);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {  // words of two rows, then of four: each 128-bit lane holds a 4 x 4 transpose
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {  // lanes of four rows of lanes
        const __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x44);
        const __m512i low2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xee);
        const __m512i high2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xee);
        _mm512_storeu_si512(y + i * y_stride, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(y + (i + 4) * y_stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(y + (i + 8) * y_stride, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(y + (i + 12) * y_stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
#elif defined(__SSE2__)
    for (int c = 0; c < 16; c += 4)
        for (int j = 0; j < 16; j += 4) {
            __m128 r[4];
            for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_ps(reinterpret_cast<const float*>(x + (c + i) * x_stride + j));
            _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
            for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(y + (j + i) * y_stride + c), r[i]);
        }
#else
    for (int j = 0; j < 16; ++j)
        for (int c = 0; c < 16; ++c) y[j * y_stride + c] = x[c * x_stride + j];
#endif
}

}  // namespace
}  // namespace tf::TF_ISA
