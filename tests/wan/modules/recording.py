"""What holds for a kernel on a GPU wherever it is called from."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def check_compiled_and_recorded(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> None:
    """Inside compiled code and in a CUDA graph the numbers are those of a plain call, of what lies in memory then."""

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v) + 1

    expected = layer(*tensors)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*tensors), expected, atol=1e-2, rtol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = layer(*tensors)
    recorded.fill_(float("nan"))
    for factor in (1, 0.5):
        tensors[2].mul_(factor)
        graph.replay()
        torch.testing.assert_close(recorded, layer(*tensors), atol=1e-2, rtol=1e-2)
