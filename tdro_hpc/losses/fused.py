"""The functions of torch_core.py by the compiled library: the operators infonce_* of torch.ops.tdro_hpc.

They take float32, bfloat16 and float16, contiguous, and give float32. `obstacle` comes before the first call of them.
"""

from functools import cache

import torch
from torch import Tensor

from tdro_hpc.losses import cuda_core, registration
from tdro_hpc.losses.library import Library, load
from tdro_hpc.losses.torch_ops import Argument

DTYPES = torch.float32, torch.bfloat16, torch.float16  # of embeddings


def obstacle(dtype: torch.dtype, device_type: str) -> str:
    """Why the library cannot serve embeddings of a type on a kind of device, and what to do; "" = it can."""
    if dtype not in DTYPES:
        return f"the compiled library takes {', '.join(map(str, DTYPES))}, and the embeddings are {dtype}."
    if device_type not in ("cpu", "cuda"):
        return f"the compiled library serves cpu and cuda, and the embeddings are on {device_type}."
    library = _library()
    if library.path is None:
        return library.reason
    if not (library.cpu if device_type == "cpu" else library.cuda):
        return f"{library.path} was built without {device_type}. Type `make build` where a compiler for it is."
    return ""


@cache
def _library() -> Library:
    """The compiled library, loaded; its operators serve the GPU and are known to torch.compile."""
    library = load()
    if library.path is None:
        return library
    registration.register()
    if library.cuda and not torch._C._dispatch_has_kernel_for_dispatch_key("tdro_hpc::infonce_forward", "CUDA"):
        cuda_core.register()
    return library


def forward(*arguments: Argument) -> tuple[Tensor, Tensor, Tensor]:
    """positive_scores [rows], row_negatives [rows], column_negatives [columns] or [0]: see torch_core.forward."""
    return torch.ops.tdro_hpc.infonce_forward.default(*arguments)


def backward(*arguments: Argument) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents: see torch_core.backward."""
    return torch.ops.tdro_hpc.infonce_backward.default(*arguments)


def forward_backward(*arguments: Argument) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [rows] and the gradients of their weighted sum: see torch_core.forward_backward."""
    return torch.ops.tdro_hpc.infonce_forward_backward.default(*arguments)
