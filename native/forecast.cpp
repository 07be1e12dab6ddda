// The policy `forecast`: the block with the fewest expected hits per second of staying goes first.
// Only leaves go, blocks with no other behind them here: what comes after a block is of no use
// without it. All of this holds the GIL.
#include "forecast.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <set>
#include <stack>
#include <stdexcept>

#include "asked.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvstore {
namespace {

constexpr double kRests = 0.25;  // seconds until one that was in use is looked at again
constexpr int kMoves = 512;  // items that are put elsewhere at a time: under a millisecond
constexpr double kNever = -std::numeric_limits<double>::infinity();

// Salted by Python, so nobody makes two that are the same.
Name name_of(nb::handle key) {
  const Py_hash_t hash = PyObject_Hash(key.ptr());
  if (hash == -1) throw nb::python_error();
  return hash == 0 ? 1 : static_cast<Name>(hash);
}

// Anything else has no place in an order.
double time_of(double now) {
  if (!std::isfinite(now)) throw std::invalid_argument("no time");
  return now;
}

// Of a block's object of one part.
Name object_name(Name block, Name part) {
  const Name name = block ^ (part * 0x9E3779B97F4A7C15u);
  return name == 0 ? 1 : name;
}

struct Item;

// Where an item stands among others: oldest first, by `order` where times are the same.
struct Rank {
  double at;
  std::int64_t order;
  Item* item;
  bool operator<(const Rank& other) const {
    return at != other.at ? at < other.at : order < other.order;
  }
};
using Ring = std::set<Rank>;

// A node that is here; `above` names the object before it, if that is known.
struct Item {
  nb::object node;
  Name block = 0, part = 0, above = 0;
  std::shared_ptr<Known> known;
  bool cold = false;
  Ring* ring = nullptr;
  Ring::iterator rank;
  Name name() const { return object_name(block, part); }
};

// An object that is here, or others before which it stands.
struct Place {
  Item* item = nullptr;
  std::size_t behind = 0;
};

class Forecast {
 public:
  explicit Forecast(std::shared_ptr<Asked> asked) : asked_(std::move(asked)), rings_(classes()) {}
  Forecast(const Forecast&) = delete;
  Forecast& operator=(const Forecast&) = delete;

  std::size_t size() const { return items_.size() - free_.size(); }

  void add(nb::object node, nb::handle /*older_than*/) {
    const std::size_t number = free_.empty() ? items_.size() : free_.top();
    const nb::object owner = node.attr("owner");
    const Name block = name_of(owner.attr("key")), part = name_of(owner.attr("variant"));
    node.attr("mark") = number;
    node.attr("after") = true;  // so that its owner sees that it is here
    if (free_.empty()) {
      items_.emplace_back();
    } else {
      free_.pop();
    }
    Item& item = items_[number];
    item.node = std::move(node);
    item.block = block;
    item.part = part;
    places_.of(item.name())[item.name()].item = &item;
    asked_->hold(size());
    use(item);
  }

  void touch(nb::handle node) {
    Item& item = of(node);
    item.cold = false;
    use(item);
  }

  void renew(nb::handle node) { settle(of(node)); }  // the newest of its time

  void cool(nb::handle node) {
    Item& item = of(node);
    item.cold = true;
    settle(item);
  }

  void remove(nb::handle node, bool /*evicted*/) {
    Item& item = of(node);
    const std::size_t number = nb::cast<std::size_t>(node.attr("mark"));
    node.attr("after") = nb::none();
    if (offered_ == &item) offered_ = nullptr;
    item.ring->erase(item.rank);
    const Name name = item.name(), above = item.above;
    Place& place = places_.of(name)[name];
    if (place.item == &item) place.item = nullptr;
    drop_if_empty(name);
    item = Item();
    free_.push(number);
    if (above == 0) return;
    Place& before = places_.of(above)[above];
    if (--before.behind == 0 && before.item != nullptr && before.item->ring == &inner_) {
      settle(*before.item, true);
    }
    drop_if_empty(above);
  }

  // Whether what is to come is worth less than the least that would have to go.
  bool refuses(nb::handle newcomer, nb::handle victim, double now) {
    const auto coming = asked_->find(name_of(newcomer.attr("key")));
    Item& item = of(victim);
    const Group* going = group_of(item);
    if (coming == nullptr || going == nullptr || item.cold) return false;
    return coming->group->at == going->at ||
           asked_->worth(going->cls, now - going->at) > asked_->worth(coming->group->cls, 0.0);
  }

