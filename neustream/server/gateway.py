"""The models behind the routes, and the state that the server is in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

from neustream.core.types import SLO
from neustream.engine.clock import stopwatch
from neustream.engine.snapshot import Snapshot
from neustream.errors import RequestDropped, RequestFailed, nearest, told
from neustream.server.admission import Admission, Began
from neustream.server.backing import Backing
from neustream.server.config import LimitConfig
from neustream.server.errors import HTTPError
from neustream.server.loading import Loaded, on_a_thread
from neustream.server.models import NOTHING, AgentModel, ImageModel, Model, TextModel, count_of, served_as
from neustream.server.observe.gauges import Gauges
from neustream.server.observe.lives import Life
from neustream.server.observe.notes import Asked, Note, Unasked
from neustream.server.patience import Patience, Progress
from neustream.service.answer import Answer

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "stopped", "failed"]
SOON_S = 5.0
"""When clients come again of a server that is ending: by then another may have its address."""
FAILED_S = 60.0
"""The same where an engine has failed: somebody has to look at it."""
INLINE = 2000
"""Characters of a prompt that are tokenised on the event loop; longer ones on a thread."""


class Gateway:
    """The models, once they are loaded, and the state that the server is in.

    Args:
        limits: of what is taken in.
        tell: told of requests before the engine is.
        lives: what is known of open requests, by id.

    Attributes:
        state: of the server; reason: why it failed.
        connections: how many are open.
    """

    def __init__(
        self,
        limits: LimitConfig | None = None,
        tell: Callable[[Note], None] = lambda note: None,
        lives: Mapping[str, Life] = {},
    ) -> None:
        self._lives = lives
        self.connections: Callable[[], int] = lambda: 0
        self._tell = tell
        self._limits = limits or LimitConfig()
        self._takes = False
        self._state: State = "loading"
        self._since = stopwatch()
        self.reason = ""
        self._loaded: Loaded | None = None
        self._backing: Backing | None = None
        self._models: dict[str, Model] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="neustream-http")
        self._admission = Admission(self._limits, self._wait_s, self._jobs)

    # -- life -------------------------------------------------------------------------------------

    async def load(self, load: Callable[[], Loaded]) -> None:
        """Load on a thread, so that /health answers meanwhile.

        Nobody has to wait for that thread: what it loads once the server has ended is closed again.
        """
        try:
            self.open(await on_a_thread(load))
        except Exception as error:
            self.state, self.reason = "failed", told(error)
            raise

    def open(self, loaded: Loaded) -> None:
        """Serve from now on."""
        self._loaded, self._backing = loaded, loaded.backing
        self._models = {model.name: model for model in loaded.models}
        if self.state == "loading":
            self.state = "ready"

    def drain(self, *, take: bool = False) -> None:
        """Take nothing more; with `take`, only say so for now: what comes is served still."""
        self._takes = take and self.state == "ready"
        if self.state in ("loading", "ready"):
            self.state = "draining"

    async def close(self, *, cancel: bool) -> None:
        """Serve what is open, or end it; then stop."""
        if self._loaded is not None:
            for model in self._models.values():
                if model.own is not None:
                    await model.own.close()
            if self._backing is not None:
                work = partial(self._backing.close, cancel=cancel)
                await asyncio.get_running_loop().run_in_executor(self._threads, work)
        self.state = "stopped" if self.state != "failed" else "failed"
        self._threads.shutdown(wait=False)

    # -- how it is --------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state, self._since = state, stopwatch()

    @property
    def since_s(self) -> float:
        """Seconds that it has been in its state."""
        return round(stopwatch() - self._since, 3)

    @property
    def again_s(self) -> float:
        """Seconds after which a client that is not served now had better come again.

        Nobody knows how long a model takes to load: as long again as it has taken so far.
        """
        if self.state == "loading":
            return self.since_s
        return FAILED_S if self.state == "failed" or self.faults else SOON_S

    @property
    def known(self) -> list[Model]:
        """All models that were loaded."""
        return list(self._models.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is served."""
        lengths = [model.max_len for model in self._models.values() if isinstance(model, TextModel)]
        return max(lengths, default=0)

    @property
    def sees(self) -> bool:
        """Whether a language model looks at images."""
        return any(isinstance(model, TextModel) and model.see is not None for model in self._models.values())

    @property
    def died(self) -> dict[str, str]:
        """Models whose engine serves nothing any more, and why."""
        if self._loaded is None or self.state in ("stopped", "failed"):
            return {}
        shot = None if self._backing is None else self._backing.snapshot()
        found = {}
        for name, model in self._models.items():
            why = model.own.fault if model.own is not None else _fault(shot, model.device)
            if why:
                found[name] = why
        return found

    @property
    def faults(self) -> dict[str, str]:
        """Models that are not served, and why: they could not be loaded, or their engine died."""
        failed = {} if self._loaded is None else self._loaded.failed
        return {**failed, **self.died}

    @property
    def lacking(self) -> str:
        """What is not there that was asked for, though all models are served; empty: all is."""
        return "" if self._backing is None else self._backing.lacking

    @property
    def shown(self) -> str:
        """Its state as it is told: failed while a model is not served, short while instances lack."""
        if self.state != "ready":
            return self.state
        return "failed" if self.faults else "short" if self.lacking else "ready"

    @property
    def alive(self) -> bool:
        """Whether all engines live, if there are some by now."""
        return self.state != "failed" and not self.died

    @property
    def dead(self) -> bool:
        """Whether no engine lives."""
        return self.state == "failed" or (bool(self._models) and len(self.died) == len(self._models))

    def _jobs(self) -> list[Mapping[str, Began]]:
        """What engines have, by id."""
        found: list[Mapping[str, Began]] = []
        if self._backing is not None:
            found += self._backing.jobs
        return found + [model.own.jobs for model in self._models.values() if model.own is not None]

    def _wait_s(self, count: int) -> float | None:
        return None if self._backing is None else self._backing.wait_s(count)

    def gauges(self) -> Gauges:
        """How the server is at this moment."""
        state, reason = self.shown, self.reason or "; ".join(self.faults.values()) or self.lacking
        connections = self.connections()
        backing = self._backing
        if backing is None:
            return Gauges(state, reason, connections=connections)
        shot = backing.snapshot()
        return Gauges(
            state,
            reason or shot.reason,
            backing.now(),
            shot.open,
            shot.policy_faults,
            backing.wait_s(shot.open + 1),
            connections,
            shot.kv,
            backing.instances,
            backing.happened,
        )

    # -- models -----------------------------------------------------------------------------------

    def check(self) -> None:
        """HTTPError while nothing is taken."""
        takes = self.state == "ready" or (self.state == "draining" and self._takes)
        if not takes or self._loaded is None:
            headers = {"connection": "close"} if self.state == "draining" else {}
            text = f"this server is {self.state}"
            raise HTTPError(503, text, self.state, retry_after_s=self.again_s, headers=headers)
        if self.dead:
            raise HTTPError(503, "the engine has failed", "failed", retry_after_s=self.again_s)

    @property
    def service(self) -> Backing:
        """What serves most models; HTTPError while there is none, or it is to end."""
        self.check()
        if self._backing is None:
            raise HTTPError(404, "no model here is served by the service", "not_found")
        return self._backing

    @property
    def models(self) -> list[Model]:
        """Those that are served; HTTPError while nothing is taken."""
        self.check()
        died = self.died
        return [model for name, model in self._models.items() if name not in died]

    def text(self, name: str | None) -> TextModel:
        """A language model by its name, or the only one."""
        found = self._model(name, "text", lambda model: isinstance(model, TextModel))
        assert isinstance(found, TextModel)
        return found

    def chat(self, name: str | None) -> TextModel | AgentModel:
        """A language model or an agent that answers chats, by its name; or the only language model."""
        if name is None:
            return self.text(name)
        fits = TextModel | AgentModel
        found = self._model(name, "chats", lambda model: isinstance(model, fits) and model.chats)
        assert isinstance(found, fits)
        return found

    def image(self, name: str | None) -> ImageModel:
        """A pipeline that makes images of a prompt, by its name, or the only one."""
        found = self._model(name, "images", lambda model: isinstance(model, ImageModel) and model.generates)
        assert isinstance(found, ImageModel)
        return found

    def editor(self, name: str | None) -> ImageModel:
        """A pipeline that makes images of pictures, by its name, or the only one."""
        found = self._model(name, "edits", lambda model: isinstance(model, ImageModel) and model.edits)
        assert isinstance(found, ImageModel)
        return found

    def agent(self, name: str) -> AgentModel:
        """An agent by its name."""
        found = self._model(name, "agents", lambda model: isinstance(model, AgentModel))
        assert isinstance(found, AgentModel)
        return found

    def _model(self, name: str | None, what: str, fits: Callable[[Model], bool]) -> Model:
        """A model of a kind that takes requests; HTTPError for what is none, or is not served."""
        self.check()
        faults = self.faults
        if name is not None and name in faults:
            text = f"model {name!r} is not served: {faults[name]}"
            raise HTTPError(503, text, "failed", "model", retry_after_s=FAILED_S)
        fitting = {each.name: each for each in self.models if fits(each)}
        whole = [each for each in fitting.values() if served_as(each) == each.name]
        if name is None and len(whole) == 1:
            return whole[0]
        if name is None or name not in fitting:
            text = f"no model {name!r} for {what}; {nearest(name or '', fitting)}"
            raise HTTPError(404, text, "model_not_found", "model")
        return fitting[name]

    async def think(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        """Call a function: here if it is quick (a `size` of few characters), else on a thread."""
        if size <= INLINE:
            return function(*args)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)

    def admit(self, model: Model, slo: SLO) -> None:
        """HTTPError if a model takes no more now of those that are promised something, or nothing."""
        self._admission.check(served_as(model), model.batch, slo.promises)

    def patience(self, model: Model, slo: SLO, ids: Sequence[str], give_up: Callable[[HTTPError], None]) -> Patience:
        """Watches requests that are promised nothing; see `Patience`."""
        seconds = None if slo.promises else self._limits.patience_s

        def wait_s() -> float | None:
            name = served_as(model)
            return self._admission.wait_s(name, slo.promises, self._admission.waiting(name, slo.promises))

        def progress() -> Progress:
            lives = [life for id in ids if (life := self._lives.get(id)) is not None]
            done = sum([life.stepped + life.outputs for life in lives])
            return Progress(done, any(life.under_way > 0 for life in lives))

        return Patience(seconds, partial(self._admission.began, ids), progress, wait_s, give_up)

    def waited_s(self, id: str) -> float | None:
        """Seconds that a request under way waited before it ran; None: it did not, or it is over."""
        jobs = [job for each in self._jobs() if (job := each.get(id)) is not None]
        return next((job.started_at - job.arrival for job in jobs if job.started_at is not None), None)

    def submit(self, model: Model, *args: Any, id: str, **options: Any) -> Answer[Any]:
        """Ask a model; errors as of `Service.submit`."""
        self.check()
        tokens = count_of(args[0]) if isinstance(model, TextModel) else None
        slo = options.get("slo") or NOTHING
        self._tell(Asked(id, model.name, model.kind, slo, tokens, options.get("max_tokens")))
        try:
            if model.own is not None:
                answer: Answer[Any] = model.own.submit(*args, id=id, **options)
            else:
                answer = self.service.submit(*args, model=self._name(model), id=id, **options)
        except BaseException:
            self._tell(Unasked(id))
            raise
        self._admission.came(id, served_as(model), answer, slo.promises)
        answer.add_done_callback(self._told_over)
        return answer

    def preview(self, model: Model, preview: Any, id: str) -> Answer[Any]:
        """The picture of a request under way, when nobody who was promised anything needs the time."""
        self._tell(Asked(id, model.name, "preview", NOTHING))
        try:
            answer: Answer[Any] = self.service.submit(preview, model=self._name(model), id=id, slo=NOTHING)
        except BaseException:
            self._tell(Unasked(id))
            raise
        answer.add_done_callback(self._told_over)
        return answer

    def _told_over(self, answer: Any) -> None:
        self._tell(_over(answer))

    def _name(self, model: Model) -> str | None:
        """What the service calls a model; None: it has no other."""
        assert self._backing is not None
        return name if (name := served_as(model)) in self._backing.models else None


def _over(answer: Answer[Any]) -> Unasked:
    """What to tell of a request that is over."""
    if answer.cancelled():
        return Unasked(answer.id, "cancelled")
    error = answer.exception()
    if isinstance(error, RequestDropped):
        return Unasked(answer.id, "dropped", error.code)
    return Unasked(answer.id, "failed" if isinstance(error, RequestFailed) else "")


def _fault(shot: Snapshot | None, device: str) -> str:
    """Why the service serves nothing on a device any more; empty: it does."""
    if shot is None or shot.state not in ("serving", "closing", "closed"):
        return "the engine has failed" + (f": {shot.reason}" if shot is not None and shot.reason else "")
    here = shot.members.get(device) or next(iter(shot.members.values()), None)
    return "" if here is None else "; ".join(here.closed.values())
