// The machine: memory, threads in warps, blocks, clusters, and the decoded instructions that they run.
//
// A warp holds its registers lane by lane (32 values in a row), so that an instruction is a loop over lanes. Lanes that
// part at a branch become groups with a program counter each; the group with the lowest one runs, and groups that meet
// become one. An instruction with .sync runs when all the lanes that it names have come to it.
#pragma once

#include <bit>
#include <climits>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "module.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAll = ~0u;
// Generic addresses of shared and local memory; all others are the host's own.
constexpr uint64_t kSharedWindow = uint64_t{1} << 62, kLocalWindow = uint64_t{1} << 61;
// A shared address is the block's rank in its cluster and an offset; the first KB is the system's, as on a device.
constexpr int kRankShift = 24;
constexpr uint32_t kSharedBase = 1024;

// The last write and reads of a word of memory: by whom, and in which stretch between barriers.
struct Shadow {
  struct Access {
    uint16_t thread = 0, warp_epoch = 0;          // thread: rank in the cluster << 10 | thread in the block
    uint32_t block_epoch = 0, cluster_epoch = 0;  // 0: never
    int32_t line = 0;
    uint32_t serial = 0;   // of the warp's accesses
    uint64_t cluster = 0;  // global memory only: number of the cluster, of all launches
  };
  Access write, read, other_read;
  uint32_t writers = 0;  // warps of the block that wrote the value that is there
  uint8_t valid = 0, write_bytes = 0, read_bytes = 0, pending = 0;  // masks of bytes
};

struct Allocation {
  uint64_t lo = 1, hi = 0;  // [lo, hi)
  std::string name;
  mutable std::vector<Shadow> shadow;  // of its words, once a kernel has touched it
};

// What kernels may touch: everything else is an error.
class Registry {
 public:
  void add(const void* p, uint64_t bytes, std::string name);
  void remove(const void* p);
  const Allocation* find(uint64_t address) const;
  uint64_t version() const { return version_; }

 private:
  std::map<uint64_t, Allocation> by_start_;
  uint64_t version_ = 1;
};
Registry& registry();

// Findings that do not stop a kernel; equal ones are counted.
struct Finding {
  std::string kind, kernel, where, detail;
  uint64_t count = 0;
};
class Findings {
 public:
  void add(const std::string& kind, const std::string& kernel, const std::string& where,
           const std::function<std::string()>& detail);
  const std::vector<Finding>& all() const { return all_; }
  void clear() { all_.clear(), index_.clear(); }

 private:
  std::vector<Finding> all_;
  std::map<std::string, size_t> index_;
};
Findings& findings();

struct Options {
  bool races = true;         // between threads, in shared memory
  bool global_races = true;  // and in global memory
  bool counters = true;      // bank conflicts and sectors
  int resident = 4;          // clusters in flight
  uint64_t skip = 0;         // clusters of a launch that are not run, from the first; the last one always is
  uint64_t limit = 0;        // how many are run after those; 0: all
  int memset = -1;           // written by cudaMemsetAsync into words instead of 0: where a queue starts
  uint64_t seed = 0;         // order of warps; 0: in turn
  double approximate = 0;    // error of approximate instructions: this times the allowed one, by a hash of the input
  bool truncate = true;      // sums of tensor cores are cut, not rounded
};
Options& options();

enum class Space : uint8_t { param, global, shared, cluster, generic, local };
enum Class : uint8_t {
  kInteger,
  kFloat,
  kDouble,
  kSpecial,
  kConvert,
  kMove,
  kPredicate,
  kBranch,
  kShuffle,
  kTensor,
  kBarrier,
  kLoadGlobal,
  kStoreGlobal,
  kLoadShared,
  kStoreShared,
  kMatrix,
  kAsync,
  kAtomic,
  kParam,
  kOther,
  kClasses
};
extern const char* const kClassNames[kClasses];

// Where a register or a constant is, for 32 lanes.
struct Slot {
  static constexpr uint32_t kConstant = 1u << 31;
  uint32_t at = 0;
};

class Warp;
struct Instruction;
using Handler = void (*)(Warp&, Instruction&);

struct Counters {
  uint64_t warps = 0, threads = 0;     // executions
  uint64_t wavefronts = 0, ideal = 0;  // of shared memory
  uint64_t sectors = 0, needed = 0;    // of 32 bytes; needed: bytes asked for / 32, rounded up
};

struct Instruction {
  Handler run = nullptr;
  uint32_t guard = UINT32_MAX;  // slot of a predicate
  uint32_t guard_flip = 0;
  Slot d, d2, s[5];
  std::vector<Slot> dv, sv;  // elements of vectors
  uint64_t offset = 0;       // of an address, or an immediate
  int target = 0;            // of a branch, or a number
  Space space = Space::generic;
  uint8_t bytes = 0, count = 1;  // of an element in memory
  uint8_t register_bytes = 0;
  Class kind = kOther;
  bool flag = false, flag2 = false;
  int mode = 0;
  int shape = 0;
  const Statement* from = nullptr;
  uint64_t cache_version = 0;  // of the registry
  const Allocation* cache = nullptr;
  Counters counts;
};

// An entry, ready to run.
struct Kernel {
  const Module* module = nullptr;
  const Function* function = nullptr;
  std::vector<Instruction> code;
  std::vector<uint8_t> constants;
  uint32_t register_bytes = 0;
  uint64_t dynamic_at = 0;  // offset of dynamic shared memory
  uint64_t launches = 0;

