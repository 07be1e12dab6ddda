// Python bindings. Every argument is checked here, or in make_plan, before memory is touched;
// then the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "copy.hpp"
#include "cpu.hpp"
#include "e4.hpp"
#include "forecast.hpp"
#include "plan.hpp"
#include "sha256.hpp"
#include "xxh3.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvstore {
namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;

constexpr std::chrono::milliseconds kFinishWait{5000};
constexpr std::int64_t kMaxThreads = 256;
constexpr std::size_t kMaxSegments = 1 << 20;
constexpr std::size_t kMaxPageIds = std::size_t{1} << 32;
constexpr std::int64_t kMaxPageTokens = 1 << 24;
constexpr std::int64_t kMaxBlockTokens = 1 << 24;

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

// Lets go of the GIL while it lives. CPython unwinds daemon threads that want the GIL back while the
// interpreter ends, and no C++ frame survives that. So its end waits for those that are here, but
// not for ever (`finish`, with the GIL): who comes later stays where it is.
class Unlocked {
 public:
  Unlocked() {
    if (ending_) return;  // keeps it
    ++inside_;
    thread_ = PyEval_SaveThread();
  }
  ~Unlocked() {
    if (thread_ == nullptr) return;
    while (ended_) pause();
    PyEval_RestoreThread(thread_);
    --inside_;
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

  static void finish() {
    ending_ = true;
    PyThreadState* const thread = PyEval_SaveThread();
    for (int i = 0; inside_ > 0 && i < kFinishWait.count(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ended_ = true;
    PyEval_RestoreThread(thread);
  }
  static void forget() { inside_ = 0; }  // in the child of a fork: none of those threads is there

 private:
  PyThreadState* thread_ = nullptr;
  static inline std::atomic<bool> ending_{false}, ended_{false};
  static inline std::atomic<int> inside_{0};
};

// A memory range from Python: a positive address and a size that do not wrap around.
struct Range {
  std::uint8_t* data;
  std::size_t size;
};

Range checked_range(const char* name, std::int64_t address, std::int64_t nbytes) {
  if (nbytes < 0) reject("nbytes must not be negative");
  if (address < 0 || (address == 0 && nbytes > 0)) {
    reject(std::string(name) + " must be a valid address, not null or negative");
  }
  if (nbytes > INT64_MAX - address) reject(std::string(name) + " + nbytes overflows");
  return {reinterpret_cast<std::uint8_t*>(address), static_cast<std::size_t>(nbytes)};
}

void check_disjoint(const Range& dst, const Range& src) {
  if (dst.data < src.data + src.size && src.data < dst.data + dst.size) {
    reject("dst and src must not overlap");
  }
}

unsigned checked_threads(std::int64_t threads) {
  if (threads < 1 || threads > kMaxThreads) reject("threads must be between 1 and 256");
  return static_cast<unsigned>(threads);
}

template <class T>
const T* checked_array(const char* name, const Array& array, std::size_t ndim, const char* shape) {
  bool fits = array.dtype() == nb::dtype<T>() && array.ndim() == ndim;
  std::int64_t expected = 1;
  for (std::size_t i = ndim; fits && i-- > 0;) {
    fits = array.stride(i) == expected || array.shape(i) <= 1 || array.size() == 0;
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
  if (!fits) reject(std::string(name) + " must be a C-contiguous array " + shape);
  return static_cast<const T*>(array.data());
}

std::uint64_t hash_range(std::int64_t address, std::int64_t nbytes) {
  const Range range = checked_range("address", address, nbytes);
  const Unlocked unlocked;
  return xxh3_64(range.data, range.size);
}

void copy_range(std::int64_t dst, std::int64_t src, std::int64_t nbytes, std::int64_t threads) {
  const Range to = checked_range("dst", dst, nbytes);
  const Range from = checked_range("src", src, nbytes);
  check_disjoint(to, from);
  const unsigned workers = checked_threads(threads);
  const Unlocked unlocked;
  linear_copy(to.data, from.data, to.size, workers);
}

void stream_update(Xxh3Stream& stream, std::int64_t src, std::int64_t nbytes, std::int64_t dst) {
  const Range from = checked_range("src", src, nbytes);
  const Range to = checked_range("dst", dst, dst == 0 ? 0 : nbytes);
  check_disjoint(to, from);
  if (nbytes > 0 && !stream.open()) {
    reject("nbytes of every piece but the last must be a multiple of 64");
  }
  const Unlocked unlocked;
  stream.update(to.data, from.data, from.size);
}

// Copies the page numbers, so that they stay as checked, and notes their range in `shape`.
std::vector<std::int64_t> checked_pages(const Array& page_ids, Shape& shape) {
  const auto* data = checked_array<std::int64_t>("page_ids", page_ids, 2, "(B, P) of int64");
  if (page_ids.shape(1) < 1) reject("page_ids must have at least one page per block");
  if (page_ids.size() > kMaxPageIds) reject("page_ids has too many entries");
  std::vector<std::int64_t> pages(data, data + page_ids.size());
  bool any = false;
  for (const std::int64_t page : pages) {
    if (page < -1) reject("page_ids must not be below -1");
    if (page == -1) {
      if (shape.to_slots) reject("page_ids may be -1 (skip) only if to_slots is false");
      continue;
    }
    shape.min_page = any ? std::min(shape.min_page, page) : page;
    shape.max_page = std::max(shape.max_page, page);
    any = true;
  }
  shape.pages = static_cast<std::int64_t>(page_ids.shape(1));
  return pages;
}

std::vector<std::uint64_t> checked_slots(const Array& slots, std::size_t blocks) {
  const auto* data = checked_array<std::uint64_t>("slots", slots, 1, "(B,) of uint64");
  if (slots.shape(0) != blocks) reject("slots must have one address per row of page_ids");
  return std::vector<std::uint64_t>(data, data + blocks);
}

// The plan of a copy, once its pages have been checked.
Plan checked_plan(const Array& segments, const Shape& shape) {
  if (shape.page_tokens < 1 || shape.page_tokens > kMaxPageTokens) {
    reject("page_tokens must be between 1 and 2**24");
  }
  if (shape.elem_size != 1 && shape.elem_size != 2 && shape.elem_size != 4 &&
      shape.elem_size != 8) {
    reject("elem_size must be 1, 2, 4 or 8");
  }
  const auto* rows = checked_array<std::int64_t>("segments", segments, 2, "(S, 11) of int64");
  const std::size_t count = segments.shape(0);
  if (segments.shape(1) != kSegmentFields) {
    reject("segments must be a C-contiguous array (S, 11) of int64");
  }
  if (count < 1 || count > kMaxSegments) reject("segments must have between 1 and 2**20 rows");
  return make_plan(reinterpret_cast<const Segment*>(rows), count, shape);
}

nb::object copy_blocks_checked(bool to_slots, const Array& segments, const Array& page_ids,
                               const Array& slots, std::int64_t page_tokens,
                               std::int64_t elem_size, std::int64_t threads, bool checksum) {
  Shape shape{to_slots, checksum, page_tokens, elem_size};
  const unsigned workers = checked_threads(threads);
  const std::vector<std::int64_t> pages = checked_pages(page_ids, shape);
  const std::size_t blocks = page_ids.shape(0);
  const std::vector<std::uint64_t> addresses = checked_slots(slots, blocks);
  const Plan plan = checked_plan(segments, shape);
  for (const std::uint64_t slot : addresses) {
    if (slot == 0) reject("slots must not be null");
    if (slot > INT64_MAX - plan.object_bytes) reject("slots: address overflows");
  }
  if (blocks > INT64_MAX / plan.block_bytes) reject("page_ids has too many rows");

  std::vector<std::uint64_t> hashes(checksum ? blocks : 0);
  {
    const Unlocked unlocked;
    copy_blocks(plan, pages.data(), page_ids.shape(1), addresses.data(), blocks, workers,
                checksum ? hashes.data() : nullptr);
  }
  return checksum ? nb::cast(hashes) : nb::none();
}

// A stream of one block, or none: its bytes have no order in which they could be streamed.
std::unique_ptr<BlockStream> stream_block(bool to_slots, const Array& segments,
                                          const Array& page_ids, std::int64_t page_tokens,
                                          std::int64_t elem_size) {
  Shape shape{to_slots, true, page_tokens, elem_size};
  std::vector<std::int64_t> pages = checked_pages(page_ids, shape);
  if (page_ids.shape(0) != 1) reject("page_ids must have one row");
  Plan plan = checked_plan(segments, shape);
  if (!BlockStream::fits(plan) || std::find(pages.begin(), pages.end(), -1) != pages.end()) {
    return nullptr;
  }
  return std::make_unique<BlockStream>(std::move(plan), std::move(pages));
}

std::size_t stream_next(BlockStream& stream, std::int64_t capacity) {
  if (capacity < static_cast<std::int64_t>(BlockStream::kLeast)) {
    reject("capacity must be 65536 at least");
  }
  return stream.next(static_cast<std::size_t>(capacity));
}

void stream_take(BlockStream& stream, std::int64_t buffer) {
  const Range range = checked_range("buffer", buffer, 1);
  const Unlocked unlocked;
  stream.take(range.data);
}

nb::bytes chain_keys_checked(const nb::bytes& parent, const Array& tokens,
                             std::int64_t block_tokens) {
  if (parent.size() != kKeyBytes) reject("parent must be 32 bytes");
  const auto* data = checked_array<std::uint32_t>("tokens", tokens, 1, "(N,) of uint32");
  if (block_tokens < 1 || block_tokens > kMaxBlockTokens) {
    reject("block_tokens must be between 1 and 2**24");
  }
  const std::size_t blocks = tokens.shape(0) / static_cast<std::size_t>(block_tokens);
  std::vector<std::uint8_t> keys(blocks * kKeyBytes);
  const auto* parent_key = reinterpret_cast<const std::uint8_t*>(parent.c_str());
  {
    const Unlocked unlocked;
    chain_keys(parent_key, data, blocks, static_cast<std::uint32_t>(block_tokens), keys.data());
  }
  return nb::bytes(keys.data(), keys.size());
}

constexpr std::int64_t kMaxValues = std::int64_t{1} << 31;  // so that places are 32 bits

std::size_t checked_values(std::int64_t values) {
  if (values < 1 || values > kMaxValues) reject("values must be between 1 and 2**31");
  return static_cast<std::size_t>(values);
}

std::size_t e4_bytes(std::int64_t values) { return E4Shape(checked_values(values)).total; }

nb::object e4_encode_checked(std::int64_t dst, std::int64_t src, std::int64_t values) {
  const std::size_t count = checked_values(values), total = E4Shape(count).total;
  const Range to = checked_range("dst", dst, static_cast<std::int64_t>(total));
  const Range from = checked_range("src", src, 2 * values);
  check_disjoint(to, from);
  if (src % 2 != 0) reject("src must be a multiple of 2");
  std::optional<E4Coded> coded;
  {
    const Unlocked unlocked;
    coded = e4_encode(to.data, reinterpret_cast<const std::uint16_t*>(from.data), count);
  }
  if (!coded) return nb::none();
  return nb::make_tuple(coded->escapes, coded->checksum);
}

nb::object e4_decode_checked(std::int64_t dst, std::int64_t src, std::int64_t values,
                             std::int64_t escapes) {
  const E4Shape shape(checked_values(values));
  const Range to = checked_range("dst", dst, 2 * values);
  const Range from = checked_range("src", src, static_cast<std::int64_t>(shape.total));
  check_disjoint(to, from);
  if (escapes < 0 || static_cast<std::size_t>(escapes) > shape.escapes) {
    reject("escapes must fit in their section");
  }
  std::optional<std::uint64_t> sum;
  {
    const Unlocked unlocked;
    sum = e4_decode(to.data, from.data, shape.values, static_cast<std::size_t>(escapes));
  }
  return sum ? nb::cast(*sum) : nb::none();
}

// How drivers of devices take one copy: destination, source, bytes, stream; 0 is success.
using CopyFunction = int (*)(std::uint64_t, std::uint64_t, std::size_t, void*);

nb::tuple call_copies(std::int64_t function_address, const Array& dst, const Array& src,
                      const Array& sizes, std::int64_t stream) {
  const auto* to = checked_array<std::uint64_t>("dst", dst, 1, "(N,) of uint64");
  const auto* from = checked_array<std::uint64_t>("src", src, 1, "(N,) of uint64");
  const auto* bytes = checked_array<std::uint64_t>("sizes", sizes, 1, "(N,) of uint64");
  const std::size_t count = dst.shape(0);
  if (src.shape(0) != count || sizes.shape(0) != count) {
    reject("dst, src and sizes must have the same length");
  }
  if (function_address <= 0) reject("function_address must be a valid address");
  if (stream < 0) reject("stream must not be negative");
  const auto copy = reinterpret_cast<CopyFunction>(function_address);
  std::size_t done = 0;
  int status = 0;
  {
    const Unlocked unlocked;
    for (; done < count; ++done) {
      status = copy(to[done], from[done], bytes[done], reinterpret_cast<void*>(stream));
      if (status != 0) break;
    }
  }
  return nb::make_tuple(done, status);
}

// A prompt's token ids are small objects strewn over the heap: reading ahead hides their latency.
constexpr Py_ssize_t kObjectsAhead = 16;

nb::bytes pack_u32(const nb::list& values) {
  const Py_ssize_t count = PyList_Size(values.ptr());
  auto packed = nb::steal<nb::bytes>(
      PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(std::uint32_t))));
  if (!packed.is_valid()) throw nb::python_error();
  char* out = PyBytes_AsString(packed.ptr());
  PyObject* ahead[kObjectsAhead] = {};
  for (Py_ssize_t next = 0; next < count + kObjectsAhead; ++next) {
    PyObject*& place = ahead[next % kObjectsAhead];
    PyObject* const object = place;
    if (next < count) __builtin_prefetch(place = PyList_GetItem(values.ptr(), next));
    const Py_ssize_t i = next - kObjectsAhead;
    if (i < 0) continue;
    const unsigned long value = PyLong_AsUnsignedLong(object);
    if (value == static_cast<unsigned long>(-1) && PyErr_Occurred() != nullptr) {
      throw nb::python_error();
    }
    if (value > UINT32_MAX) {
      PyErr_SetString(PyExc_OverflowError, "a value is above 2**32 - 1");
      throw nb::python_error();
    }
    const auto token = static_cast<std::uint32_t>(value);
    std::memcpy(out + static_cast<std::size_t>(i) * sizeof token, &token, sizeof token);
  }
  return packed;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native core of KVStore: block copies, XXH3 checksums and token-chain keys.";
  cpu_features();  // reads KVSTORE_CPU now
  nb::set_leak_warnings(false);  // threads may have blocks under way when the interpreter ends
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&Unlocked::finish));
  pthread_atfork(nullptr, nullptr, &Unlocked::forget);

