#include "e4.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu.hpp"
#include "lines.hpp"
#include "xxh3.hpp"

namespace kvstore {
namespace {

// Numbers of a tile have one base: its largest exponent less 14. So it stays in the first cache,
// where it is looked at more than once.
constexpr std::size_t kTile = 4096;
// Numbers that the kernels take at a time. The code of number i of a group is the low half of byte
// i, that of number i + 32 the high one.
constexpr std::size_t kGroup = 64;
constexpr unsigned kEscape = 15;
constexpr std::size_t kValuesPerEscape = 512;
constexpr std::size_t kLeastEscapes = 16;

std::size_t lines(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

struct Kernels {
  // The largest exponent but that of infinities.
  unsigned (*largest)(const std::uint16_t* src, std::size_t groups);
  // Codes groups; of each which numbers are escapes.
  void (*encode)(std::uint8_t* codes, std::uint8_t* rests, std::uint64_t* escapes,
                 const std::uint16_t* src, std::size_t groups, unsigned base);
  void (*decode)(std::uint16_t* dst, const std::uint8_t* codes, const std::uint8_t* rests,
                 std::size_t groups, unsigned base);
};

unsigned exponent_of(std::uint16_t value) { return (value >> 7) & 0xff; }

unsigned largest_portable(const std::uint16_t* src, std::size_t groups) {
  std::uint16_t most = 0;
  for (std::size_t i = 0; i < groups * kGroup; ++i) {
    const std::uint16_t shifted = src[i] & 0x7f80;
    most = std::max<std::uint16_t>(most, shifted == 0x7f80 ? 0 : shifted);
  }
  return most >> 7;
}

void encode_portable(std::uint8_t* codes, std::uint8_t* rests, std::uint64_t* escapes,
                     const std::uint16_t* src, std::size_t groups, unsigned base) {
  for (; groups > 0; --groups, src += kGroup, codes += kGroup / 2, rests += kGroup, ++escapes) {
    std::uint8_t code[kGroup], most = 0;
    for (std::size_t i = 0; i < kGroup; ++i) {
      const auto distance = static_cast<std::uint16_t>(((src[i] >> 7) & 0xff) - base);
      code[i] = static_cast<std::uint8_t>(std::min<std::uint16_t>(distance, kEscape));
      rests[i] = static_cast<std::uint8_t>(((src[i] >> 8) & 0x80) | (src[i] & 0x7f));
      most = std::max(most, code[i]);
    }
    for (std::size_t i = 0; i < kGroup / 2; ++i) {
      codes[i] = static_cast<std::uint8_t>(code[i] | code[i + kGroup / 2] << 4);
    }
    *escapes = 0;
    for (std::size_t i = 0; most == kEscape && i < kGroup; ++i) {
      *escapes |= static_cast<std::uint64_t>(code[i] == kEscape) << i;
    }
  }
}

void decode_portable(std::uint16_t* dst, const std::uint8_t* codes, const std::uint8_t* rests,
                     std::size_t groups, unsigned base) {
  for (; groups > 0; --groups, dst += kGroup, codes += kGroup / 2, rests += kGroup) {
    for (std::size_t i = 0; i < kGroup; ++i) {
      dst[i] = static_cast<std::uint16_t>((rests[i] & 0x80) << 8 | (rests[i] & 0x7f));
    }
    for (std::size_t i = 0; i < kGroup / 2; ++i) {
      dst[i] = static_cast<std::uint16_t>(dst[i] | ((codes[i] & 15) + base) << 7);
      dst[i + kGroup / 2] =
          static_cast<std::uint16_t>(dst[i + kGroup / 2] | ((codes[i] >> 4) + base) << 7);
    }
  }
}

#if defined(__x86_64__)
#define KVSTORE_AVX2 __attribute__((target("avx2")))
#define KVSTORE_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl")))

// The largest of 16 numbers.
KVSTORE_AVX2 inline unsigned most_of(__m256i numbers) {
  const __m128i eight =
      _mm_max_epu16(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
  const __m128i ones = _mm_set1_epi16(-1);  // there is an instruction for the smallest one
  const auto least = static_cast<unsigned>(
      _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, ones))));
  return 0xffff - (least & 0xffff);
}

KVSTORE_AVX2 unsigned largest_avx2(const std::uint16_t* src, std::size_t groups) {
  const __m256i exponents = _mm256_set1_epi16(0x7f80);
  __m256i most[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (std::size_t i = 0; i < groups * kGroup; i += 32) {
    for (int half = 0; half < 2; ++half) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i) + half);
      const __m256i shifted = _mm256_and_si256(value, exponents);
      const __m256i infinite = _mm256_cmpeq_epi16(shifted, exponents);
      most[half] = _mm256_max_epu16(most[half], _mm256_andnot_si256(infinite, shifted));
    }
  }
  return most_of(_mm256_max_epu16(most[0], most[1])) >> 7;
}

