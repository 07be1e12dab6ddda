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
  // Codes a group; which of its numbers are escapes.
  std::uint64_t (*encode)(std::uint8_t* codes, std::uint8_t* rests, const std::uint16_t* src,
                          unsigned base);
  void (*decode)(std::uint16_t* dst, const std::uint8_t* codes, const std::uint8_t* rests,
                 std::size_t groups, unsigned base);
};

// Brings what the next tile is decoded from to the caches; a prefetch does not fault.
inline void fetch(const std::uint8_t* codes, const std::uint8_t* rests) {
  __builtin_prefetch(codes + kTile / 2, 0, 3);
  __builtin_prefetch(rests + kTile, 0, 3);
}

unsigned exponent_of(std::uint16_t value) { return (value >> 7) & 0xff; }

unsigned largest_portable(const std::uint16_t* src, std::size_t groups) {
  std::uint16_t most = 0;
  for (std::size_t i = 0; i < groups * kGroup; ++i) {
    const std::uint16_t shifted = src[i] & 0x7f80;
    most = std::max<std::uint16_t>(most, shifted == 0x7f80 ? 0 : shifted);
  }
  return most >> 7;
}

std::uint64_t encode_portable(std::uint8_t* codes, std::uint8_t* rests, const std::uint16_t* src,
                              unsigned base) {
  std::uint8_t code[kGroup];
  for (std::size_t i = 0; i < kGroup; ++i) {
    const auto distance = static_cast<std::uint16_t>(((src[i] >> 7) & 0xff) - base);
    code[i] = static_cast<std::uint8_t>(std::min<std::uint16_t>(distance, kEscape));
    rests[i] = static_cast<std::uint8_t>(((src[i] >> 8) & 0x80) | (src[i] & 0x7f));
  }
  for (std::size_t i = 0; i < kGroup / 2; ++i) {
    codes[i] = static_cast<std::uint8_t>(code[i] | code[i + kGroup / 2] << 4);
  }
  std::uint8_t most = 0;
  for (std::size_t i = 0; i < kGroup; ++i) most = std::max(most, code[i]);
  std::uint64_t escapes = 0;
  for (std::size_t i = 0; most == kEscape && i < kGroup; ++i) {
    escapes |= static_cast<std::uint64_t>(code[i] == kEscape) << i;
  }
  return escapes;
}

void decode_portable(std::uint16_t* dst, const std::uint8_t* codes, const std::uint8_t* rests,
                     std::size_t groups, unsigned base) {
  for (; groups > 0; --groups, dst += kGroup, codes += kGroup / 2, rests += kGroup) {
    fetch(codes, rests);
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

KVSTORE_AVX2 unsigned largest_avx2(const std::uint16_t* src, std::size_t groups) {
  const __m256i exponents = _mm256_set1_epi16(0x7f80);
  __m256i most = _mm256_setzero_si256();
  for (std::size_t i = 0; i < groups * kGroup; i += 16) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i shifted = _mm256_and_si256(value, exponents);
    const __m256i infinite = _mm256_cmpeq_epi16(shifted, exponents);
    most = _mm256_max_epu16(most, _mm256_andnot_si256(infinite, shifted));
  }
  alignas(32) std::uint16_t found[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(found), most);
  return *std::max_element(found, found + 16) >> 7;
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

KVSTORE_AVX2 std::uint64_t encode_avx2(std::uint8_t* codes, std::uint8_t* rests,
                                       const std::uint16_t* src, unsigned base) {
  const __m256i from = _mm256_set1_epi16(static_cast<short>(base));
  const __m256i escape = _mm256_set1_epi8(kEscape);
  __m256i low, high, rest;
  auto* to = reinterpret_cast<__m256i*>(rests);
  split_avx2(src, from, &low, &rest);
  _mm256_storeu_si256(to, rest);
  split_avx2(src + kGroup / 2, from, &high, &rest);
  _mm256_storeu_si256(to + 1, rest);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm256_or_si256(low, _mm256_slli_epi16(high, 4)));
  const auto first = static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, escape)));
  const auto second = static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, escape)));
  return first | static_cast<std::uint64_t>(second) << 32;
}

KVSTORE_AVX2 void decode_avx2(std::uint16_t* dst, const std::uint8_t* codes,
                              const std::uint8_t* rests, std::size_t groups, unsigned base) {
  const __m128i low = _mm_set1_epi8(0x0f);
  const __m256i from = _mm256_set1_epi16(static_cast<short>(base));
  const __m256i sign = _mm256_set1_epi16(0x80), fraction = _mm256_set1_epi16(0x7f);
  for (; groups > 0; --groups, dst += kGroup, codes += kGroup / 2, rests += kGroup) {
    fetch(codes, rests);
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

KVSTORE_AVX512 std::uint64_t encode_avx512(std::uint8_t* codes, std::uint8_t* rests,
                                           const std::uint16_t* src, unsigned base) {
  const __m512i from = _mm512_set1_epi16(static_cast<short>(base));
  const __m512i escape = _mm512_set1_epi16(kEscape);
  __m256i code[2];
  std::uint64_t escapes = 0;
  for (int half = 0; half < 2; ++half) {
    const __m512i value = _mm512_loadu_si512(src + 32 * half);
    const __m512i exponent = _mm512_and_si512(_mm512_srli_epi16(value, 7), _mm512_set1_epi16(0xff));
    const __m512i distance = _mm512_min_epu16(_mm512_sub_epi16(exponent, from), escape);
    escapes |= static_cast<std::uint64_t>(_mm512_cmpeq_epi16_mask(distance, escape)) << (32 * half);
    code[half] = _mm512_cvtepi16_epi8(distance);
    const __m512i rest =
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(value, 8), _mm512_set1_epi16(0x80)),
                        _mm512_and_si512(value, _mm512_set1_epi16(0x7f)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rests) + half, _mm512_cvtepi16_epi8(rest));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm256_or_si256(code[0], _mm256_slli_epi16(code[1], 4)));
  return escapes;
}

