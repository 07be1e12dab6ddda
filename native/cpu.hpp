// What the processor can do, read once when the module is imported.
#pragma once

namespace kvstore {

struct CpuFeatures {
  bool avx2 = false;
  bool avx512 = false;
  bool sha = false;
};

// The features that dispatch may use: those of the processor, limited by the environment
// variable KVSTORE_CPU (a comma-separated list; "portable" selects none).
const CpuFeatures& cpu_features();

}  // namespace kvstore
