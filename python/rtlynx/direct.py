"""Whether an op may be called past torch's dispatcher.

For an eager call without gradients the dispatcher finds, by way of Python's autograd, the one function that was registered for the device.
That takes longer than what the function then does. Whatever else could want to see the call (a trace, a dispatch mode, a tensor subclass,
functorch) says so in a tensor's or the thread's dispatch keys, or as a ``__torch_function__``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

# Tensors on a GPU have the first four, or fewer in inference mode; a thread has ADInplaceOrView and BackendSelect. Without gradients none
# of them but CUDA does anything for an op that neither writes to its arguments nor has a rule for autocast.
_PLAIN = ("CUDA", "ADInplaceOrView", "AutogradCUDA", "AutocastCUDA", "BackendSelect")


def _keys_but(names: tuple[str, ...]) -> int:
    """Every dispatch key but these, as the bits that `raw_repr` gives."""
    plain = 0
    for name in names:
        plain |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return ~plain


try:
    _dispatch_keys, _thread_keys = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
    _NOT_PLAIN = _keys_but(_PLAIN)
except AttributeError:  # names that torch does not promise: without them every call goes through the dispatcher
    _NOT_PLAIN = 0


def direct(*tensors: Tensor | None) -> bool:
    """Whether nothing but the CUDA implementation would see a call with these tensors."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _NOT_PLAIN or has_torch_function_variadic(*tensors):
        return False
    keys = _thread_keys().raw_repr()
    for tensor in tensors:
        if tensor is not None:
            keys |= _dispatch_keys(tensor).raw_repr()
    return not keys & _NOT_PLAIN
