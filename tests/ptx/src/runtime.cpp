// The entry points of the CUDA runtime that the project's host code links to, on the interpreter; those that Python
// calls; and, for LD_PRELOAD, posix_memalign and free, so that every tensor of torch on the CPU is device memory with
// known ends, filled with NaN.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <sstream>

#include "machine.h"

using ptx::Dim;

namespace {

struct Device {
  int capability, processors, shared_optin, shared_processor;
};
const Device& device() {
  static const std::map<std::string, Device> known{
      {"h100", {90, 132, 232448, 233472}}, {"a100", {80, 108, 166912, 167936}}, {"b200", {100, 148, 232448, 233472}}};
  static const Device& own = known.at(getenv("PTX_DEVICE") ? getenv("PTX_DEVICE") : "h100");
  return own;
}

// A kernel by name, and what the host has set for it.
struct Entry {
  std::unique_ptr<ptx::Kernel> kernel;
  const ptx::Module* module = nullptr;
  const ptx::Function* function = nullptr;
  const std::map<std::string, uint64_t>* addresses = nullptr;
  uint32_t dynamic_limit = 48 * 1024;

  ptx::Kernel* decoded() {
    if (!kernel) kernel = ptx::decode(*module, *function, *addresses);
    return kernel.get();
  }
};
struct Loaded {
  std::unique_ptr<ptx::Module> module;
  std::map<std::string, uint64_t> addresses;
  std::vector<std::vector<uint8_t>> variables;
};

std::vector<std::unique_ptr<Entry>>& all() {
  static auto* e = new std::vector<std::unique_ptr<Entry>>;
  return *e;
}
std::map<std::string, Entry*>& entries() {  // the last of each name
  static auto* e = new std::map<std::string, Entry*>;
  return *e;
}
std::map<const void*, Entry*>& functions() {
  static auto* f = new std::map<const void*, Entry*>;
  return *f;
}
std::string& message() {
  static std::string m;
  return m;
}
cudaError_t last = cudaSuccess;

cudaError_t refuse(cudaError_t error, const std::string& why) {
  message() = why;
  if (getenv("PTX_QUIET") == nullptr) fprintf(stderr, "ptx: %s\n", why.c_str());
  return last = error;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
std::vector<Configuration>& configurations() {
  static std::vector<Configuration> c;
  return c;
}

uint32_t static_shared(Entry& e) {
  uint64_t bytes = e.function->shared_bytes;
  for (const ptx::Variable& v : e.module->shared) bytes += v.size;
  return static_cast<uint32_t>(bytes);
}

// What a device refuses, then the kernel.
cudaError_t launch(Entry* e, Dim grid, Dim block, Dim cluster, size_t shared, const std::vector<const void*>& args) {
  if (e == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "launch of an unknown kernel");
  const ptx::Function& f = *e->function;
  if (grid.count() == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || block.count() == 0 ||
      block.count() > 1024 || block.z > 64) {
    return refuse(cudaErrorInvalidConfiguration, f.name + ": a grid or block that no device takes");
  }
  const uint64_t most = uint64_t(std::max(f.threads[0], 1)) * std::max(f.threads[1], 1) * std::max(f.threads[2], 1);
  if (f.threads[0] > 0 && (f.exact_threads ? block.count() != most : block.count() > most)) {
    return refuse(cudaErrorLaunchOutOfResources,
                  f.name + ": " + std::to_string(block.count()) + " threads, compiled for " + std::to_string(most));
  }
  if (shared > e->dynamic_limit || shared + static_shared(*e) > static_cast<size_t>(device().shared_optin)) {
    return refuse(cudaErrorInvalidValue, f.name + ": more shared memory than was asked for: " + std::to_string(shared));
  }
  if (cluster.count() > 1) {
    if (device().capability < 90) return refuse(cudaErrorNotSupported, f.name + ": no clusters on this device");
    if (cluster.count() > 8 || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
      return refuse(cudaErrorInvalidClusterSize, f.name + ": cluster size");
    }
  }
  if (e->module->capability > device().capability) {
    return refuse(cudaErrorNoKernelImageForDevice, f.name + ": compiled for a later device");
  }
  try {
    ptx::Launch l{e->decoded(), grid, block, cluster, static_cast<uint32_t>(shared), {}};
    l.params.resize(f.param_bytes, 0xff);
    if (args.size() != f.params.size()) throw ptx::Error(f.name + ": the number of parameters");
    for (size_t k = 0; k < args.size(); ++k) {
      std::memcpy(l.params.data() + f.params[k].offset, args[k], f.params[k].size);
    }
    ptx::launch(l);
  } catch (const std::exception& error) {
    return refuse(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

std::vector<const void*> arguments(Entry* e, void** args) {
  return e == nullptr ? std::vector<const void*>{} : std::vector<const void*>(args, args + e->function->params.size());
}
Entry* find(const void* f) {
  auto at = functions().find(f);
  return at == functions().end() ? nullptr : at->second;
}
Dim dim(dim3 d) { return {d.x, d.y, d.z}; }

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API void** __cudaRegisterFatBinary(void* fat) { return static_cast<void**>(fat); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  auto at = entries().find(name);
  if (at == entries().end())
    fprintf(stderr, "ptx: no PTX was loaded for %s\n", name);
  else
    functions()[host] = at->second;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations().back();
  configurations().pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<void**>(stream) = c.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(find(host));
  return *kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                   cudaStream_t) {
  Entry* e = reinterpret_cast<Entry*>(kernel);
  return launch(e, dim(grid), dim(block), {}, shared, arguments(e, args));
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  Entry* e = find(f);
  return launch(e, dim(grid), dim(block), {}, shared, arguments(e, args));
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  Dim cluster;
  for (unsigned k = 0; k < c->numAttrs; ++k) {
    const cudaLaunchAttribute& a = c->attrs[k];
    if (a.id == cudaLaunchAttributeClusterDimension) {
      cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
    } else {
      return refuse(cudaErrorNotSupported, "an attribute of a launch that the interpreter does not know");
    }
  }
  Entry* e = find(f);
  return launch(e, dim(c->gridDim), dim(c->blockDim), cluster, c->dynamicSmemBytes, arguments(e, args));
}
API cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int) { return cudaSuccess; }
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorString(cudaError_t) { return message().c_str(); }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount:
      *value = device().processors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device().shared_optin;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device().shared_processor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().capability % 10;
      break;
    default:
      return refuse(cudaErrorNotSupported, "attribute " + std::to_string(what));
  }
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute what, int value) {
  Entry* e = find(f);
  if (e == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "an attribute of an unknown kernel");
  if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<uint32_t>(value) + static_shared(*e) > static_cast<uint32_t>(device().shared_optin)) {
    return refuse(cudaErrorInvalidValue, e->function->name + ": shared memory of " + std::to_string(value));
  }
  e->dynamic_limit = static_cast<uint32_t>(value);
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* f) {
  Entry* e = find(f);
  if (e == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "attributes of an unknown kernel");
  *out = {};
  out->ptxVersion = out->binaryVersion = e->module->capability;
  out->sharedSizeBytes = static_shared(*e);
  out->maxThreadsPerBlock = e->function->threads[0] ? e->function->threads[0] : 1024;
  out->maxDynamicSharedSizeBytes = static_cast<int>(e->dynamic_limit);
  return cudaSuccess;
}
// As if every kernel took the registers that its launch bounds leave it.
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads,
                                                                       size_t shared, unsigned) {
  Entry* e = find(f);
  if (e == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "occupancy of an unknown kernel");
  const int bound = e->function->threads[0] ? e->function->threads[0] : 1024, registers = std::min(255, 65536 / bound);
  const size_t own = shared + static_shared(*e) + 1024;
  *blocks = std::min({65536 / ((registers + 7) / 8 * 8 * threads), 2048 / threads, 32,
                      static_cast<int>(static_cast<size_t>(device().shared_processor) / own)});
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}
API cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  const ptx::Allocation* a = ptx::registry().find(reinterpret_cast<uint64_t>(p));
  if (bytes > 0 && (a == nullptr || reinterpret_cast<uint64_t>(p) + bytes > a->hi)) {
    return refuse(cudaErrorInvalidValue, "cudaMemsetAsync outside of an allocation");
  }
  std::memset(p, value, bytes);
  if (ptx::options().memset >= 0) std::memcpy(p, &ptx::options().memset, std::min(bytes, sizeof(int)));
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// Parses PTX and makes its kernels known by name; a later one of the same name takes its place.
API int ptx_load(const char* text) {
  try {
    auto* loaded = new Loaded;  // kernels point into it for ever
    loaded->module = ptx::parse(text);
    loaded->variables.reserve(loaded->module->global.size());
    for (const ptx::Variable& v : loaded->module->global) {
      loaded->variables.emplace_back(v.size + 16);
      uint8_t* p = loaded->variables.back().data();
      std::copy(v.init.begin(), v.init.end(), p);
      loaded->addresses[v.name] = reinterpret_cast<uint64_t>(p);
      ptx::registry().add(p, v.size, v.name);
    }
    for (auto& [name, function] : loaded->module->entries) {
      auto e = std::make_unique<Entry>();
      e->module = loaded->module.get();
      e->function = function.get();
      e->addresses = &loaded->addresses;
      entries()[name] = e.get();
      all().push_back(std::move(e));
    }
  } catch (const std::exception& error) {
    refuse(cudaErrorInvalidPtx, error.what());
    return 1;
  }
  return 0;
}
// Decodes an entry: an error for an opcode that is not known.
API int ptx_check(const char* name) {
  try {
    entries().at(name)->decoded();
  } catch (const std::exception& error) {
    refuse(cudaErrorInvalidPtx, error.what());
    return 1;
  }
  return 0;
}
API void* ptx_entry(const char* name) {
  auto at = entries().find(name);
  return at == entries().end() ? nullptr : at->second;
}
// dims: grid, block, cluster; args: a pointer to each parameter.
API int ptx_launch(void* entry, const uint32_t* dims, uint32_t shared, const void** args, int count) {
  Entry* e = static_cast<Entry*>(entry);
  e->dynamic_limit = static_cast<uint32_t>(device().shared_optin) - static_shared(*e);
  return launch(e, {dims[0], dims[1], dims[2]}, {dims[3], dims[4], dims[5]}, {dims[6], dims[7], dims[8]}, shared,
                std::vector<const void*>(args, args + count));
}
API int ptx_parameters(void* entry) { return static_cast<int>(static_cast<Entry*>(entry)->function->params.size()); }
API const char* ptx_error() { return message().c_str(); }
API void ptx_register(const void* p, uint64_t bytes, const char* name) { ptx::registry().add(p, bytes, name); }
API void ptx_unregister(const void* p) { ptx::registry().remove(p); }
API void ptx_option(const char* name, double value) {
  ptx::Options& o = ptx::options();
  const std::string n = name;
  if (n == "races") o.races = value != 0;
  if (n == "global_races") o.global_races = value != 0;
  if (n == "counters") o.counters = value != 0;
  if (n == "skip") o.skip = static_cast<uint64_t>(value);
  if (n == "limit") o.limit = static_cast<uint64_t>(value);
  if (n == "memset") o.memset = static_cast<int>(value);
  if (n == "resident") o.resident = static_cast<int>(value);
  if (n == "seed") o.seed = static_cast<uint64_t>(value);
  if (n == "approximate") o.approximate = value;
  if (n == "truncate") o.truncate = value != 0;
}
// Lines "kind \t count \t kernel \t where \t detail"; the text lives until the next call.
API const char* ptx_findings(int clear) {
  static std::string out;
  std::ostringstream s;
  for (const ptx::Finding& f : ptx::findings().all()) {
    s << f.kind << '\t' << f.count << '\t' << f.kernel << '\t' << f.where << '\t' << f.detail << '\n';
  }
  out = s.str();
  if (clear) ptx::findings().clear();
  return out.c_str();
}
// Lines "number of the entry \t kernel \t launches \t where \t class \t warps \t threads \t wavefronts \t ideal \t
// sectors \t needed".
API const char* ptx_counters(int clear) {
  static std::string out;
  std::ostringstream s;
  int number = 0;
  for (auto& e : all()) {
    ++number;
    if (!e->kernel) continue;
    const std::string kernel = e->kernel->name();
    for (ptx::Instruction& i : e->kernel->code) {
      if (i.counts.warps && i.from != nullptr) {
        s << number << '\t' << kernel << '\t' << e->kernel->launches << '\t' << e->kernel->where(i) << '\t'
          << ptx::kClassNames[i.kind] << '\t' << i.counts.warps << '\t' << i.counts.threads << '\t'
          << i.counts.wavefronts << '\t' << i.counts.ideal << '\t' << i.counts.sectors << '\t' << i.counts.needed
          << '\n';
      }
      if (clear) i.counts = {};
    }
    if (clear) e->kernel->launches = 0;
  }
  out = s.str();
  return out.c_str();
}

extern "C" void* __libc_memalign(size_t, size_t);
extern "C" void __libc_free(void*);

// Torch's allocator asks for 64 bytes of alignment; what lies behind an allocation belongs to nobody for a page.
API int posix_memalign(void** out, size_t alignment, size_t bytes) noexcept {
  constexpr size_t kGap = 4096;
  void* p = __libc_memalign(alignment, bytes + (alignment >= 64 ? kGap : 0));
  if (p == nullptr) return 12;
  *out = p;
  if (alignment >= 64) {
    std::memset(p, 0xff, bytes);
    ptx::registry().add(p, bytes, "tensor");
  }
  return 0;
}
API void free(void* p) noexcept {
  if (p != nullptr && (reinterpret_cast<uint64_t>(p) & 63) == 0) ptx::registry().remove(p);
  __libc_free(p);
}
