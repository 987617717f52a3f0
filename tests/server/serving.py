"""A server on a free port of 127.0.0.1, in a thread of the test; and a tiny real model for it."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time

from toys import Flat

from neustream import serve
from neustream.backends.copies import twin
from neustream.backends.loading.texts import BYTES_TEMPLATE
from neustream.backends.transformers.from_config import byte_tokenizer
from neustream.server.config import ModelConfig, ServerConfig
from neustream.server.lifecycle import run
from neustream.server.loading import Loaded
from neustream.server.models import TextModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}


def stock():
    """A Llama of bytes."""
    import torch
    import transformers

    torch.manual_seed(0)
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=257, intermediate_size=64, num_key_value_heads=2, **ids, **SIZES
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return model


def text_service(model, metrics, **options):
    """A service of a model, and what the server knows of it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BYTES_TEMPLATE
    given = {"profile": Flat(), "slots": 8, "observers": [metrics], **options}
    service = serve(twin(model), tokenizer, **given)
    known = service.models[""].model
    return Loaded(service, [TextModel("tiny", tokenizer, known.max_len, known.vocabulary, batch=known.slots)])


@contextlib.contextmanager
def serving(load, keys=(), **config):
    """A running server: yields its URL and a function that stops it and gives the exit code."""
    models = [ModelConfig(name="tiny", kind="text", backend={})]
    http = {"port": 0, **config.pop("http", {})}
    settings = ServerConfig(models=models, http=http, **config)
    said, over = queue.Queue(), queue.Queue()
    box = {}

    async def main():
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
        return await run(settings, load, keys, said.put, box["stop"])

    def work():
        try:
            over.put(asyncio.run(main()))
        except BaseException as error:
            over.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    url = said.get(timeout=60).removeprefix("serving on ")

    def stop():
        with contextlib.suppress(RuntimeError):
            box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(60)
        return over.get(timeout=1)

    try:
        yield url, said, stop
    finally:
        if thread.is_alive():
            stop()


def settled(service, seconds=10.0):
    """Wait until nothing is open and no slot is held."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not service.snapshot().open and not service.models[""].used:
            return True
        time.sleep(0.01)
    return False


def until(done, seconds=20.0):
    """Wait until `done()`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)
