// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace ddfast::cpu {

// Floats that start a cache line. A thread keeps its own from call to call, since fresh memory costs a page fault every
// 4 KiB; what is in them is of no use.
class Floats {
   public:
    float* reserve(int64_t count) {
        if (count > count_) {
            memory_.reset(new (std::align_val_t{64}) float[count]);
            count_ = count;
        }
        if (poisoned()) std::memset(memory_.get(), 0xff, sizeof(float) * count);
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
    };
    std::unique_ptr<float[], Free> memory_;
    int64_t count_ = 0;
};

}  // namespace ddfast::cpu