// Brings a group of the next tile to the caches, a little at a time; it does not fault.
inline void fetch(const std::uint16_t* src) {
  __builtin_prefetch(src + kTile, 0, 3);
  __builtin_prefetch(src + kTile + kGroup / 2, 0, 3);
}

// Stores what is not read soon past the caches, if it may.
KVSTORE_AVX2 inline void put(std::uint8_t* to, __m256i bytes, bool stream) {
  if (stream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bytes);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
  }
}

// Of 32 numbers the codes and the rests, as bytes in their order.
KVSTORE_AVX2 inline void split_avx2(const std::uint16_t* src, __m256i base, __m256i* code,
                                    __m256i* rest) {
  __m256i codes[2], rests[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src) + half);
    const __m256i exponent =
        _mm256_and_si256(_mm256_srli_epi16(value, 7), _mm256_set1_epi16(0xff));
    codes[half] = _mm256_min_epu16(_mm256_sub_epi16(exponent, base), _mm256_set1_epi16(kEscape));
    rests[half] =
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(value, 8), _mm256_set1_epi16(0x80)),
                        _mm256_and_si256(value, _mm256_set1_epi16(0x7f)));
  }
  *code = _mm256_permute4x64_epi64(_mm256_packus_epi16(codes[0], codes[1]), 0xd8);
  *rest = _mm256_permute4x64_epi64(_mm256_packus_epi16(rests[0], rests[1]), 0xd8);
}

KVSTORE_AVX2 void encode_avx2(std::uint8_t* codes, std::uint8_t* rests, std::uint64_t* escapes,
                              const std::uint16_t* src, std::size_t groups, unsigned base) {
  const __m256i from = _mm256_set1_epi16(static_cast<short>(base));
  const __m256i escape = _mm256_set1_epi8(kEscape);
  const bool stream = is_line_start(codes) && is_line_start(rests);
  for (; groups > 0; --groups, src += kGroup, codes += kGroup / 2, rests += kGroup, ++escapes) {
    fetch(src);
    __m256i low, high, rest;
    std::uint8_t* const to = rests;
    split_avx2(src, from, &low, &rest);
    put(to, rest, stream);
    split_avx2(src + kGroup / 2, from, &high, &rest);
    put(to + 32, rest, stream);
    put(codes, _mm256_or_si256(low, _mm256_slli_epi16(high, 4)), stream);
    const auto first = static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, escape)));
    const auto last = static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, escape)));
    *escapes = first | static_cast<std::uint64_t>(last) << 32;
  }
}

