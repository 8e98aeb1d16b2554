// A device called "npu" whose memory is the host's: tensors of another device type, computed by torch's CPU kernels.
//
// Every operator that torch does not express in others arrives at one boxed fallback. It lends the CPU kernel tensors
// that share the memory of the npu tensors (nothing is copied), and hands back what comes out as npu tensors again.
// What a real device refuses is refused here: operands on different devices, generators of another device.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#include "_device.h"

namespace simulated_npu {
namespace {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// ---- memory

std::atomic<int64_t> allocated{0}, peak{0}, host_waits{0};

void count_bytes(int64_t bytes) {
  const int64_t now = allocated += bytes;
  int64_t highest = peak.load();
  while (now > highest && !peak.compare_exchange_weak(highest, now)) {
  }
}

thread_local c10::DeviceIndex current_device = 0;
c10::DeviceIndex device_count = 1;

// Bytes of the device, either malloc's or those of a CPU tensor that a kernel made.
struct Block {
  size_t bytes;
  void* own;
  c10::DataPtr adopted;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  count_bytes(-static_cast<int64_t>(block->bytes));
  if (block->own != nullptr) c10::free_cpu(block->own);
  delete block;
}

struct NpuAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : c10::alloc_cpu(bytes);
    count_bytes(static_cast<int64_t>(bytes));
    return {data, new Block{bytes, data, {}}, &free_block, c10::Device(kNpu, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

NpuAllocator npu_allocator;

c10::DataPtr adopt(c10::DataPtr&& of_cpu, size_t bytes) {
  void* data = of_cpu.get();
  count_bytes(static_cast<int64_t>(bytes));
  return {data, new Block{bytes, nullptr, std::move(of_cpu)}, &free_block, c10::Device(kNpu, current_device)};
}

// Page-locked host memory: ordinary memory that remembers its addresses.
std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;

void free_pinned(void* data) {
  std::lock_guard<std::mutex> guard(pinned_mutex);
  pinned.erase(static_cast<const char*>(data));
  c10::free_cpu(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned[static_cast<const char*>(data)] = std::max<size_t>(bytes, 1);
    return {data, data, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

PinnedAllocator pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  --after;
  return static_cast<const char*>(data) < after->first + after->second;
}

// ---- random numbers: a CPU generator of the device's own

struct NpuGenerator final : c10::GeneratorImpl {
  explicit NpuGenerator(c10::DeviceIndex index)
      : c10::GeneratorImpl(c10::Device(kNpu, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "the simulated npu generator has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "the simulated npu generator has no offset"); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  NpuGenerator* clone_impl() const override {
    auto* copy = new NpuGenerator(device().index());
    copy->inner = inner.clone();
    return copy;
  }
  at::Generator inner;
};

const at::Generator& default_generator(c10::DeviceIndex index) {
  static std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (int device = 0; device < 64; ++device) made.push_back(at::make_generator<NpuGenerator>(device));
    return made;
  }();
  return generators.at(index < 0 ? current_device : index);
}

at::Generator inner_generator(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kNpu,
      "Expected a 'npu' device type for generator but found '", generator.device().type(), "'");
  return generator.get<NpuGenerator>()->inner;
}

// ---- hooks and guard

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_device = index; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return std::exchange(current_device, index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<NpuGenerator>(index < 0 ? current_device : index);
  }
  at::Device getDeviceFromPtr(void*) const override { return c10::Device(kNpu, current_device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    auto fresh = npu_allocator.allocate(bytes);
    if (const size_t kept = std::min(bytes, impl->nbytes())) std::memcpy(fresh.get(), impl->data(), kept);
    impl->set_data_ptr_noswap(std::move(fresh));
    impl->set_nbytes(bytes);
  }
};

thread_local std::unordered_map<int, c10::StreamId> current_streams;
std::atomic<c10::StreamId> streams_made{0};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Work is done when it is queued, so streams have identities only, and events the time at which they were recorded.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kNpu, std::exchange(current_device, device.index())};
  }
  c10::Device getDevice() const override { return {kNpu, current_device}; }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  static c10::Device known(c10::Device device) {
    return {kNpu, device.index() < 0 ? current_device : device.index()};
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, known(device), current_streams[known(device).index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::UNSAFE, known(device), 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, known(device), ++streams_made);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto previous = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return previous;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new double;
    *static_cast<double*>(*event) = seconds();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    TORCH_CHECK(first != nullptr && second != nullptr, "Both events must be recorded before calculating elapsed time.");
    return 1e3 * (*static_cast<double*>(second) - *static_cast<double*>(first));
  }
};

// ---- lending memory to the CPU and taking it back

void keep_storage(void* context) { delete static_cast<c10::Storage*>(context); }

c10::Storage lend_storage(const c10::Storage& storage) {
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), &keep_storage, c10::Device(c10::kCPU));
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

}  // namespace

