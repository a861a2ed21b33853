// Selection from gathered channels, for Hopper: those of a layer with a permutation, of X as it is or of an activation of what is read.

#include "rtlynx/sparsify_sm90.cuh"

RTLYNX_SPARSIFY_TYPES(_gathered, kNone, true)
RTLYNX_SPARSIFY_TYPES(_gelu_tanh_gathered, kGeluTanh, true)
RTLYNX_SPARSIFY_TYPES(_silu_gate_gathered, kSiluGate, true)
