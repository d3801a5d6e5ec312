// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "ieee.h"

namespace ddfast {

struct Words {
    uint32_t x0, x1, x2, x3;
};

DDFAST_HD Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
    DDFAST_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * counter.x0;
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.x2;
        counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.x1 ^ key0, static_cast<uint32_t>(product1),
                   static_cast<uint32_t>(product0 >> 32) ^ counter.x3 ^ key1, static_cast<uint32_t>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

}  // namespace ddfast
