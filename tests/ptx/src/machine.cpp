#include "machine.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <mutex>

namespace ptx {

const char* const kClassNames[kClasses] = {"integer", "float32",   "float64",   "special",   "convert",
                                           "move",    "predicate", "branch",    "shuffle",   "tensor",
                                           "barrier", "ld.global", "st.global", "ld.shared", "st.shared",
                                           "matrix",  "cp.async",  "atomic",    "ld.param",  "other"};

Registry& registry() {
  static Registry* r = new Registry;  // never destroyed: memory is freed after main
  return *r;
}
Findings& findings() {
  static Findings f;
  return f;
}
Options& options() {
  static Options o;
  return o;
}

namespace {
std::recursive_mutex registry_mutex;  // torch frees from any thread; and the map frees its own nodes
}

void Registry::add(const void* p, uint64_t bytes, std::string name) {
  const std::lock_guard lock(registry_mutex);
  const uint64_t lo = reinterpret_cast<uint64_t>(p);
  by_start_[lo] = {lo, lo + bytes, std::move(name), {}};
  ++version_;
}
void Registry::remove(const void* p) {
  const std::lock_guard lock(registry_mutex);
  auto at = by_start_.find(reinterpret_cast<uint64_t>(p));
  if (at == by_start_.end()) return;
  const auto node = by_start_.extract(at);  // freed after the map is whole again: that calls this
  ++version_;
}
const Allocation* Registry::find(uint64_t address) const {
  const std::lock_guard lock(registry_mutex);
  auto after = by_start_.upper_bound(address);
  if (after == by_start_.begin()) return nullptr;
  const Allocation& a = std::prev(after)->second;
  return address < a.hi ? &a : nullptr;
}

void Findings::add(const std::string& kind, const std::string& kernel, const std::string& where,
                   const std::function<std::string()>& detail) {
  const std::string key = kind + '\n' + kernel + '\n' + where;
  auto [at, fresh] = index_.try_emplace(key, all_.size());
  if (fresh) all_.push_back({kind, kernel, where, detail(), 0});
  ++all_[at->second].count;
}

std::string Kernel::where(const Instruction& i) const {
  std::string out = "PTX line " + std::to_string(i.from->line) + " (" + i.from->text() + ")";
  if (auto file = module->files.find(i.from->source_file); file != module->files.end() && i.from->source_line > 0) {
    const std::string& path = file->second;
    out += " at " + path + ":" + std::to_string(i.from->source_line);
  }
  return out;
}

std::string Kernel::name() const {
  int status = 0;
  char* p = abi::__cxa_demangle(function->name.c_str(), nullptr, nullptr, &status);
  std::string s = status == 0 ? p : function->name;
  free(p);
  // "void a::b::(anonymous namespace)::kernel<2>(...)": up to the parenthesis of the parameters, after the last "::".
  for (const char* drop : {"(anonymous namespace)::", "fewstep::", "cuda::", "void "}) {
    for (size_t at; (at = s.find(drop)) != std::string::npos;) s.erase(at, strlen(drop));
  }
  int depth = 0;
  for (size_t at = 0; at < s.size(); ++at) {
    depth += s[at] == '<' ? 1 : s[at] == '>' ? -1 : 0;
    if (s[at] == '(' && depth == 0) return s.substr(0, at);
  }
  return s;
}

Block::Block(Cluster& cluster, const Launch& launch, uint32_t rank)
    : cluster(cluster), launch(launch), rank(rank), threads(static_cast<uint32_t>(launch.block.count())) {
  const uint64_t bytes = launch.kernel->dynamic_at + launch.dynamic_shared - kSharedBase;
  memory_.resize(bytes);
  if (options().races) shadow_.resize((bytes + 3) / 4);
  for (uint32_t w = 0; w < (threads + kLanes - 1) / kLanes; ++w) warps.emplace_back(*this, static_cast<int>(w));
}

void Block::start(Dim at) {
  index = at;
  live = threads;
  epoch = 1;
  std::fill(memory_.begin(), memory_.end(), uint8_t{0xff});  // NaN in any type
  std::fill(shadow_.begin(), shadow_.end(), Shadow{});
  for (Barrier& b : barriers) b = {};
  for (Warp& w : warps) w.start();
}

void Block::note(Warp& by, int lane, const Instruction& i, uint32_t offset, uint32_t bytes, bool write) {
  if (shadow_.empty()) return;
  const uint32_t start = offset - kSharedBase, end = start + bytes;
  for (uint32_t word = start / 4; word * 4 < end; ++word) {
    const uint32_t from = std::max(word * 4, start), to = std::min(word * 4 + 4, end);
    const uint8_t mask = static_cast<uint8_t>((0xf << (from - word * 4)) & (0xf >> (word * 4 + 4 - to)));
    Shadow& s = shadow_[word];
    if (s.pending & mask) {
      findings().add("copy in flight", by.kernel.name(), by.kernel.where(i), [&] {
        return std::string(write ? "write to" : "read of") +
               " the target of a cp.async that has not been waited for, " + "by thread " +
               std::to_string(by.thread(lane)) + ", shared offset " + std::to_string(word * 4);
      });
    }
    if (!write && (s.valid & mask) != mask) {
      findings().add("uninitialised shared read", by.kernel.name(), by.kernel.where(i), [&] {
        return "by thread " + std::to_string(by.thread(lane)) + " of block " + std::to_string(by.block.rank) +
               ", shared offset " + std::to_string(word * 4);
      });
    }
    if (write) s.valid |= mask;
    const bool equal =
        write && by.storing && std::memcmp(by.incoming[lane] + (from - start), memory_.data() + from, to - from) == 0;
    by.note(s, lane, i, mask, write, equal, "shared offset ", word * 4);
  }
}

void Block::mark_pending(Warp& by, int lane, const Instruction& i, uint32_t offset, uint32_t bytes) {
  note(by, lane, i, offset, bytes, true);
  if (shadow_.empty()) return;
  for (uint32_t word = (offset - kSharedBase) / 4; word * 4 < offset - kSharedBase + bytes; ++word) {
    shadow_[word].pending = 0xf;
  }
}

void Block::arrived(Warp& by, const Pending& copy) {
  uint8_t* to = shared(copy.to);
  std::memset(to, 0, copy.bytes);
  if (copy.from_bytes) std::memcpy(to, copy.from, copy.from_bytes);
  if (shadow_.empty()) return;
  for (uint32_t word = (copy.to - kSharedBase) / 4; word * 4 < copy.to - kSharedBase + copy.bytes; ++word) {
    shadow_[word].pending = 0;
  }
  note(by, copy.lane, *copy.by, copy.to, copy.bytes, true);
}

void Block::arrive(Warp& w, int id, uint32_t expected, bool reduce, uint32_t flags, int lanes) {
  Barrier& b = barriers[id];
  b.needed = expected;
  b.arrived += static_cast<uint32_t>(lanes);
  if (reduce) {
    b.any |= flags != 0;
    b.every &= std::popcount(flags) == lanes;
    b.count += static_cast<uint32_t>(std::popcount(flags));
  }
  w.waiting = true;
  w.released = false;
  b.waiting.push_back(&w);
  complete(b);
}

void Block::complete(Barrier& b) {
  const uint32_t needed = b.needed ? b.needed : live;
  if (b.waiting.empty() || b.arrived < needed) return;
  for (Warp* w : b.waiting) {
    w->released = true;
    w->result = (b.any ? 1u : 0u) | (b.every ? 2u : 0u) | (b.count << 2);
  }
  b = {};
  new_epoch();
}

void Block::thread_exit(uint32_t lanes) {
  live -= lanes;
  cluster.live -= lanes;
  for (Barrier& b : barriers) complete(b);
  cluster.check();
}

Cluster::Cluster(const Launch& launch) : launch(launch) {
  for (uint32_t r = 0; r < launch.cluster.count(); ++r) blocks.push_back(std::make_unique<Block>(*this, launch, r));
}

void Cluster::start(uint64_t number) {
  arrived = 0, phase = 1, epoch = 1;
  serial = launch.first_cluster + number;
  const Dim& c = launch.cluster;
  const uint32_t nx = launch.grid.x / c.x, ny = launch.grid.y / c.y;
  const uint32_t cx = static_cast<uint32_t>(number % nx), cy = static_cast<uint32_t>(number / nx % ny),
                 cz = static_cast<uint32_t>(number / nx / ny);
  live = static_cast<uint32_t>(blocks.size() * launch.block.count());
  for (uint32_t r = 0; r < blocks.size(); ++r) {
    blocks[r]->start({cx * c.x + r % c.x, cy * c.y + r / c.x % c.y, cz * c.z + r / c.x / c.y});
  }
}

void Cluster::check() {
  if (arrived == 0 || arrived < live) return;
  arrived = 0;
  ++phase;
  ++epoch;
  for (auto& b : blocks) b->new_epoch();
}

bool Cluster::step(uint64_t& random) {
  bool moved = false;
  std::vector<Warp*> order;
  for (auto& b : blocks) {
    for (Warp& w : b->warps) {
      if (w.live != 0) order.push_back(&w);
    }
  }
  if (options().seed != 0) {
    for (size_t k = order.size(); k > 1; --k) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[k - 1], order[(random >> 33) % k]);
    }
  }
  for (Warp* w : order) moved |= w->run();
  return moved;
}

