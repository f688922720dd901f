// Loads, stores, atomics, asynchronous copies, matrices of 8 x 8.
#include <algorithm>

#include "decode.h"

namespace ptx {
namespace {

// Memory of type M, registers of type R; R is unsigned, M signed where it extends its sign.
template <class M, class R>
void load(Warp& w, Instruction& i) {
  w.resolve(i, i.s[0], sizeof(M) * i.count, false);
  for (size_t v = 0; v < i.dv.size(); ++v) {
    each<R>(w, i.dv[v], [&](int l) {
      M x;
      std::memcpy(&x, w.host[l] + v * sizeof(M), sizeof x);
      return static_cast<R>(x);
    });
  }
}
// Lanes of one store that write different values to one address of shared memory: any of them may win.
template <class M, class R>
void compare_lanes(Warp& w, Instruction& i) {
  for (uint32_t m = w.exec; m; m &= m - 1) {
    const int l = std::countr_zero(m);
    for (uint32_t n = m & (m - 1); n; n &= n - 1) {
      const int k = std::countr_zero(n);
      if (w.host[k] != w.host[l]) continue;
      for (Slot v : i.sv) {
        if (static_cast<M>(w.in<R>(v)[l]) == static_cast<M>(w.in<R>(v)[k])) continue;
        findings().add("lanes of one store disagree", w.kernel.name(), w.kernel.where(i), [&] {
          return "threads " + std::to_string(w.thread(l)) + " and " + std::to_string(w.thread(k));
        });
      }
    }
  }
}

template <class M, class R>
void store(Warp& w, Instruction& i) {
  if (options().races) {
    for (size_t v = 0; v < i.sv.size(); ++v) {
      for (int l = 0; l < kLanes; ++l) {
        const M x = static_cast<M>(w.in<R>(i.sv[v])[l]);
        std::memcpy(w.incoming[l] + v * sizeof(M), &x, sizeof x);
      }
    }
    w.storing = true;
  }
  w.resolve(i, i.s[0], sizeof(M) * i.count, true);
  if (w.storing) compare_lanes<M, R>(w, i);
  w.storing = false;
  for (size_t v = 0; v < i.sv.size(); ++v) {
    const R* from = w.in<R>(i.sv[v]);
    for (uint32_t m = w.exec; m; m &= m - 1) {
      const int l = std::countr_zero(m);
      const M x = static_cast<M>(from[l]);
      std::memcpy(w.host[l] + v * sizeof(M), &x, sizeof x);
    }
  }
}

template <class M>
Handler of_register(int width, bool loads) {
  switch (width) {
    case 2:
      return loads ? &load<M, uint16_t> : &store<M, uint16_t>;
    case 4:
      return loads ? &load<M, uint32_t> : &store<M, uint32_t>;
    case 8:
      return loads ? &load<M, uint64_t> : &store<M, uint64_t>;
    default:
      return nullptr;
  }
}
Handler access(Type t, int width, bool loads) {
  switch (t) {
    case Type::s8:
      return of_register<int8_t>(width, loads);
    case Type::s16:
      return of_register<int16_t>(width, loads);
    case Type::s32:
      return of_register<int32_t>(width, loads);
    default:
      switch (bytes_of(t)) {
        case 1:
          return of_register<uint8_t>(width, loads);
        case 2:
          return of_register<uint16_t>(width, loads);
        case 4:
          return of_register<uint32_t>(width, loads);
        case 8:
          return of_register<uint64_t>(width, loads);
        default:
          return nullptr;
      }
  }
}

// Lane after lane, as the hardware serialises them in some order.
template <class T>
void atomic(Warp& w, Instruction& i) {
  w.resolve(i, i.s[0], sizeof(T), true);
  const T *b = w.in<T>(i.s[1]), *c = i.mode == 'c' ? w.in<T>(i.s[2]) : nullptr;
  T* d = i.flag ? w.out<T>(i.d) : nullptr;
  for (uint32_t m = w.exec; m; m &= m - 1) {
    const int l = std::countr_zero(m);
    T old, now;
    std::memcpy(&old, w.host[l], sizeof old);
    now = old;
    switch (i.mode) {
      case '+':
        now = static_cast<T>(old + b[l]);
        break;
      case '<':
        now = std::min(old, b[l]);
        break;
      case '>':
        now = std::max(old, b[l]);
        break;
      case '=':
        now = b[l];
        break;
      case 'c':
        now = old == b[l] ? c[l] : old;
        break;
      default:
        if constexpr (std::is_integral_v<T>) now = i.mode == '&' ? old & b[l] : i.mode == '|' ? old | b[l] : old ^ b[l];
    }
    std::memcpy(w.host[l], &now, sizeof now);
    if (d) d[l] = old;
  }
}

void to_generic(Warp& w, Instruction& i) {  // i.offset: the window
  const uint64_t* a = w.in<uint64_t>(i.s[0]);
  each<uint64_t>(w, i.d, [=, window = i.offset](int l) { return a[l] | window; });
}
void from_generic(Warp& w, Instruction& i) {
  const uint64_t* a = w.in<uint64_t>(i.s[0]);
  each<uint64_t>(w, i.d, [=, window = i.offset](int l) { return a[l] & ~window; });
}
void map_rank(Warp& w, Instruction& i) {  // mapa; i.flag: 64 bits
  const uint32_t* rank = w.in<uint32_t>(i.s[1]);
  const uint64_t low = (1u << kRankShift) - 1;
  for (uint32_t m = w.exec; m; m &= m - 1) {
    const int l = std::countr_zero(m);
    if (rank[l] >= w.block.cluster.blocks.size()) w.fail(i, l, "no block of rank " + std::to_string(rank[l]));
    const uint64_t a = i.flag ? w.in<uint64_t>(i.s[0])[l] : w.in<uint32_t>(i.s[0])[l];
    if (i.flag && !(a & kSharedWindow)) w.fail(i, l, "mapa of an address that is not shared");
    const uint64_t to = (i.flag ? kSharedWindow : 0) | static_cast<uint64_t>(rank[l]) << kRankShift | (a & low);
    if (i.flag)
      w.out<uint64_t>(i.d)[l] = to;
    else
      w.out<uint32_t>(i.d)[l] = static_cast<uint32_t>(to);
  }
}

void copy_async(Warp& w, Instruction& i) {
  const uint32_t bytes = i.bytes;
  uint32_t size[kLanes];
  for (int l = 0; l < kLanes; ++l) size[l] = i.flag ? w.in<uint32_t>(i.s[2])[l] : bytes;
  Instruction from = i;  // its source; a copy of 0 bytes reads nothing
  from.space = Space::global;
  from.register_bytes = 8;
  from.offset = static_cast<uint64_t>(i.target);
  const uint32_t all = w.exec;
  const uint8_t* source[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    if ((all >> l & 1) && size[l] > bytes) w.fail(i, l, "cp.async of " + std::to_string(size[l]) + " bytes");
    if (size[l] == 0) w.exec &= ~(1u << l);
  }
  if (w.exec) w.resolve(from, i.s[1], bytes, false);
  for (int l = 0; l < kLanes; ++l) source[l] = w.exec >> l & 1 ? w.host[l] : nullptr;
  w.exec = all;
  Instruction to = i;
  to.space = Space::shared;
  const bool counts = options().counters;
  to.counts = from.counts;
  // The target's words are marked below.
  for (int l = 0; l < kLanes; ++l) {
    if (!(all >> l & 1)) continue;
    const uint64_t a = (i.register_bytes == 4 ? w.in<uint32_t>(i.s[0])[l] : w.in<uint64_t>(i.s[0])[l]) + i.offset;
    const uint32_t offset = a & ((1u << kRankShift) - 1);
    if (a % bytes != 0) w.fail(i, l, "the target is not aligned");
    if (a >> kRankShift != w.block.rank || !w.block.inside(offset, bytes)) {
      w.fail(i, l, "cp.async outside of shared memory, offset " + std::to_string(offset));
    }
    w.block.mark_pending(w, l, i, offset, bytes);
    std::memset(w.block.shared(offset), 0xff, bytes);
    w.copies.push_back({l, offset, bytes, size[l], source[l], w.committed[l], &i});
  }
  if (counts) i.counts = to.counts;
}
void commit(Warp& w, Instruction&) {
  for (int l = 0; l < kLanes; ++l) w.committed[l] += w.exec >> l & 1;
}
void wait_group(Warp& w, Instruction& i) {  // i.target: how many may be open; -1: none, committed or not
  std::vector<Pending> rest;
  for (const Pending& p : w.copies) {
    const bool own = w.exec >> p.lane & 1;
    const uint32_t done = i.target < 0 ? UINT32_MAX
                          : w.committed[p.lane] > static_cast<uint32_t>(i.target)
                              ? w.committed[p.lane] - static_cast<uint32_t>(i.target)
                              : 0;
    if (!own || p.group >= done) {
      rest.push_back(p);
      continue;
    }
    w.block.arrived(w, p);
  }
  w.copies = std::move(rest);
}

template <bool kLoad>
void matrices(Warp& w, Instruction& i) {  // i.count matrices, i.flag: transposed
  if (!w.gather(kAll)) return;
  // Lane 8 k + r has the address of row r of matrix k; half `column` of it belongs to one lane.
  const auto each_half = [&](auto f) {
    for (int k = 0; k < i.count; ++k) {
      for (int l = 0; l < kLanes; ++l) {
        for (int e = 0; e < 2; ++e) {
          const int row = i.flag ? 2 * (l % 4) + e : l / 4, column = i.flag ? l / 4 : 2 * (l % 4) + e;
          f(k, l, e, 8 * k + row, 2 * column);
        }
      }
    }
  };
  const int rows = 8 * i.count;
  if (!kLoad) {
    each_half([&](int k, int l, int e, int row, int byte) {
      const uint32_t word = w.in<uint32_t>(i.sv[static_cast<size_t>(k)])[l] >> (16 * e);
      std::memcpy(w.incoming[row] + byte, &word, 2);
    });
    w.storing = options().races;
  }
  w.exec = rows == 32 ? kAll : (1u << rows) - 1;
  w.resolve(i, i.s[0], 16, !kLoad);
  w.exec = kAll;
  w.storing = false;
  if (!kLoad) {
    for (int r = 0; r < rows; ++r) std::memcpy(w.host[r], w.incoming[r], 16);
    return;
  }
  each_half([&](int k, int l, int e, int row, int byte) {
    auto* to = reinterpret_cast<uint8_t*>(w.out<uint32_t>(i.dv[static_cast<size_t>(k)]) + l);
    std::memcpy(to + 2 * e, w.host[row] + byte, 2);
  });
}

void nothing(Warp&, Instruction&) {}

// The space of an access and its address.
void address(Builder& b, const Statement& s, Instruction& i, const Argument& a) {
  if (a.kind != Argument::kMemory) b.fail("expected an address");
  i.space = Space::generic;
  for (const std::string& m : s.mods) {
    if (m == "global" || m == "const") i.space = Space::global;
    if (m == "param" || m == "param::entry") i.space = Space::param;
    if (m == "shared" || m == "shared::cta") i.space = Space::shared;
    if (m == "shared::cluster") i.space = Space::cluster;
    if (m == "local") i.space = Space::local;
  }
  const bool narrow = i.space == Space::param || i.space == Space::shared || i.space == Space::local;
  const Argument& base = a.of[0];
  i.s[0] = b.source(base, narrow && base.kind != Argument::kRegister ? Type::u32 : Type::u64);
  i.register_bytes = static_cast<uint8_t>(b.width(base, narrow ? Type::u32 : Type::u64));
  i.offset = a.bits;
}

}  // namespace

Handler memory(Builder& b, const Statement& s, Instruction& i) {
  const auto& a = s.args;
  const std::string& op = s.op;
  const Type t = s.mods.empty() ? Type::none : type_of(s.mods.back());
  if (op == "ld" || op == "st") {
    const bool loads = op == "ld";
    const Argument &at = a.at(loads ? 1 : 0), &value = a.at(loads ? 0 : 1);
    address(b, s, i, at);
    const bool vector = value.kind == Argument::kVector;
    const size_t count = vector ? value.of.size() : 1;
    for (size_t v = 0; v < count; ++v) {
      const Argument& x = vector ? value.of[v] : value;
      if (loads)
        i.dv.push_back(b.destination(x, t));
      else
        i.sv.push_back(b.source(x, t));
    }
    i.count = static_cast<uint8_t>(count);
    const bool global = i.space == Space::global || i.space == Space::generic;
    i.kind = i.space == Space::param ? kParam
             : global                ? (loads ? kLoadGlobal : kStoreGlobal)
                                     : (loads ? kLoadShared : kStoreShared);
    return access(t, b.width(vector ? value.of[0] : value, t), loads);
  }
  if (op == "atom" || op == "red") {
    const bool returns = op == "atom";
    i.kind = kAtomic;
    i.flag = returns && a[0].kind != Argument::kSink;
    if (i.flag) i.d = b.destination(a[0]);
    address(b, s, i, a.at(returns ? 1 : 0));
    i.s[1] = b.source(a.at(returns ? 2 : 1), t);
    const std::pair<const char*, char> ops[] = {{"add", '+'}, {"min", '<'}, {"max", '>'}, {"exch", '='},
                                                {"cas", 'c'}, {"and", '&'}, {"or", '|'},  {"xor", '^'}};
    for (const auto& [name, mode] : ops) {
      if (s.has(name)) i.mode = mode;
    }
    if (i.mode == 'c') i.s[2] = b.source(a.at(3), t);
    switch (t) {
      case Type::s32:
        return &atomic<int32_t>;
      case Type::s64:
        return &atomic<int64_t>;
      case Type::f32:
        return &atomic<float>;
      case Type::f64:
        return &atomic<double>;
      default:
        return bytes_of(t) == 4 ? &atomic<uint32_t> : bytes_of(t) == 8 ? &atomic<uint64_t> : nullptr;
    }
  }
  if (op == "cvta") {
    if (bytes_of(t) != 8) return nullptr;
    i.kind = kInteger;
    i.d = b.destination(a[0]);
    i.s[0] = b.source(a[1], t);
    i.offset = s.has("shared") || s.has("shared::cta") ? kSharedWindow : s.has("local") ? kLocalWindow : 0;
    if (s.has("param")) return nullptr;
    return s.has("to") ? &from_generic : &to_generic;
  }
  if (op == "mapa") {
    i.kind = kInteger;
    i.d = b.destination(a[0]);
    i.flag = bytes_of(t) == 8;
    i.s[0] = b.source(a[1], t);
    i.s[1] = b.source(a[2], Type::u32);
    return &map_rank;
  }
  if (op == "cp" && s.has("async")) {
    i.kind = kAsync;
    if (s.has("commit_group")) return &commit;
    if (s.has("wait_all") || s.has("wait_group")) {
      i.target = s.has("wait_all") ? -1 : static_cast<int>(a.at(0).bits);
      return &wait_group;
    }
    if (!(s.has("ca") || s.has("cg")) || s.has("bulk")) return nullptr;
    address(b, s, i, a[0]);
    i.s[1] = b.source(a[1].of[0], Type::u64);
    i.target = static_cast<int>(a[1].bits);
    i.bytes = static_cast<uint8_t>(a.at(2).bits);
    i.flag = a.size() > 3;
    if (i.flag) i.s[2] = b.source(a[3], Type::u32);
    return &copy_async;
  }
  if (op == "ldmatrix" || op == "stmatrix") {
    const bool loads = op == "ldmatrix";
    i.kind = kMatrix;
    address(b, s, i, a.at(loads ? 1 : 0));
    const Argument& registers = a.at(loads ? 0 : 1);
    for (const Argument& x : registers.of)
      (loads ? i.dv : i.sv).push_back(loads ? b.destination(x) : b.source(x, Type::b32));
    i.count = static_cast<uint8_t>(registers.of.size());
    i.flag = s.has("trans");
    if (!s.has("m8n8") || !s.has("b16")) return nullptr;
    return loads ? &matrices<true> : &matrices<false>;
  }
  if (op == "fence" || op == "membar" || op == "prefetch" || op == "applypriority") return &nothing;
  return nullptr;
}

}  // namespace ptx
