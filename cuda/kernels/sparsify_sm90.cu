// Selection from X as it is, for Hopper.

#include "rtlynx/sparsify_sm90.cuh"

RTLYNX_SPARSIFY_TYPES(, kNone, false)
