// Drivers of the drift: a task per group, or threads inside a group where there are few.
#include "cpu/drift.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/driver.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fewstep::cpu {
namespace {

constexpr double kMinScale = 1e-3, kMinRms = 1e-4;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
struct Workspace {
  Buffer<T> packed, points, centre, moments, distances, kernel, tiles, velocity;
  Buffer<T> a, b, log2_b, h, total_h, v, v_next, f, f_next, fa, zero, shift, u, u_next, columns;
  Buffer<uint8_t> bad;
  int64_t cloud = -1;

  void release_above(int64_t bytes) {
    cpu::release_above<T>(bytes, {&packed, &points, &distances, &kernel, &tiles, &velocity, &columns});
  }
};

// Columns of one cloud, padded to whole panels, among those of a plan.
template <class T>
struct Part {
  const T* data;  // row j at data + j * row
  int64_t row, m, offset;
  const T* weights;  // [m]
  const T* points;   // [m, d] relative to the centre of x
};

template <class T>
Part<T> part_of(const Drift<T>& in, int64_t g, int64_t cloud, int64_t offset) {
  int64_t before = 0, all = 0;
  for (int64_t c = 0; c < in.cloud_count; ++c) {
    if (c < cloud) before += in.clouds[c].count;
    all += in.clouds[c].count;
  }
  const Cloud<T>& source = in.clouds[cloud];
  return {source.data + g * source.batch, source.row, source.count, offset, in.weights + g * all + before, nullptr};
}

// The plan of one group for the columns of some clouds, at one temperature after the other. Rows are cut into chunks,
// for threads to share, and a chunk into blocks whose distances are in memory together: all, where distances are kept.
// A tile of rows holds weights, or the scratch of a pass that keeps no K.
template <class T>
class Coupling {
 public:
  Coupling(const Drift<T>& in, int64_t g, int64_t first_cloud, int64_t clouds, Workspace<T>& w, int64_t threads)
      : in_(in), w_(w), threads_(threads), n_(in.x.count), d_(in.d) {
    int64_t mp = 0;
    for (int64_t c = first_cloud; c < first_cloud + clouds; ++c) {
      parts_[part_count_++] = part_of(in, g, c, mp);
      mp += round_up(in.clouds[c].count, kernel_.panel);
    }
    const Chunks chunks = Chunks::of(n_, std::max(kernel_.rows, kernel_.lanes));
    chunks_ = chunks.count;
    chunk_rows_ = chunks.rows;
    n_padded_ = round_up(n_, kernel_.lanes);

    const int64_t bytes = n_padded_ * mp * static_cast<int64_t>(sizeof(T));
    keep_kernel_ = bytes <= in.memory_limit;
    keep_distances_ = (keep_kernel_ ? 2 : 1) * bytes <= in.memory_limit;
    int64_t tile = kTile / (mp * static_cast<int64_t>(sizeof(T)));
    if (keep_kernel_ || tile > kernel_.lanes) tile = std::max<int64_t>(tile / kernel_.lanes, 1) * kernel_.lanes;
    tile_rows_ = std::clamp<int64_t>(tile, 1, chunk_rows_);
    block_rows_ = keep_distances_ ? chunk_rows_ : tile_rows_;
    distances_ = w.distances.get(keep_distances_ ? n_padded_ * mp : chunks_ * block_rows_ * mp);
    tiles_ = w.tiles.get(chunks_ * tile_rows_ * mp);
    if (keep_kernel_) {
      matrix_ = w.kernel.get(n_padded_ * mp);
      std::fill(matrix_ + n_ / kernel_.lanes * kernel_.lanes * mp, matrix_ + n_padded_ * mp, T(0));
    }

    T* packed = w.packed.get(mp * d_);
    p_ = {n_,      0,       d_,          mp,      mp,  in.x.data + g * in.x.batch, in.x.row, packed, nullptr,
          nullptr, nullptr, kNoDiagonal, in.cost, T(0)};
    int64_t points = 0;
    for (int64_t i = 0; i < part_count_; ++i) points += parts_[i].m;
    T* centred = w.points.get(points * d_);
    for (int64_t i = 0; i < part_count_; ++i) {
      Part<T>& part = parts_[i];
      drift_.centred(part.data, part.row, part.m, d_, w.centre.get(d_), centred);
      kernel_.pack(part.data, part.row, part.m, d_, packed + part.offset * d_);
      part.points = centred;
      centred += part.m * d_;
      if (in.diagonal != kNoDiagonal && first_cloud + i == 1) excluded_ = &part;
    }
    if (keep_distances_) {
      each_chunk([&](int64_t, int64_t begin, int64_t end) { measure(begin, end, distances_ + begin * mp); });
    }
    allocate();
    set_marginals();
  }

