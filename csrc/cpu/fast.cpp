// Loops whose rounding may differ from one instruction set to the next: fused multiply-adds are welcome here. Compiled
// once per instruction set, with DDFAST_FAST_KERNELS naming the table; as in kernels.cpp, no standard templates.
#include "fast.h"

#include "flow.h"
#include "nearest.h"

namespace ddfast::cpu {

extern const FastKernels DDFAST_FAST_KERNELS{filter_row, flow_row, pack_panels, nearest_rows};

}  // namespace ddfast::cpu
