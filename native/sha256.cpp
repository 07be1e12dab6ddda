#include "sha256.hpp"

#include <cstring>
#include <vector>

#include "cpu.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvstore {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are hashed as they lie in memory");

constexpr std::size_t kBlock = 64;

constexpr std::uint32_t kInitial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

alignas(16) constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotate_right(std::uint32_t x, int bits) { return (x >> bits) | (x << (32 - bits)); }

std::uint32_t read_big_endian(const std::uint8_t* p) {
  std::uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return __builtin_bswap32(value);
}

void compress_portable(std::uint32_t* state, const std::uint8_t* data, std::size_t blocks) {
  for (; blocks > 0; --blocks, data += kBlock) {
    std::uint32_t w[64];
    for (int t = 0; t < 16; ++t) w[t] = read_big_endian(data + 4 * t);
    for (int t = 16; t < 64; ++t) {
      const std::uint32_t s0 =
          rotate_right(w[t - 15], 7) ^ rotate_right(w[t - 15], 18) ^ (w[t - 15] >> 3);
      const std::uint32_t s1 =
          rotate_right(w[t - 2], 17) ^ rotate_right(w[t - 2], 19) ^ (w[t - 2] >> 10);
      w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    std::uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int t = 0; t < 64; ++t) {
      const std::uint32_t s1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
      const std::uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
      const std::uint32_t s0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
      const std::uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1;
      d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
  }
}

#if defined(__x86_64__)

__attribute__((target("sha,sse4.1"))) void compress_sha(std::uint32_t* state,
                                                        const std::uint8_t* data,
                                                        std::size_t blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  // The instructions want the state as (a b e f) and (c d g h), high word first.
  const __m128i cdab =
      _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state)), 0xB1);
  const __m128i efgh =
      _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state + 4)), 0x1B);
  __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
  __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
  for (; blocks > 0; --blocks, data += kBlock) {
    const __m128i abef_before = abef;
    const __m128i cdgh_before = cdgh;
    __m128i w[4];  // the last 16 words of the message schedule
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {  // four rounds each
      __m128i& oldest = w[r % 4];
      if (r < 4) {
        const __m128i* from = reinterpret_cast<const __m128i*>(data) + r;
        oldest = _mm_shuffle_epi8(_mm_loadu_si128(from), big_endian);
      } else {
        const __m128i newest = w[(r + 3) % 4];
        const __m128i seven_back = _mm_alignr_epi8(newest, w[(r + 2) % 4], 4);
        const __m128i sum =
            _mm_add_epi32(_mm_sha256msg1_epu32(oldest, w[(r + 1) % 4]), seven_back);
        oldest = _mm_sha256msg2_epu32(sum, newest);
      }
      const __m128i round = _mm_load_si128(reinterpret_cast<const __m128i*>(kRound) + r);
      const __m128i words = _mm_add_epi32(oldest, round);
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, words);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(words, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
  const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

#endif  // __x86_64__

using Compress = void (*)(std::uint32_t*, const std::uint8_t*, std::size_t);

Compress choose() {
#if defined(__x86_64__)
  if (cpu_has("sha")) return compress_sha;
#endif
  return compress_portable;
}

}  // namespace

void chain_keys(const std::uint8_t* parent, const std::uint32_t* tokens, std::size_t blocks,
                std::uint32_t block_tokens, std::uint8_t* keys) {
  static const Compress compress = choose();
  // All messages have one length, so the padding is written once and stays.
  const std::size_t token_bytes = std::size_t{4} * block_tokens;
  const std::size_t message_bytes = kKeyBytes + token_bytes;
  std::vector<std::uint8_t> message((message_bytes + 9 + kBlock - 1) / kBlock * kBlock);
  message[message_bytes] = 0x80;
  const std::uint64_t bits = __builtin_bswap64(8 * std::uint64_t{message_bytes});
  std::memcpy(message.data() + message.size() - sizeof bits, &bits, sizeof bits);

  const std::uint8_t* previous = parent;
  for (std::size_t i = 0; i < blocks; ++i, keys += kKeyBytes) {
    std::memcpy(message.data(), previous, kKeyBytes);
    std::memcpy(message.data() + kKeyBytes, tokens + i * std::size_t{block_tokens}, token_bytes);
    std::uint32_t state[8];
    std::memcpy(state, kInitial, sizeof state);
    compress(state, message.data(), message.size() / kBlock);
    for (int word = 0; word < 8; ++word) state[word] = __builtin_bswap32(state[word]);
    std::memcpy(keys, state, kKeyBytes);
    previous = keys;
  }
}

}  // namespace kvstore