  // `max_iter` iterations for costs that are `k` distances in units of log2.
  void solve(double k) {
    p_.k = static_cast<T>(k);
    scaled_ = has_f_ = false;
    for (int64_t j = 0; j < p_.m_padded; ++j) h_[j] = b_[j] > 0 ? T(0) : -kInfinity<T>;
    for (int64_t i = 0; i < in_.max_iter; ++i) iterate();
  }

  // Adds the plan's share of the velocity, times `factor`, to out [n, d], or writes it there.
  PlanSums finish(double factor, T* out, bool add) {
    const int64_t mp = p_.m_padded;
    for (int64_t j = 0; j < mp; ++j) {
      if (!scaled_) v_[j] = b_[j] > 0 ? T(1) : T(0);
      total_h_[j] = b_[j] > 0 ? h_[j] : T(0);
    }
    if (scaled_) kernel_.add_log2(mp, v_, total_h_);
    each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      PlanSums& sums = sums_[c];
      sums = {};
      T* weights = tile_of(c);
      for (int64_t row = begin; row < end; row += tile_rows_) {
        const Geometry<T> rows = block(c, row, std::min(row + tile_rows_, end));
        if (!scaled_) {
          const RowPass<T> io{h_,           f_ + row, a_ + row, {},         false, f_next_ + row,
                              shift_ + row, nullptr,  weights,  Store::rows};
          kernel_.row_pass(rows, io, kernel_.rows, 0, rows.n);
          for (int64_t i = row; i < row + rows.n; ++i) u_[i] = std::exp2(f_[i] - shift_[i]);
        }
        const int64_t positive = in_.joint ? parts_[1].offset : mp;
        const PlanRows<T> io{scaled_ ? matrix_ + row * mp : weights,
                             scaled_,
                             weights,
                             rows.cached,
                             u_ + row,
                             shift_ + row,
                             v_,
                             total_h_,
                             p_.k,
                             mp,
                             positive,
                             in_.joint,
                             static_cast<T>(factor)};
        const PlanSums more = drift_.plan_rows(io, rows.n);
        sums.residual += more.residual;
        sums.entropy += more.entropy;
        sums.peak += more.peak;
        for (int64_t i = 0; i < part_count_ && factor != 0; ++i) {
          const Part<T>& part = parts_[i];
          kernel_.combine(weights + part.offset, mp, rows.n, part.m, part.points, d_, out + row * d_, add || i > 0);
        }
      }
    });
    PlanSums total;
    for (const PlanSums& sums : sums_) {
      total.residual += sums.residual / n_;
      total.entropy += sums.entropy / n_;
      total.peak += sums.peak / n_;
    }
    return total;
  }

 private:
  static constexpr int64_t kTile = 256 << 10;  // bytes, in the second-level cache together with another

  void allocate() {
    const int64_t mp = p_.m_padded;
    auto rows = [&](Buffer<T>& buffer) {
      T* array = buffer.get(n_padded_);
      std::fill_n(array, n_padded_, T(0));
      return array;
    };
    a_ = rows(w_.a);
    std::fill_n(a_, n_, T(1) / n_);
    f_ = rows(w_.f);
    f_next_ = rows(w_.f_next);
    shift_ = rows(w_.shift);
    u_ = rows(w_.u);
    u_next_ = rows(w_.u_next);
    fa_ = rows(w_.fa);
    zero_ = rows(w_.zero);
    b_ = w_.b.get(mp);
    log2_b_ = w_.log2_b.get(mp);
    h_ = w_.h.get(mp);
    total_h_ = w_.total_h.get(mp);
    v_ = w_.v.get(mp);
    v_next_ = w_.v_next.get(mp);
    columns_ = w_.columns.get(chunks_ * mp);
    bad_ = w_.bad.get(mp / kernel_.panel);
    sums_.resize(chunks_);
    extremes_.resize(chunks_);
  }

  void set_marginals() {
    double total = 0;
    std::fill_n(b_, p_.m_padded, T(0));
    for (int64_t i = 0; i < part_count_; ++i) {
      for (int64_t j = 0; j < parts_[i].m; ++j) total += parts_[i].weights[j];
    }
    for (int64_t i = 0; i < part_count_; ++i) {
      const Part<T>& part = parts_[i];
      for (int64_t j = 0; j < part.m; ++j) b_[part.offset + j] = static_cast<T>(part.weights[j] / total);
    }
    for (int64_t j = 0; j < p_.m_padded; ++j) log2_b_[j] = std::log2(b_[j]);
  }

  template <class Body>
  void each_chunk(const Body& body) {
    auto chunk = [&](int64_t c) { body(c, c * chunk_rows_, std::min((c + 1) * chunk_rows_, n_)); };
    if (chunks_ == 1) return chunk(0);
    parallel_for(chunks_, threads_, chunk);
  }

  // Distances of rows [begin, end), with pairs that are left out at infinity.
  void measure(int64_t begin, int64_t end, T* out) const {
    Geometry<T> rows = p_;
    rows.x += begin * p_.x_stride;
    rows.n = end - begin;
    kernel_.distances(rows, 0, 0, rows.n, out);
    if (excluded_ == nullptr) return;
    for (int64_t i = begin; i < end; ++i, out += p_.m_padded) {
      const int64_t j = i + in_.diagonal;
      if (0 <= j && j < excluded_->m) out[excluded_->offset + j] = kInfinity<T>;
    }
  }

  // Rows [begin, end) of chunk c as a problem of their own, with their distances.
  Geometry<T> block(int64_t c, int64_t begin, int64_t end) const {
    Geometry<T> rows = p_;
    rows.n = end - begin;
    if (keep_distances_) {
      rows.cached = distances_ + begin * p_.m_padded;
    } else {
      T* tile = distances_ + c * block_rows_ * p_.m_padded;
      measure(begin, end, tile);
      rows.cached = tile;
    }
    return rows;
  }

  T* tile_of(int64_t c) const { return tiles_ + c * tile_rows_ * p_.m_padded; }

  void iterate() {
    if (scaled_) {
      if (scaled_pass() <= kernel_.safe && next_v() <= kernel_.safe) {
        std::swap(u_, u_next_);
        std::swap(v_, v_next_);
        return;
      }
      scaled_ = false;
      std::copy_n(shift_, n_padded_, f_);
      kernel_.add_log2(n_padded_, u_, f_);
      kernel_.add_log2(p_.m_padded, v_, h_);
    }
    const double moved = log_pass();
    std::swap(f_, f_next_);
    has_f_ = true;
    // K serves from now on if it is likely to serve for long.
    if (keep_kernel_ && moved <= kernel_.safe / 2 && next_v() <= kernel_.safe / 2) {
      kernel_.exp2_sum(n_padded_, f_, zero_, shift_, u_);
      std::swap(v_, v_next_);
      scaled_ = true;
      empty_rows_ = std::any_of(f_, f_ + n_, [&](T f) { return f >= kernel_.nowhere; });
    } else if (kernel_.update_columns(p_.m_padded, columns_, log2_b_, {}, 0, h_, bad_)) {
      update_bad_columns();
    }
  }

  template <class Body>
  double sum_columns(const Body& body) {
    each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      T* columns = columns_ + c * p_.m_padded;
      std::fill_n(columns, p_.m_padded, T(0));
      extremes_[c] = body(c, begin, end, columns);
    });
    kernel_.add_parts(p_.m_padded, chunks_, columns_);
    return *std::max_element(extremes_.begin(), extremes_.end());
  }

  double log_pass() {
    return sum_columns([&](int64_t c, int64_t begin, int64_t end, T* columns) {
      double extreme = 0;
      for (int64_t row = begin; row < end; row += block_rows_) {
        const Geometry<T> rows = block(c, row, std::min(row + block_rows_, end));
        const RowPass<T> io{h_,
                            has_f_ ? f_ + row : nullptr,
                            a_ + row,
                            {},
                            false,
                            f_next_ + row,
                            shift_ + row,
                            columns,
                            keep_kernel_ ? matrix_ + row * p_.m_padded : tile_of(c),
                            keep_kernel_ ? Store::tiles : Store::scratch};
        const int64_t at_once = std::min(kernel_.rows, keep_kernel_ ? kernel_.lanes : tile_rows_);
        extreme = std::max(extreme, kernel_.row_pass(rows, io, at_once, 0, rows.n).extreme);
      }
      return extreme;
    });
  }

  double scaled_pass() {
    return sum_columns([&](int64_t c, int64_t begin, int64_t, T* columns) {
      const int64_t end = c + 1 == chunks_ ? n_padded_ : begin + chunk_rows_;
      const ScalePass<T> io{matrix_, shift_, v_, u_, a_, {}, false, u_next_, columns, empty_rows_};
      return kernel_.scale_pass(n_, p_.m_padded, io, begin, end).extreme;
    });
  }

  double next_v() { return kernel_.scale_columns(p_.m_padded, columns_, b_, log2_b_, h_, {}, 0, v_, v_next_); }

  // Own log-sum-exp for the columns of marked panels, whose sums have left the range of T.
  void update_bad_columns() {
    alignas(64) T own[64];
    for (int64_t i = 0; i < n_; ++i) fa_[i] = f_[i] + std::log2(a_[i]);
    for (int64_t q = 0; q < p_.m_padded / kernel_.panel; ++q) {
      if (bad_[q]) std::fill_n(columns_ + q * kernel_.panel, kernel_.panel, -kInfinity<T>);
    }
    for (int64_t row = 0; row < n_; row += block_rows_) {
      const Geometry<T> rows = block(0, row, std::min(row + block_rows_, n_));
      for (int64_t q = 0; q < p_.m_padded / kernel_.panel; ++q) {
        if (!bad_[q]) continue;
        kernel_.column_lse(rows, fa_ + row, q, own);
        for (int64_t j = 0; j < kernel_.panel; ++j) {
          T& sum = columns_[q * kernel_.panel + j];  // in log2
          const T other = -own[j], high = sum > other ? sum : other, low = sum > other ? other : sum;
          sum = low == -kInfinity<T> ? high : high + std::log2(T(1) + std::exp2(low - high));
        }
      }
    }
    for (int64_t j = 0; j < p_.m_padded; ++j) {
      if (bad_[j / kernel_.panel] && b_[j] > 0) h_[j] = log2_b_[j] - columns_[j];
    }
  }

  const SinkhornKernels<T>& kernel_ = kernels<SinkhornKernels, T>();
  const DriftKernels<T>& drift_ = kernels<DriftKernels, T>();
  const Drift<T>& in_;
  Workspace<T>& w_;
  const int64_t threads_, n_, d_;
  int64_t n_padded_, chunk_rows_, chunks_, block_rows_, tile_rows_, part_count_ = 0;
  Part<T> parts_[3];
  const Part<T>* excluded_ = nullptr;  // the columns of x_self, where they have a diagonal
  Geometry<T> p_;
  bool keep_kernel_, keep_distances_, scaled_ = false, has_f_ = false, empty_rows_ = false;
  T *distances_, *matrix_, *tiles_;
  T *a_, *b_, *log2_b_, *columns_, *fa_, *zero_;
  T *f_, *f_next_, *shift_, *h_, *total_h_;  // the log domain
  T *u_, *u_next_, *v_, *v_next_;            // scalings of a kept K
  uint8_t* bad_;
  std::vector<PlanSums> sums_;
  std::vector<double> extremes_;
};

