// The sparse GEMM for Hopper with what follows it, as kernels of their own: those without keep their registers.

#include "rtlynx/spmm_sm90.cuh"

RTLYNX_SPMM_EPILOGUE_TYPES(256, 192, 2, 5)
RTLYNX_SPMM_EPILOGUE_TYPES(192, 192, 3, 6)
RTLYNX_SPMM_EPILOGUE_TYPES(192, 160, 3, 6)
RTLYNX_SPMM_EPILOGUE_TYPES(128, 192, 2, 7)
RTLYNX_SPMM_EPILOGUE_TYPES(128, 128, 2, 8)
