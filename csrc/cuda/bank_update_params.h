// Plain description of a bank update on a GPU.
#pragma once

#include <cstdint>

#include "../bank.h"

namespace crrcd::cuda {

struct BankUpdateParams {
  int64_t U = 0, D = 0, N = 0;
  void* bank = nullptr;
  Storage storage = Storage::kFloat32;
  int64_t row_stride = 0, column_stride = 1;  // elements
  const int64_t* index = nullptr;             // [U]
  const double* value = nullptr;              // [U, D]
  double momentum = 0;
  bool normalize = true;
};

void bank_update_launch(const BankUpdateParams& params, void* stream);

}  // namespace crrcd::cuda
