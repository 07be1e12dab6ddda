// The policy `forecast`: the block with the fewest expected hits per second of staying goes first.
// Only leaves go, blocks with no other behind them here: what comes after a block is of no use
// without it. All of this holds the GIL.
#include "forecast.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "asked.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvstore {
namespace {

constexpr double kRests = 0.25;  // seconds until one that was in use is looked at again
constexpr int kMoves = 512;  // items that are put elsewhere at a time: under a millisecond
constexpr Name kSpread = 0x9E3779B97F4A7C15u;

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
  const Name name = block ^ part;
  return name == 0 ? 1 : name;
}

using RingNumber = std::uint16_t;
constexpr RingNumber kNoRing = 0xFFFF;

// A node that is here, or the mere place of one before which others stand: `behind` so many. Of a
// ring it is `at` some place, which its `rank` and then `order` say: the lowest goes first.
struct Item {
  nb::object node;
  Name name = 0, block = 0;
  double rank = 0.0;
  std::int64_t order = 0;
  Number next = kNone, known = kNone, above = kNone, behind = 0, at = 0;
  RingNumber ring = kNoRing;
  bool cold = false;
  bool operator<(const Item& other) const {
    return rank != other.rank ? rank < other.rank : order < other.order;
  }
};
static_assert(sizeof(Item) <= 64, "there may be millions");

class Forecast {
 public:
  explicit Forecast(std::shared_ptr<Asked> asked)
      : asked_(std::move(asked)),
        cold_(static_cast<RingNumber>(asked_->classes())),
        inner_(cold_ + 1),
        resting_(cold_ + 2),
        rings_(cold_ + 3u) {}
  Forecast(const Forecast&) = delete;
  Forecast& operator=(const Forecast&) = delete;

  std::size_t size() const { return size_; }

  void add(nb::object node, nb::handle /*older_than*/) {
    const nb::object owner = node.attr("owner");
    const Name block = name_of(owner.attr("key"));
    const Name name = object_name(block, kSpread * name_of(owner.attr("variant")));
    Number number = place_of(name);
    if (items_[number].node.is_valid()) number = items_.take();  // a second one of that name
    node.attr("mark") = number;
    node.attr("after") = true;  // so that its owner sees that it is here
    Item& item = items_[number];
    item.node = std::move(node);
    item.name = name;
    item.block = block;
    asked_->hold(++size_);
    use(number);
  }

  void touch(nb::handle node) {
    const Number number = of(node);
    items_[number].cold = false;
    use(number);
  }

  void renew(nb::handle node) { settle(of(node)); }  // the newest of its time

  void cool(nb::handle node) {
    const Number number = of(node);
    items_[number].cold = true;
    settle(number);
  }

  void remove(nb::handle node, bool /*evicted*/) {
    const Number number = of(node);
    node.attr("after") = nb::none();
    if (offered_ == number) offered_ = kNone;
    take_out(number);
    Item& item = items_[number];
    const nb::object last = std::move(item.node);  // goes once all is in order
    const Number above = std::exchange(item.above, kNone);
    item.known = kNone;
    item.cold = false;
    --size_;
    drop_if_empty(number);
    if (above == kNone) return;
    Item& before = items_[above];
    if (--before.behind == 0 && before.ring == inner_) settle(above, true);
    drop_if_empty(above);
  }

  // Whether what is to come is worth less than the least that would have to go.
  bool refuses(nb::handle newcomer, nb::handle victim, double now) {
    const Group* coming = group_of(newcomer);
    Item& item = items_[of(victim)];
    const Group* going = group_of(item);
    if (coming == nullptr || going == nullptr || item.cold) return false;
    return coming->request == going->request ||
           asked_->worth(going->cls, now - going->at) > asked_->worth(coming->cls, 0.0);
  }

