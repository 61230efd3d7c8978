"""Forward and backward of a micro batch as a CUDA graph: the host launches one thing instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from hippos.errors import ConfigError
from hippos.ops.graph_capture import capture_into
from hippos.train.config import TrainConfig
from hippos.train.gradient_mean import GradientMean
from hippos.train.processes import Processes

__all__ = ["GraphedPasses", "capture_together", "uses_graph"]

# The first run compiles kernels and lets cuBLAS choose, the second sees that nothing is left to do.
_WARMUP_RUNS = 2


class GraphedPasses:
    """Forward and backward passes over inputs of one shape, captured once and replayed with other values.

    The first micro batch of a step writes the gradients, those after it add to them; each kind is a graph of its own,
    so that a step of one micro batch neither clears nor reads the gradients of the step before.

    Numbers are those of the passes run as they are: the same kernels in the same order, random numbers drawn from the
    same place of the same stream. Capturing draws none.

    Args:
        passes: Runs forward and backward, adding to the parameters' ``grad``, and gives the loss without its history.
            It may not wait for the device, nor decide by values.
        parameters: Those that get gradients.
        inputs: Tensors of the shapes, dtypes and device of all micro batches to come.
        accumulates: Whether steps have more than one micro batch.
        mean: Taken of the gradients of several processes, inside of the graph; they capture at the same time. Goes with
            steps of one micro batch.
        before_capture: Called when kernels are compiled and memory was enough, with gradients there.
    """

    def __init__(
        self,
        passes: Callable[[dict[str, Tensor]], Tensor],
        parameters: Iterable[nn.Parameter],
        inputs: Mapping[str, Tensor],
        *,
        accumulates: bool,
        mean: GradientMean | None = None,
        before_capture: Callable[[], object] = lambda: None,
    ) -> None:
        if accumulates and mean is not None:
            raise ValueError("gradients that add up over micro batches are exchanged behind the last one: mean=None")
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._passes = passes
        self._clear_gradients()
        device = next(iter(self._inputs.values())).device
        torch.cuda.empty_cache()  # what other streams have used lies apart, and a second set of activations may not fit
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.random.fork_rng([device]), torch.cuda.stream(stream):
            for _ in range(_WARMUP_RUNS):
                self._clear_gradients()
                passes(dict(self._inputs))
            before_capture()
            if mean is not None:
                mean.connect()
                self._passes = mean.around(passes)
            self._clear_gradients()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._first, self._first_loss = self._capture(stream)
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._adding, self._adding_loss = self._first, self._first_loss
        if accumulates:
            self._adding, self._adding_loss = self._capture(stream, pool=self._first.pool())
        self._accumulates = accumulates
        self._clear_gradients()

    def __call__(self, inputs: Mapping[str, Tensor], *, adds: bool) -> Tensor:
        """Run the passes over a micro batch; the parameters have their gradients after it.

        Args:
            inputs: As those of the capture, by the same names.
            adds: Whether to add to the gradients of the micro batch before.

        Returns:
            The loss, in memory that the next call overwrites.

        Raises:
            ValueError: If the inputs are of another shape, or ``adds`` although nothing accumulates.
        """
        if adds and not self._accumulates:
            raise ValueError("adds=True needs passes that were captured with accumulates=True")
        for name, kept in self._inputs.items():
            if inputs[name].shape != kept.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(kept.shape)}, as captured, got {tuple(inputs[name].shape)}"
                )
            kept.copy_(inputs[name], non_blocking=True)
        (self._adding if adds else self._first).replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._adding_loss if adds else self._first_loss

    def _capture(self, stream: torch.cuda.Stream, pool: object = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are watched: one that pins memory for batches to come does no harm.
        with capture_into(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            loss = self._passes(dict(self._inputs))
        return graph, loss

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def capture_together(
    passes: Callable[[dict[str, Tensor]], Tensor],
    parameters: Iterable[nn.Parameter],
    inputs: Mapping[str, Tensor],
    processes: Processes,
    *,
    accumulates: bool,
    mean: GradientMean | None,
) -> GraphedPasses | None:
    """Capture passes in all processes, or in none if one has too little memory; called by all.

    Args:
        passes: As `GraphedPasses` takes it, and so are those after it.
        parameters: Those that get gradients.
        inputs: Of a micro batch.
        processes: Those of the run.
        accumulates: Whether steps have more than one micro batch.
        mean: Taken inside of the graph; None for gradients that stay each process's own.

    Returns:
        The passes, or None.
    """
    graph, has_met = None, False

    def meet() -> None:
        nonlocal has_met
        has_met = True
        # Exchanges that only some begin would never end.
        if not all(processes.gather(True)):
            raise torch.OutOfMemoryError("another process has too little memory")

    try:
        graph = GraphedPasses(passes, parameters, inputs, accumulates=accumulates, mean=mean, before_capture=meet)
    except torch.OutOfMemoryError:
        if not has_met:
            processes.gather(False)
    return graph if all(processes.gather(graph is not None)) else None


def uses_graph(config: TrainConfig, device: torch.device, processes: Processes) -> bool:
    """Whether a run replays its passes from a CUDA graph.

    Raises:
        ConfigError: If the configuration asks for it and it cannot be.
    """
    if config.run.cuda_graph is False:
        return False
    why = config.why_no_graph()
    if device.type != "cuda":
        why = "this device: it needs a CUDA device"
    elif not (processes.is_alone or (config.run.parallel == "ddp" and processes.share_a_machine)):
        why = "several processes, unless they run DDP on one machine"
    if why is not None and config.run.cuda_graph:
        raise ConfigError(f"run.cuda_graph does not go with {why}")
    return why is None