at::Tensor lend(const at::Tensor& tensor) {
  return tensor_over(lend_storage(tensor.storage()), tensor, c10::DispatchKey::CPU);
}

at::Tensor take(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.layout() == at::kStrided, "only strided CPU tensors can be taken");
  const auto& from = tensor.storage();
  c10::DataPtr held(from.mutable_data(), new c10::Storage(from), &keep_storage, c10::Device(c10::kCPU));
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), from.nbytes(), adopt(std::move(held), from.nbytes()), &npu_allocator, true);
  return tensor_over(storage, tensor, c10::DispatchKey::PrivateUse1);
}

namespace {

// One call of a CPU kernel: which npu tensor each lent CPU tensor stands for.
struct Call {
  const c10::FunctionSchema& schema;
  std::optional<c10::Device> device;
  std::vector<std::pair<at::Tensor, at::Tensor>> written;                        // npu, cpu
  std::unordered_map<c10::TensorImpl*, at::Tensor> of_tensor;                     // cpu -> npu
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, c10::Storage>> lent;  // npu -> npu, cpu
  std::vector<at::Tensor> on_host;

  at::Tensor lend_tensor(const at::Tensor& tensor, bool write) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kNpu) {
      on_host.push_back(tensor);
      return tensor;
    }
    if (device) {
      TORCH_CHECK(*device == tensor.device(), schema.name(), ": tensors on ", *device, " and ", tensor.device());
    }
    device = tensor.device();
    auto& pair = lent[tensor.storage().unsafeGetStorageImpl()];
    if (!pair.second) pair = {tensor.storage(), lend_storage(tensor.storage())};
    auto cpu = tensor_over(pair.second, tensor, c10::DispatchKey::CPU);
    of_tensor.emplace(cpu.unsafeGetTensorImpl(), tensor);
    if (write) written.emplace_back(tensor, cpu);
    return cpu;
  }

  void lend_argument(c10::IValue& value, const c10::Argument& argument) {
    const bool write = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      value = lend_tensor(value.toTensor(), write);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(lend_tensor(tensor, write));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::make_optional(lend_tensor(*tensor, write)) : std::nullopt);
      }
      value = std::move(list);
    } else if (value.isDevice() && value.toDevice().type() == kNpu) {
      device = value.toDevice();
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      value = inner_generator(value.toGenerator());
    } else if (value.isNone() && argument.name() == "generator") {
      value = inner_generator(default_generator(-1));
    }
  }

  void check_hosts() const {
    for (const at::Tensor& tensor : on_host) {
      TORCH_CHECK(
          tensor.dim() == 0, "Expected all tensors to be on the same device, but found at least two devices, ",
          device ? device->str() : "npu", " and ", tensor.device(), "! (", schema.name(), ")");
    }
  }

  at::Tensor take_result(const at::Tensor& cpu) const {
    if (!cpu.defined()) return cpu;
    const auto same = of_tensor.find(cpu.unsafeGetTensorImpl());
    if (same != of_tensor.end()) return same->second;
    for (const auto& [key, pair] : lent) {
      if (pair.second.unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl()) {
        return tensor_over(pair.first, cpu, c10::DispatchKey::PrivateUse1);
      }
    }
    return take(cpu);
  }

  void take_result(c10::IValue& value) const {
    if (value.isTensor()) {
      value = take_result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(take_result(tensor));
      value = std::move(list);
    }
  }

  // An operator may have resized what it wrote into.
  void write_back() const {
    for (const auto& [npu, cpu] : written) {
      auto* impl = npu.unsafeGetTensorImpl();
      if (npu.sizes() != cpu.sizes() || npu.strides() != cpu.strides()) {
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      }
      auto* storage = npu.storage().unsafeGetStorageImpl();
      const auto& grown = cpu.storage();
      if (storage->data() != grown.data() || storage->nbytes() != grown.nbytes()) {
        c10::DataPtr held(grown.mutable_data(), new c10::Storage(grown), &keep_storage, c10::Device(c10::kCPU));
        storage->set_data_ptr_noswap(adopt(std::move(held), grown.nbytes()));
        storage->set_nbytes(grown.nbytes());
      }
    }
  }
};

