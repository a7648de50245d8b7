"""The engine against Hugging Face: log-probs, banned ids, weight updates by every transport, checksums."""

import socket
from pathlib import Path

import numpy as np
import pytest
import ray

from megarl.config import ModelConfig, RolloutConfig, RunConfig
from megarl.rollout.engine import Request, server_arguments
from megarl.utils.checksum import tensor_checksum
from megarl.utils.errors import EngineRefused
from megarl.weight_sync.broadcast import broadcast_bucket, create_group, destroy_group, layout
from megarl.weight_sync.shared import share_bucket
from tests.rollout.reference import TOLERANCE, HuggingFace, prompt, tensors


def sample(engine, encoded, *, num_samples=3, temperature=1.0, max_new_tokens=16):
    request = Request("test", encoded.tokens, encoded.media, num_samples, temperature, max_new_tokens)
    return ray.get(engine.generate.remote(request))


def push_shared(engine, named, version):
    """Two buckets."""
    half = len(named) // 2
    for part in (named[:half], named[half:]):
        ray.get(engine.update_weights_from_shared.remote({0: share_bucket(part, 1)[0]}, version))
    ray.get(engine.forget.remote())


def push_broadcast(engine, named, version):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    joined = engine.init_broadcast.remote("127.0.0.1", port, 1, 2, "gloo", f"test-{version}")
    group = create_group("127.0.0.1", port, world_size=2, backend="gloo", group_name=f"test-{version}", timeout_s=60)
    ray.get(joined)
    half = len(named) // 2
    for part in (named[:half], named[half:]):
        bucket = layout(part)
        received = engine.receive_broadcast.remote(
            bucket.names,
            bucket.dtypes,
            bucket.shapes,
            group_name=f"test-{version}",
            weight_version=version,
        )
        sent = broadcast_bucket(part, group)
        ray.get(received)
        sent.wait()
    ray.get(engine.forget.remote())
    ray.get(engine.destroy_broadcast.remote(f"test-{version}"))
    destroy_group(group)


