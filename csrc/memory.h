// Zeroed memory straight from the operating system: huge pages where it grants them, and untouched
// pages cost nothing, so a key/value cache may be laid out for a context that is never filled.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace pronk {

class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes) : bytes_(bytes) {
        if (!bytes) return;
        constexpr size_t kHuge = size_t(2) << 20;
        mapped_ = bytes + (bytes >= kHuge ? kHuge : 0);
        void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<uint8_t*>(p);
        data_ = base_;
        if (bytes >= kHuge) {
            data_ += (kHuge - reinterpret_cast<uintptr_t>(base_) % kHuge) % kHuge;
#ifdef MADV_HUGEPAGE
            madvise(data_, bytes, MADV_HUGEPAGE);
#endif
        }
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() {
        if (base_) munmap(base_, mapped_);
    }

    uint8_t* data() const { return data_; }
    size_t size() const { return bytes_; }

  private:
    uint8_t *base_ = nullptr, *data_ = nullptr;
    size_t bytes_ = 0, mapped_ = 0;
};

}  // namespace pronk