// A sum of weighted distances (squared, but for the euclidean cost) from x, and of the weights of its pairs.
struct Moment {
  double distance = 0, weight = 0;
};

template <class T>
Moment moment_of_distances(const Drift<T>& in, int64_t g, int64_t clouds, Workspace<T>& w) {
  constexpr int64_t kTile = 256 << 10;
  const auto& kernel = kernels<SinkhornKernels, T>();
  Moment moment;
  const Cloud<T>& x = in.x;
  for (int64_t c = in.diagonal == kNoDiagonal ? -1 : 0; c < clouds; ++c) {
    const Part<T> part =
        c < 0 ? Part<T>{x.data + g * x.batch, x.row, x.count, 0, nullptr, nullptr} : part_of(in, g, c, 0);
    const int64_t mp = round_up(part.m, kernel.panel);
    T* weights = w.b.get(mp);
    std::fill_n(weights, mp, T(0));
    for (int64_t j = 0; j < part.m; ++j) {
      weights[j] = part.weights == nullptr ? T(1) : part.weights[j];
      moment.weight += weights[j];
    }
    T* packed = w.packed.get(mp * in.d);
    kernel.pack(part.data, part.row, part.m, in.d, packed);
    const int64_t step = std::clamp<int64_t>(kTile / (mp * static_cast<int64_t>(sizeof(T))), 1, x.count);
    T* tile = w.distances.get(step * mp);
    Geometry<T> p{step,    part.m,  in.d,        mp,      mp,  x.data + g * x.batch, x.row, packed, nullptr,
                  nullptr, nullptr, kNoDiagonal, in.cost, T(0)};
    for (int64_t i = 0; i < x.count; i += step, p.x += step * x.row) {
      const int64_t rows = std::min(step, x.count - i);
      kernel.distances(p, 0, 0, rows, tile);
      moment.distance += kernels<DriftKernels, T>().weighted_sum(rows, mp, tile, weights);
    }
  }
  moment.weight *= x.count;
  return moment;
}