  // Begin to name victims for a request's block; ends all that began before.
  std::size_t begin(nb::handle newcomer, double now) {
    const Group* coming = newcomer.is_none() ? nullptr : group_of(newcomer);
    newcomer_ = coming == nullptr ? 0 : coming->request;
    now_ = time_of(now);
    offered_ = kNone;
    first_passed_ = ++order_;
    for (int moves = kMoves; moves > 0 && first(resting_) != kNone; --moves) {
      const double since = items_[first(resting_)].rank;
      if (since <= now && now < since + kRests) break;
      settle(first(resting_));
    }
    return ++turn_;
  }

  // The next victim, if there is one; that before it, if it is still here, is in use.
  nb::object next(std::size_t turn) {
    if (turn != turn_) return nb::none();
    if (offered_ != kNone) move(offered_, resting_, now_, ++order_);
    offered_ = best();
    return offered_ == kNone ? nb::none() : items_[offered_].node;
  }

 private:
  Number of(nb::handle node) {
    const auto number = nb::cast<std::size_t>(node.attr("mark"));
    if (items_.has(number) && items_[static_cast<Number>(number)].node.is(node)) {
      return static_cast<Number>(number);
    }
    throw std::invalid_argument("the node is not here");
  }

  // What its block is in by now: nothing if nobody asked for it, or nobody remembers.
  const Group* group_of(Item& item) { return asked_->group_of(item.block, item.known); }
  const Group* group_of(nb::handle newcomer) {
    Number known = kNone;
    return asked_->group_of(name_of(newcomer.attr("key")), known);
  }

  Number place_of(Name name) {
    Number number = items_.find(name);
    if (number == kNone) {
      number = items_.take();
      items_[number].name = name;
      items_.list(number);
    }
    return number;
  }

  void drop_if_empty(Number number) {
    if (items_[number].node.is_valid() || items_[number].behind > 0) return;
    items_.unlist(number);
    items_.give_back(number);
  }

  // Its block came, or was asked for.
  void use(Number number) {
    Item& item = items_[number];
    const Name parent = group_of(item) == nullptr ? 0 : asked_->parent_of(item.known);
    if (item.above == kNone && parent != 0 && parent != item.block) {
      item.above = place_of(object_name(parent, item.name ^ item.block));
      Item& before = items_[item.above];
      if (++before.behind == 1 && before.node.is_valid()) settle(item.above);
    }
    settle(number);
  }

  // Put it where it belongs, `first` of those of its time.
  void settle(Number number, bool first = false) {
    Item& item = items_[number];
    const Group* group = group_of(item);
    const std::int64_t order = first ? -++order_ : ++order_;
    if (item.cold) {
      move(number, cold_, 0.0, -order);  // the last one to cool goes first
    } else {
      move(number, item.behind > 0 ? inner_ : ring_of(group), rank_of(group), order);
    }
  }

  static RingNumber ring_of(const Group* group) { return group == nullptr ? 0 : group->cls; }
  static double rank_of(const Group* group) {
    return group == nullptr ? 0.0 : static_cast<double>(group->request);
  }

  void move(Number number, RingNumber ring, double rank, std::int64_t order) {
    take_out(number);
    Item& item = items_[number];
    item.ring = ring;
    item.rank = rank;
    item.order = order;
    rings_[ring].push_back(number);
    sift(rings_[ring], rings_[ring].size() - 1);
  }

  void take_out(Number number) {
    Item& item = items_[number];
    if (item.ring == kNoRing) return;
    auto& ring = rings_[std::exchange(item.ring, kNoRing)];
    const Number last = ring.back();
    ring.pop_back();
    if (last == number) return;
    ring[item.at] = last;
    sift(ring, item.at);
  }

  // A ring is a heap: the one there moves to where none before it is to go later.
  void sift(std::vector<Number>& ring, std::size_t at) {
    const Number number = ring[at];
    const auto put = [&](Number moved) {
      ring[at] = moved;
      items_[moved].at = static_cast<Number>(at);
    };
    for (; at > 0 && items_[number] < items_[ring[(at - 1) / 2]]; at = (at - 1) / 2) {
      put(ring[(at - 1) / 2]);
    }
    for (std::size_t child; (child = 2 * at + 1) < ring.size(); at = child) {
      if (child + 1 < ring.size() && items_[ring[child + 1]] < items_[ring[child]]) ++child;
      if (items_[number] < items_[ring[child]]) break;
      put(ring[child]);
    }
    put(number);
  }

