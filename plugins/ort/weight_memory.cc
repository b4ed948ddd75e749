// SPDX-License-Identifier: Apache-2.0
#include "weight_memory.h"

#if defined(__linux__)

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace clada::ort {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;
constexpr size_t kRegionBytes = size_t{32} << 20;  // many weights are smaller than a large page, and share them
constexpr size_t kPieceBytes = size_t{8} << 20;    // what a thread copies, and gives back, at a time
constexpr size_t kAlignment = 256;
constexpr size_t kMostThreads = 8;  // memory is the limit long before

uintptr_t Address(const void* data) { return reinterpret_cast<uintptr_t>(data); }
size_t RoundUp(size_t value, size_t step) { return (value + step - 1) / step * step; }

// Anonymous memory on large pages where the system has them. Weights are laid into it one after the other; the system gives a page
// when it is first written.
class Region {
 public:
  // Null where there is no room.
  static std::shared_ptr<Region> Make(size_t bytes) {
    const size_t size = RoundUp(bytes, kLargePage);
    void* base = mmap(nullptr, size + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    // The ends beyond a whole number of large pages are given back, so that nothing is counted that is never used.
    const uintptr_t first = RoundUp(Address(base), kLargePage), end = Address(base) + size + kLargePage;
    if (first != Address(base)) munmap(base, first - Address(base));
    if (end != first + size) munmap(reinterpret_cast<void*>(first + size), end - first - size);
    madvise(reinterpret_cast<void*>(first), size, MADV_HUGEPAGE);  // may fail: then pages are small
    return std::make_shared<Region>(reinterpret_cast<char*>(first), size);
  }
  Region(char* base, size_t size) : base_(base), size_(size) {}
  ~Region() { munmap(base_, size_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Null when what is left is too small.
  char* Take(size_t bytes) {
    if (size_ - used_ < bytes) return nullptr;
    char* piece = base_ + used_;
    used_ = std::min(size_, RoundUp(used_ + bytes, kAlignment));
    return piece;
  }

 private:
  char* base_;
  size_t size_, used_ = 0;
};

// Contents stay what they are, whatever else is on the page. Both may fail, and nothing hangs on it.
void AskForLargePages(const void* data, size_t bytes) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1
  const uintptr_t end = RoundUp(Address(data) + bytes, kLargePage);
  for (uintptr_t page = Address(data) / kLargePage * kLargePage; page < end; page += kLargePage) {
    madvise(reinterpret_cast<void*>(page), kLargePage, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(page), kLargePage, kCollapse);
  }
}

// Whether all of it lies in one mapping of a file.
bool IsMappedFile(const void* data, size_t bytes) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return false;
  bool found = false;
  char line[512];
  bool begins = true;  // a long path takes several reads, and only the first is the line's beginning
  while (!found && std::fgets(line, sizeof(line), maps)) {
    uint64_t first = 0, end = 0, inode = 0;
    const bool fields = begins && std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*s %*s %" SCNu64, &first, &end, &inode) == 3;
    begins = std::strchr(line, '\n') != nullptr;
    found = fields && inode != 0 && first <= Address(data) && Address(data) + bytes <= end;
  }
  std::fclose(maps);
  return found;
}

// Lets go of pages that are as the file has them: a later read finds them there again. A page that was written to would lose that,
// so those beside it stay, too.
void GiveBack(int pagemap, uintptr_t first, uintptr_t end) {
  constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kOfFile = uint64_t{1} << 61;
  constexpr size_t kPages = 512;  // looked at together
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  first = RoundUp(first, page);
  end = end / page * page;
  for (uint64_t entries[kPages]; pagemap >= 0 && first < end; first += kPages * page) {
    const size_t count = std::min(kPages, (end - first) / page), size = count * sizeof(uint64_t);
    const auto at = static_cast<off_t>(first / page * sizeof(uint64_t));
    if (pread(pagemap, entries, size, at) != static_cast<ssize_t>(size)) return;
    const bool clean = std::all_of(entries, entries + count, [](uint64_t entry) {
      return !(entry & (kPresent | kSwapped)) || (entry & kOfFile);
    });
    if (clean) madvise(reinterpret_cast<void*>(first), count * page, MADV_DONTNEED);
  }
}

// Piece by piece, so that the file's pages and the copy are never both in memory as a whole.
void CopyFromFile(const void* source, size_t bytes, char* target) {
  const char* from = static_cast<const char*>(source);
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t at; (at = next.fetch_add(kPieceBytes)) < bytes;) {
      const size_t size = std::min(kPieceBytes, bytes - at);
      std::memcpy(target + at, from + at, size);
      GiveBack(pagemap, Address(from + at), Address(from + at) + size);
    }
  };
  std::vector<std::thread> others;
  const size_t threads = std::min({RoundUp(bytes, kPieceBytes) / kPieceBytes, kMostThreads,
                                   static_cast<size_t>(std::max(1u, std::thread::hardware_concurrency()))});
  others.reserve(threads);
  try {
    for (size_t i = 1; i < threads; ++i) others.emplace_back(work);
  } catch (const std::exception&) {  // no more threads: those that there are do it
  }
  work();
  for (std::thread& other : others) other.join();
  if (pagemap >= 0) close(pagemap);
}

// The copies that nodes hold now. Nothing here keeps one alive.
class Copies {
 public:
  // Null where there is no memory.
  KeptWeight Of(const void* source, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::weak_ptr<const void>& known = copies_[{source, bytes}];
    // An address may have been given to another file since: what counts is what it holds.
    if (const KeptWeight copy = known.lock(); copy && std::memcmp(copy.get(), source, bytes) == 0) return copy;
    std::shared_ptr<Region> region = region_.lock();
    char* target = region ? region->Take(bytes) : nullptr;
    if (target == nullptr) {
      region = Region::Make(std::max(bytes, kRegionBytes));
      if (region == nullptr) return nullptr;
      if (bytes < kRegionBytes) region_ = region;
      target = region->Take(bytes);
    }
    CopyFromFile(source, bytes, target);
    const KeptWeight copy(region, target);
    known = copy;
    for (auto entry = copies_.begin(); entry != copies_.end();) entry = entry->second.expired() ? copies_.erase(entry) : ++entry;
    return copy;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, size_t>, std::weak_ptr<const void>> copies_;
  std::weak_ptr<Region> region_;  // that the next weight goes into
};

}  // namespace

KeptWeight KeepWeight(const void* data, size_t bytes, WeightMemory memory) {
  const KeptWeight in_place(KeptWeight(), data);
  if (bytes == 0) return in_place;
  if (!IsMappedFile(data, bytes)) {
    AskForLargePages(data, bytes);
    return in_place;
  }
  if (memory == WeightMemory::kInPlace) return in_place;
  static Copies copies;
  const KeptWeight copy = copies.Of(data, bytes);
  return copy ? copy : in_place;
}

}  // namespace clada::ort

#else

namespace clada::ort {

KeptWeight KeepWeight(const void* data, size_t, WeightMemory) { return KeptWeight(KeptWeight(), data); }

}  // namespace clada::ort

#endif  // __linux__
