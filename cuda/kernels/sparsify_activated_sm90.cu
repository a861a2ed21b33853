// Selection from an activation of what is read, for Hopper: a feed-forward layer's inner tensor is then read once and never written.

#include "rtlynx/sparsify_sm90.cuh"

RTLYNX_SPARSIFY_TYPES(_gelu_tanh, kGeluTanh, false)
RTLYNX_SPARSIFY_TYPES(_silu_gate, kSiluGate, false)
