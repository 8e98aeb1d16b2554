// The collective library "hccl": gloo over the same memory, refusing what HCCL refuses.

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "_device.h"

namespace simulated_npu {
namespace {

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

// HCCL moves dense memory of these types only.
at::Tensor lend_checked(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().is_privateuseone(), "No backend type associated with device type ", tensor.device().type());
  TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous");
  switch (tensor.scalar_type()) {
    case at::kByte: case at::kChar: case at::kShort: case at::kInt: case at::kLong: case at::kBool:
    case at::kHalf: case at::kBFloat16: case at::kFloat: case at::kDouble:
      return lend(tensor);
    default:
      TORCH_CHECK(false, "Unsupported data type for HCCL process group: ", tensor.scalar_type());
  }
}

Tensors lend_checked(const Tensors& tensors) {
  Tensors lent;
  for (const auto& tensor : tensors) lent.push_back(lend_checked(tensor));
  return lent;
}

std::vector<Tensors> lend_checked(const std::vector<Tensors>& lists) {
  std::vector<Tensors> lent;
  for (const auto& tensors : lists) lent.push_back(lend_checked(tensors));
  return lent;
}

// libtorch_npu.so has "Cannot use ReduceOp." and " with HCCL" beside the names of these.
void check_reduction(const c10d::ReduceOp& operation) {
  using Op = c10d::ReduceOp;
  const char* name = operation == Op::AVG ? "AVG" : operation == Op::BAND ? "BAND" : operation == Op::BOR ? "BOR"
      : operation == Op::BXOR ? "BXOR" : operation == Op::PREMUL_SUM ? "PREMUL_SUM" : nullptr;
  TORCH_CHECK(name == nullptr, "Cannot use ReduceOp.", name, " with HCCL");
}

class Hccl final : public c10d::Backend {
 public:
  Hccl(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : c10d::Backend(rank, size), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "hccl"; }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto lent = lend_checked(tensors);
    return gloo_->broadcast(lent, options);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto lent = lend_checked(tensors);
    check_reduction(options.reduceOp);
    return gloo_->allreduce(lent, options);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto lent = lend_checked(tensors);
    check_reduction(options.reduceOp);
    WorkPtr last;
    for (auto& tensor : lent) {
      Tensors one{tensor};
      last = gloo_->allreduce(one, options);
      last->wait();
    }
    return last;

  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto lent = lend_checked(tensors);
    check_reduction(options.reduceOp);
    return gloo_->reduce(lent, options);
  }
  WorkPtr allgather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = lend_checked(outputs);
    auto from = lend_checked(inputs);
    return gloo_->allgather(to, from, options);
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = lend_checked(output), from = lend_checked(input);
    return gloo_->_allgather_base(to, from, options);
  }
  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = lend_checked(outputs), from = lend_checked(inputs);
    return gloo_->allgather_into_tensor_coalesced(to, from, options);
  }
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto to = lend_checked(outputs);
    auto from = lend_checked(inputs);
    return gloo_->gather(to, from, options);
  }
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    auto to = lend_checked(outputs);
    auto from = lend_checked(inputs);
    return gloo_->scatter(to, from, options);
  }
  WorkPtr reduce_scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = lend_checked(outputs);
    auto from = lend_checked(inputs);
    check_reduction(options.reduceOp);
    return gloo_->reduce_scatter(to, from, options);
  }
  WorkPtr _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto to = lend_checked(output), from = lend_checked(input);
    check_reduction(options.reduceOp);
    return gloo_->_reduce_scatter_base(to, from, options);
  }
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = lend_checked(outputs), from = lend_checked(inputs);
    check_reduction(options.reduceOp);
    return gloo_->reduce_scatter_tensor_coalesced(to, from, options);
  }
  WorkPtr alltoall_base(
      at::Tensor& output, at::Tensor& input, std::vector<int64_t>& receive, std::vector<int64_t>& send,
      const c10d::AllToAllOptions& options) override {
    auto to = lend_checked(output), from = lend_checked(input);
    return gloo_->alltoall_base(to, from, receive, send, options);
  }
  WorkPtr send(Tensors& tensors, int rank, int tag) override {
    auto lent = lend_checked(tensors);
    return gloo_->send(lent, rank, tag);
  }
  WorkPtr recv(Tensors& tensors, int rank, int tag) override {
    auto lent = lend_checked(tensors);
    return gloo_->recv(lent, rank, tag);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    auto plain = options;
    plain.device_ids.clear();
    plain.device.reset();
    return gloo_->barrier(plain);
  }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace

void bind_hccl(py::module& module) {
  module.def(
      "hccl",
      [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) -> c10::intrusive_ptr<c10d::Backend> {
        return c10::make_intrusive<Hccl>(std::move(gloo), rank, size);
      });
}

}  // namespace simulated_npu
