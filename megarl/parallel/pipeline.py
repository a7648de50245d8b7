"""Microbatches through Megatron-Core's pipeline schedules, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
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


class _Communicator(P2PCommunicator):
    """Shapes travel like the tensors that they announce.

    mcore batches them, and the two messages of a pair of interleaved stages that are each other's neighbours on both
    sides then meet the wrong receivers.
    """

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        device = torch.cuda.current_device()

        def shape(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else torch.tensor(tensor.shape, dtype=torch.int64, device=device)

        def room(wanted: bool) -> Tensor | None:
            return torch.empty(3, dtype=torch.int64, device=device) if wanted else None

        received = room(recv_prev), room(recv_next)
        requests = _p2p_ops(
            tensor_send_prev=shape(tensor_send_prev),
            tensor_recv_prev=received[0],
            tensor_send_next=shape(tensor_send_next),
            tensor_recv_next=received[1],
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        previous, following = ([0, 0, 0] if tensor is None else tensor.tolist() for tensor in received)
        return previous, following


def _groups() -> ProcessGroupCollection:
    """What the schedule collects itself when it is not handed a communicator."""
    collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "pp", "dp_cp"])
    collection.embd = parallel_state.get_embedding_group(check_initialized=False)
    collection.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    return collection