std::string Cluster::state() const {
  std::string out;
  for (auto& b : blocks) {
    for (const Warp& w : b->warps) {
      if (w.live) out += "\n  block " + std::to_string(b->rank) + " warp " + std::to_string(w.number) + w.place();
    }
  }
  return out;
}

Warp::Warp(Block& block, int number)
    : block(block), kernel(*block.launch.kernel), number(static_cast<uint32_t>(number)) {
  registers_.resize(kernel.register_bytes);
  constants_ = kernel.constants.data();
}

void Warp::start() {
  const uint32_t left = block.threads - number * kLanes;
  live = left >= kLanes ? kAll : (1u << left) - 1;
  std::fill(registers_.begin(), registers_.end(), uint8_t{0xff});
  uint64_t local = 0;
  for (const Variable& v : kernel.function->local) local = std::max(local, v.offset + v.size);
  local_.assign(local * kLanes, 0xff);
  ready_.clear();
  blocked_.assign(1, {0, live});
  waiting = released = false;
  epoch = 1;
  copies.clear();
  std::fill(std::begin(committed), std::end(committed), 0u);
}

void Warp::push(std::vector<Group>& groups, int at, uint32_t mask) {
  auto place = std::lower_bound(groups.begin(), groups.end(), at, [](const Group& g, int pc) { return g.pc < pc; });
  if (place != groups.end() && place->pc == at) {
    place->mask |= mask;
  } else {
    groups.insert(place, {at, mask});
  }
}

