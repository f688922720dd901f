// Products of matrices in panels of columns, in registers. Include after math.h.
#pragma once

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

constexpr int kColumns = 2;                                     // vectors of a panel
constexpr int kMostRows = FEWSTEP_VECTOR_BYTES == 64 ? 14 : 6;  // of a tile: 2 + 1 + 28 registers of 32, or of 16
template <class T>
constexpr int64_t kPanel = kColumns * kLanes<T>;

// out[j, i] = from[i, j] for a square of vectors.
template <class T>
FEWSTEP_INLINE void turn(const T* from, int64_t row, T* out, int64_t step) {
#if FEWSTEP_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    __m512d two[16];  // pairs of rows, then fours, interleaved within 128 bits
    for (int i = 0; i < 16; i += 2) {
      const __m512 a = load(from + i * row), b = load(from + (i + 1) * row);
      two[i] = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
      two[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    }
    __m512 four[16];
    for (int i = 0; i < 16; i += 4) {
      for (int h = 0; h < 2; ++h) {
        four[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(two[i + h], two[i + 2 + h]));
        four[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(two[i + h], two[i + 2 + h]));
      }
    }
    // four[4 g + j] has columns j, 4 + j, 8 + j and 12 + j of rows 4 g to 4 g + 3.
    for (int j = 0; j < 4; ++j) {
      const __m512 a = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xdd);
      store<T>(out + j * step, _mm512_shuffle_f32x4(a, c, 0x88));
      store<T>(out + (4 + j) * step, _mm512_shuffle_f32x4(b, d, 0x88));
      store<T>(out + (8 + j) * step, _mm512_shuffle_f32x4(a, c, 0xdd));
      store<T>(out + (12 + j) * step, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
    return;
  }
#elif FEWSTEP_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    __m256 four[8];  // four[4 h + j] has columns j and 4 + j of rows 4 h to 4 h + 3
    for (int h = 0; h < 8; h += 4) {
      const __m256 a = load(from + h * row), b = load(from + (h + 1) * row);
      const __m256 c = load(from + (h + 2) * row), d = load(from + (h + 3) * row);
      const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
      const __m256d ef = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)), gh = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
      four[h] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
      four[h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
      four[h + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ef, gh));
      four[h + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ef, gh));
    }
    for (int j = 0; j < 4; ++j) {
      store<T>(out + j * step, _mm256_permute2f128_ps(four[j], four[4 + j], 0x20));
      store<T>(out + (4 + j) * step, _mm256_permute2f128_ps(four[j], four[4 + j], 0x31));
    }
    return;
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i) {
    for (int j = 0; j < kLanes<T>; ++j) out[j * step + i] = from[i * row + j];
  }
}

template <class T>
void pack(const Matrix<T>& m, T* panels, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t p = begin; p < end; ++p) {
    T* out = panels + p * m.depth * P;
    const T* from = m.source + p * P * m.column;
    const int64_t n = m.cols - p * P;
    if (n < P) {
      for (int64_t k = 0; k < m.depth; ++k) {
        for (int64_t j = 0; j < P; ++j) out[k * P + j] = j < n ? from[k * m.row + j * m.column] : T(0);
      }
    } else if (m.column == 1) {
      for (int64_t k = 0; k < m.depth; ++k) {
        for (int c = 0; c < kColumns; ++c) store(out + k * P + c * kLanes<T>, load(from + k * m.row + c * kLanes<T>));
      }
    } else {
      for (int64_t k0 = 0; k0 < m.depth; k0 += kLanes<T>) {
        const int64_t k1 = k0 + kLanes<T> < m.depth ? k0 + kLanes<T> : m.depth;
        if (m.row == 1 && k1 - k0 == kLanes<T>) {
          for (int c = 0; c < kColumns; ++c) {
            turn<T>(from + k0 + c * kLanes<T> * m.column, m.column, out + k0 * P + c * kLanes<T>, P);
          }
          continue;
        }
        for (int64_t k = k0; k < k1; ++k) {
          for (int64_t j = 0; j < P; ++j) out[k * P + j] = from[k * m.row + j * m.column];
        }
      }
    }
  }
}

// acc[r] += sum_k a[r, k] b[k] for one panel b, or by a's transpose.
template <int R, bool kTurned, class T>
FEWSTEP_INLINE void accumulate(const T* a, int64_t lda, const T* b, int64_t depth, Vec<T> (&acc)[R][kColumns]) {
  for (int64_t k = 0; k < depth; ++k, b += kPanel<T>) {
    Vec<T> w[kColumns];
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) w[c] = load(b + c * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> v = splat(kTurned ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) acc[r][c] += v * w[c];
    }
  }
}

template <int R, class T>
FEWSTEP_INLINE void clear(Vec<T> (&acc)[R][kColumns]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) acc[r][c] = Vec<T>{};
  }
}

// R rows of a product with one panel, in registers; n of its columns are stored, or added where turned.
template <int R, bool kTurned, class T>
void product_tile(const T* a, int64_t lda, const T* b, int64_t depth, int64_t n, T* out, int64_t ldo) {
  Vec<T> acc[R][kColumns];
  clear<R, T>(acc);
  accumulate<R, kTurned, T>(a, lda, b, depth, acc);
  T edge[R * kPanel<T>];
  const bool whole = n >= kPanel<T>;
  T* to = whole ? out : edge;
  const int64_t step = whole ? ldo : kPanel<T>;
  if (kTurned && !whole) {
    for (int r = 0; r < R; ++r) __builtin_memcpy(edge + r * kPanel<T>, out + r * ldo, n * sizeof(T));
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) {
      T* at = to + r * step + c * kLanes<T>;
      store(at, kTurned ? load(at) + acc[r][c] : acc[r][c]);
    }
  }
  if (whole) return;
  for (int r = 0; r < R; ++r) __builtin_memcpy(out + r * ldo, edge + r * kPanel<T>, n * sizeof(T));
}

template <int R, bool kTurned, class T>
FEWSTEP_INLINE void product_rows(int64_t rows, const T* a, int64_t lda, const T* b, int64_t depth, int64_t n, T* out,
                                 int64_t ldo) {
  if (rows == R) return product_tile<R, kTurned>(a, lda, b, depth, n, out, ldo);
  if constexpr (R > 1) product_rows<R - 1, kTurned>(rows, a, lda, b, depth, n, out, ldo);
}

template <bool kTurned, class T>
void multiply(const T* a, int64_t lda, int64_t rows, const T* panels, int64_t stride, int64_t depth, int64_t cols,
              T* out, int64_t ldo) {
  // Rows a multiple of 4 KiB apart share the eight lines of one set of the first-level cache.
  const bool aliased = !kTurned && lda * int64_t(sizeof(T)) % 4096 == 0;
  const int64_t most = aliased && kMostRows > 8 ? 8 : kMostRows, blocks = (rows + most - 1) / most;
  for (int64_t j = 0; j < cols; j += kPanel<T>, panels += stride) {
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t own = (rows - i) / (blocks - block);  // as even as can be
      const T* from = kTurned ? a + i : a + i * lda;
      product_rows<kMostRows, kTurned>(own, from, lda, panels, depth, cols - j, out + i * ldo + j, ldo);
      i += own;
    }
  }
}

}  // namespace
}  // namespace fewstep::cpu::FEWSTEP_ISA
