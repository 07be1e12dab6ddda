// What requests ask for: which class of blocks each block is in, and how long they waited to be used
// again (kvstore/memory/habits.py learns from that). All of it belongs to one thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

namespace kvstore {

// A hash that names a block, or an object; 0 is none.
using Name = std::uint64_t;

// Many small tables for what may be millions: none takes long to grow, or much room before.
template <class T>
class Tables {
 public:
  using Table = std::unordered_map<Name, T>;

  Table& of(Name name) {
    auto& table = tables_[name >> 56];
    if (table == nullptr) table = std::make_unique<Table>();
    return *table;
  }
  T* find(Name name) {
    auto& table = of(name);
    const auto found = table.find(name);
    return found == table.end() ? nullptr : &found->second;
  }

 private:
  std::array<std::unique_ptr<Table>, 256> tables_;
};

// Blocks that one request left in one class: `size` once, `left` were not asked for since.
struct Group {
  int cls;
  double at;
  std::int64_t left = 0, size = 0;
};

// A block that requests asked for, the name of the one before it, and its group: none once it is
// forgotten.
struct Known {
  Name name, parent;
  int turn, uses = 0;
  std::shared_ptr<Group> group;
};

// `uses`, `turns`, `fresh` and `edges` say where classes and ages begin; see habits.py.
class Asked {
 public:
  Asked(std::vector<int> uses, int turns, std::vector<int> fresh, std::vector<double> edges);

  int classes() const { return (static_cast<int>(uses_.size()) + 1) * kinds_; }
  int ages() const { return static_cast<int>(edges_.size()) + 1; }

  // Some place holds so many blocks: as many times more are remembered.
  void hold(std::size_t blocks);
  // None if nobody remembers it.
  std::shared_ptr<Known> find(Name name);
  std::size_t size() const { return order_.size(); }
  // A request asks for these blocks, its whole prompt, or what comes after `parent`.
  void ask(const std::vector<Name>& names, Name parent, double now);

  // How much was used by each age of each class, then how much was not and is forgotten.
  std::vector<double> seen;
  // The second half of that, with those that wait still, and have waited so long at least.
  std::vector<double> waited(double now) const;

  // What blocks of each class and age are worth.
  std::vector<double> worth_of;
  double worth(int cls, double waited) const { return worth_of[place(cls, waited)]; }

 private:
  using Order = std::list<std::shared_ptr<Known>>;

  std::size_t place(int cls, double waited) const;
  void leave(const Group& group, double blocks, bool used, double now);
  void forget_oldest(double now);

  std::vector<int> uses_;
  int turns_;
  std::vector<int> fresh_;
  std::vector<double> edges_;
  int kinds_;
  std::size_t limit_;
  Order order_;  // oldest first
  Tables<Order::iterator> known_;
  std::deque<std::shared_ptr<Group>> groups_;
};

}  // namespace kvstore
