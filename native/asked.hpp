// What requests ask for: which class of blocks each block is in, and how long they waited to be used
// again (kvstore/memory/habits.py learns from that). All of it belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "records.hpp"

namespace kvstore {

// Blocks that one request left in one class: `size` once, `left` were not asked for since.
struct Group {
  Name name = 0;  // none has any
  double at = 0.0;
  std::uint64_t request = 0;
  Number next = kNone;
  std::uint32_t left = 0, size = 0;
  std::uint16_t cls = 0;
  bool waits = true;  // is looked at by lessons
};

// A block that requests asked for, and the name of the one before it.
struct Known {
  Name name = 0, parent = 0;
  Number next = kNone, older = kNone, newer = kNone, group = kNone;
  std::uint8_t turn = 1, uses = 0;
};
static_assert(sizeof(Known) <= 40, "many more are remembered than are here");

// A request that is being told of: the first `old` blocks were known, and `told` are dealt with.
struct Asking {
  std::vector<Name> names;
  Name parent;
  double now;
  std::uint64_t request;
  std::vector<Number> groups;  // by uses
  std::size_t old = 0, told = 0;
  int turn = 1, kind = -1;
};

// `uses`, `turns`, `fresh` and `edges` say where classes and ages begin; see habits.py.
class Asked {
 public:
  Asked(std::vector<int> uses, int turns, std::vector<int> fresh, std::vector<double> edges);

  int classes() const { return (static_cast<int>(uses_.size()) + 1) * kinds_; }
  int ages() const { return static_cast<int>(edges_.size()) + 1; }

  // Some place holds so many blocks: as many times more are remembered.
  void hold(std::size_t blocks);
  std::size_t size() const { return size_; }
  // None if nobody remembers it.
  Number find(Name name) const { return known_.find(name); }
  Name parent_of(Number known) const { return known_[known].parent; }
  // Null if nobody remembers the block; `known` may be where it was found before.
  const Group* group_of(Name block, Number& known) const;
  // A request asks for these blocks, its whole prompt, or what comes after `parent`.
  Asking ask(std::vector<Name> names, Name parent, double now);
  // Deal with some more of it, as of one time with the rest; whether there is more.
  bool go_on(Asking& asking);

  // How much was used by each age of each class, then how much was not and is forgotten.
  std::vector<double> seen;
  // The second half of that, with those that wait still, and have waited so long at least.
  std::vector<double> waited(double now) const;

  // What blocks of each class are worth in the middle of each age.
  std::vector<double> worth_of;
  // In between, something in between.
  double worth(int cls, double waited) const;

 private:
  std::size_t place(int cls, double waited) const;
  void count(const Group& group, double blocks, bool used, double now);
  void leave(Number group, bool used, double now);
  Number begin_group(int cls, const Asking& asking);
  void append(Number number);
  void unlink(const Known& known);
  void forget_oldest(double now);

  std::vector<int> uses_;
  int turns_;
  std::vector<int> fresh_;
  std::vector<double> edges_, middles_;
  int kinds_;
  std::size_t limit_, size_ = 0;
  Records<Known> known_;
  Number oldest_ = kNone, newest_ = kNone;
  Records<Group> groups_;  // Those that wait are linked, in the order in which they began.
  Number first_ = kNone, last_ = kNone;
  std::size_t waiting_ = 0;
  std::uint64_t requests_ = 0;
};

}  // namespace kvstore
