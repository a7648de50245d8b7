"""One SGLang engine in a Ray actor: token ids and encoded images in, token ids and log-probs out.

The driver imports this module to create the actor, so SGLang is imported only when the actor starts.

Log-probs are log_softmax(logits / temperature) over the true vocabulary without the processor's banned ids, whose
logits are -inf; at temperature 0 sampling is greedy and log-probs are those of temperature 1.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megarl.config import RunConfig
from megarl.data.processors import load_processor
from megarl.families import FAMILIES
from megarl.types import FinishReason, Media
from megarl.utils.errors import EngineRefused
from megarl.weight_sync.shared import share_bucket

_ADAPTER = "policy"  # what SGLang calls it
_MAX_DECODERS = 8  # threads that decode images
_POLL_S = 0.2  # between looks at the engine's processes
_IDLE_TIMEOUT_S = 60.0  # from the last response until the scheduler has put everything away


class EngineDied(RuntimeError):
    """A process of the engine is gone; nothing will come from it any more."""


@dataclass
class Progress:
    """What tells an engine that is busy from one that hangs."""

    steps: int  # forward passes of the scheduler, and prompts whose images were decoded; another number: it works
    paused: bool  # it stands still by order


@dataclass
class Batch:
    """Which deterministic batch a request belongs to: it starts when all ``total`` samples have arrived."""

    name: str
    index: int  # of the request's first sample
    total: int


@dataclass
class Request:
    """A prompt to be sampled ``num_samples`` times."""

    name: str  # for errors: the prompt's id
    tokens: np.ndarray  # [L] int32, image placeholders expanded
    media: Media
    num_samples: int
    temperature: float  # 0: greedy
    max_new_tokens: int
    seeds: list[int] | None = None  # one a sample, in a deterministic engine
    batch: Batch | None = None  # in a deterministic engine


@dataclass
class Response:
    """One sampled continuation."""

    tokens: np.ndarray  # [N] int32, the end-of-sequence token included
    logprobs: np.ndarray  # [N] float32
    finish_reason: FinishReason
    weight_versions: np.ndarray  # [N] int32, of the weights that each token was sampled from


def engine_environment(config: RunConfig, device: str) -> dict[str, str]:
    """Environment variables that must be set before the actor's process imports torch and SGLang.

    ``device``: cuda or cpu.
    """
    tensor_parallel_size = config.rollout.tensor_parallel_size
    environment = {
        "SGLANG_VLM_CACHE_SIZE_MB": "0",  # its cache of image embeddings outlives weight updates
        "PYTHONWARNINGS": "ignore::UserWarning",  # each of its processes prints a page while it imports
        "TQDM_DISABLE": "1",
        "SGLANG_MM_PRECOMPUTE_HASH": "1",  # of pixels, once a prompt: schedulers would do it for each sample
    }
    if "cuda_graph" in config.released:
        environment["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"  # its memory saver leaves them alone else
    if device == "cpu":
        # Threads of several processes spin against each other on few cores; CPU has no compiled kernels to gain from.
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        if tensor_parallel_size > 1:  # SGLang would give each rank a NUMA node of its own
            cores = [str(rank % (os.cpu_count() or 1)) for rank in range(tensor_parallel_size)]
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    return environment


def external_environment(name: str) -> dict[str, str]:
    """Environment variables that make SGLang import the architecture ``name`` from here, set before it is imported."""
    architecture, environment = FAMILIES[name].architectures[name], {}
    if architecture.engine_model:
        environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "megarl.rollout.external_models"
    if architecture.engine_processor:
        environment["SGLANG_EXTERNAL_MM_MODEL_ARCH"] = name
        environment["SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"] = "megarl.rollout.external_processors"
    return environment


def server_arguments(config: RunConfig, hf_dir: str, index: int, device: str) -> dict[str, Any]:
    """SGLang's ServerArgs of engine ``index`` on ``device``, cuda or cpu; ``rollout.engine`` has the last word."""
    dtype = config.rollout.dtype or config.model.params_dtype
    arguments: dict[str, Any] = {
        "model_path": hf_dir,
        "dtype": dtype,
        "enable_fp32_lm_head": dtype == "bfloat16",  # rounded logits alone move log-probs by a tenth
        "tp_size": config.rollout.tensor_parallel_size,
        "enable_multimodal": True,
        "enable_precise_embedding_interpolation": True,  # Qwen3-VL's learned positions, in CUDA graphs as elsewhere
        "random_seed": config.seed + index,
        "weight_version": "0",
        "log_level": "error",
    }
    if not any(Path(hf_dir).glob("*.safetensors")):
        arguments["load_format"] = "dummy"  # a resumed run's: the trainer sends the weights before the first rollout
    if config.weight_sync.lora == "adapter":  # the trainer names the layers, in rollout.engine
        rank = config.model.lora.rank
        arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras_per_batch": 2}  # one is none
    if config.trainer.placement == "colocated":
        # the trainer sends the policy's weights after every release, but never again the frozen ones beside adapters
        arguments |= {"enable_memory_saver": True, "enable_weights_cpu_backup": config.weight_sync.lora == "adapter"}
    deterministic = config.debug.deterministic
    if deterministic:
        arguments |= {"disable_radix_cache": True, "schedule_policy": "fcfs"}
    if device == "cpu":
        arguments |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "disable_cuda_graph": True,
            "mem_fraction_static": 0.1,
            "max_total_tokens": 65536,
            "max_running_requests": 256,
            "lora_backend": "torch_native",
            "sleep_on_idle": True,  # an idle scheduler takes a whole core else
        }
    elif deterministic:
        arguments["enable_deterministic_inference"] = True
    return arguments | config.rollout.engine