bool Warp::run() {
  if (waiting && !released) return false;
  const bool count = options().counters;
  uint64_t moved = 0;
  for (const Group& g : blocked_) push(ready_, g.pc, g.mask);
  blocked_.clear();
  while (!ready_.empty()) {
    pc = ready_.front().pc;
    active = ready_.front().mask;
    ready_.erase(ready_.begin());
    stopped = false;
    int limit = ready_.empty() ? INT_MAX : ready_.front().pc;
    while (true) {
      if (pc >= limit) {
        if (pc > limit) {
          push(ready_, pc, active);
          break;
        }
        active |= ready_.front().mask;
        ready_.erase(ready_.begin());
        limit = ready_.empty() ? INT_MAX : ready_.front().pc;
      }
      Instruction& i = kernel.code[static_cast<size_t>(pc)];
      exec = i.guard == UINT32_MAX ? active : active & (predicate({i.guard}) ^ i.guard_flip);
      next = pc + 1;
      if (exec != 0) {
        i.run(*this, i);
        if (exec != 0) {  // else it waits
          ++moved;
          if (count) {
            ++i.counts.warps;
            i.counts.threads += static_cast<uint64_t>(std::popcount(exec));
          }
        }
      }
      if (stopped) break;
      pc = next;
    }
  }
  return moved != 0;
}

void Warp::wait_here() {
  push(blocked_, pc, exec);
  const uint32_t rest = active & ~exec;
  if (rest) push(ready_, pc + 1, rest);
  stopped = true;
  exec = 0;
}

Shadow::Access Warp::access(int lane, const Instruction& i) const {
  return {static_cast<uint16_t>((block.rank << 10) | thread(lane)),
          epoch,
          block.epoch,
          block.cluster.epoch,
          i.from->line,
          serial,
          block.cluster.serial};
}