  m.def("cpu_features", &cpu_features);
  m.def("xxh3_64", &hash_range, "address"_a, "nbytes"_a);
  m.def("e4_bytes", &e4_bytes, "values"_a);
  m.def("e4_encode", &e4_encode_checked, "dst"_a, "src"_a, "values"_a);
  m.def("e4_decode", &e4_decode_checked, "dst"_a, "src"_a, "values"_a, "escapes"_a);
  m.def("copy", &copy_range, "dst"_a, "src"_a, "nbytes"_a, "threads"_a = 1);
  m.def("copy_blocks", &copy_blocks_checked, "to_slots"_a, "segments"_a.noconvert(),
        "page_ids"_a.noconvert(), "slots"_a.noconvert(), "page_tokens"_a, "elem_size"_a,
        "threads"_a = 1, "checksum"_a = false);
  m.def("call_copies", &call_copies, "function_address"_a, "dst"_a.noconvert(),
        "src"_a.noconvert(), "sizes"_a.noconvert(), "stream"_a);
  m.def("chain_keys", &chain_keys_checked, "parent"_a, "tokens"_a.noconvert(), "block_tokens"_a);
  m.def("pack_u32", &pack_u32, "values"_a);

  m.def("stream_block", &stream_block, "to_slots"_a, "segments"_a.noconvert(),
        "page_ids"_a.noconvert(), "page_tokens"_a, "elem_size"_a);
  nb::class_<BlockStream>(m, "BlockStream")
      .def("next", &stream_next, "capacity"_a)
      .def("take", &stream_take, "buffer"_a)
      .def("digest", &BlockStream::digest);
  nb::class_<Xxh3Stream>(m, "Xxh3Stream")
      .def(nb::init<>())
      .def("update", &stream_update, "src"_a, "nbytes"_a, "dst"_a = 0)
      .def("digest", &Xxh3Stream::digest);
  bind_forecast(m);
}

}  // namespace kvstore