KVSTORE_AVX512 void decode_avx512(std::uint16_t* dst, const std::uint8_t* codes,
                                  const std::uint8_t* rests, std::size_t groups, unsigned base) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  const __m512i from = _mm512_set1_epi16(static_cast<short>(base));
  const __m512i sign = _mm512_set1_epi16(0x80), fraction = _mm512_set1_epi16(0x7f);
  for (; groups > 0; --groups, dst += kGroup, codes += kGroup / 2, rests += kGroup) {
    fetch(codes, rests);
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    for (int half = 0; half < 2; ++half) {
      const __m256i code = _mm256_and_si256(half == 0 ? pairs : _mm256_srli_epi16(pairs, 4), low);
      const __m512i rest = _mm512_cvtepu8_epi16(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rests) + half));
      const __m512i exponent = _mm512_add_epi16(_mm512_cvtepu8_epi16(code), from);
      const __m512i signs = _mm512_slli_epi16(_mm512_and_si512(rest, sign), 8);
      const __m512i value = _mm512_or_si512(_mm512_or_si512(signs, _mm512_and_si512(rest, fraction)),
                                            _mm512_slli_epi16(exponent, 7));
      _mm512_storeu_si512(dst + 32 * half, value);
    }
  }
}
#endif  // __x86_64__

Kernels choose() {
#if defined(__x86_64__)
  if (cpu_has("avx512") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return {largest_avx2, encode_avx512, decode_avx512};
  }
  if (cpu_has("avx2")) return {largest_avx2, encode_avx2, decode_avx2};
#endif
  return {largest_portable, encode_portable, decode_portable};
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
  Xxh3Stream sum;
  std::size_t found = 0;
  std::memset(dst, 0, shape.codes);
  std::memset(dst + shape.rests - kLine, 0, kLine);
  std::memset(dst + shape.places, 0, shape.total - shape.places);
  for (std::size_t at = 0; at < values; at += kTile) {
    const std::size_t count = std::min(kTile, values - at);
    std::uint16_t padded[kTile];
    const std::uint16_t* tile = src + at;
    sum.update(nullptr, reinterpret_cast<const std::uint8_t*>(tile), 2 * count);
    const std::size_t groups = (count + kGroup - 1) / kGroup;
    if (count % kGroup != 0) {
      std::memset(padded, 0, groups * kGroup * sizeof(std::uint16_t));
      std::memcpy(padded, tile, 2 * count);
      tile = padded;
    }
    const unsigned most = run.largest(tile, groups), base = most < 14 ? 0 : most - 14;
    dst[shape.bases + at / kTile] = static_cast<std::uint8_t>(base);
    for (std::size_t group = 0; group < groups; ++group) {
      const std::size_t inside = group * kGroup, first = at + inside;
      std::uint64_t escapes;
      if (values - first >= kGroup) {
        escapes = run.encode(dst + shape.codes + first / 2, dst + shape.rests + first,
                             tile + inside, base);
      } else {
        std::uint8_t rests[kGroup];
        const std::size_t left = values - first;
        escapes = run.encode(dst + shape.codes + first / 2, rests, tile + inside, base);
        escapes &= (std::uint64_t{1} << left) - 1;
        std::memset(dst + shape.rests + first, 0, shape.places - shape.rests - first);
        std::memcpy(dst + shape.rests + first, rests, left);
      }
      for (; escapes != 0; escapes &= escapes - 1) {
        if (found == shape.escapes) return std::nullopt;
        const auto place = static_cast<std::uint32_t>(first + __builtin_ctzll(escapes));
        std::memcpy(dst + shape.places + found * sizeof place, &place, sizeof place);
        dst[shape.exponents + found++] = static_cast<std::uint8_t>(exponent_of(src[place]));
      }
    }
  }
  return E4Coded{found, sum.digest()};
}

std::optional<std::uint64_t> e4_decode(std::uint8_t* dst, const std::uint8_t* src,
                                       std::size_t values, std::size_t escapes) {
  const E4Shape shape(values);
  const Kernels& run = kernels();
  Xxh3Stream sum;
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
    sum.update(dst + 2 * at, reinterpret_cast<const std::uint8_t*>(tile), 2 * count);
  }
  if (used != escapes) return std::nullopt;
  return sum.digest();
}

}  // namespace kvstore
