// A CUDA driver for tests: the same entry points over the memory of the process. Each stream is a
// thread that copies late, at random, so that missing order shows as wrong bytes; whatever the
// real driver forbids, or allows only by luck, is an error here.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "fake_cuda_memory.hpp"
#include "fake_cuda_streams.hpp"

namespace {

struct Location { int type, id; };
struct Attributes { int order; Location source, destination; unsigned flags; };
static_assert(sizeof(Attributes) == 24, "CUmemcpyAttributes");

std::map<Address, std::shared_ptr<Stream>> g_streams;
std::map<Address, std::shared_ptr<Point>> g_events;  // as last recorded
Address g_next_handle = 0x1000;
int g_version = 12080;
int g_contexts = 0;
std::int64_t g_batches = 0, g_largest_batch = 0, g_plain = 0, g_device_bytes = 0;
std::int64_t g_fail_in = 0;   // the n-th copy call from now on is refused
std::int64_t g_break_in = 0;  // the n-th copy call breaks the device for good
std::int64_t g_pin_limit = -1;
std::atomic<bool> g_broken{false};
const Address kContext = 0xC0DE;
thread_local std::vector<Address> t_contexts;

#define NEEDS_CONTEXT() \
  if (t_contexts.empty() || t_contexts.back() != kContext) return kInvalidContext; \
  if (g_broken) return kIllegalAddress

template <class T>
std::shared_ptr<T> found(std::map<Address, std::shared_ptr<T>>& all, Address handle) {
  std::lock_guard<std::mutex> lock(g_mutex);
  auto it = all.find(handle);
  return it == all.end() ? nullptr : it->second;
}

std::shared_ptr<Stream> stream_of(void* handle) {
  const auto key = reinterpret_cast<Address>(handle);
  if (key == 0) {  // the legacy default stream
    std::lock_guard<std::mutex> lock(g_mutex);
    auto& legacy = g_streams[0];
    if (!legacy) legacy = std::make_shared<Stream>();
    return legacy;
  }
  return found(g_streams, key);
}

// Counts a copy call; what injected failure says of it.
int injected() {  // under g_mutex
  if (g_fail_in > 0 && --g_fail_in == 0) return kUnknown;
  if (g_break_in > 0 && --g_break_in == 0) g_broken = true;
  return kOk;
}

int cuInit(unsigned) { return kOk; }
int cuDriverGetVersion(int* version) { *version = g_version; return kOk; }
int cuDeviceGet(int* device, int ordinal) {
  *device = 7;
  return ordinal == 0 ? kOk : kInvalidDevice;
}
int cuDevicePrimaryCtxRetain(Address* context, int device) {
  if (device != 7) return kInvalidDevice;
  std::lock_guard<std::mutex> lock(g_mutex);
  ++g_contexts;
  *context = kContext;
  return kOk;
}
int cuDevicePrimaryCtxRelease(int device) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (device != 7 || g_contexts == 0) return kInvalidDevice;
  --g_contexts;
  return kOk;
}
int cuCtxGetCurrent(Address* context) {
  return *context = t_contexts.empty() ? 0 : t_contexts.back(), kOk;
}
int cuCtxPushCurrent(Address context) { t_contexts.push_back(context); return kOk; }
int cuCtxPopCurrent(Address* context) {
  if (t_contexts.empty()) return kInvalidContext;
  *context = t_contexts.back();
  t_contexts.pop_back();
  return kOk;
}
int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  NEEDS_CONTEXT();
  *least = 2, *greatest = -3;
  return kOk;
}

