// Instructions that compute lane by lane.
#include <algorithm>

#include "decode.h"

namespace ptx {
namespace {

template <class T, auto F, class D = T>
void unary(Warp& w, Instruction& i) {
  const T* a = w.in<T>(i.s[0]);
  each<D>(w, i.d, [=](int l) { return F(a[l]); });
}
template <class T, auto F, class D = T>
void binary(Warp& w, Instruction& i) {
  const T *a = w.in<T>(i.s[0]), *b = w.in<T>(i.s[1]);
  each<D>(w, i.d, [=](int l) { return F(a[l], b[l]); });
}
template <class T, auto F, class D = T>
void ternary(Warp& w, Instruction& i) {
  const T *a = w.in<T>(i.s[0]), *b = w.in<T>(i.s[1]);
  const D* c = w.in<D>(i.s[2]);
  each<D>(w, i.d, [=](int l) { return F(a[l], b[l], c[l]); });
}
template <class T, auto F>
void shift(Warp& w, Instruction& i) {
  const T* a = w.in<T>(i.s[0]);
  const uint32_t* b = w.in<uint32_t>(i.s[1]);
  each<T>(w, i.d, [=](int l) { return F(a[l], b[l]); });
}
template <auto F>
void on_predicates(Warp& w, Instruction& i) {
  w.set_predicate(i.d, F(w.predicate(i.s[0]), w.predicate(i.s[1])));
}

template <class T>
using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
template <class T>
using Double = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                  std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

constexpr auto add = [](auto a, auto b) { return static_cast<decltype(a)>(a + b); };
constexpr auto sub = [](auto a, auto b) { return static_cast<decltype(a)>(a - b); };
constexpr auto mul = [](auto a, auto b) {
  if constexpr (sizeof a == 2)
    return static_cast<decltype(a)>(static_cast<uint32_t>(a) * b);
  else
    return static_cast<decltype(a)>(a * b);
};
constexpr auto mul_high = []<class T>(T a, T b) {
  return static_cast<T>((static_cast<Double<T>>(a) * static_cast<Double<T>>(b)) >> (8 * sizeof(T)));
};
constexpr auto mul_wide = []<class T>(T a, T b) { return static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b); };
constexpr auto mad = [](auto a, auto b, auto c) { return static_cast<decltype(a)>(a * b + c); };
constexpr auto mad_wide = []<class T>(T a, T b, Wide<T> c) {
  using U = std::make_unsigned_t<Wide<T>>;
  return static_cast<Wide<T>>(static_cast<U>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) + static_cast<U>(c));
};
constexpr auto quotient = []<class T>(T a, T b) -> T {
  if constexpr (std::is_floating_point_v<T>)
    return a / b;
  else if (b == 0)
    return static_cast<T>(-1);
  else if constexpr (std::is_signed_v<T>)
    return b == -1 ? static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a)) : a / b;
  else
    return a / b;
};
constexpr auto remainder = []<class T>(T a, T b) -> T {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    return b == -1 ? 0 : a % b;
  else
    return a % b;
};
// A NaN loses to a number.
constexpr auto least = []<class T>(T a, T b) -> T {
  if constexpr (std::is_floating_point_v<T>) {
    if (a == b) return std::signbit(a) ? a : b;
    return a < b || b != b ? a : b;
  } else {
    return a < b ? a : b;
  }
};
constexpr auto most = []<class T>(T a, T b) -> T {
  if constexpr (std::is_floating_point_v<T>) {
    if (a == b) return std::signbit(a) ? b : a;
    return a > b || b != b ? a : b;
  } else {
    return a > b ? a : b;
  }
};
// A NaN wins.
template <auto F>
constexpr auto unless_nan =
    []<class T>(T a, T b) -> T { return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : F(a, b); };