KVSTORE_AVX2 void decode_avx2(std::uint16_t* dst, const std::uint8_t* codes,
                              const std::uint8_t* rests, std::size_t groups, unsigned base) {
  const __m128i low = _mm_set1_epi8(0x0f);
  const __m256i from = _mm256_set1_epi16(static_cast<short>(base));
  const __m256i sign = _mm256_set1_epi16(0x80), fraction = _mm256_set1_epi16(0x7f);
  for (; groups > 0; --groups, dst += kGroup, codes += kGroup / 2, rests += kGroup) {
    const auto* pairs = reinterpret_cast<const __m128i*>(codes);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const __m128i pair = _mm_loadu_si128(pairs + quarter % 2);
      const __m128i code = _mm_and_si128(quarter < 2 ? pair : _mm_srli_epi16(pair, 4), low);
      const __m256i rest = _mm256_cvtepu8_epi16(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(rests) + quarter));
      const __m256i exponent = _mm256_add_epi16(_mm256_cvtepu8_epi16(code), from);
      const __m256i signs = _mm256_slli_epi16(_mm256_and_si256(rest, sign), 8);
      const __m256i value = _mm256_or_si256(_mm256_or_si256(signs, _mm256_and_si256(rest, fraction)),
                                            _mm256_slli_epi16(exponent, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst) + quarter, value);
    }
  }
}

KVSTORE_AVX512 unsigned largest_avx512(const std::uint16_t* src, std::size_t groups) {
  const __m512i exponents = _mm512_set1_epi16(0x7f80);
  __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (std::size_t i = 0; i < groups * kGroup; i += kGroup) {
    for (int half = 0; half < 2; ++half) {
      const __m512i shifted = _mm512_and_si512(_mm512_loadu_si512(src + i + 32 * half), exponents);
      const __mmask32 finite = _mm512_cmpneq_epi16_mask(shifted, exponents);
      most[half] = _mm512_mask_max_epu16(most[half], finite, most[half], shifted);
    }
  }
  const __m512i both = _mm512_max_epu16(most[0], most[1]);
  const __m256i high = _mm512_extracti64x4_epi64(both, 1);
  return most_of(_mm256_max_epu16(_mm512_castsi512_si256(both), high)) >> 7;
}

// In these two, bytes are worked on, of 64 numbers at a time. What packs and unpacks them does so in
// each quarter of a register, so eights of bytes change their places: to_pairs brings eights 0 and 4
// to the first quarter, 1 and 5 to the second, and so on, from_pairs is the reverse.
KVSTORE_AVX512 inline __m512i to_pairs() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
KVSTORE_AVX512 inline __m512i from_pairs() { return _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7); }

KVSTORE_AVX512 void encode_avx512(std::uint8_t* codes, std::uint8_t* rests, std::uint64_t* escapes,
                                  const std::uint16_t* src, std::size_t groups, unsigned base) {
  const __m512i byte = _mm512_set1_epi16(0xff), sign = _mm512_set1_epi16(0x80);
  const __m512i fraction = _mm512_set1_epi16(0x7f), escape = _mm512_set1_epi8(kEscape);
  const __m512i from = _mm512_set1_epi8(static_cast<char>(base)), order = from_pairs();
  const bool stream = is_line_start(codes) && is_line_start(rests);
  for (; groups > 0; --groups, src += kGroup, codes += kGroup / 2, rests += kGroup, ++escapes) {
    fetch(src);
    __m512i exponents[2], others[2];
    for (int half = 0; half < 2; ++half) {
      const __m512i value = _mm512_loadu_si512(src + 32 * half);
      exponents[half] = _mm512_and_si512(_mm512_srli_epi16(value, 7), byte);
      // (high byte & sign) | (value & fraction)
      others[half] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(value, 8), sign,
                                               _mm512_and_si512(value, fraction), 0xea);
    }
    const __m512i exponent =
        _mm512_permutexvar_epi64(order, _mm512_packus_epi16(exponents[0], exponents[1]));
    const __m512i rest = _mm512_permutexvar_epi64(order, _mm512_packus_epi16(others[0], others[1]));
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(rests), rest);
    } else {
      _mm512_storeu_si512(rests, rest);
    }
    const __m512i code = _mm512_min_epu8(_mm512_sub_epi8(exponent, from), escape);
    const __m256i low = _mm512_castsi512_si256(code), high = _mm512_extracti64x4_epi64(code, 1);
    put(codes, _mm256_or_si256(low, _mm256_slli_epi16(high, 4)), stream);
    *escapes = _mm512_cmpeq_epi8_mask(code, escape);
  }
}