class EngineActor:
    """An SGLang engine; an async Ray actor whose methods may overlap."""

    def __init__(self, config: RunConfig, hf_dir: str, index: int, device: str = "cpu") -> None:
        self._processor = load_processor(hf_dir, config)
        os.environ |= external_environment(self._processor.config.architectures[0])
        # Here, not above: the driver that creates this actor must stay free of SGLang.
        from megarl.rollout import sglang_process

        self._sglang = sglang_process
        self._name = f"engine {index}"
        self._tensor_parallel_size = config.rollout.tensor_parallel_size
        self._deterministic = config.debug.deterministic
        self._top_p, self._top_k = config.rollout.top_p, config.rollout.top_k
        self._bias = {str(token): -math.inf for token in self._processor.banned_token_ids}
        dtype = getattr(torch, config.rollout.dtype or config.model.params_dtype)
        self._pixels_dtype = dtype  # the tower's first layer rounds them to it anyway: half of the bytes on their way
        self._decoders = ThreadPoolExecutor(min(_MAX_DECODERS, len(os.sched_getaffinity(0))))
        # SGLang names its sockets after temporary files and leaves both behind
        self._sockets = tempfile.TemporaryDirectory(prefix="megarl-engine-", ignore_cleanup_errors=True)
        tempfile.tempdir = self._sockets.name
        engine_type = sglang_process.DeterministicEngine if self._deterministic else sglang_process.RolloutEngine
        self._engine = engine_type(**server_arguments(config, hf_dir, index, device))
        self._manager = self._engine.tokenizer_manager
        # SGLang's watchdog would end this process before an error could say why; ``_watch`` takes its place.
        self._manager._subprocess_watchdog.stop()
        self._children = [psutil.Process(pid) for pid in self._engine.get_all_child_pids()]
        self._death: asyncio.Future[str] | None = None
        self._refused = ""  # see ``ping``
        self._num_decoded, self._paused = 0, False
        self._adapter: str | None = None  # the one that all requests use
        self._payloads: dict[int, bytes] = {}  # of the bucket that arrives, by tensor-parallel rank

    async def ping(self) -> dict[str, Any]:
        """Return once the engine's scheduler answers.

        {"pid": of the actor, "processes": pids of SGLang's children, "host": its name, "memory_gb": by kind of memory,
        "refused": weights that it did not take since the last call, and why}
        """
        memory = (await self._state())["memory_usage"]
        refused, self._refused = self._refused, ""
        return {
            "refused": refused,
            "pid": os.getpid(),
            "processes": self._engine.get_all_child_pids(),
            "host": os.uname().nodename,
            "memory_gb": {
                "weights": memory["weight"],
                "kv_cache": memory["kvcache"],
                "cuda_graph": sum(memory["graph"].values()),
            },
        }

    async def progress(self) -> Progress:
        """How far the engine is; it answers between two forward passes, and at once while it is paused."""
        passes = 0 if self._paused else (await self._state())["forward_passes"]
        return Progress(passes + self._num_decoded, self._paused)

    async def _state(self) -> dict[str, Any]:
        return (await self._watched(self._manager.get_internal_state()))[0]

    async def generate(self, request: Request) -> list[Response]:
        """Sample ``request.num_samples`` continuations, in the order of their seeds where there are any."""
        shown = await self._shown(request.media)
        parameters = {
            "temperature": request.temperature,
            "top_p": self._top_p if request.temperature > 0 else 1.0,
            "top_k": self._top_k if request.temperature > 0 else -1,
            "max_new_tokens": request.max_new_tokens,
            "stop_token_ids": list(self._processor.eos_token_ids),
            "logit_bias": self._bias or None,
        }
        with self._sglang.shared_pixels.lend():
            if request.batch is None:
                outputs = await self._submit(request.tokens, shown, parameters | {"n": request.num_samples})
            else:
                batch = request.batch
                calls = []
                for offset, seed in enumerate(request.seeds or []):
                    rid = self._sglang.batch_rid(batch.name, batch.index + offset, batch.total)
                    calls.append(self._submit(request.tokens, shown, parameters | {"sampling_seed": seed}, rid=rid))
                outputs = [output for answer in await asyncio.gather(*calls) for output in answer]
        return [self._response(request, output) for output in outputs]

    async def score(self, tokens: np.ndarray, media: Media) -> np.ndarray:
        """Log-probs [L - 1] float32 of tokens[1:] given what precedes each, at temperature 1.

        The softmax runs over the whole true vocabulary, banned ids included: SGLang masks sampled tokens only. Where
        the target is a banned id (an image placeholder, ...) the value is 0: SGLang replaces placeholders by hashes.
        """
        shown = await self._shown(media)
        parameters = {"temperature": 1.0, "max_new_tokens": 0}
        with self._sglang.shared_pixels.lend():
            (output,) = await self._submit(tokens, shown, parameters, logprob_start_len=0)
        values = output["meta_info"]["input_token_logprobs"][1:]
        logprobs = np.array([value for value, _, _ in values], np.float32)
        if len(logprobs) != len(tokens) - 1:
            raise RuntimeError(f"{self._name} scored {len(logprobs) + 1} tokens of {len(tokens)}")
        return np.where(np.isin(tokens[1:], list(self._processor.banned_token_ids)), np.float32(0), logprobs)

    async def pause(self) -> None:
        """Stop generating until ``resume``: requests keep their tokens and lose what was computed for them."""
        message = self._sglang.PauseGenerationReqInput(mode="retract")
        self._paused = True
        await self._watched(self._manager.pause_generation(message))

    async def resume(self) -> None:
        """Generate on, by the weights of now."""
        await self._watched(self._manager.continue_generation(self._sglang.ContinueGenerationReqInput()))
        self._paused = False

    async def update_weights_from_shared(self, payloads: dict[int, bytes], weight_version: int) -> None:
        """Load a bucket of ``weight_sync.shared.share_bucket``: a payload for each tensor-parallel rank.

        They may come from several callers, each with those of the engine's ranks on its own GPU; all of them return
        when the bucket is loaded. A caller sends its next bucket after that.
        """
        wrong = [rank for rank in payloads if not 0 <= rank < self._tensor_parallel_size]
        if wrong or not payloads:
            raise ValueError(f"{self._name} has {self._tensor_parallel_size} ranks and got payloads for {wrong}")
        if any(rank in self._payloads for rank in payloads):  # of a bucket that another rank never sent
            self._payloads = {}
            self._loading.set_exception(RuntimeError(f"{self._name}: a bucket of weights was given up"))
        if not self._payloads:
            self._loading = asyncio.get_running_loop().create_future()
        loading = self._loading
        self._payloads |= payloads
        if len(self._payloads) == self._tensor_parallel_size:
            ready = [self._payloads[rank] for rank in range(self._tensor_parallel_size)]
            self._payloads = {}
            try:
                await self._load_shared(ready, weight_version)
                loading.set_result(None)
            except BaseException as error:
                loading.set_exception(error)
        await asyncio.shield(loading)

    async def _load_shared(self, payloads: list[bytes], weight_version: int) -> None:
        message = self._sglang.UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=payloads,
            load_format="flattened_bucket",
            flush_cache=False,
            weight_version=str(weight_version),
        )
        self._check_taken(
            "update_weights_from_shared", await self._watched(self._manager.update_weights_from_tensor(message))
        )

    async def forget(self) -> None:
        """Drop what was computed with weights of before: the caches of prompts."""
        await self._flush()

    async def release(self, kinds: list[str]) -> None:
        """Give back ``kinds`` of the engine's memory (``rollout.release``), once nothing is computed any more.

        Weights are lost: they must be sent again after ``resume``, except frozen ones beside adapters, which SGLang
        keeps in host memory.
        """
        await self._flush()  # which waits until the scheduler has nothing left to do; SGLang's release would die of it
        await self._watched(
            self._manager.release_memory_occupation(self._sglang.ReleaseMemoryOccupationReqInput(tags=list(kinds)))
        )

    async def reclaim(self, kinds: list[str]) -> None:
        """Take ``kinds`` of memory back that ``release`` gave."""
        await self._watched(
            self._manager.resume_memory_occupation(self._sglang.ResumeMemoryOccupationReqInput(tags=list(kinds)))
        )

    async def _flush(self) -> None:
        deadline = time.monotonic() + _IDLE_TIMEOUT_S
        while not (await self._watched(self._manager.flush_cache())).success:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._name} still computes {_IDLE_TIMEOUT_S:g} s after its last response")
            await asyncio.sleep(_POLL_S / 10)

    async def init_broadcast(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, backend: str, group_name: str
    ) -> None:
        """Join ``weight_sync.broadcast.create_group`` with ranks from ``rank_offset``, one a tensor-parallel rank."""
        message = self._sglang.InitWeightsUpdateGroupReqInput(
            master_address=master_address,
            master_port=master_port,
            rank_offset=rank_offset,
            world_size=world_size,
            backend=backend,
            group_name=group_name,
        )
        self._check("init_broadcast", await self._watched(self._manager.init_weights_update_group(message)))

    async def destroy_broadcast(self, group_name: str) -> None:
        """Leave a group that ``init_broadcast`` joined."""
        message = self._sglang.DestroyWeightsUpdateGroupReqInput(group_name=group_name)
        self._check("destroy_broadcast", await self._watched(self._manager.destroy_weights_update_group(message)))

    async def receive_broadcast(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        *,
        group_name: str,
        weight_version: int,
    ) -> None:
        """Receive and load the bucket that rank 0 sends with ``weight_sync.broadcast.broadcast_bucket``."""
        message = self._sglang.UpdateWeightsFromDistributedReqInput(
            names=names,
            dtypes=dtypes,
            shapes=shapes,
            group_name=group_name,
            load_format="flattened_bucket",
            flush_cache=False,
            weight_version=str(weight_version),
        )
        answer = await self._watched(self._manager.update_weights_from_distributed(message))
        self._check_taken("receive_broadcast", answer)

    async def update_weights_from_disk(self, path: str, weight_version: int) -> None:
        """Load every weight of a Hugging Face directory."""
        message = self._sglang.UpdateWeightFromDiskReqInput(
            model_path=path, load_format="auto", weight_version=str(weight_version)
        )
        answer = await self._watched(self._manager.update_weights_from_disk(message))
        self._check_taken("update_weights_from_disk", answer)

    async def load_adapter(
        self, tensors: list[tuple[str, torch.Tensor]], description: dict[str, Any], weight_version: int
    ) -> None:
        """Use the adapters ``tensors``, named as in PEFT, instead of the last; every request from now on does.

        ``description``: the content of their ``adapter_config.json``.
        """
        if self._adapter is not None:
            unload = self._sglang.UnloadLoRAAdapterReqInput(lora_name=self._adapter)
            self._check_lora("unload", await self._watched(self._manager.unload_lora_adapter(unload)))
        self._adapter = None
        message = self._sglang.LoadLoRAAdapterFromTensorsReqInput(
            lora_name=_ADAPTER,
            config_dict=description,
            serialized_named_tensors=share_bucket(tensors, self._tensor_parallel_size),
            load_format="flattened_bucket",
        )
        self._check_lora("load", await self._watched(self._manager.load_lora_adapter_from_tensors(message)))
        self._adapter = _ADAPTER
        version = self._sglang.UpdateWeightVersionReqInput(new_version=str(weight_version), abort_all_requests=False)
        await self._watched(self._manager.update_weight_version(version))
        await self.forget()  # what the last adapters made is of no more use

    async def checksums(self, *, adapters: bool = False) -> dict[str, str]:
        """``utils.checksum.tensor_checksum`` of every live weight, whole and under its checkpoint name.

        A tied ``lm_head.weight`` is not listed. ``adapters``: of what requests are computed with beside the weights.
        """
        message = self._sglang.CheckWeightsReqInput(action="adapter_checksum" if adapters else "checksum")
        success, text, ranks, _ = await self._watched(self._manager.check_weights(message))
        self._check("checksums", (success, text))
        return ranks[0]["checksums"]

    async def shutdown(self) -> None:
        """Stop SGLang's processes; the actor itself is the caller's to end."""
        self._engine.shutdown()
        self._sockets.cleanup()

    async def _shown(self, media: Media) -> dict[str, Any]:
        """What SGLang takes for the images and videos of a prompt."""
        if not media.images:
            return {}

        def shown() -> dict[str, Any]:
            return {
                "image_data": self._processor.engine_inputs(media, self._pixels_dtype),
                "video_data": self._processor.engine_videos(media, self._pixels_dtype),
            }

        made = await asyncio.get_running_loop().run_in_executor(self._decoders, shown)
        self._num_decoded += 1
        return made

    async def _submit(
        self,
        tokens: np.ndarray,
        shown: dict[str, Any],
        parameters: dict[str, Any],
        *,
        logprob_start_len: int = -1,
        rid: str | None = None,
    ) -> list[dict[str, Any]]:
        message = self._sglang.GenerateReqInput(
            input_ids=tokens.tolist(),
            sampling_params=parameters,
            return_logprob=True,
            logprob_start_len=logprob_start_len,
            rid=rid,
            lora_path=self._adapter,
            **{name: data for name, data in shown.items() if data},
        )
        outputs = await self._watched(anext(self._manager.generate_request(message)))
        outputs = outputs if isinstance(outputs, list) else [outputs]
        for output in outputs:
            length = output["meta_info"]["prompt_tokens"]
            if length != len(tokens):
                raise RuntimeError(f"{self._name} read {length} prompt tokens where the processor wrote {len(tokens)}")
        return outputs

    def _response(self, request: Request, output: dict[str, Any]) -> Response:
        meta = output["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason == "abort":
            raise RuntimeError(f"{request.name}: {self._name} aborted: {meta['finish_reason']}")
        logprobs = meta["output_token_logprobs"]
        tokens = np.array(output["output_ids"], np.int32)
        if [token for _, token, _ in logprobs] != tokens.tolist():
            raise RuntimeError(f"{request.name}: {self._name} returned log-probs of other tokens than it sampled")
        return Response(
            tokens=tokens,
            logprobs=np.array([value for value, _, _ in logprobs], np.float32),
            finish_reason=reason,
            weight_versions=_versions(meta["weight_versions"], len(tokens)),
        )

    def _check(self, call: str, answer: tuple[Any, ...]) -> None:
        success, message = answer[:2]
        if not success:
            raise RuntimeError(f"{self._name}: {call} failed: {message}")

    def _check_taken(self, call: str, answer: tuple[Any, ...]) -> None:
        """The same of weights; after a failure the engine holds some of one version and some of another."""
        try:
            self._check(call, answer)
        except RuntimeError as error:
            self._refused = str(error)
            raise EngineRefused(self._refused) from error

    def _check_lora(self, call: str, answer: Any) -> None:
        self._check_taken(f"{call} of the adapters", (answer.success, answer.error_message))

    async def _watched(self, call: Any) -> Any:
        """Await ``call``, or raise ``EngineDied`` as soon as a process of the engine is gone."""
        if self._death is None:
            self._death = asyncio.get_running_loop().create_future()
            self._watcher = asyncio.create_task(self._watch())
        task = asyncio.ensure_future(call)
        await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        raise EngineDied(self._death.result())

    async def _watch(self) -> None:
        while True:
            for process in self._children:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    self._death.set_result(
                        f"{self._name}: SGLang's process {process.pid} on {os.uname().nodename} died "
                        f"at {time.strftime('%H:%M:%S')}"
                    )
                    return
            await asyncio.sleep(_POLL_S)


def _versions(spans: list[dict[str, Any]], length: int) -> np.ndarray:
    """Versions [N] int32 of ``length`` sampled tokens, from the spans that SGLang reports."""
    versions = np.full(length, -1, np.int32)
    for span in spans:
        versions[span["start"] : span["end"]] = int(span["version"])
    if (versions < 0).any():
        raise RuntimeError(f"SGLang names the weights of some of {length} tokens only: {spans}")
    return versions