constexpr auto and_ = [](auto a, auto b) { return static_cast<decltype(a)>(a & b); };
constexpr auto or_ = [](auto a, auto b) { return static_cast<decltype(a)>(a | b); };
constexpr auto xor_ = [](auto a, auto b) { return static_cast<decltype(a)>(a ^ b); };
constexpr auto not_ = [](auto a) { return static_cast<decltype(a)>(~a); };
constexpr auto copy = [](auto a) { return a; };
constexpr auto negate = []<class T>(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return -a;
  else
    return static_cast<T>(0 - a);
};
constexpr auto absolute = []<class T>(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fabs(a);
  else
    return static_cast<T>(a < 0 ? 0 - static_cast<std::make_unsigned_t<T>>(a)
                                : static_cast<std::make_unsigned_t<T>>(a));
};
constexpr auto fused = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
constexpr auto root = [](auto a) { return std::sqrt(a); };
constexpr auto inverse = [](auto a) { return static_cast<decltype(a)>(1) / a; };
constexpr auto left = []<class T>(T a, uint32_t b) { return static_cast<T>(b >= 8 * sizeof(T) ? 0 : a << b); };
constexpr auto right = []<class T>(T a, uint32_t b) {
  const uint32_t most_bits = 8 * sizeof(T) - 1;
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>(a >> std::min(b, most_bits));
  else
    return static_cast<T>(b > most_bits ? 0 : a >> b);
};
template <auto F>
constexpr auto ftz = [](auto... x) { return flush(F(flush(x)...)); };

uint32_t bits(float x) { return std::bit_cast<uint32_t>(x); }
// Approximations: the exact value, or one that is off by what the manual allows. All of .ftz flush both ways.
constexpr auto exp2_ftz = [](float x) {
  return flush(approximately(std::exp2(static_cast<double>(flush(x))), bits(x), 2));
};
constexpr auto exp2_any = [](float x) { return approximately(std::exp2(static_cast<double>(x)), bits(x), 2); };
constexpr auto log2_ftz = [](float x) {
  return flush(approximately(std::log2(static_cast<double>(flush(x))), bits(x), 2));
};
constexpr auto rcp_ftz = [](float x) { return flush(approximately(1 / static_cast<double>(flush(x)), bits(x), 1)); };
constexpr auto rsqrt_ftz = [](float x) {
  return flush(approximately(1 / std::sqrt(static_cast<double>(flush(x))), bits(x), 2));
};
constexpr auto sqrt_ftz = [](float x) {
  return flush(approximately(std::sqrt(static_cast<double>(flush(x))), bits(x), 1));
};
constexpr auto tanh_any = [](float x) { return approximately(std::tanh(static_cast<double>(x)), bits(x), 64); };
constexpr auto sin_any = [](float x) { return approximately(std::sin(static_cast<double>(x)), bits(x), 2); };
constexpr auto cos_any = [](float x) { return approximately(std::cos(static_cast<double>(x)), bits(x), 2); };
constexpr auto divide_full = [](float a, float b) {
  return approximately(static_cast<double>(a) / static_cast<double>(b), bits(a) ^ bits(b), 2);
};
// Of 1 / x the upper word, from the upper word of x.
constexpr auto rcp_double = [](double x) {
  const uint64_t high = std::bit_cast<uint64_t>(x) & 0xffffffff00000000u;
  if ((high >> 52 & 0x7ff) == 0) return std::copysign(std::numeric_limits<double>::infinity(), x);
  return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / std::bit_cast<double>(high)) & 0xffffffff00000000u);
};

