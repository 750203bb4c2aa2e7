// The inner loops that find a machine's limits, one set an ISA (kernels/machine.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace lacuna::cpu {

// A loop of independent multiply-accumulates that never leave the registers.
struct PeakLoop {
  float (*run)(int64_t rounds) = nullptr;  // null: this ISA has no such instruction
  int64_t ops_per_round = 0;               // multiplies and adds counted one each
};

struct MachineBodies {
  // Loads every byte once; bytes is a multiple of 4096. The result keeps the loads alive.
  float (*read)(const void* data, size_t bytes) = nullptr;
  PeakLoop f32, bf16, int8;
};

const MachineBodies& machine_bodies();  // of the level in use
const MachineBodies& machine_portable();
#if defined(__x86_64__)
const MachineBodies& machine_avx2();
const MachineBodies& machine_avx512();
const MachineBodies& machine_avx512_bf16();
#endif

}  // namespace lacuna::cpu