int cuStreamCreateWithPriority(Address* stream, unsigned flags, int priority) {
  NEEDS_CONTEXT();
  if (flags != 1 || priority > 2 || priority < -3) return kInvalidValue;
  std::lock_guard<std::mutex> lock(g_mutex);
  *stream = g_next_handle += 16;
  g_streams[*stream] = std::make_shared<Stream>();
  return kOk;
}
int cuStreamDestroy(void* handle) {
  NEEDS_CONTEXT();
  std::shared_ptr<Stream> gone;
  std::lock_guard<std::mutex> lock(g_mutex);
  auto it = g_streams.find(reinterpret_cast<Address>(handle));
  if (handle == nullptr || it == g_streams.end()) return kInvalidHandle;
  gone = it->second;
  g_streams.erase(it);
  return kOk;
}
int cuStreamSynchronize(void* handle) {
  NEEDS_CONTEXT();
  auto stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  stream->finish();
  return g_broken ? kIllegalAddress : kOk;
}
int cuStreamWaitEvent(void* handle, void* event, unsigned flags) {
  NEEDS_CONTEXT();
  auto stream = stream_of(handle);
  auto point = found(g_events, reinterpret_cast<Address>(event));
  if (!stream || !point || flags != 0) return kInvalidHandle;
  stream->add([point] { point->wait(); });
  return kOk;
}

int cuEventCreate(Address* event, unsigned flags) {
  NEEDS_CONTEXT();
  if (flags != 3) return kInvalidValue;  // blocking synchronisation, no timing
  std::lock_guard<std::mutex> lock(g_mutex);
  *event = g_next_handle += 16;
  g_events[*event] = std::make_shared<Point>();
  g_events[*event]->happened = true;  // never recorded: nothing to wait for
  return kOk;
}
int cuEventDestroy(void* handle) {
  NEEDS_CONTEXT();
  std::lock_guard<std::mutex> lock(g_mutex);
  return g_events.erase(reinterpret_cast<Address>(handle)) ? kOk : kInvalidHandle;
}
int cuEventRecord(void* event, void* handle) {
  NEEDS_CONTEXT();
  auto stream = stream_of(handle);
  auto point = std::make_shared<Point>();
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto it = g_events.find(reinterpret_cast<Address>(event));
    if (!stream || it == g_events.end()) return kInvalidHandle;
    it->second = point;
  }
  stream->add([point] { point->happen(); });
  return kOk;
}
int cuEventSynchronize(void* event) {
  NEEDS_CONTEXT();
  auto point = found(g_events, reinterpret_cast<Address>(event));
  if (!point) return kInvalidHandle;
  point->wait();
  return g_broken ? kIllegalAddress : kOk;
}

int cuMemAlloc(Address* address, std::size_t size) {
  NEEDS_CONTEXT();
  std::lock_guard<std::mutex> lock(g_mutex);
  void* memory = size == 0 ? nullptr : aligned_alloc(512, (size + 511) / 512 * 512);
  if (memory == nullptr) return kNoMemory;
  std::memset(memory, 0xDD, size);
  *address = reinterpret_cast<Address>(memory);
  g_device_bytes += static_cast<std::int64_t>(size);
  return add_range(*address, size, kDevice, true);
}
int cuMemFree(Address address) {
  NEEDS_CONTEXT();
  std::lock_guard<std::mutex> lock(g_mutex);
  auto it = g_ranges.find(address);
  if (it == g_ranges.end() || !it->second.allocated) return kInvalidValue;
  g_device_bytes -= static_cast<std::int64_t>(it->second.end - address);
  g_ranges.erase(it);
  free(reinterpret_cast<void*>(address));
  return kOk;
}
int cuMemHostRegister(Address address, std::size_t size, unsigned flags) {
  NEEDS_CONTEXT();
  if (flags != 3) return kInvalidValue;  // portable, device map
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_pin_limit >= 0 && (g_pin_limit -= static_cast<std::int64_t>(size)) < 0) {
    g_pin_limit += static_cast<std::int64_t>(size);
    return kNoMemory;
  }
  return add_range(address, size, kPinned, false);
}
int cuMemHostUnregister(Address address) {
  NEEDS_CONTEXT();
  std::lock_guard<std::mutex> lock(g_mutex);
  auto it = g_ranges.find(address);
  if (it == g_ranges.end() || it->second.kind != kPinned) return kNotRegistered;
  g_ranges.erase(it);
  return kOk;
}
int cuMemHostGetDevicePointer(Address* seen, Address address, unsigned flags) {
  NEEDS_CONTEXT();
  std::lock_guard<std::mutex> lock(g_mutex);
  if (flags != 0 || kind_of(address, 1) != kPinned) return kInvalidValue;
  *seen = address;
  return kOk;
}

