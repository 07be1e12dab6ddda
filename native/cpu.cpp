#include "cpu.hpp"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kvstore {
namespace {

CpuFeatures detect() {
  CpuFeatures found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  found.avx2 = __builtin_cpu_supports("avx2");
  found.avx512 = __builtin_cpu_supports("avx512f");
  // Compilers older than GCC 14 do not know the name "sha" here, so ask cpuid.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    found.sha = ((ebx >> 29) & 1) != 0 && __builtin_cpu_supports("sse4.1");
  }
#endif
  return found;
}

bool listed(const std::string& list, const std::string& name) {
  return ("," + list + ",").find("," + name + ",") != std::string::npos;
}

CpuFeatures detect_limited() {
  CpuFeatures features = detect();
  if (const char* list = std::getenv("KVSTORE_CPU"); list != nullptr && *list != '\0') {
    features.avx2 = features.avx2 && listed(list, "avx2");
    features.avx512 = features.avx512 && listed(list, "avx512");
    features.sha = features.sha && listed(list, "sha");
  }
  return features;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect_limited();
  return features;
}

}  // namespace kvstore
