"""Microbatches through Megatron-Core's pipeline schedules, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor, nn

ForwardStep = Callable[[Iterator, nn.Module], tuple[Tensor, Callable]]


def forward_backward(
    forward_step: ForwardStep,
    chunks: Sequence[nn.Module],
    microbatches: Sequence[Any],
    *,
    train: bool,
    force_all_reduce: bool = False,
) -> list[Any]:
    """Run ``microbatches`` through ``chunks``, this rank's pieces of the model; every rank of the world calls it.

    ``forward_step(iterator, chunk)`` takes the next microbatch and returns the chunk's output, and a function from that
    to (loss, number of actions, result) which is called behind the last layer. Returns the results, nothing elsewhere.
    ``train``: backward too, gradients reduced over data- and context-parallel ranks (``force_all_reduce``: whole on
    every rank) and divided by the number of actions. An interleaved pipeline wants a multiple of its size of
    microbatches.
    """
    options = {}
    if len(chunks) > 1:
        communicator = _Communicator(parallel_state.get_pipeline_model_parallel_group(), get_model_config(chunks[0]))
        options = {"p2p_communicator": communicator, "pg_collection": _groups()}
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=1,  # not read: microbatches differ in length, and stages tell each other
        micro_batch_size=1,
        forward_only=not train,
        force_all_reduce=force_all_reduce,
        **options,
    )


class _Message:
    """A tensor on its way with its shape before it."""

    def __init__(self, *works: dist.Work) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class _Communicator(P2PCommunicator):
    """Messages between interleaved stages, each with its shape before it.

    mcore exchanges all shapes of a call, waits, and then exchanges tensors. Two stages that are each other's neighbours
    on both sides then take one shape for the other, and a message that the other side expects only in its next call
    stops both. Here everything is sent before anything is waited for; the two directions between a pair of ranks have
    a group each, so that neither stands in the other's queue.
    """

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, dict[str, _Message] | None]:
        messages: dict[str, _Message] = {}
        received: dict[str, Tensor] = {}
        here, device = dist.get_rank(), torch.cuda.current_device()
        for name, tensor, rank in (
            ("send_next", tensor_send_next, self.next_rank),
            ("send_prev", tensor_send_prev, self.prev_rank),
        ):
            if tensor is not None:
                group = self._group(here, rank)
                shape = torch.tensor(tensor.shape, dtype=torch.int64, device=device)
                messages[name] = _Message(dist.isend(shape, rank, group), dist.isend(tensor, rank, group))
        for name, wanted, rank in (("recv_prev", recv_prev, self.prev_rank), ("recv_next", recv_next, self.next_rank)):
            if wanted:
                group = self._group(rank, here)
                shape = torch.empty(3, dtype=torch.int64, device=device)
                dist.irecv(shape, rank, group).wait()
                kind = {"dtype": self.config.pipeline_dtype, "device": device, "requires_grad": True}
                received[name] = torch.empty(shape.tolist(), **kind)
                messages[name] = _Message(dist.irecv(received[name], rank, group))
        if wait_on_reqs:
            for message in messages.values():
                message.wait()
        return received.get("recv_prev"), received.get("recv_next"), None if wait_on_reqs else messages

    def _group(self, source: int, destination: int) -> dist.ProcessGroup:
        return self.pp_group if source < destination else dist.group.WORLD


def _groups() -> ProcessGroupCollection:
    """What the schedule collects itself when it is not handed a communicator."""
    collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "pp", "dp_cp"])
    collection.embd = parallel_state.get_embedding_group(check_initialized=False)
    collection.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    return collection
