// Memory that a file stands behind.
#ifndef INDUCTOR_VISION_FILE_PAGES_H
#define INDUCTOR_VISION_FILE_PAGES_H

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>
#include <cstdint>

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Gives the pages of constants of a program back that were read and are not needed soon. They are read from the file
// again if they are.
inline void release_file_pages(const void* begin, const void* end) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }
#else
  (void)begin, (void)end;
#endif
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_FILE_PAGES_H