// Squared distances of all pairs from moments about a centre c near the mean of x:
// sum_iu w_u |x_i - u|^2 = W sum_i |x_i - c|^2 + N sum_u w_u |u - c|^2 - 2 sum_i (x_i - c) . sum_u w_u (u - c).
template <class T>
Moment moment_of_squares(const Drift<T>& in, int64_t g, int64_t clouds, Workspace<T>& w) {
  const auto& kernel = kernels<DriftKernels, T>();
  const int64_t n = in.x.count, d = in.d;
  const T* x = in.x.data + g * in.x.batch;
  T* centre = w.centre.get(d);
  T* first_x = w.moments.get(2 * d);
  T* first = first_x + d;
  kernel.mean(x, in.x.row, n, d, centre);
  std::fill_n(first_x, 2 * d, T(0));
  const double squares_x = kernel.moments(x, in.x.row, n, d, centre, nullptr, first_x);
  double squares = 0, weight = 0;
  if (in.diagonal == kNoDiagonal) {
    squares = squares_x;
    weight = n;
    std::copy_n(first_x, d, first);
  }
  for (int64_t c = 0; c < clouds; ++c) {
    const Part<T> part = part_of(in, g, c, 0);
    squares += kernel.moments(part.data, part.row, part.m, d, centre, part.weights, first);
    for (int64_t j = 0; j < part.m; ++j) weight += part.weights[j];
  }
  double cross = 0;
  for (int64_t c = 0; c < d; ++c) cross += double(first_x[c]) * first[c];
  return {weight * squares_x + n * squares - 2 * cross, weight * n};
}