void Warp::note(Shadow& s, int lane, const Instruction& i, uint8_t mask, bool write, bool equal, const char* where,
                uint64_t offset) {
  const Shadow::Access now = access(lane, i);
  const auto same_block = [&](const Shadow::Access& a) {
    return a.cluster == now.cluster && a.thread >> 10 == now.thread >> 10;
  };
  const auto same_warp = [&](const Shadow::Access& a) { return same_block(a) && a.thread >> 5 == now.thread >> 5; };
  const auto conflict = [&](const Shadow::Access& a, bool wrote) {
    if (a.cluster_epoch == 0 || (a.cluster == now.cluster && a.thread == now.thread)) return;
    if (a.cluster < block.cluster.launch.first_cluster) return;  // of an earlier launch
    if (same_block(a)) {
      if (a.block_epoch != now.block_epoch) return;
      // Lanes that write together are looked at where the values are known.
      if (same_warp(a) && (a.warp_epoch != now.warp_epoch || a.serial == now.serial)) return;
    } else if (a.cluster == now.cluster && a.cluster_epoch != now.cluster_epoch) {
      return;
    }
    const char* kind = same_warp(a)               ? "race within a warp"
                       : same_block(a)            ? "race"
                       : a.cluster == now.cluster ? "race within a cluster"
                                                  : "race between blocks";
    findings().add(kind, kernel.name(), kernel.where(i) + " after PTX line " + std::to_string(a.line), [&] {
      return std::string(write ? "write" : "read") + " by thread " + std::to_string(thread(lane)) + " of block " +
             std::to_string(block.rank) + " after a " + (wrote ? "write" : "read") + " by thread " +
             std::to_string(a.thread & 1023) + " of block " + std::to_string(a.thread >> 10) + ", " + where +
             std::to_string(offset);
    });
  };
  // Warps may write the same value (replicated layouts do), and each then read its own.
  const bool own = same_block(s.write) && s.write.block_epoch == now.block_epoch && (s.writers >> number & 1);
  if ((s.write_bytes & mask) && !equal && !(own && !write && !same_warp(s.write))) conflict(s.write, true);
  if (write) {
    const bool fresh = !same_block(s.write) || s.write.block_epoch != now.block_epoch || s.write.cluster_epoch == 0;
    s.writers = (equal && !fresh ? s.writers : 0) | 1u << number;
    if ((s.read_bytes & mask) && !equal) {
      conflict(s.read, false);
      conflict(s.other_read, false);
    }
    const bool same =
        s.write.thread == now.thread && s.write.block_epoch == now.block_epoch && s.write.cluster == now.cluster;
    s.write_bytes = same ? s.write_bytes | mask : mask;
    s.write = now;
    s.read_bytes &= static_cast<uint8_t>(~mask);
    return;
  }
  // Of the readers of an epoch one is kept, and one of another warp.
  const bool fresh = s.read_bytes == 0 || s.read.block_epoch != now.block_epoch || s.read.cluster != now.cluster;
  if (fresh) {
    s.other_read = s.read.cluster != now.cluster && s.read_bytes ? s.read : Shadow::Access{};
    s.read_bytes = mask;
  } else if (!same_warp(s.read)) {
    s.other_read = s.read;
  }
  s.read_bytes |= mask;
  s.read = now;
}

bool Warp::gather(uint32_t required) {
  if ((exec & required) == required) return true;
  for (size_t g = 0; g < blocked_.size(); ++g) {
    if (blocked_[g].pc == pc && ((exec | blocked_[g].mask) & required) == required) {
      exec |= blocked_[g].mask;
      active |= blocked_[g].mask;
      blocked_.erase(blocked_.begin() + static_cast<long>(g));
      return true;
    }
  }
  wait_here();
  return false;
}

void Warp::split(int target, uint32_t taken) {
  const uint32_t rest = active & ~taken;
  if (rest == 0) {
    next = target;
    return;
  }
  push(ready_, target, taken);
  push(ready_, pc + 1, rest);
  stopped = true;
}

void Warp::leave(uint32_t lanes) {
  for (const Pending& p : copies) {
    if (lanes >> p.lane & 1) {
      findings().add("copy never waited for", kernel.name(), kernel.where(*p.by),
                     [&] { return "thread " + std::to_string(thread(p.lane)) + " exits"; });
    }
  }
  live &= ~lanes;
  block.thread_exit(static_cast<uint32_t>(std::popcount(lanes)));
  const uint32_t rest = active & ~lanes;
  if (rest) push(ready_, pc + 1, rest);
  stopped = true;
}

