// Zeroed memory straight from the operating system: huge pages where it grants them, and untouched
// pages cost nothing, so a key/value cache may be laid out for a context that is never filled.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
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

// A piece of memory that keeps the chunk it lies in alive.
struct Piece {
    std::shared_ptr<Memory> chunk;
    uint8_t* data = nullptr;
    size_t bytes = 0;
};

// Small pieces share chunks, so that they too lie in huge pages: a small model's weights are read
// in one go, and would otherwise miss the address cache at every page.
inline Piece allocate(size_t bytes) {
    constexpr size_t kChunk = size_t(32) << 20, kOwn = size_t(8) << 20, kAlign = 4096;
    if (bytes >= kOwn) {
        auto chunk = std::make_shared<Memory>(bytes);
        return {chunk, chunk->data(), bytes};
    }
    static std::mutex mutex;
    static std::weak_ptr<Memory> current;
    static size_t used = 0;
    std::lock_guard lock(mutex);
    std::shared_ptr<Memory> chunk = current.lock();
    if (!chunk || used + bytes > kChunk) {
        chunk = std::make_shared<Memory>(kChunk);
        current = chunk;
        used = 0;
    }
    Piece piece{chunk, chunk->data() + used, bytes};
    used += (bytes + kAlign - 1) / kAlign * kAlign;
    return piece;
}

}  // namespace pronk