template <class T>
double scale_of(const Drift<T>& in, int64_t threads) {
  const bool squared = is_squared(in.cost);
  const int64_t clouds = in.joint ? in.cloud_count : 2;
  std::vector<Moment> moments(in.groups);
  int64_t points = in.x.count;
  for (int64_t c = 0; c < clouds; ++c) points += in.clouds[c].count;
  const double work = static_cast<double>(points) * in.d * (squared ? 1 : in.x.count);
  for_each_problem<Workspace<T>>(in.groups, work, threads, [&](int64_t g, Workspace<T>& w, int64_t) {
    moments[g] = squared ? moment_of_squares(in, g, clouds, w) : moment_of_distances(in, g, clouds, w);
  });
  Moment total;
  for (const Moment& m : moments) {
    total.distance += m.distance;
    total.weight += m.weight;
  }
  const double mean = total.distance / total.weight;
  const double scale = root(in.cost, mean) / std::sqrt(static_cast<double>(in.d));
  return scale < kMinScale ? kMinScale : scale;  // NaN stays
}

// Where the velocities of all groups at one temperature go. Those that are summed in the end have memory of their own,
// but for the first, which is where the sum will be.
template <class T>
struct Velocities {
  T* first;
  T* others;
  int64_t size;
  bool stream;  // larger than the caches

  T* at(int64_t t) const { return t == 0 ? first : others + (t - 1) * size; }
};