def assert_parity(engine, reference, encoded, *, version, temperature=0.7):
    banned = reference.processor.banned_token_ids
    for response in sample(engine, encoded, temperature=temperature):
        assert (response.weight_versions == version).all()
        assert len(response.tokens) == len(response.logprobs) > 0
        assert not np.isin(response.tokens, banned).any()
        tokens = np.concatenate([encoded.tokens, response.tokens])
        expected = reference.logprobs(tokens, encoded.media, temperature=temperature)[len(encoded.tokens) - 1 :]
        np.testing.assert_allclose(response.logprobs, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_logprobs_equal_hugging_face(pool, models, processor, num_images):
    assert_parity(pool.engine, HuggingFace(models[0], processor), prompt(processor, num_images), version=0)


def test_banned_ids_leave_the_softmax(pool, models, processor):
    encoded, reference = prompt(processor, 1), HuggingFace(models[0], processor)
    response = sample(pool.engine, encoded, num_samples=1)[0]
    tokens = np.concatenate([encoded.tokens, response.tokens])
    unmasked = reference.logprobs(tokens, encoded.media, banned=False)[len(encoded.tokens) - 1 :]
    assert (response.logprobs > unmasked + TOLERANCE).all()  # what the banned ids would have taken


def test_samples_of_a_prompt_differ_and_stop_at_the_end_token(pool, processor):
    responses = sample(pool.engine, prompt(processor, 1), num_samples=8, max_new_tokens=400)
    assert len({response.tokens.tobytes() for response in responses}) == 8
    stopped = [r for r in responses if r.finish_reason == "stop"]
    assert stopped
    assert all(r.tokens[-1] in processor.eos_token_ids for r in stopped)
    assert all(len(r.tokens) == 400 for r in responses if r.finish_reason == "length")


def count_writes(actor):
    """In the engine's process: count what is written into shared memory from now on."""
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    write, actor.writes = ShmPointerMMData.__init__, []

    def counted(pointer, tensor, *args, **kwargs):
        actor.writes.append(tensor.nbytes)
        write(pointer, tensor, *args, **kwargs)

    ShmPointerMMData.__init__ = counted


def test_pixels_are_written_once_for_all_samples(pool, processor):
    """Two images of one prompt: SGLang alone would write them again for each of five samples."""
    pid = ray.get(pool.engine.ping.remote())["pid"]
    ray.get(pool.engine.__ray_call__.remote(count_writes))
    encoded = prompt(processor, 2, 77)
    responses = sample(pool.engine, encoded, num_samples=5)
    assert len({response.tokens.tobytes() for response in responses}) == 5
    assert len(ray.get(pool.engine.__ray_call__.remote(lambda actor: actor.writes))) == 2
    assert not list(Path("/dev/shm").glob(f"sgl_shm_mm_{pid}_*"))


def test_greedy_takes_the_most_likely_token(pool, models, processor):
    encoded, reference = prompt(processor, 1), HuggingFace(models[0], processor)
    response = sample(pool.engine, encoded, num_samples=1, temperature=0.0)[0]
    tokens = np.concatenate([encoded.tokens, response.tokens])
    chosen = reference.logprobs(tokens, encoded.media)[len(encoded.tokens) - 1 :]
    np.testing.assert_allclose(response.logprobs, chosen, atol=TOLERANCE, rtol=0)
    for position in range(len(response.tokens)):
        swapped = tokens.copy()
        for other in range(0, 300, 37):
            swapped[len(encoded.tokens) + position] = other
            value = reference.logprobs(swapped[: len(encoded.tokens) + position + 1], encoded.media)[-1]
            assert value <= chosen[position] + TOLERANCE
        break  # the first token: the others follow from the equality above


@pytest.mark.parametrize("num_images", [0, 2])
def test_score_equals_hugging_face_without_the_ban(pool, models, processor, num_images):
    encoded = prompt(processor, num_images)
    tokens = np.concatenate([encoded.tokens, np.arange(20, 30, dtype=np.int32)])
    scored = ray.get(pool.engine.score.remote(tokens, encoded.media))
    expected = HuggingFace(models[0], processor).logprobs(tokens, encoded.media, banned=False)
    masked = np.isin(tokens[1:], processor.banned_token_ids)
    assert (scored[masked] == 0).all()
    assert masked.any() == bool(num_images)
    np.testing.assert_allclose(scored[~masked], expected[~masked], atol=TOLERANCE, rtol=0)


def push_disk(engine, path, version):
    ray.get(engine.update_weights_from_disk.remote(str(path), version))


@pytest.mark.parametrize(("transport", "target"), [("shared", 1), ("broadcast", 0), ("disk", 1), ("shared", 0)])
def test_weights_arrive_whole(pool, models, processor, transport, target):
    """The same image before and after: an embedding kept from the old tower would show."""
    encoded = prompt(processor, 1)
    before = ray.get(pool.engine.score.remote(encoded.tokens, encoded.media))
    version = {"shared": 10, "broadcast": 20, "disk": 30}[transport] + target
    named = list(tensors(models[target]).items())
    if transport == "disk":
        push_disk(pool.engine, models[target], version)
    else:
        (push_shared if transport == "shared" else push_broadcast)(pool.engine, named, version)
    assert np.abs(ray.get(pool.engine.score.remote(encoded.tokens, encoded.media)) - before).max() > 0.1
    assert_parity(pool.engine, HuggingFace(models[target], processor), encoded, version=version)
    assert ray.get(pool.engine.checksums.remote()) == {name: tensor_checksum(tensor) for name, tensor in named}


def test_a_new_vision_tower_sees_an_old_image_anew(pool, models, processor):
    encoded = prompt(processor, 2)
    before = ray.get(pool.engine.score.remote(encoded.tokens, encoded.media))
    tower = {name: tensor for name, tensor in tensors(models[1]).items() if name.startswith("visual.")}
    push_shared(pool.engine, list(tower.items()), 40)
    after = ray.get(pool.engine.score.remote(encoded.tokens, encoded.media))
    assert np.abs(after - before).max() > 100 * TOLERANCE
    assert_parity(pool.engine, HuggingFace(models[0], processor, tower), encoded, version=40)
    push_shared(pool.engine, list(tensors(models[0]).items()), 0)


@pytest.mark.parametrize("name", ["visual.blocks.1.attn.qkv.weight", "model.layers.2.self_attn.k_proj.bias"])
def test_checksums_show_one_changed_tensor(pool, models, name):
    original = tensors(models[0])[name]
    before = ray.get(pool.engine.checksums.remote())
    changed = original.clone()
    changed.view(-1)[-1] += 1e-3
    push_shared(pool.engine, [(name, changed), (name, changed)], 50)
    after = ray.get(pool.engine.checksums.remote())
    assert {key for key in before if before[key] != after[key]} == {name}
    assert after[name] == tensor_checksum(changed)
    push_shared(pool.engine, [(name, original), (name, original)], 0)


def test_responses_go_on_with_new_weights(pool, models, processor):
    """Weights change while four responses are under way: every token is of the weights that its version names."""
    encoded, named = prompt(processor, 1), [list(tensors(model).items()) for model in models]
    call = pool.engine.generate.remote(Request("test", encoded.tokens, encoded.media, 4, 1.0, 200))
    for version in range(101, 105):
        ray.wait([call], timeout=0.2)
        ray.get(pool.engine.pause.remote())
        assert ray.get(pool.engine.progress.remote()).paused
        push_shared(pool.engine, named[version % 2], version)
        ray.get(pool.engine.resume.remote())
        progress = ray.get(pool.engine.progress.remote())
        assert not progress.paused
        assert progress.steps > 0
    references = [HuggingFace(model, processor) for model in models]
    seen = set()
    for response in ray.get(call):
        versions = response.weight_versions
        assert (np.diff(versions) >= 0).all()
        seen |= set(versions.tolist())
        tokens = np.concatenate([encoded.tokens, response.tokens])
        expected = [r.logprobs(tokens, encoded.media)[len(encoded.tokens) - 1 :] for r in references]
        chosen = np.where(versions % 2, expected[1], expected[0])
        np.testing.assert_allclose(response.logprobs, chosen, atol=TOLERANCE, rtol=0)
    assert len(seen) > 1
    push_shared(pool.engine, named[0], 0)


def test_a_failed_update_raises_with_the_reason(pool, tmp_path):
    with pytest.raises(EngineRefused, match="engine 0: update_weights_from_disk failed"):
        ray.get(pool.engine.update_weights_from_disk.remote(str(tmp_path / "absent"), 60))
    assert "update_weights_from_disk failed" in ray.get(pool.engine.ping.remote())["refused"]
    assert ray.get(pool.engine.ping.remote())["refused"] == ""  # said once


def test_lent_memory_is_gone_and_comes_back_with_the_next_weights(pool, models, processor):
    encoded, named = prompt(processor, 1), list(tensors(models[0]).items())
    before = ray.get(pool.engine.checksums.remote())
    sample(pool.engine, encoded)  # something is cached, and the scheduler has just finished
    assert pool.manager.release(["weights", "kv_cache"])
    assert not pool.manager.release(["weights"])  # it is lent already
    assert pool.manager.reclaim(["weights"])
    lost = ray.get(pool.engine.checksums.remote())
    assert {name for name in before if lost[name] == before[name]} == set()
    push_shared(pool.engine, named, 70)
    assert pool.manager.reclaim(["weights", "kv_cache"])
    assert ray.get(pool.engine.checksums.remote()) == before
    assert_parity(pool.engine, HuggingFace(models[0], processor), encoded, version=70)
    push_shared(pool.engine, named, 0)


@pytest.mark.parametrize(
    ("model", "engine", "dtype"),
    [("bfloat16", "", "bfloat16"), ("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32")],
)
def test_an_engine_in_bfloat16_has_a_float32_head(tmp_path, model, engine, dtype):
    config = RunConfig(model=ModelConfig(dtype=model), rollout=RolloutConfig(dtype=engine))
    arguments = server_arguments(config, str(tmp_path), 0, "cpu")
    assert (arguments["dtype"], arguments["enable_fp32_lm_head"]) == (dtype, dtype == "bfloat16")