KVSTORE_AVX512 void decode_avx512(std::uint16_t* dst, const std::uint8_t* codes,
                                  const std::uint8_t* rests, std::size_t groups, unsigned base) {
  const __m512i from = _mm512_set1_epi8(static_cast<char>(base)), order = to_pairs();
  const __m512i low = _mm512_set1_epi8(0x0f), top = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  const __m512i shifts = _mm512_setr_epi64(0, 4, 0, 4, 0, 4, 0, 4);
  for (; groups > 0; --groups, dst += kGroup, codes += kGroup / 2, rests += kGroup) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m512i spread = _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(pairs));
    const __m512i code = _mm512_and_si512(_mm512_srlv_epi64(spread, shifts), low);
    const __m512i exponent = _mm512_add_epi8(code, from);
    const __m512i rest = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(rests));
    // Of the first byte the top bit is the exponent's last one, of the second it is the sign.
    const __m512i first = _mm512_ternarylogic_epi32(top, _mm512_slli_epi16(exponent, 7), rest, 0xca);
    const __m512i second = _mm512_ternarylogic_epi32(top, rest, _mm512_srli_epi16(exponent, 1), 0xca);
    _mm512_storeu_si512(dst, _mm512_unpacklo_epi8(first, second));
    _mm512_storeu_si512(dst + 32, _mm512_unpackhi_epi8(first, second));
  }
}
#endif  // __x86_64__

Kernels choose() {
#if defined(__x86_64__)
  if (cpu_has("avx512") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return {largest_avx512, encode_avx512, decode_avx512};
  }
  if (cpu_has("avx2")) return {largest_avx2, encode_avx2, decode_avx2};
#endif
  return {largest_portable, encode_portable, decode_portable};
}