int plain(Address dst, Address src, std::size_t size, void* handle, bool dst_device,
          bool src_device) {
  NEEDS_CONTEXT();
  auto stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    if (const int status = injected()) return status;
    const Kind to = kind_of(dst, size), from = kind_of(src, size);
    if (to == kSpanning || from == kSpanning || size == 0) return kInvalidValue;
    if ((to == kDevice) != dst_device || (from == kDevice) != src_device) return kInvalidValue;
    ++g_plain;
  }
  stream->add([=] {
    std::memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), size);
  });
  return kOk;
}
int cuMemcpyHtoDAsync(Address dst, Address src, std::size_t size, void* stream) {
  return plain(dst, src, size, stream, true, false);
}
int cuMemcpyDtoHAsync(Address dst, Address src, std::size_t size, void* stream) {
  return plain(dst, src, size, stream, false, true);
}

struct Copy {
  Address dst, src;
  std::size_t size;
  std::vector<std::uint8_t> early;  // what was read ahead of the stream
};

int cuMemcpyBatchAsync(Address* dst, Address* src, std::size_t* sizes, std::size_t count,
                       const Attributes* attributes, const std::size_t* firsts,
                       std::size_t attribute_count, std::size_t* refused, void* handle) {
  NEEDS_CONTEXT();
  if (handle == nullptr) return kInvalidValue;
  auto stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  if (attribute_count != 1 || firsts[0] != 0 || count == 0) return kInvalidValue;
  const Attributes& how = attributes[0];
  if (how.source.type || how.source.id || how.destination.type || how.destination.id ||
      how.flags > 1 || (how.order != 1 && how.order != 3)) {
    return kInvalidValue;
  }
  auto copies = std::make_shared<std::vector<Copy>>();
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    if (const int status = injected()) {
      *refused = count / 2;
      return status;
    }
    for (std::size_t i = 0; i < count; ++i) {
      const Kind to = kind_of(dst[i], sizes[i]), from = kind_of(src[i], sizes[i]);
      const bool save = from == kDevice && to == kPinned && how.order == 1;
      const bool load = from == kPinned && to == kDevice;
      if (sizes[i] == 0 || (!save && !load)) {
        *refused = i;
        return kInvalidValue;
      }
      Copy copy{dst[i], src[i], sizes[i], {}};
      if (how.order == 3) {
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(src[i]);
        copy.early.assign(bytes, bytes + sizes[i]);
      }
      copies->push_back(std::move(copy));
    }
    ++g_batches;
    g_largest_batch = std::max(g_largest_batch, static_cast<std::int64_t>(count));
  }
  stream->add([copies] {
    thread_local std::mt19937 random(std::random_device{}());
    std::shuffle(copies->begin(), copies->end(), random);
    for (std::size_t i = 0; i < copies->size(); ++i) {
      if (i % 64 == 63) nap();
      const Copy& copy = (*copies)[i];
      const void* from = copy.early.empty() ? reinterpret_cast<const void*>(copy.src)
                                            : static_cast<const void*>(copy.early.data());
      std::memcpy(reinterpret_cast<void*>(copy.dst), from, copy.size);
    }
  });
  return kOk;
}