  // Begin to name victims for a request's block; ends all that began before.
  std::size_t begin(nb::handle newcomer, double now) {
    const auto coming =
        newcomer.is_none() ? nullptr : asked_->find(name_of(newcomer.attr("key")));
    newcomer_ = coming == nullptr ? std::nan("") : coming->group->at;
    now_ = time_of(now);
    offered_ = nullptr;
    first_passed_ = ++order_;
    for (int moves = kMoves; moves > 0 && !resting_.empty(); --moves) {
      const Rank& first = *resting_.begin();
      if (first.at <= now && now < first.at + kRests) break;
      settle(*first.item);
    }
    return ++turn_;
  }

  // The next victim, if there is one; that before it, if it is still here, is in use.
  nb::object next(std::size_t turn) {
    if (turn != turn_) return nb::none();
    if (offered_ != nullptr) move(*offered_, resting_, now_, ++order_);
    offered_ = best();
    return offered_ == nullptr ? nb::none() : offered_->node;
  }

 private:
  std::size_t classes() const { return static_cast<std::size_t>(asked_->classes()); }

  Item& of(nb::handle node) {
    const auto number = nb::cast<std::size_t>(node.attr("mark"));
    if (number < items_.size() && items_[number].node.is(node)) return items_[number];
    throw std::invalid_argument("the node is not here");
  }

  // What its block is in by now: nothing if nobody asked for it, or nobody remembers.
  const Group* group_of(Item& item) {
    if (item.known == nullptr || item.known->group == nullptr) {
      item.known = asked_->find(item.block);
    }
    return item.known == nullptr ? nullptr : item.known->group.get();
  }

  // Its block came, or was asked for.
  void use(Item& item) {
    item.known = asked_->find(item.block);
    if (item.above == 0 && item.known != nullptr && item.known->parent != 0) {
      item.above = object_name(item.known->parent, item.part);
      Place& before = places_.of(item.above)[item.above];
      if (++before.behind == 1 && before.item != nullptr) settle(*before.item);
    }
    settle(item);
  }

  // Put it where it belongs, `first` of those of its time.
  void settle(Item& item, bool first = false) {
    const Group* group = group_of(item);
    const std::int64_t order = first ? -++order_ : ++order_;
    const double at = group == nullptr ? kNever : group->at;
    if (item.cold) {
      move(item, cold_, 0.0, -order);  // the last one to cool goes first
    } else {
      const Place* const place = places_.find(item.name());
      const bool inner = place != nullptr && place->behind > 0;
      move(item, inner ? inner_ : rings_[group == nullptr ? 0 : group->cls], at, order);
    }
  }

  void move(Item& item, Ring& ring, double at, std::int64_t order) {
    if (item.ring != nullptr) item.ring->erase(item.rank);
    item.ring = &ring;
    item.rank = ring.insert(ring.end(), Rank{at, order, &item});
  }

  Item* best() {
    if (!cold_.empty()) return cold_.begin()->item;
    Item* least = nullptr;
    double least_worth = 0.0;
    int moves = kMoves;
    for (Ring& ring : rings_) {
      Item* const item = oldest(ring, moves);
      const Group* group = item == nullptr ? nullptr : group_of(*item);
      // Where the oldest is the newcomer's, so are all.
      if (item == nullptr || (group != nullptr && group->at == newcomer_)) continue;
      const double worth = group == nullptr ? 0.0 : asked_->worth(group->cls, now_ - group->at);
      if (least == nullptr || worth < least_worth) least = item, least_worth = worth;
    }
    if (least != nullptr) return least;
    for (Ring& ring : rings_) {
      if (!ring.empty()) return ring.begin()->item;
    }
    if (!inner_.empty()) return inner_.begin()->item;
    // What is in use may be free again, but is named once only.
    const bool passed = resting_.empty() || resting_.begin()->order > first_passed_;
    return passed ? nullptr : resting_.begin()->item;
  }

  // Of a class, once those have moved on whose blocks were asked for since, or are forgotten: as
  // many as may.
  Item* oldest(Ring& ring, int& moves) {
    for (; !ring.empty(); --moves) {
      Item* const item = ring.begin()->item;
      const Group* group = group_of(*item);
      const double at = group == nullptr ? kNever : group->at;
      const bool here = &rings_[group == nullptr ? 0 : group->cls] == &ring && item->rank->at == at;
      if (here || moves <= 0) return item;
      settle(*item);
    }
    return nullptr;
  }