// The hash of data whose whole lines went into `state`.
std::uint64_t sum_of(const Xxh3State& state, const std::uint8_t* data, std::size_t size) {
  return size <= kShortHash ? xxh3_64(data, size) : xxh3_finish(state, size, data + size - kLine);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

E4Shape::E4Shape(std::size_t values)
    : values(values),
      escapes(std::max(kLeastEscapes, values / kValuesPerEscape)),
      bases(0),
      codes(lines((values + kTile - 1) / kTile)),
      rests(codes + lines((values + kGroup - 1) / kGroup * (kGroup / 2))),
      places(rests + lines(values)),
      exponents(places + escapes * sizeof(std::uint32_t)),
      total(lines(exponents + escapes)) {}

std::optional<E4Coded> e4_encode(std::uint8_t* dst, const std::uint16_t* src, std::size_t values) {
  const E4Shape shape(values);
  const Kernels& run = kernels();
  Xxh3State state;
  std::size_t found = 0;
  std::memset(dst, 0, shape.codes);
  std::memset(dst + shape.rests - kLine, 0, kLine);
  std::memset(dst + shape.places, 0, shape.total - shape.places);
  for (std::size_t at = 0; at < values; at += kTile) {
    const std::size_t count = std::min(kTile, values - at);
    const std::uint16_t* const tile = src + at;
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(tile);
    run_kernel(line_kernels().hash, &state, nullptr, bytes, 2 * count / kLine, bytes);
    const std::size_t whole = count / kGroup, groups = (count + kGroup - 1) / kGroup;
    std::uint16_t last[kGroup] = {};  // the group that is not whole
    std::memcpy(last, tile + whole * kGroup, 2 * (count % kGroup));
    const unsigned rest = whole != groups ? run.largest(last, 1) : 0;
    const unsigned most = std::max(run.largest(tile, whole), rest);
    const unsigned base = most < 14 ? 0 : most - 14;
    dst[shape.bases + at / kTile] = static_cast<std::uint8_t>(base);
    std::uint8_t* const codes = dst + shape.codes + at / 2;
    std::uint8_t* const rests = dst + shape.rests + at;
    std::uint64_t escapes[kTile / kGroup];
    run.encode(codes, rests, escapes, tile, whole, base);
    if (whole != groups) {
      std::uint8_t padded[kGroup];
      run.encode(codes + whole * kGroup / 2, padded, escapes + whole, last, 1, base);
      escapes[whole] &= (std::uint64_t{1} << (count % kGroup)) - 1;
      std::memset(rests + whole * kGroup, 0, shape.places - shape.rests - at - whole * kGroup);
      std::memcpy(rests + whole * kGroup, padded, count % kGroup);
    }
    for (std::size_t group = 0; group < groups; ++group) {
      for (std::uint64_t left = escapes[group]; left != 0; left &= left - 1) {
        if (found == shape.escapes) return std::nullopt;
        const auto place = static_cast<std::uint32_t>(at + group * kGroup + __builtin_ctzll(left));
        std::memcpy(dst + shape.places + found * sizeof place, &place, sizeof place);
        dst[shape.exponents + found++] = static_cast<std::uint8_t>(exponent_of(src[place]));
      }
    }
  }
  store_fence();
  const auto* data = reinterpret_cast<const std::uint8_t*>(src);
  return E4Coded{found, sum_of(state, data, 2 * values)};
}

std::optional<std::uint64_t> e4_decode(std::uint8_t* dst, const std::uint8_t* src,
                                       std::size_t values, std::size_t escapes) {
  const E4Shape shape(values);
  const Kernels& run = kernels();
  const LineKernels& copies = line_kernels();
  const auto kernel = is_line_start(dst) ? copies.hash_stream : copies.hash_store;
  Xxh3State state;
  std::size_t used = 0;
  const auto place_of = [&](std::size_t number) {
    std::uint32_t place;
    std::memcpy(&place, src + shape.places + number * sizeof place, sizeof place);
    return std::size_t{place};
  };
  for (std::size_t at = 0; at < values; at += kTile) {
    const std::size_t count = std::min(kTile, values - at);
    alignas(kLine) std::uint16_t tile[kTile];
    const std::uint8_t* const codes = src + shape.codes + at / 2;
    const std::uint8_t* const rests = src + shape.rests + at;
    const std::size_t whole = count / kGroup, base = src[shape.bases + at / kTile];
    run.decode(tile, codes, rests, whole, static_cast<unsigned>(base));
    if (count % kGroup != 0) {  // The last group has all its codes, but maybe not all rests.
      std::uint8_t last[kGroup] = {};
      std::memcpy(last, rests + whole * kGroup, count % kGroup);
      run.decode(tile + whole * kGroup, codes + whole * kGroup / 2, last, 1,
                 static_cast<unsigned>(base));
    }
    for (; used < escapes; ++used) {
      const std::size_t place = place_of(used);
      if (place < at || (used > 0 && place <= place_of(used - 1))) return std::nullopt;
      if (place >= at + count) break;
      std::uint16_t& value = tile[place - at];
      value = static_cast<std::uint16_t>((value & 0x807f) | src[shape.exponents + used] << 7);
    }
    // What leaves is hashed on the way, while what the next tile is made of comes to the caches.
    const auto* from = reinterpret_cast<const std::uint8_t*>(tile);
    std::uint8_t* to = dst + 2 * at;
    const auto send = [&](std::size_t most, const std::uint8_t* ahead) {
      const std::size_t bytes = std::min(most, 2 * count - (to - dst - 2 * at)) / kLine * kLine;
      run_kernel(kernel, &state, to, from, bytes / kLine, ahead);
      from += bytes;
      to += bytes;
    };
    send(kTile, rests + kTile);
    send(kTile / 2, codes + kTile / 2);
    send(kTile, from);
    std::memcpy(to, from, 2 * count % kLine);
  }
  if (used != escapes) return std::nullopt;
  store_fence();
  return sum_of(state, dst, 2 * values);
}

}  // namespace kvstore