std::string Warp::place() const {
  std::string out = waiting && !released ? " (at a barrier)" : "";
  for (const Group& g : blocked_) {
    char text[64];
    snprintf(text, sizeof text, ": lanes %08x at ", g.mask);
    out += text + kernel.where(kernel.code[static_cast<size_t>(g.pc)]);
  }
  return out;
}

void Warp::fail(const Instruction& i, int lane, const std::string& what) const {
  throw Error(kernel.name() + ", " + kernel.where(i) + ", block (" + std::to_string(block.index.x) + ", " +
              std::to_string(block.index.y) + ", " + std::to_string(block.index.z) + ") thread " +
              std::to_string(thread(lane)) + ": " + what);
}

namespace {

std::string hex(uint64_t value) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void Warp::resolve(Instruction& i, Slot address, uint32_t bytes, bool write) {
  ++serial;
  uint64_t at[kLanes];
  const bool narrow = i.register_bytes == 4;  // of the address
  for (int l = 0; l < kLanes; ++l) {
    at[l] = narrow ? static_cast<uint64_t>(static_cast<uint32_t>(in<uint32_t>(address)[l] + i.offset))
                   : in<uint64_t>(address)[l] + i.offset;
  }
  const bool count = options().counters;
  uint32_t shared_mask = 0, global_mask = 0, offsets[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    uint64_t a = at[l];
    const uint32_t align = std::min<uint32_t>(bytes, 16);
    if (a % align != 0) fail(i, l, "address " + hex(a) + " is not aligned to " + std::to_string(align) + " bytes");
    Space space = i.space;
    if (space == Space::generic) {
      space = a & kSharedWindow ? Space::cluster : a & kLocalWindow ? Space::local : Space::global;
      if (space != Space::global) a &= ~(kSharedWindow | kLocalWindow);
    }
    switch (space) {
      case Space::param:
        if (a + bytes > block.launch.params.size()) fail(i, l, "outside of the parameters: " + hex(a));
        host[l] = const_cast<uint8_t*>(block.launch.params.data()) + a;
        break;
      case Space::shared:
      case Space::cluster: {
        const uint32_t rank = static_cast<uint32_t>(a >> kRankShift), offset = a & ((1u << kRankShift) - 1);
        if (a >> 32 || rank >= block.cluster.blocks.size() || (space == Space::shared && rank != block.rank)) {
          fail(i, l, "no shared memory of this block at " + hex(a));
        }
        Block& owner = *block.cluster.blocks[rank];
        if (!owner.inside(offset, bytes)) {
          fail(i, l,
               std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at shared offset " +
                   std::to_string(int64_t{offset} - kSharedBase) + " of " +
                   std::to_string(kernel.dynamic_at + block.launch.dynamic_shared - kSharedBase));
        }
        if (owner.live == 0) fail(i, l, "shared memory of a block that has exited: rank " + std::to_string(rank));
        owner.note(*this, l, i, offset, bytes, write);
        host[l] = owner.shared(offset);
        shared_mask |= 1u << l;
        offsets[l] = static_cast<uint32_t>(a);
        break;
      }
      case Space::local:
        if (a + bytes > local_.size() / kLanes) fail(i, l, "outside of local memory: " + hex(a));
        host[l] = local_.data() + static_cast<uint64_t>(l) * (local_.size() / kLanes) + a;
        break;
      default:
        if (i.cache_version != registry().version() || a < i.cache->lo || a + bytes > i.cache->hi) {
          const Allocation* found = registry().find(a);
          if (found == nullptr || a + bytes > found->hi) {
            std::string near = "no allocation";
            if (const Allocation* before = registry().find(a - 64); found || before) {
              const Allocation& b = found ? *found : *before;
              near = "past the end of '" + b.name + "' of " + std::to_string(b.hi - b.lo) + " bytes, at byte " +
                     std::to_string(a - b.lo);
            }
            fail(i, l,
                 std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " + hex(a) + ": " +
                     near);
          }
          i.cache = found, i.cache_version = registry().version();
        }
        if (options().global_races && i.kind != kAtomic) {
          const Allocation& own = *i.cache;
          if (own.shadow.empty()) own.shadow.resize((own.hi - own.lo + 3) / 4 + 1);
          const uint64_t start = a - own.lo, end = start + bytes;
          for (uint64_t word = start / 4; word * 4 < end; ++word) {
            const uint64_t from = std::max(word * 4, start), to = std::min(word * 4 + 4, end);
            const uint8_t mask = static_cast<uint8_t>((0xf << (from - word * 4)) & (0xf >> (word * 4 + 4 - to)));
            const bool equal = write && storing &&
                               std::memcmp(incoming[l] + (from - start),
                                           reinterpret_cast<const uint8_t*>(own.lo) + from, to - from) == 0;
            note(own.shadow[word], l, i, mask, write, equal, "byte ", from);
          }
        }
        host[l] = reinterpret_cast<uint8_t*>(a);
        global_mask |= 1u << l;
    }
  }
  if (!count) return;
  if (shared_mask) count_shared(i, offsets, shared_mask, bytes);
  if (global_mask) count_global(i, global_mask, bytes);
}

void Warp::count_global(Instruction& i, uint32_t mask, uint32_t bytes) const {
  uint64_t seen[kLanes * 2], useful = 0;
  int n = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    useful += bytes;
    const uint64_t first = reinterpret_cast<uint64_t>(host[l]) / 32,
                   last = (reinterpret_cast<uint64_t>(host[l]) + bytes - 1) / 32;
    for (uint64_t s = first; s <= last; ++s) {
      if (std::find(seen, seen + n, s) == seen + n) seen[n++] = s;
    }
  }
  i.counts.sectors += static_cast<uint64_t>(n);
  // Lanes that read one address together need it once.
  i.counts.needed += std::min<uint64_t>((useful + 31) / 32, static_cast<uint64_t>(n));
}