  std::string where(const Instruction& i) const;
  std::string name() const;  // demangled, short
};

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

class Block;
class Cluster;

struct Launch {
  Kernel* kernel;
  Dim grid, block, cluster;
  uint32_t dynamic_shared = 0;
  std::vector<uint8_t> params;
  uint64_t first_cluster = 0;  // set by `launch`
};
void launch(Launch& l);

struct Barrier {
  uint32_t arrived = 0, needed = 0;
  bool any = false, every = true;
  uint32_t count = 0;
  std::vector<Warp*> waiting;
};

struct Pending {  // a copy of cp.async
  int lane;
  uint32_t to, bytes, from_bytes;
  const uint8_t* from;
  uint32_t group;
  const Instruction* by;
};

class Block {
 public:
  Block(Cluster& cluster, const Launch& launch, uint32_t rank);
  void start(Dim index);
  uint8_t* shared(uint32_t offset) { return memory_.data() + (offset - kSharedBase); }
  bool inside(uint32_t offset, uint32_t bytes) const {
    return offset >= kSharedBase && offset - kSharedBase + bytes <= memory_.size();
  }
  // Notes an access to shared memory; `by` is the accessing warp, of this or another block.
  void note(Warp& by, int lane, const Instruction& i, uint32_t offset, uint32_t bytes, bool write);
  // The target of a cp.async, and its end.
  void arrived(Warp& by, const Pending& copy);
  void mark_pending(Warp& by, int lane, const Instruction& i, uint32_t offset, uint32_t bytes);
  void arrive(Warp& w, int id, uint32_t expected, bool reduce, uint32_t flags, int lanes);
  void thread_exit(uint32_t lanes);
  void new_epoch() { ++epoch; }

  Cluster& cluster;
  const Launch& launch;
  uint32_t rank;
  Dim index{0, 0, 0};
  uint32_t threads, live = 0;
  uint32_t epoch = 1;
  std::vector<Warp> warps;
  Barrier barriers[16];

 private:
  void complete(Barrier& b);
  std::vector<uint8_t> memory_;
  std::vector<Shadow> shadow_;
};

class Cluster {
 public:
  explicit Cluster(const Launch& launch);
  void start(uint64_t number);
  bool step(uint64_t& random);  // runs every warp once; whether anything happened
  bool done() const { return live == 0; }
  void check();
  std::string state() const;

  const Launch& launch;
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t live = 0, arrived = 0, phase = 1, epoch = 1;
  uint64_t serial = 0;  // of all clusters that ever ran
};

class Warp {
 public:
  Warp(Block& block, int number);
  void start();
  bool run();  // until all groups wait or are done; whether anything happened

  template <class T>
  const T* in(Slot s) const {
    return reinterpret_cast<const T*>(s.at & Slot::kConstant ? constants_ + (s.at & ~Slot::kConstant)
                                                             : registers_.data() + s.at);
  }
  template <class T>
  T* out(Slot s) {
    return reinterpret_cast<T*>(registers_.data() + s.at);
  }
  uint32_t predicate(Slot s) const { return *in<uint32_t>(s); }
  void set_predicate(Slot s, uint32_t value) {
    uint32_t& p = *out<uint32_t>(s);
    p = (p & ~exec) | (value & exec);
  }

  // Of instructions that wait for others. False: this group waits now.
  bool gather(uint32_t required);
  void wait_here();
  void split(int target, uint32_t taken);
  void leave(uint32_t lanes);
  // Fills `host` with where the lanes' accesses of i.bytes * i.count are, checked.
  void resolve(Instruction& i, Slot address, uint32_t bytes, bool write);
  [[noreturn]] void fail(const Instruction& i, int lane, const std::string& what) const;
  void count_global(Instruction& i, uint32_t mask, uint32_t bytes) const;
  // A word's shadow before an access to it by a lane; `offset` and `where` for the message.
  void note(Shadow& s, int lane, const Instruction& i, uint8_t mask, bool write, bool equal, const char* where,
            uint64_t offset);
  Shadow::Access access(int lane, const Instruction& i) const;
  void count_shared(Instruction& i, const uint32_t* offsets, uint32_t mask, uint32_t bytes) const;
  uint32_t thread(int lane) const { return number * kLanes + lane; }
  std::string place() const;

  Block& block;
  Kernel& kernel;
  const uint32_t number;
  uint32_t live = 0;
  uint32_t active = 0, exec = 0;
  int pc = 0, next = 0;
  bool stopped = false;  // the current group waits, left or parted
  bool waiting = false, released = false;
  uint32_t result = 0;  // of a reduction at a barrier
  uint16_t epoch = 1;
  uint32_t serial = 0;            // counts accesses to memory
  uint32_t arrival[kLanes] = {};  // phase of the cluster's barrier
  uint32_t committed[kLanes] = {};
  std::vector<Pending> copies;
  uint8_t* host[kLanes];
  // What a store is about to write, so that writes of what is there already are told from others.
  bool storing = false;
  uint8_t incoming[kLanes][32];

 private:
  struct Group {
    int pc;
    uint32_t mask;
  };
  void push(std::vector<Group>& groups, int at, uint32_t mask);
  std::vector<Group> ready_, blocked_;
  std::vector<uint8_t> registers_, local_;
  const uint8_t* constants_;
};

std::unique_ptr<Kernel> decode(const Module& module, const Function& function,
                               const std::map<std::string, uint64_t>& addresses);

}  // namespace ptx