struct Entry { void* address; int since; };
#define ENTRY(name, since) {#name, {reinterpret_cast<void*>(&name), since}}
const std::map<std::string, Entry> g_entries = {
    ENTRY(cuInit, 2000), ENTRY(cuDriverGetVersion, 2020), ENTRY(cuGetErrorName, 6000),
    ENTRY(cuGetErrorString, 6000), ENTRY(cuDeviceGet, 2000),
    ENTRY(cuDevicePrimaryCtxRetain, 7000), ENTRY(cuDevicePrimaryCtxRelease, 11000),
    ENTRY(cuCtxGetCurrent, 4000), ENTRY(cuCtxPushCurrent, 4000), ENTRY(cuCtxPopCurrent, 4000),
    ENTRY(cuCtxGetStreamPriorityRange, 5050), ENTRY(cuStreamCreateWithPriority, 5050),
    ENTRY(cuStreamDestroy, 4000), ENTRY(cuStreamSynchronize, 2000),
    ENTRY(cuStreamWaitEvent, 3020), ENTRY(cuEventCreate, 2000), ENTRY(cuEventDestroy, 4000),
    ENTRY(cuEventRecord, 2000), ENTRY(cuEventSynchronize, 2000),
    ENTRY(cuMemAlloc, 3020), ENTRY(cuMemFree, 3020), ENTRY(cuMemHostRegister, 6050),
    ENTRY(cuMemHostUnregister, 4000), ENTRY(cuMemHostGetDevicePointer, 3020),
    ENTRY(cuMemcpyHtoDAsync, 3020), ENTRY(cuMemcpyDtoHAsync, 3020),
    ENTRY(cuMemcpyBatchAsync, 12080),
};

}  // namespace

extern "C" {

int cuGetProcAddress_v2(const char* name, void** address, int version, std::uint64_t flags,
                        int* status) {
  *address = nullptr;
  if (flags != 0) return kInvalidValue;
  const auto it = g_entries.find(name);
  if (it == g_entries.end()) {
    *status = 1;  // not found
    return 500;
  }
  // Version 13 of the batch has other arguments.
  const bool other_form = std::string(name) == "cuMemcpyBatchAsync" && version >= 13000;
  if (it->second.since > g_version || it->second.since > version || other_form) {
    *status = 2;  // not in this version
    return kOk;
  }
  *address = it->second.address;
  *status = 0;
  return kOk;
}

void fake_set_version(int version) { g_version = version; }
int fake_add_device_range(Address address, std::uint64_t size) {
  std::lock_guard<std::mutex> lock(g_mutex);
  return add_range(address, size, kDevice, false);
}
void fake_remove_device_range(Address address) {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_ranges.erase(address);
}
int fake_kind(Address address, std::uint64_t size) {
  std::lock_guard<std::mutex> lock(g_mutex);
  return kind_of(address, size);
}
void fake_fail_in(std::int64_t copies) { g_fail_in = copies; }
void fake_break_in(std::int64_t copies) {  // 0: the device is whole again
  g_break_in = copies;
  if (copies == 0) g_broken = false;
}
void fake_limit_pinning(std::int64_t nbytes) { g_pin_limit = nbytes; }
int fake_enqueue(void* handle, void (*function)(void*), void* argument) {
  auto stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  stream->add([=] { function(argument); });
  return kOk;
}
// Live events, streams, pinned ranges, bytes of the device, contexts; then calls: batches, copies
// in the largest one, plain copies.
void fake_counts(std::int64_t* counts) {
  std::lock_guard<std::mutex> lock(g_mutex);
  std::int64_t pinned = 0;
  for (const auto& range : g_ranges) pinned += range.second.kind == kPinned;
  const auto streams = static_cast<std::int64_t>(g_streams.size() - g_streams.count(0));
  const std::int64_t all[] = {static_cast<std::int64_t>(g_events.size()), streams, pinned,
                              g_device_bytes, g_contexts, g_batches, g_largest_batch, g_plain};
  std::copy(std::begin(all), std::end(all), counts);
}

}  // extern "C"