  Number first(RingNumber ring) const { return rings_[ring].empty() ? kNone : rings_[ring][0]; }

  Number best() {
    if (first(cold_) != kNone) return first(cold_);
    Number least = kNone;
    double least_worth = 0.0;
    int moves = kMoves;
    for (RingNumber ring = 0; ring < cold_; ++ring) {
      const Number number = oldest(ring, moves);
      if (number == kNone) continue;
      const Group* group = group_of(items_[number]);
      // Where the oldest is the newcomer's, so are all.
      if (group != nullptr && group->request == newcomer_) continue;
      const double worth = group == nullptr ? 0.0 : asked_->worth(group->cls, now_ - group->at);
      if (least == kNone || worth < least_worth) least = number, least_worth = worth;
    }
    for (RingNumber ring = 0; least == kNone && ring <= inner_; ++ring) least = first(ring);
    if (least != kNone) return least;
    // What is in use may be free again, but is named once only.
    least = first(resting_);
    return least == kNone || items_[least].order > first_passed_ ? kNone : least;
  }

  // Of a class, once those have moved on whose blocks were asked for since, or are forgotten: as
  // many as may.
  Number oldest(RingNumber ring, int& moves) {
    for (; first(ring) != kNone; --moves) {
      Item& item = items_[first(ring)];
      const Group* group = group_of(item);
      const bool here = ring_of(group) == ring && item.rank == rank_of(group);
      if (here || moves <= 0) return first(ring);
      settle(first(ring));
    }
    return kNone;
  }

  std::shared_ptr<Asked> asked_;
  const RingNumber cold_, inner_, resting_;  // after those of classes
  std::vector<std::vector<Number>> rings_;
  Records<Item> items_;
  std::size_t size_ = 0;
  std::int64_t order_ = 0, first_passed_ = 0;
  std::size_t turn_ = 0;
  Number offered_ = kNone;
  std::uint64_t newcomer_ = 0;
  double now_ = 0.0;
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

// A request, dealt with as it is gone through.
struct Slices {
  std::shared_ptr<Asked> asked;
  Asking asking;
};

Slices ask(std::shared_ptr<Asked> asked, const nb::iterable& keys, const nb::bytes& parent,
           double now) {
  std::vector<Name> names;
  for (const nb::handle key : keys) names.push_back(name_of(key));
  Asking asking =
      asked->ask(std::move(names), parent.size() == 0 ? 0 : name_of(parent), time_of(now));
  return {std::move(asked), std::move(asking)};
}

nb::object find(Asked& asked, nb::handle key) {
  Number known = kNone;
  const Group* group = asked.group_of(name_of(key), known);
  if (group == nullptr) return nb::none();
  return nb::make_tuple(group->cls, group->at);
}

}  // namespace

void bind_forecast(nb::module_& m) {
  nb::class_<Asked>(m, "Asked")
      .def(nb::init<std::vector<int>, int, std::vector<int>, std::vector<double>>(), "uses"_a,
           "turns"_a, "fresh"_a, "edges"_a)
      .def("__len__", &Asked::size)
      .def("__contains__", [](Asked& a, nb::handle key) { return a.find(name_of(key)) != kNone; })
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
  nb::class_<Slices>(m, "Slices")
      .def("__iter__", [](nb::object self) { return self; })
      .def("__next__", [](Slices& slices) {
        if (!slices.asked->go_on(slices.asking)) throw nb::stop_iteration();
      });
  nb::class_<Victims>(m, "Victims")
      .def("__iter__", [](nb::object self) { return self; })
      .def("__next__", [](Victims& victims) {
        nb::object node = nb::cast<Forecast&>(victims.policy).next(victims.turn);
        if (node.is_none()) throw nb::stop_iteration();
        return node;
      });
}

}  // namespace kvstore