template <class T>
void extract(Warp& w, Instruction& i) {  // bfe
  const T* a = w.in<T>(i.s[0]);
  const uint32_t *b = w.in<uint32_t>(i.s[1]), *c = w.in<uint32_t>(i.s[2]);
  each<T>(w, i.d, [=](int l) -> T {
    using U = std::make_unsigned_t<T>;
    const uint32_t size = 8 * sizeof(T), at = b[l] & 0xff, length = c[l] & 0xff;
    if (length == 0) return 0;
    U value = at >= size ? 0 : static_cast<U>(static_cast<U>(a[l]) >> at);
    const uint32_t last = std::min(at + length - 1, size - 1);
    const bool sign = std::is_signed_v<T> && (static_cast<U>(a[l]) >> last & 1);
    if (length < size) value &= static_cast<U>((U{1} << length) - 1);
    if (at + length > size && sign) value |= static_cast<U>(~U{0}) << (size > at ? size - at : 0);
    if (sign && length < size) value |= static_cast<U>(~U{0}) << length;
    return static_cast<T>(value);
  });
}
template <class T>
void insert(Warp& w, Instruction& i) {  // bfi
  const T *a = w.in<T>(i.s[0]), *b = w.in<T>(i.s[1]);
  const uint32_t *c = w.in<uint32_t>(i.s[2]), *d = w.in<uint32_t>(i.s[3]);
  each<T>(w, i.d, [=](int l) -> T {
    const uint32_t size = 8 * sizeof(T), at = c[l] & 0xff, length = std::min(d[l] & 0xff, size);
    if (length == 0 || at >= size) return b[l];
    const T mask = static_cast<T>((length == size ? ~T{0} : (T{1} << length) - 1) << at);
    return static_cast<T>((b[l] & ~mask) | (static_cast<T>(a[l] << at) & mask));
  });
}
void permute(Warp& w, Instruction& i) {  // prmt, default mode
  const uint32_t *a = w.in<uint32_t>(i.s[0]), *b = w.in<uint32_t>(i.s[1]), *c = w.in<uint32_t>(i.s[2]);
  each<uint32_t>(w, i.d, [=](int l) {
    const uint64_t all = static_cast<uint64_t>(b[l]) << 32 | a[l];
    uint32_t out = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t pick = c[l] >> (4 * k) & 0xf;
      uint32_t byte = all >> (8 * (pick & 7)) & 0xff;
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
      out |= byte << (8 * k);
    }
    return out;
  });
}
void logic3(Warp& w, Instruction& i) {  // lop3: i.mode is the table
  const uint32_t *a = w.in<uint32_t>(i.s[0]), *b = w.in<uint32_t>(i.s[1]), *c = w.in<uint32_t>(i.s[2]);
  each<uint32_t>(w, i.d, [=, table = i.mode](int l) {
    uint32_t out = 0;
    for (int k = 0; k < 8; ++k) {
      if (table >> k & 1) out |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    }
    return out;
  });
}
template <bool kLeft>
void funnel(Warp& w, Instruction& i) {  // shf; i.flag: clamp
  const uint32_t *a = w.in<uint32_t>(i.s[0]), *b = w.in<uint32_t>(i.s[1]), *c = w.in<uint32_t>(i.s[2]);
  each<uint32_t>(w, i.d, [=, clamp = i.flag](int l) {
    const uint32_t by = clamp ? std::min(c[l], 32u) : c[l] & 31;
    const uint64_t all = static_cast<uint64_t>(b[l]) << 32 | a[l];
    return static_cast<uint32_t>(kLeft ? (by == 32 ? a[l] : all << by >> 32) : all >> by);
  });
}
template <class T>
void select(Warp& w, Instruction& i) {
  const T *a = w.in<T>(i.s[0]), *b = w.in<T>(i.s[1]);
  const uint32_t p = w.predicate(i.s[2]);
  each<T>(w, i.d, [=](int l) { return p >> l & 1 ? a[l] : b[l]; });
}

template <class T, auto F, bool kFlush = false>
void compare(Warp& w, Instruction& i) {
  const T *a = w.in<T>(i.s[0]), *b = w.in<T>(i.s[1]);
  uint32_t p = which([=](int l) {
    if constexpr (kFlush)
      return F(flush(a[l]), flush(b[l]));
    else
      return F(a[l], b[l]);
  });
  uint32_t q = ~p;
  if (i.mode != 0) {
    const uint32_t c = w.predicate(i.s[2]);
    p = i.mode == '&' ? p & c : i.mode == '|' ? p | c : p ^ c;
    q = i.mode == '&' ? q & c : i.mode == '|' ? q | c : q ^ c;
  }
  w.set_predicate(i.d, p);
  if (i.flag) w.set_predicate(i.d2, q);
}

constexpr auto unordered = [](auto a, auto b) { return a != a || b != b; };
template <class T, bool kFlush = false>
Handler comparison(const std::string& op) {
#define CASE(name, expression) \
  if (op == name) return &compare<T, [](auto a, auto b) { return (expression); }, kFlush>
  CASE("eq", (a == b));
  CASE("lt", (a < b));
  CASE("le", (a <= b));
  CASE("gt", (a > b));
  CASE("ge", (a >= b));
  CASE("lo", (a < b));
  CASE("ls", (a <= b));
  CASE("hi", (a > b));
  CASE("hs", (a >= b));
  if constexpr (std::is_floating_point_v<T>) {
    CASE("ne", (a < b || a > b));
    CASE("equ", (!(a < b || a > b)));
    CASE("neu", (a != b));
    CASE("ltu", (!(a >= b)));
    CASE("leu", (!(a > b)));
    CASE("gtu", (!(a <= b)));
    CASE("geu", (!(a < b)));
    CASE("num", (!unordered(a, b)));
    CASE("nan", (unordered(a, b)));
  } else {
    CASE("ne", (a != b));
  }
#undef CASE
  return nullptr;
}

