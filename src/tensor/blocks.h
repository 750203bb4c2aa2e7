#pragma once

#include <cstddef>

namespace lacuna {

// Where accounted memory comes from. Streaming reads are bound by address translation as much as by the
// memory: on a virtual machine with 4 KB pages one core read 16 GB/s, with 2 MB pages 30. So everything is
// asked of the system in huge pages: large blocks as they are, blocks of 1 … 128 KB (the KV cache's pages)
// from slabs of 2 MB, of which one is kept when it is empty, smaller ones from malloc. 64-byte aligned, uninitialised;
// null if the system refuses.
void* take_block(size_t bytes);
// `bytes` as it was asked for.
void give_block(void* block, size_t bytes) noexcept;

}  // namespace lacuna
