"""A real vLLM with a tiny random OPT; without vllm installed these tests say so and skip.

`NEUSTREAM_TEST_DEVICE=cuda` is for a vLLM that is built for CUDA, which runs on nothing else; they are skipped where
the two do not fit. Kernels are float32 through and through there, since tokens of batches that differ are compared.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is here, to be looked at

DEVICE = os.environ.get("NEUSTREAM_TEST_DEVICE", "cpu").partition(":")[0]
ON_CUDA = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "async_scheduling": False}
"""There one of several engines that share the device, with as much memory and one step at a time as on a CPU."""
HERE = Path(__file__).parent
WITHOUT = ("test_choice.py", "test_middleware.py", "test_settings.py", "test_view.py")
"""What needs no vLLM."""
VOCABULARY = 512


def lacking() -> str:
    """Why vLLM cannot be tested here; empty: it can be."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # this very folder looks like a package of that name
        return "vllm is not installed here; `make test-vllm` has it"
    from vllm.platforms import current_platform

    have = current_platform.device_type
    return "" if have == DEVICE else f"this vLLM is for {have or 'no device here'}, NEUSTREAM_TEST_DEVICE is {DEVICE}"


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.is_relative_to(HERE) and item.path.name not in WITHOUT]
    why = lacking() if ours else ""
    for item in ours:
        item.add_marker(pytest.mark.vllm)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
        elif item.get_closest_marker("gpu") and DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="NEUSTREAM_TEST_DEVICE=cuda and a vLLM for CUDA run it"))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A folder with a random OPT of two layers, real weights, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("opt")
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    opt = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for weights in opt.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.25)  # as initialised, all tokens are about equally likely
    opt.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{at}": at for at in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="session")
def engines(model):
    """Makes in-process engines: `engines(scheduler_cls, **more)`; one of each kind is kept."""
    from vllm import LLM

    kept = {}

    def make(scheduler_cls=None, **more):
        name = scheduler_cls if isinstance(scheduler_cls, str | None) else scheduler_cls.__qualname__
        key = json.dumps([name, more], sort_keys=True, default=str)
        if key not in kept:
            given = {
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 512,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 128,
                "enable_prefix_caching": False,
                "block_size": 32,
                "num_gpu_blocks_override": 200,
                "seed": 0,
            } | more
            if DEVICE == "cuda":
                given = ON_CUDA | given
            if scheduler_cls is not None:
                given["scheduler_cls"] = scheduler_cls
            kept[key] = LLM(str(model), **given)
        return Rig(kept[key])

    return make


class Rig:
    """An engine, its scheduler, and requests put to it by hand."""

    def __init__(self, llm):
        self.llm = llm
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.ended = {}
        self.order = []
        self.steps = 0

    def ask(self, id, prompt, max_tokens, extra=None, **params):
        from vllm import SamplingParams

        tokens = [4 + (7 * at + len(id) + sum(map(ord, id))) % (VOCABULARY - 4) for at in range(prompt)]
        given = {"temperature": 0, "ignore_eos": True, "detokenize": False} | params
        self.engine.add_request(
            id, {"prompt_token_ids": tokens}, SamplingParams(max_tokens=max_tokens, extra_args=extra, **given)
        )

    def step(self):
        self.steps += 1
        for output in self.engine.step():
            if output.finished:
                assert output.request_id not in self.ended, f"{output.request_id} ended twice"
                self.ended[output.request_id] = output.outputs[0]
                self.order.append(output.request_id)

    def run(self, most=2000):
        while self.engine.has_unfinished_requests():
            assert self.steps < most, f"still unfinished: {list(self.scheduler.requests)}"
            self.step()
        while self.core.batch_queue:  # of a step ahead that nobody is in any more
            self.step()
        return self.ended

    def abort(self, *ids):
        self.engine.abort_request(list(ids))

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    def assert_empty(self):
        """Nothing is left anywhere, and all blocks but vLLM's null block are free."""
        s = self.scheduler
        if s.finished_req_ids:
            s.schedule()
        assert not s.requests and not s.running and not len(s.waiting)
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        if hasattr(s, "views"):
            assert not s.views.jobs and not s._promised and not s._slos and not s._given_up
            assert s.max_num_scheduled_tokens == s._step_tokens