// What a process has asked a backend's own kernels for.
std::mutex used_mutex;
std::set<std::string> used;

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  {
    std::lock_guard<std::mutex> guard(used_mutex);
    used.insert(toString(op.operator_name()));
  }
  Call call{op.schema()};
  const auto& arguments = call.schema.arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t index = 0; index < arguments.size(); ++index) {
    call.lend_argument((*stack)[first + index], arguments[index]);
  }
  call.check_hosts();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.write_back();
  const size_t results = call.schema.returns().size();
  for (size_t index = stack->size() - results; index < stack->size(); ++index) call.take_result((*stack)[index]);
}

// ---- the operators that make tensors, or know of two devices

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto strides = C10_AS_INTARRAYREF_SLOW(stride);
  const auto meta = c10::scalarTypeToTypeMeta(dtype.value_or(c10::get_default_dtype_as_scalartype()));
  const auto previous = current_device;
  if (device && device->has_index()) current_device = device->index();
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, meta.itemsize());
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, npu_allocator.allocate(bytes), &npu_allocator, true);
  current_device = previous;
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), meta);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return made;
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat>) {
  std::vector<c10::SymInt> strides(size.size(), 1);
  for (int64_t axis = static_cast<int64_t>(size.size()) - 2; axis >= 0; --axis) {
    strides[axis] = strides[axis + 1] * std::max<c10::SymInt>(size[axis + 1], 1);
  }
  return empty_strided(size, strides, dtype, layout, device, pin);
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? offset->guard_int(__FILE__, __LINE__) : self.storage_offset());
  return made;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  const bool to_host = self.device().type() == kNpu && target.device().is_cpu();
  if (to_host && !(non_blocking && is_pinned(target.storage().data()))) ++host_waits;
  auto to = target.device().type() == kNpu ? lend(target) : target;
  to.copy_(self.device().type() == kNpu ? lend(self) : self);
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  const_cast<at::Tensor&>(target).resize_(self.sizes());
  return copy_from(self, target, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  ++host_waits;
  return lend(self).item();
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.guard_int(__FILE__, __LINE__));
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const c10::SymInt length(static_cast<int64_t>(source.nbytes() / self.dtype().itemsize()));
  const c10::SymInt step(1);
  return set_storage(self, std::move(source), 0, length, step);
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &as_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("record_stream", &record_stream);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(kNpu, &npu_allocator);
  // Operators without a derivative; later versions of torch let them through by themselves.
  if (!c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(c10::DispatchKey::AutogradPrivateUse1)) {
    static torch::Library through(
        torch::Library::IMPL, "_", c10::DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
    through.fallback(torch::CppFunction::makeFallthrough());
  }

  module.def("lend", py::overload_cast<const at::Tensor&>(&lend));
  module.def("take", &take);
  module.def("set_device_count", [](int count) { device_count = static_cast<c10::DeviceIndex>(count); });
  module.def("device_count", [] { return static_cast<int>(device_count); });
  module.def("current_device", [] { return static_cast<int>(current_device); });
  module.def("set_device", [](int index) {
    TORCH_CHECK(index >= 0 && index < device_count, "Invalid NPU device ordinal ", index);
    current_device = static_cast<c10::DeviceIndex>(index);
  });
  module.def("allocated", [] { return allocated.load(); });
  module.def("peak", [] { return peak.load(); });
  module.def("reset_peak", [] { peak = allocated.load(); });
  module.def("used_operators", [] {
    std::lock_guard<std::mutex> guard(used_mutex);
    return used;
  });
  module.def("host_waits", [] { return host_waits.load(); });
  module.def("manual_seed", [](int index, uint64_t seed) { 
    auto generator = default_generator(static_cast<c10::DeviceIndex>(index));
    std::lock_guard<std::mutex> guard(generator.mutex());
    generator.set_current_seed(seed);
  });
  module.def("initial_seed", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)).current_seed(); });
  module.def("rng_state", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)).get_state(); });
  module.def("set_rng_state", [](int index, const at::Tensor& state) {
    auto generator = default_generator(static_cast<c10::DeviceIndex>(index));
    std::lock_guard<std::mutex> guard(generator.mutex());
    generator.set_state(state);
  });
  module.def("current_stream", [](int index) { return current_streams[index]; });
  module.def("set_stream", [](c10::StreamId stream, int index) { current_streams[index] = stream; });
  bind_hccl(module);
}

}  // namespace simulated_npu
