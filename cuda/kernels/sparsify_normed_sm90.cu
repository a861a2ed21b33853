// Selection from a norm of what is read, for Hopper: a block's normed and modulated hidden states are then never written.

#include "rtlynx/sparsify_sm90.cuh"

RTLYNX_SPARSIFY_TYPES(_norm, kNorm, false)
