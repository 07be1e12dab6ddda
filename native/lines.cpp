#include "lines.hpp"

#include <cstring>

#include "cpu.hpp"
#include "xxhash.hpp"

namespace kvstore {
namespace {

static_assert(kStripesPerBlock == (sizeof XXH3_kSecret - XXH_STRIPE_LEN) / XXH_SECRET_CONSUME_RATE);

enum class Store { kNone, kOrdinary, kStream };

template <Store kStore>
inline void copy_portable(std::uint8_t* dst, const std::uint8_t* src) {
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

#if defined(__x86_64__)

template <Store kStore>
__attribute__((target("avx2"), always_inline)) inline void copy_avx2(std::uint8_t* dst,
                                                                     const std::uint8_t* src) {
  auto* to = reinterpret_cast<__m256i*>(dst);
  const auto* from = reinterpret_cast<const __m256i*>(src);
  const __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
  if constexpr (kStore == Store::kStream) {
    _mm256_stream_si256(to, low);
    _mm256_stream_si256(to + 1, high);
  } else if constexpr (kStore == Store::kOrdinary) {
    _mm256_storeu_si256(to, low);
    _mm256_storeu_si256(to + 1, high);
  }
}

template <Store kStore>
__attribute__((target("avx512f"), always_inline)) inline void copy_avx512(
    std::uint8_t* dst, const std::uint8_t* src) {
  const __m512i line = _mm512_loadu_si512(src);
  if constexpr (kStore == Store::kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), line);
  } else if constexpr (kStore == Store::kOrdinary) {
    _mm512_storeu_si512(dst, line);
  }
}

#endif  // __x86_64__

// A kernel for one instruction set; a macro, because the attribute cannot depend on a template.
// The accumulators are a local variable, so that they stay in registers.
#define KVSTORE_KERNEL(NAME, TARGET, COPY, ACCUMULATE, SCRAMBLE)                                   \
  template <bool kHash, Store kStore>                                                              \
  TARGET void NAME(Xxh3State* state, const Strip& strip, const std::uint8_t* ahead) {              \
    alignas(64) std::uint64_t acc[8];                                                              \
    unsigned stripe = 0;                                                                           \
    if constexpr (kHash) {                                                                         \
      std::memcpy(acc, state->acc, sizeof acc);                                                    \
      stripe = state->stripe;                                                                      \
    }                                                                                              \
    const Grid grid = *strip.grid;                                                                 \
    const std::int64_t rows = strip.rows;                                                          \
    const std::size_t run = strip.run;                                                             \
    const std::ptrdiff_t lead = ahead - strip.src;                                                 \
    for (std::int64_t row = 0; row < rows; ++row) {                                                \
      std::uint8_t* dst = strip.dst + row * grid.dst_row;                                          \
      const std::uint8_t* src = strip.src + row * grid.src_row;                                    \
      for (std::int64_t column = 0; column < grid.columns; ++column) {                             \
        for (std::size_t i = 0; i < run; i += kLine) {                                             \
          __builtin_prefetch(src + lead + i, 0, 0);                                                \
          if constexpr (kHash) {                                                                   \
            if (stripe == kStripesPerBlock) {                                                      \
              SCRAMBLE(acc, XXH3_kSecret + sizeof XXH3_kSecret - XXH_STRIPE_LEN);                  \
              stripe = 0;                                                                          \
            }                                                                                      \
            ACCUMULATE(acc, src + i, XXH3_kSecret + XXH_SECRET_CONSUME_RATE * stripe++);           \
          }                                                                                        \
          COPY<kStore>(dst + i, src + i);                                                          \
        }                                                                                          \
        dst += grid.dst_column;                                                                    \
        src += grid.src_column;                                                                    \
      }                                                                                            \
    }                                                                                              \
    if constexpr (kHash) {                                                                         \
      std::memcpy(state->acc, acc, sizeof acc);                                                    \
      state->stripe = stripe;                                                                      \
    }                                                                                              \
  }

KVSTORE_KERNEL(portable, , copy_portable, XXH3_accumulate_512, XXH3_scrambleAcc)
#if defined(__x86_64__)
KVSTORE_KERNEL(avx2, __attribute__((target("avx2"))), copy_avx2, XXH3_accumulate_512_avx2,
               XXH3_scrambleAcc_avx2)
KVSTORE_KERNEL(avx512, __attribute__((target("avx512f"))), copy_avx512, XXH3_accumulate_512_avx512,
               XXH3_scrambleAcc_avx512)
#endif

#define KVSTORE_KERNELS(NAME)                                                         \
  LineKernels {                                                                       \
    NAME<false, Store::kStream>, NAME<true, Store::kNone>, NAME<true, Store::kStream>, \
        NAME<true, Store::kOrdinary>                                                  \
  }

LineKernels choose() {
#if defined(__x86_64__)
  if (cpu_has("avx512")) return KVSTORE_KERNELS(avx512);
  if (cpu_has("avx2")) return KVSTORE_KERNELS(avx2);
#endif
  return KVSTORE_KERNELS(portable);
}

}  // namespace

const LineKernels& line_kernels() {
  static const LineKernels kernels = choose();
  return kernels;
}

void run_kernel(LineKernels::Kernel kernel, Xxh3State* state, std::uint8_t* dst,
                const std::uint8_t* src, std::size_t lines, const std::uint8_t* ahead) {
  static constexpr Grid kSingle{};
  kernel(state, {dst, src, &kSingle, 1, lines * kLine}, ahead);
}

void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace kvstore
