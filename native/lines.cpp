#include "lines.hpp"

#include "cpu.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvstore {
namespace {

enum class Store { kNone, kOrdinary, kStream };

inline void prefetch(const std::uint8_t* p) { __builtin_prefetch(p, 0, 3); }

template <Store kStore>
inline void copy_line(std::uint8_t* dst, const std::uint8_t* src) {
#if defined(__x86_64__)  // SSE2 is part of the base architecture
  if constexpr (kStore == Store::kStream) {
    for (int i = 0; i < 4; ++i) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src) + i);
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst) + i, part);
    }
    return;
  }
#endif
  if constexpr (kStore != Store::kNone) std::memcpy(dst, src, kLine);
}

template <bool kHash, Store kStore, bool kAhead = true>
void lines_portable(Xxh3State* state, std::uint8_t* dst, const std::uint8_t* src,
                    std::size_t lines, [[maybe_unused]] const std::uint8_t* ahead) {
  for (std::size_t i = 0; i < lines; ++i) {
    if constexpr (kAhead) prefetch(ahead + kLine * i);
    if constexpr (kHash) {
      if (state->stripe == kStripesPerBlock) {
        scramble(state->acc);
        state->stripe = 0;
      }
      accumulate(state->acc, src + kLine * i, kSecret + 8 * state->stripe++);
    }
    copy_line<kStore>(dst + kLine * i, src + kLine * i);
  }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) inline __m256i accumulate_avx2(__m256i acc, __m256i data,
                                                               const std::uint8_t* key) {
  const __m256i mixed =
      _mm256_xor_si256(data, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key)));
  const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(_mm256_add_epi64(acc, swapped), product);
}

__attribute__((target("avx2"))) inline __m256i scramble_avx2(__m256i acc,
                                                             const std::uint8_t* key) {
  const __m256i prime = _mm256_set1_epi64x(kPrime32_1);
  acc = _mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47));
  acc = _mm256_xor_si256(acc, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key)));
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(acc, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(acc, prime), _mm256_slli_epi64(high, 32));
}

template <bool kHash, Store kStore, bool kAhead = true>
__attribute__((target("avx2"))) void lines_avx2(Xxh3State* state, std::uint8_t* dst,
                                                const std::uint8_t* src, std::size_t lines,
                                                const std::uint8_t* ahead) {
  __m256i acc0{}, acc1{};
  unsigned stripe = 0;
  if constexpr (kHash) {
    acc0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(state->acc));
    acc1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(state->acc) + 1);
    stripe = state->stripe;
  }
  for (std::size_t i = 0; i < lines; ++i) {
    if constexpr (kAhead) prefetch(ahead + kLine * i);
    const __m256i* from = reinterpret_cast<const __m256i*>(src + kLine * i);
    const __m256i data0 = _mm256_loadu_si256(from);
    const __m256i data1 = _mm256_loadu_si256(from + 1);
    if constexpr (kHash) {
      if (stripe == kStripesPerBlock) {
        acc0 = scramble_avx2(acc0, kSecret + kScrambleKey);
        acc1 = scramble_avx2(acc1, kSecret + kScrambleKey + 32);
        stripe = 0;
      }
      acc0 = accumulate_avx2(acc0, data0, kSecret + 8 * stripe);
      acc1 = accumulate_avx2(acc1, data1, kSecret + 8 * stripe + 32);
      ++stripe;
    }
    __m256i* to = reinterpret_cast<__m256i*>(dst + kLine * i);
    if constexpr (kStore == Store::kStream) {
      _mm256_stream_si256(to, data0);
      _mm256_stream_si256(to + 1, data1);
    } else if constexpr (kStore == Store::kOrdinary) {
      _mm256_storeu_si256(to, data0);
      _mm256_storeu_si256(to + 1, data1);
    }
  }
  if constexpr (kHash) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(state->acc), acc0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(state->acc) + 1, acc1);
    state->stripe = stripe;
  }
}

#if !defined(__clang__)  // GCC 12 reports placeholder operands of its own header as uninitialized
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
template <bool kHash, Store kStore, bool kAhead = true>
__attribute__((target("avx512f"))) void lines_avx512(Xxh3State* state, std::uint8_t* dst,
                                                     const std::uint8_t* src, std::size_t lines,
                                                     const std::uint8_t* ahead) {
  const __m512i prime = _mm512_set1_epi64(kPrime32_1);
  __m512i acc{};
  unsigned stripe = 0;
  if constexpr (kHash) {
    acc = _mm512_load_si512(state->acc);
    stripe = state->stripe;
  }
  for (std::size_t i = 0; i < lines; ++i) {
    if constexpr (kAhead) prefetch(ahead + kLine * i);
    const __m512i data = _mm512_loadu_si512(src + kLine * i);
    if constexpr (kHash) {
      if (stripe == kStripesPerBlock) {
        acc = _mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47));
        acc = _mm512_xor_si512(acc, _mm512_loadu_si512(kSecret + kScrambleKey));
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(acc, 32), prime);
        acc = _mm512_add_epi64(_mm512_mul_epu32(acc, prime), _mm512_slli_epi64(high, 32));
        stripe = 0;
      }
      const __m512i mixed = _mm512_xor_si512(data, _mm512_loadu_si512(kSecret + 8 * stripe));
      const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
      const __m512i swapped =
          _mm512_shuffle_epi32(data, static_cast<_MM_PERM_ENUM>(_MM_SHUFFLE(1, 0, 3, 2)));
      acc = _mm512_add_epi64(_mm512_add_epi64(acc, swapped), product);
      ++stripe;
    }
    void* to = dst + kLine * i;
    if constexpr (kStore == Store::kStream) {
      _mm512_stream_si512(static_cast<__m512i*>(to), data);
    } else if constexpr (kStore == Store::kOrdinary) {
      _mm512_storeu_si512(to, data);
    }
  }
  if constexpr (kHash) {
    _mm512_store_si512(state->acc, acc);
    state->stripe = stripe;
  }
}

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // __x86_64__

LineKernels choose() {
#if defined(__x86_64__)
  if (cpu_features().avx512) {
    return {lines_avx512<false, Store::kStream, false>, lines_avx512<false, Store::kStream>,
            lines_avx512<true, Store::kNone>, lines_avx512<true, Store::kStream>,
            lines_avx512<true, Store::kOrdinary>};
  }
  if (cpu_features().avx2) {
    return {lines_avx2<false, Store::kStream, false>, lines_avx2<false, Store::kStream>,
            lines_avx2<true, Store::kNone>, lines_avx2<true, Store::kStream>,
            lines_avx2<true, Store::kOrdinary>};
  }
#endif
  return {lines_portable<false, Store::kStream, false>, lines_portable<false, Store::kStream>,
          lines_portable<true, Store::kNone>, lines_portable<true, Store::kStream>,
          lines_portable<true, Store::kOrdinary>};
}

}  // namespace

const LineKernels& line_kernels() {
  static const LineKernels kernels = choose();
  return kernels;
}

void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace kvstore
