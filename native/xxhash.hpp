// XXH3 with all of its vector code: which of it runs is chosen by the caller. xxhash/ is xxHash
// 0.8.4 as the sdist of PyPI's xxhash 4.1.0 has it, unchanged. Its public functions would read what
// is being copied a second time, so the kernels use its inner steps: look at them in an update.
#pragma once

#define XXH_INLINE_ALL
#if defined(__x86_64__)
#include <immintrin.h>
#define XXH_X86DISPATCH
#define XXH_DISPATCH_AVX2 1
#define XXH_DISPATCH_AVX512 1
#define XXH_TARGET_AVX2 __attribute__((target("avx2")))
#define XXH_TARGET_AVX512 __attribute__((target("avx512f")))
#endif
#include "xxhash/xxhash.h"
