#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

namespace simulated_npu {

// A CPU tensor over the memory of an npu tensor.
at::Tensor lend(const at::Tensor& tensor);

// An npu tensor over the memory of a CPU tensor.
at::Tensor take(const at::Tensor& tensor);

void bind_hccl(py::module& module);

}  // namespace simulated_npu