template <class T>
void drift_group(const Drift<T>& in, int64_t g, double scale, const Velocities<T>& out, double* squares,
                 Workspace<T>& w, int64_t threads) {
  const int64_t n = in.x.count, d = in.d, plans = in.joint ? 1 : in.cloud_count;
  const auto& kernel = kernels<DriftKernels, T>();
  kernel.mean(in.x.data + g * in.x.batch, in.x.row, n, d, w.centre.get(d));
  const double guidance = in.cloud_count > 2 ? in.guidance[g] : 0;
  const double size = static_cast<double>(d), dimension = !in.scaled            ? 1.0
                                                          : is_squared(in.cost) ? size
                                                                                : std::sqrt(size);
  T* velocity = w.velocity.get(in.temperatures * n * d);
  for (int64_t p = 0; p < plans; ++p) {
    Coupling<T> coupling(in, g, p, in.joint ? in.cloud_count : 1, w, threads);
    const double factor = p == 0 ? 1 + (in.joint ? 0 : guidance) : p == 1 ? -1 : -guidance;
    for (int64_t t = 0; t < in.temperatures; ++t) {
      coupling.solve(unit(in.cost) * kLog2E / (in.eps[t] * dimension * power(in.cost, scale)));
      const PlanSums sums = coupling.finish(factor / scale, velocity + t * n * d, p > 0);
      const int64_t i = (t * in.groups + g) * plans + p;
      in.residual[i] = static_cast<T>(sums.residual);
      in.entropy[i] = static_cast<T>(sums.entropy / kLog2E);
      in.peak[i] = static_cast<T>(sums.peak);
    }
  }
  for (int64_t t = 0; t < in.temperatures; ++t) {
    squares[t * in.groups + g] = kernel.copy(n * d, velocity + t * n * d, out.at(t) + g * n * d, out.stream);
  }
}

// Multiply-adds of a group.
template <class T>
double work_of(const Drift<T>& in) {
  int64_t columns = 0;
  for (int64_t c = 0; c < in.cloud_count; ++c) columns += in.clouds[c].count;
  return static_cast<double>(in.x.count) * columns * (in.d + in.temperatures * (in.d + 4.0 * in.max_iter));
}

template <class T>
void drift_all(const Drift<T>& in, int64_t threads) {
  const int64_t n = in.x.count, size = in.groups * n * in.d;
  const double scale = in.scaled ? scale_of(in, threads) : 1;
  *in.scale = static_cast<T>(scale);
  constexpr int64_t kKept = 64 << 20, kCaches = 8 << 20;  // bytes
  static thread_local Buffer<T> memory;
  T* others = in.unit ? memory.get((in.temperatures - 1) * size) : in.velocity + size;
  const bool stream = in.temperatures * size * static_cast<int64_t>(sizeof(T)) > kCaches;
  const Velocities<T> out{in.velocity, others, size, stream};

  std::vector<double> squares(in.temperatures * in.groups);
  for_each_problem<Workspace<T>>(in.groups, work_of(in), threads, [&](int64_t g, Workspace<T>& w, int64_t inner) {
    drift_group(in, g, scale, out, squares.data(), w, inner);
  });

  std::vector<T> factors(in.temperatures);
  for (int64_t t = 0; t < in.temperatures; ++t) {
    double total = 0;
    for (int64_t g = 0; g < in.groups; ++g) total += squares[t * in.groups + g];
    const double rms = std::sqrt(total / size);
    in.rms[t] = static_cast<T>(rms);
    factors[t] = static_cast<T>(1 / (rms < kMinRms ? kMinRms : rms));
  }
  if (!in.unit) return;
  constexpr int64_t kSlice = 1 << 14;
  parallel_for((size + kSlice - 1) / kSlice, threads, [&](int64_t i) {
    std::vector<const T*> parts(in.temperatures);
    for (int64_t t = 0; t < in.temperatures; ++t) parts[t] = out.at(t) + i * kSlice;
    const int64_t count = std::min(kSlice, size - i * kSlice);
    kernels<DriftKernels, T>().mix(count, in.temperatures, parts.data(), factors.data(), in.velocity + i * kSlice);
  });
  if (memory.bytes() > kKept) memory.release();
}

}  // namespace

template <class T>
void drift(const Drift<T>& in, int64_t threads) {
  const double work = in.groups * work_of(in);
  with_team(work < kWorthATeam ? 1 : threads, [&] { drift_all(in, threads); });
}

template void drift(const Drift<float>&, int64_t);
template void drift(const Drift<double>&, int64_t);

}  // namespace fewstep::cpu