struct bfloat {
  uint16_t bits;
};

template <class F>
F whole(F x, char mode) {
  switch (mode) {
    case 'z':
      return std::trunc(x);
    case 'm':
      return std::floor(x);
    case 'p':
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

template <class D, class S>
D convert_one(S x, char mode, bool integral, bool saturate) {
  if constexpr (std::is_same_v<S, bfloat>) {
    return convert_one<D>(from_bf16(x.bits), mode, integral, saturate);
  } else if constexpr (std::is_same_v<S, half>) {
    return convert_one<D>(static_cast<float>(x), mode, integral, saturate);
  } else if constexpr (std::is_same_v<D, bfloat>) {
    return {round_to_bf16(static_cast<float>(x), mode)};
  } else if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    if (!saturate) return static_cast<D>(x);
    const __int128 wide = x, lo = std::numeric_limits<D>::min(), hi = std::numeric_limits<D>::max();
    return static_cast<D>(std::clamp(wide, lo, hi));
  } else if constexpr (std::is_integral_v<D>) {
    if (x != x) return sizeof(D) == 8 ? static_cast<D>(uint64_t{1} << 63) : D{0};
    const double r = whole(static_cast<double>(x), mode);
    if (r < static_cast<double>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    if (r >= std::ldexp(1.0, static_cast<int>(8 * sizeof(D)) - std::is_signed_v<D>))
      return std::numeric_limits<D>::max();
    return static_cast<D>(r);
  } else if constexpr (std::is_same_v<D, half>) {
    return static_cast<half>(x);  // to nearest
  } else {
    D r;
    if constexpr (std::is_same_v<D, float> && std::is_same_v<S, double>) {
      r = round_to_float(x, mode);
    } else {
      r = static_cast<D>(x);
    }
    if (integral) r = whole(r, mode);
    if (saturate) r = r != r ? 0 : std::clamp(r, D(0), D(1));
    return r;
  }
}

template <class S>
S lane(const Warp& w, Slot slot, int width, int l) {
  S x;
  const uint8_t* p = w.in<uint8_t>(slot) + l * width;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Registers may be wider than what is converted.
template <class D, class S>
void convert(Warp& w, Instruction& i) {
  const char mode = static_cast<char>(i.mode);
  const int from = i.bytes, to = i.register_bytes;
  const bool integral = i.flag, saturate = i.flag2, ftz = i.count != 0;
  if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    if (from == sizeof(S) && to == sizeof(D) && !saturate) {
      const S* a = w.in<S>(i.s[0]);
      each<D>(w, i.d, [=](int l) { return static_cast<D>(a[l]); });
      return;
    }
  }
  for (uint32_t m = w.exec; m; m &= m - 1) {
    const int l = std::countr_zero(m);
    S x = lane<S>(w, i.s[0], from, l);
    if constexpr (std::is_same_v<S, float>) {
      if (ftz) x = flush(x);
    }
    D r = convert_one<D>(x, mode, integral, saturate);
    if constexpr (std::is_same_v<D, float>) {
      if (ftz) r = flush(r);
    }
    uint64_t extended = 0;
    if constexpr (std::is_integral_v<D>) {
      extended = static_cast<uint64_t>(static_cast<int64_t>(r));
    } else {
      std::memcpy(&extended, &r, sizeof r);
    }
    std::memcpy(w.out<uint8_t>(i.d) + l * to, &extended, static_cast<size_t>(to));
  }
}

template <class D>
Handler convert_from(Type s) {
  switch (s) {
    case Type::u8:
      return &convert<D, uint8_t>;
    case Type::s8:
      return &convert<D, int8_t>;
    case Type::u16:
      return &convert<D, uint16_t>;
    case Type::s16:
      return &convert<D, int16_t>;
    case Type::u32:
      return &convert<D, uint32_t>;
    case Type::s32:
      return &convert<D, int32_t>;
    case Type::u64:
      return &convert<D, uint64_t>;
    case Type::s64:
      return &convert<D, int64_t>;
    case Type::f16:
      return &convert<D, half>;
    case Type::bf16:
      return &convert<D, bfloat>;
    case Type::f32:
      return &convert<D, float>;
    case Type::f64:
      return &convert<D, double>;
    default:
      return nullptr;
  }
}
Handler conversion(Type d, Type s) {
  switch (d) {
    case Type::u8:
      return convert_from<uint8_t>(s);
    case Type::s8:
      return convert_from<int8_t>(s);
    case Type::u16:
      return convert_from<uint16_t>(s);
    case Type::s16:
      return convert_from<int16_t>(s);
    case Type::u32:
      return convert_from<uint32_t>(s);
    case Type::s32:
      return convert_from<int32_t>(s);
    case Type::u64:
      return convert_from<uint64_t>(s);
    case Type::s64:
      return convert_from<int64_t>(s);
    case Type::f16:
      return convert_from<half>(s);
    case Type::bf16:
      return convert_from<bfloat>(s);
    case Type::f32:
      return convert_from<float>(s);
    case Type::f64:
      return convert_from<double>(s);
    default:
      return nullptr;
  }
}

void pack_halves(Warp& w, Instruction& i) {  // the first operand into the upper half
  const float *a = w.in<float>(i.s[0]), *b = w.in<float>(i.s[1]);
  const auto one = [bf = i.flag, mode = static_cast<char>(i.mode)](float x) -> uint32_t {
    return bf ? round_to_bf16(x, mode) : std::bit_cast<uint16_t>(static_cast<half>(x));
  };
  each<uint32_t>(w, i.d, [=](int l) { return one(a[l]) << 16 | one(b[l]); });
}
void to_tf32(Warp& w, Instruction& i) {
  const float* a = w.in<float>(i.s[0]);
  each<uint32_t>(w, i.d, [=, mode = static_cast<char>(i.mode)](int l) { return round_to_tf32(a[l], mode); });
}

template <class T, class P>
void pack(Warp& w, Instruction& i) {
  T all[kLanes] = {};
  for (size_t k = 0; k < i.sv.size(); ++k) {
    const P* p = w.in<P>(i.sv[k]);
    for (int l = 0; l < kLanes; ++l) all[l] |= static_cast<T>(static_cast<T>(p[l]) << (8 * sizeof(P) * k));
  }
  each<T>(w, i.d, [&](int l) { return all[l]; });
}
template <class T, class P>
void unpack(Warp& w, Instruction& i) {
  T all[kLanes];
  std::memcpy(all, w.in<T>(i.s[0]), sizeof all);
  for (size_t k = 0; k < i.dv.size(); ++k) {
    each<P>(w, i.dv[k], [&](int l) { return static_cast<P>(all[l] >> (8 * sizeof(P) * k)); });
  }
}

template <class F>
Handler by_bits(Type t, F f) {
  switch (bytes_of(t)) {
    case 2:
      return f.template operator()<uint16_t>();
    case 4:
      return f.template operator()<uint32_t>();
    case 8:
      return f.template operator()<uint64_t>();
    default:
      return nullptr;
  }
}
template <class F>
Handler by_integer(Type t, F f) {
  switch (t) {
    case Type::s16:
      return f.template operator()<int16_t>();
    case Type::s32:
      return f.template operator()<int32_t>();
    case Type::s64:
      return f.template operator()<int64_t>();
    default:
      return by_bits(t, f);
  }
}
template <class F>
Handler by_float(Type t, F f) {
  return t == Type::f32 ? f.template operator()<float>() : t == Type::f64 ? f.template operator()<double>() : nullptr;
}
bool floating(Type t) { return t == Type::f32 || t == Type::f64; }

// Of an operation on two or three numbers of any type.
template <auto F>
Handler two(const Statement& s, Type t) {
  if (t == Type::f32 && s.has("ftz")) return &binary<float, ftz<F>>;
  if (floating(t)) return by_float(t, []<class T>() -> Handler { return &binary<T, F>; });
  return by_integer(t, []<class T>() -> Handler { return &binary<T, F>; });
}

Class class_of(Type t) { return t == Type::f32 ? kFloat : t == Type::f64 ? kDouble : kInteger; }

}  // namespace

Handler arithmetic(Builder& b, const Statement& s, Instruction& i) {
  const Type t = s.mods.empty() ? Type::none : type_of(s.mods.back());
  const auto& a = s.args;
  const std::string& op = s.op;
  const auto operands = [&](size_t count) {
    i.d = b.destination(a.at(0));
    for (size_t k = 0; k < count; ++k) i.s[k] = b.source(a.at(k + 1), t);
    i.kind = class_of(t);
  };
  const auto rounded = [&] {  // only the default mode is known
    for (const char* m : {"rz", "rm", "rp", "sat"}) {
      if (s.has(m)) b.fail("rounding ." + std::string(m));
    }
  };

  if (op == "mov") {
    i.kind = kMove;
    if (t == Type::pred) {
      i.d = b.destination(a[0]);
      i.s[0] = i.s[1] = b.predicate(a[1]);
      return &on_predicates<and_>;
    }
    if (a[0].kind == Argument::kVector || a[1].kind == Argument::kVector) {
      const bool packs = a[1].kind == Argument::kVector;
      const Argument& parts = packs ? a[1] : a[0];
      const int part = bytes_of(t) / static_cast<int>(parts.of.size());
      const Type p = part == 2 ? Type::b16 : Type::b32;
      for (const Argument& x : parts.of) (packs ? i.sv : i.dv).push_back(packs ? b.source(x, p) : b.destination(x, p));
      if (packs)
        i.d = b.destination(a[0]);
      else
        i.s[0] = b.source(a[1], t);
      if (bytes_of(t) == 4 && part == 2) return packs ? &pack<uint32_t, uint16_t> : &unpack<uint32_t, uint16_t>;
      if (bytes_of(t) == 8 && part == 2) return packs ? &pack<uint64_t, uint16_t> : &unpack<uint64_t, uint16_t>;
      if (bytes_of(t) == 8 && part == 4) return packs ? &pack<uint64_t, uint32_t> : &unpack<uint64_t, uint32_t>;
      return nullptr;
    }
    i.d = b.destination(a[0]);
    i.s[0] = b.source(a[1], t);
    return by_bits(t, []<class T>() -> Handler { return &unary<T, copy>; });
  }
  if (op == "add" || op == "sub") {
    operands(2), rounded();
    return op == "add" ? two<add>(s, t) : two<sub>(s, t);
  }
  if (op == "mul" || op == "mad") {
    const bool wide = s.has("wide");
    operands(2), rounded();
    if (op == "mad") {
      const Type c = wide ? (bytes_of(t) == 2 ? Type::b32 : Type::b64) : t;
      i.s[2] = b.source(a.at(3), c);
    }
    if (wide && op == "mul") {
      return by_integer(t, []<class T>() -> Handler {
        if constexpr (sizeof(T) < 8)
          return &binary<T, mul_wide, Wide<T>>;
        else
          return nullptr;
      });
    }
    if (wide) {
      return by_integer(t, []<class T>() -> Handler {
        if constexpr (sizeof(T) < 8)
          return &ternary<T, mad_wide, Wide<T>>;
        else
          return nullptr;
      });
    }
    if (op == "mad" && s.has("lo")) return by_bits(t, []<class T>() -> Handler { return &ternary<T, mad>; });
    if (op == "mad") return nullptr;
    if (s.has("hi")) {
      return by_integer(t, []<class T>() -> Handler {
        if constexpr (sizeof(T) > 2)
          return &binary<T, mul_high>;
        else
          return nullptr;
      });
    }
    if (s.has("lo")) return by_bits(t, []<class T>() -> Handler { return &binary<T, mul>; });
    return floating(t) ? two<mul>(s, t) : nullptr;
  }
  if (op == "fma") {
    operands(3), rounded();
    if (t == Type::f32 && s.has("ftz")) return &ternary<float, ftz<fused>>;
    return by_float(t, []<class T>() -> Handler { return &ternary<T, fused>; });
  }
  if (op == "div") {
    operands(2), rounded();
    if (t == Type::f32 && (s.has("full") || s.has("approx"))) {
      i.kind = kSpecial;
      return s.has("ftz") ? &binary<float, ftz<divide_full>> : &binary<float, divide_full>;
    }
    return two<quotient>(s, t);
  }
  if (op == "rem") {
    operands(2);
    return by_integer(t, []<class T>() -> Handler { return &binary<T, remainder>; });
  }
  if (op == "min" || op == "max") {
    operands(2);
    if (s.has("xorsign")) return nullptr;
    if (s.has("NaN")) {
      if (t != Type::f32) return nullptr;
      return op == "min" ? two<unless_nan<least>>(s, t) : two<unless_nan<most>>(s, t);
    }
    return op == "min" ? two<least>(s, t) : two<most>(s, t);
  }
  if (op == "copysign") {  // the sign of the first
    operands(2);
    return by_float(t, []<class T>() -> Handler { return &binary<T, [](T a, T b) { return std::copysign(b, a); }>; });
  }
  if (op == "abs" || op == "neg") {
    operands(1);
    if (t == Type::f32 && s.has("ftz")) return op == "abs" ? &unary<float, ftz<absolute>> : &unary<float, ftz<negate>>;
    if (op == "neg") {
      if (floating(t)) return by_float(t, []<class T>() -> Handler { return &unary<T, negate>; });
      return by_bits(t, []<class T>() -> Handler { return &unary<T, negate>; });
    }
    if (floating(t)) return by_float(t, []<class T>() -> Handler { return &unary<T, absolute>; });
    return t == Type::s32 ? &unary<int32_t, absolute> : t == Type::s64 ? &unary<int64_t, absolute> : nullptr;
  }
  if (op == "and" || op == "or" || op == "xor" || op == "not") {
    if (t == Type::pred) {
      i.kind = kPredicate;
      i.d = b.destination(a[0]);
      i.s[0] = b.predicate(a[1]);
      i.s[1] = op == "not" ? i.s[0] : b.predicate(a[2]);
      if (op == "not") return &on_predicates<[](uint32_t x, uint32_t) { return ~x; }>;
      return op == "and" ? &on_predicates<and_> : op == "or" ? &on_predicates<or_> : &on_predicates<xor_>;
    }
    operands(op == "not" ? 1 : 2);
    if (op == "not") return by_bits(t, []<class T>() -> Handler { return &unary<T, not_>; });
    if (op == "and") return by_bits(t, []<class T>() -> Handler { return &binary<T, and_>; });
    if (op == "or") return by_bits(t, []<class T>() -> Handler { return &binary<T, or_>; });
    return by_bits(t, []<class T>() -> Handler { return &binary<T, xor_>; });
  }
  if (op == "shl" || op == "shr") {
    operands(1);
    i.s[1] = b.source(a.at(2), Type::u32);
    if (op == "shl") return by_bits(t, []<class T>() -> Handler { return &shift<T, left>; });
    return by_integer(t, []<class T>() -> Handler { return &shift<T, right>; });
  }
  if (op == "bfe" || op == "bfi") {
    const size_t wide = op == "bfe" ? 1 : 2;
    operands(wide);
    for (size_t k = 0; k < 2; ++k) i.s[wide + k] = b.source(a.at(wide + k + 1), Type::u32);
    if (op == "bfi") return bytes_of(t) == 4 ? &insert<uint32_t> : &insert<uint64_t>;
    return by_integer(t, []<class T>() -> Handler {
      if constexpr (sizeof(T) > 2)
        return &extract<T>;
      else
        return nullptr;
    });
  }
  if (op == "prmt" && s.mods.size() == 1) {
    operands(3);
    return &permute;
  }
  if (op == "lop3") {
    operands(3);
    i.mode = static_cast<int>(a.at(4).bits);
    return &logic3;
  }
  if (op == "shf") {
    operands(3);
    i.flag = s.has("clamp");
    return s.has("l") ? &funnel<true> : &funnel<false>;
  }
  if (op == "popc" || op == "clz" || op == "brev") {
    operands(1);
    if (bytes_of(t) == 8 && op != "brev") {
      if (op == "popc")
        return &unary<uint64_t, [](uint64_t x) { return static_cast<uint32_t>(std::popcount(x)); }, uint32_t>;
      return &unary<uint64_t, [](uint64_t x) { return static_cast<uint32_t>(std::countl_zero(x)); }, uint32_t>;
    }
    if (bytes_of(t) != 4) return nullptr;
    if (op == "popc") return &unary<uint32_t, [](uint32_t x) { return static_cast<uint32_t>(std::popcount(x)); }>;
    if (op == "clz") return &unary<uint32_t, [](uint32_t x) { return static_cast<uint32_t>(std::countl_zero(x)); }>;
    return &unary<uint32_t, [](uint32_t x) {
      uint32_t r = 0;
      for (int k = 0; k < 32; ++k) r |= (x >> k & 1) << (31 - k);
      return r;
    }>;
  }
  if (op == "selp") {
    operands(2);
    i.kind = kMove;
    i.s[2] = b.predicate(a.at(3));
    return by_bits(t, []<class T>() -> Handler { return &select<T>; });
  }
  if (op == "setp") {
    i.kind = kPredicate;
    i.d = b.destination(a[0]);
    i.flag = a[0].reg2 >= 0;
    if (i.flag) i.d2 = b.second(a[0]);
    i.s[0] = b.source(a[1], t);
    i.s[1] = b.source(a[2], t);
    if (a.size() > 3) {
      i.s[2] = b.predicate(a[3]);
      i.mode = s.has("and") ? '&' : s.has("or") ? '|' : '^';
    }
    const std::string& relation = s.mods[0];
    if (t == Type::f32 && s.has("ftz")) return comparison<float, true>(relation);
    if (floating(t)) return t == Type::f32 ? comparison<float>(relation) : comparison<double>(relation);
    return by_integer(t, [&]<class T>() -> Handler { return comparison<T>(relation); });
  }
  if (op == "cvt") {
    i.kind = kConvert;
    std::vector<Type> types;
    for (const std::string& m : s.mods) {
      if (const Type x = type_of(m); x != Type::none)
        types.push_back(x);
      else if (m == "rn" || m == "rz" || m == "rm" || m == "rp" || m == "rna")
        i.mode = m == "rna" ? 'a' : m[1];
      else if (m == "rni" || m == "rzi" || m == "rmi" || m == "rpi")
        i.mode = m[1], i.flag = true;
      else if (m == "sat")
        i.flag2 = true;
      else if (m != "ftz")
        return nullptr;
    }
    if (types.size() != 2) return nullptr;
    if (i.mode == 0) i.mode = 'n';
    i.d = b.destination(a[0]);
    i.s[0] = b.source(a[1], types[1]);
    if (types[0] == Type::f16x2 || types[0] == Type::bf16x2) {
      if (types[0] == Type::f16x2 && i.mode != 'n') return nullptr;
      i.s[1] = b.source(a.at(2), types[1]);
      i.flag = types[0] == Type::bf16x2;
      return types[1] == Type::f32 ? &pack_halves : nullptr;
    }
    if (types[0] == Type::tf32) return &to_tf32;
    i.count = s.has("ftz");
    i.bytes = static_cast<uint8_t>(b.width(a[1], types[1]));
    i.register_bytes = static_cast<uint8_t>(b.width(a[0], types[0]));
    return conversion(types[0], types[1]);
  }
  if (op == "ex2" || op == "lg2" || op == "rcp" || op == "sqrt" || op == "rsqrt" || op == "sin" || op == "cos" ||
      op == "tanh") {
    operands(1), rounded();
    const bool approximate = s.has("approx"), f32 = t == Type::f32, zero = s.has("ftz");
    if (approximate) i.kind = kSpecial;
    if (op == "rcp" && !approximate) {
      if (f32 && zero) return &unary<float, ftz<inverse>>;
      return by_float(t, []<class T>() -> Handler { return &unary<T, inverse>; });
    }
    if (op == "sqrt" && !approximate) {
      if (f32 && zero) return &unary<float, ftz<root>>;
      return by_float(t, []<class T>() -> Handler { return &unary<T, root>; });
    }
    if (op == "rcp" && t == Type::f64) return &unary<double, rcp_double>;
    if (!f32) return nullptr;
    if (op == "ex2") return zero ? &unary<float, exp2_ftz> : &unary<float, exp2_any>;
    if (op == "tanh") return &unary<float, tanh_any>;
    if (op == "sin" || op == "cos") {
      if (zero) return op == "sin" ? &unary<float, ftz<sin_any>> : &unary<float, ftz<cos_any>>;
      return op == "sin" ? &unary<float, sin_any> : &unary<float, cos_any>;
    }
    if (!zero) b.fail("an approximation without .ftz");
    return op == "lg2"    ? &unary<float, log2_ftz>
           : op == "rcp"  ? &unary<float, rcp_ftz>
           : op == "sqrt" ? &unary<float, sqrt_ftz>
                          : &unary<float, rsqrt_ftz>;
  }
  return nullptr;
}

}  // namespace ptx