// 32 banks of 4 bytes; accesses of 8 bytes go half a warp at a time, of 16 bytes a quarter.
void Warp::count_shared(Instruction& i, const uint32_t* offsets, uint32_t mask, uint32_t bytes) const {
  const int lanes = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  const uint32_t words = std::max(1u, bytes / 4);
  for (int first = 0; first < kLanes; first += lanes) {
    uint32_t seen[kLanes][kLanes], worst = 0, depth[kLanes] = {};
    for (int l = first; l < first + lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      for (uint32_t w = 0; w < words; ++w) {
        const uint32_t word = offsets[l] / 4 + w, bank = word % 32;
        if (std::find(seen[bank], seen[bank] + depth[bank], word) != seen[bank] + depth[bank]) continue;
        if (depth[bank] < kLanes) seen[bank][depth[bank]++] = word;
        worst = std::max(worst, depth[bank]);
      }
    }
    i.counts.wavefronts += worst;
    i.counts.ideal += worst > 0;
  }
}

void launch(Launch& l) {
  static uint64_t ran = 1;
  ++l.kernel->launches;
  uint64_t clusters = l.grid.count() / l.cluster.count();
  l.first_cluster = ran;
  ran += clusters;
  uint64_t random = options().seed, next = std::min(options().skip, clusters - 1);
  if (options().limit != 0) clusters = std::min(clusters, next + options().limit);
  struct Running {
    std::unique_ptr<Cluster> cluster;
    bool busy = false;
  };
  std::vector<Running> running(std::min<uint64_t>(static_cast<uint64_t>(std::max(options().resident, 1)), clusters));
  uint64_t busy = 0;
  while (next < clusters || busy > 0) {
    bool moved = false;
    for (Running& r : running) {
      if (!r.busy) {
        if (next == clusters) continue;
        if (!r.cluster) r.cluster = std::make_unique<Cluster>(l);
        r.cluster->start(next++);
        r.busy = true;
        ++busy;
      }
      moved |= r.cluster->step(random);
      if (r.cluster->done()) {
        r.busy = false;
        --busy;
        moved = true;
      }
    }
    if (!moved) {
      std::string all;
      for (Running& r : running) {
        if (r.busy) all += r.cluster->state();
      }
      throw Error(l.kernel->name() + ": deadlock: threads wait for others that never come" + all);
    }
  }
}

}  // namespace ptx