  void drop_if_empty(Name name) {
    auto& table = places_.of(name);
    const auto found = table.find(name);
    if (found != table.end() && found->second.item == nullptr && found->second.behind == 0) {
      table.erase(found);
    }
  }

  std::shared_ptr<Asked> asked_;
  std::vector<Ring> rings_;  // of classes
  Ring cold_, inner_, resting_;
  std::deque<Item> items_;  // None moves as it grows.
  std::stack<std::size_t> free_;
  Tables<Place> places_;
  std::int64_t order_ = 0, first_passed_ = 0;
  std::size_t turn_ = 0;
  Item* offered_ = nullptr;
  double newcomer_ = 0.0, now_ = 0.0;
};

// Victims for one newcomer, best first, each once.
struct Victims {
  nb::object policy;
  std::size_t turn;
};

nb::bytes packed(const std::vector<double>& numbers) {
  return nb::bytes(numbers.data(), numbers.size() * sizeof(double));
}

void unpack(const nb::bytes& bytes, std::vector<double>& numbers) {
  const std::size_t size = numbers.size() * sizeof(double);
  if (bytes.size() != size) throw std::invalid_argument("not as many numbers");
  std::memcpy(numbers.data(), bytes.data(), size);
}

void ask(Asked& asked, const nb::iterable& keys, const nb::bytes& parent, double now) {
  std::vector<Name> names;
  for (const nb::handle key : keys) names.push_back(name_of(key));
  asked.ask(names, parent.size() == 0 ? 0 : name_of(parent), time_of(now));
}

nb::object find(Asked& asked, nb::handle key) {
  const auto known = asked.find(name_of(key));
  if (known == nullptr) return nb::none();
  return nb::make_tuple(known->group->cls, known->group->at);
}

}  // namespace

void bind_forecast(nb::module_& m) {
  nb::class_<Asked>(m, "Asked")
      .def(nb::init<std::vector<int>, int, std::vector<int>, std::vector<double>>(), "uses"_a,
           "turns"_a, "fresh"_a, "edges"_a)
      .def("__len__", &Asked::size)
      .def("__contains__", [](Asked& a, nb::handle key) { return a.find(name_of(key)) != nullptr; })
      .def("ask", &ask, "keys"_a, "parent"_a, "now"_a)
      .def("find", &find, "key"_a)
      .def("waited", [](const Asked& a, double now) { return packed(a.waited(now)); }, "now"_a)
      .def_prop_rw(
          "seen", [](const Asked& asked) { return packed(asked.seen); },
          [](Asked& asked, const nb::bytes& seen) { unpack(seen, asked.seen); })
      .def_prop_rw(
          "worth", [](const Asked& asked) { return packed(asked.worth_of); },
          [](Asked& asked, const nb::bytes& worth) { unpack(worth, asked.worth_of); });
  nb::class_<Forecast>(m, "Forecast")
      .def(nb::init<std::shared_ptr<Asked>>(), "asked"_a)
      .def("__len__", &Forecast::size)
      .def("add", &Forecast::add, "node"_a, "older_than"_a = nb::none())
      .def("touch", &Forecast::touch, "node"_a)
      .def("renew", &Forecast::renew, "node"_a)
      .def("cool", &Forecast::cool, "node"_a)
      .def("remove", &Forecast::remove, "node"_a, nb::kw_only(), "evicted"_a = false)
      .def("victims", [](nb::object policy, nb::handle newcomer, double now) {
        const std::size_t turn = nb::cast<Forecast&>(policy).begin(newcomer, now);
        return Victims{std::move(policy), turn};
      }, "newcomer"_a.none(), "now"_a)
      .def("outweighs", &Forecast::refuses, "newcomer"_a, "victim"_a, "now"_a);
  nb::class_<Victims>(m, "Victims")
      .def("__iter__", [](nb::object self) { return self; })
      .def("__next__", [](Victims& victims) {
        nb::object node = nb::cast<Forecast&>(victims.policy).next(victims.turn);
        if (node.is_none()) throw nb::stop_iteration();
        return node;
      });
}

}  // namespace kvstore
