"""Services that serve some stages only: requests go from one to the next, and come out as if they had not."""

from __future__ import annotations

import copy
import itertools
import pickle
import queue
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from pipelines import build, requests, stock, tensor_of
    from texts import model_of, prompts
    from toys import Step, table

    from neustream import BackendError, Graph, GraphError, RequestError, RequestFailed, Stage, StageFailed, seq, serve
    from neustream.core.events import Left
    from neustream.core.learnt_steps import LearntSteps
    from neustream.core.nodes import par
    from neustream.engine.events import Started

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MAX = 6


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Leg:
    """A service of some stages. `left`: requests whose next stage it does not serve; `ran`: stages of its steps."""

    def __init__(self, *model, **options):
        self.left, self.ran = queue.Queue(), set()
        self.service = serve(*model, observers=[self.hear], **options)

    def hear(self, record):
        if isinstance(record, Left):
            self.left.put((record.id, record.stage))
        elif isinstance(record, Started):
            self.ran.add(record.step.stage)

    def pass_on(self, target, role):
        """Have `target` go on with a request, as another process would, once its next stage is of `role`."""
        id, stage = self.left.get(timeout=60)
        assert stage.partition("@")[0] == role
        moved = pickle.loads(pickle.dumps(self.service.give(id).result(60)))
        return target.service.take(moved).result(60)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.service.close(cancel=exc[0] is not None)


# -- texts --------------------------------------------------------------------------------------------


def chat(*stages, **options):
    model = copy.deepcopy(model_of("llama"))
    return Leg(model, **{"profile": LearntSteps(), "slots": 2, **options}, stages=stages or None)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_a_text_prefilled_here_and_decoded_there_is_the_unmoved_one(sampling):
    asked = {"max_tokens": MAX, "ignore_eos": True, "logprobs": 2, **sampling}
    prompt = prompts(4)[1]
    with chat() as whole, chat("llm.prefill") as first, chat("llm.decode") as then:
        wanted = list(whole.service.submit(prompt, **asked))
        there = first.service.submit(prompt, **asked)
        tokens = list(first.pass_on(then, "llm.decode"))
        assert there.outcome(60).code == "moved"
        assert [(one.index, one.id, one.text) for one in tokens] == [(one.index, one.id, one.text) for one in wanted]
        likely = [[one.likelihood.logprob for one in some] for some in (tokens, wanted)]
        assert likely[0] == likely[1]  # to the last bit
        assert (first.ran, then.ran) == ({"llm.prefill"}, {"llm.decode"})
        assert first.service.models[""].used == then.service.models[""].used == 0
        assert first.service.snapshot().open == then.service.snapshot().open == 0


def test_a_text_is_refused_where_no_slot_is_free_and_its_prefill_is_elsewhere():
    asked = {"max_tokens": MAX, "ignore_eos": True}
    with chat("llm.prefill") as first, chat("llm.decode", slots=1) as then:
        wanted = []
        with chat() as whole:
            wanted = [whole.service.submit(prompt, **asked).result(60).token_ids for prompt in prompts(2)]
        moved = []
        for at, prompt in enumerate(prompts(2)):
            first.service.submit(prompt, id=f"r{at}", **asked)
            first.left.get(timeout=60)
            moved.append(first.service.give(f"r{at}").result(60))
        worker = then.service._devices[0].executor._workers[0]
        run, second = worker.step, []

        def step(batch, inputs, **options):  # the second comes while the first has the slot
            second.append(then.service.take(moved[1])) if not second else None
            return run(batch, inputs, **options)

        worker.step = step
        assert then.service.take(moved[0]).result(60).result(60).token_ids == wanted[0]
        with pytest.raises(RequestError, match=r"request 'r1' comes with 1 blocks, 0 of 1 are free"):
            second[0].result(60)
        assert then.service.take(moved[1], waited_s=0.5).result(60).result(60).token_ids == wanted[1]
        assert then.ran == {"llm.decode"}


# -- images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion", "dit"])
def test_an_image_encoded_denoised_and_decoded_in_three_places_is_bitwise_stock(name):
    pipe = build(name)
    request = requests(name)[0]
    wanted = stock(pipe, request)
    roles = ["encode", "denoise", "decode"][name == "dit" :]
    made = [Leg(build(name), samples=[], measure_s=0.0, stages=[role]) for role in roles]
    here = there = made[0].service.submit(**request.arguments())
    for (source, target), role in zip(itertools.pairwise(made), roles[1:], strict=True):
        here = source.pass_on(target, role)
    assert torch.equal(tensor_of(here.result(60)), wanted)
    assert there.outcome(60).code == "moved"
    for leg, role in zip(made, roles, strict=True):
        assert {stage.partition("@")[0] for stage in leg.ran} - {"probe"} == {role}
        assert leg.service.snapshot().open == 0
        leg.service.close()


def test_a_pipeline_that_cannot_leave_says_so_by_name():
    request = requests("animatediff")[0]
    with Leg(build("animatediff"), samples=[], measure_s=0.0, stages=["encode"]) as first:
        answer = first.service.submit(**request.arguments(), id="x")
        first.left.get(timeout=60)
        with pytest.raises(StageFailed, match=r"request 'x' stays: stage .*: AnimateDiffPipeline cannot move"):
            first.service.give("x").result(60)
        assert answer.cancel()


# -- what cannot be -----------------------------------------------------------------------------------

TWO = Graph("two", seq(Stage("draft"), Stage("polish")))


def parts(graph=TWO, **options):
    stages = list(graph.stages)
    modules = {name: Step(lambda given: {"said": given.params["word"]}) for name in stages}
    return serve(graph, modules, {name: table(name, 0.001) for name in stages}, **options)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("draft", r"stages must be a list of names, as \['encode', 'decode'\], got 'draft'"),
        ([], r"stages must be a list of names, as \['encode', 'decode'\], got \[\]"),
        (["draft", 3], "stages: a stage is a name, as 'encode', got 3"),
        (["draf"], "stages: no stage 'draf'; did you mean 'draft'"),
    ],
)
def test_stages_that_are_none_are_refused(stages, message):
    with pytest.raises(BackendError, match=message):
        parts(stages=stages)


def test_stages_of_an_agent_are_refused():
    with pytest.raises(BackendError, match="stages: model 'both' is an agent, which is served as a whole"):
        serve({"both": lambda models: TWO}, stages=["both"])


def test_a_graph_that_forks_is_served_as_a_whole():
    forks = Graph("forks", seq(Stage("draft"), par(Stage("left"), Stage("right"))))
    with (
        parts(forks, stages=["draft"]) as service,
        pytest.raises(GraphError, match="stage 'left' is served elsewhere, and a branch of a par cannot leave"),
    ):
        service.submit(word="a").result(30)


def test_who_waits_to_be_taken_elsewhere_hears_of_the_end():
    left = queue.Queue()
    service = parts(stages=["draft"], observers=[lambda record: isinstance(record, Left) and left.put(record)])
    answer = service.submit(word="a")
    assert left.get(timeout=30).stage == "polish"
    service.close()
    with pytest.raises(RequestFailed, match="stage 'polish' is served elsewhere, and this ends"):
        answer.result(30)


def test_a_request_that_is_to_leave_anyway_leaves_at_the_end_of_its_last_step_here():
    with parts(stages=["draft"]) as first, parts(stages=["polish"]) as then:
        worker = first._devices[0].executor._workers[0]
        run, gone = worker.step, queue.Queue()

        def step(batch, inputs, **options):
            gone.put(first.give("x"))
            return run(batch, inputs, **options)

        worker.step = step
        first.submit(word="a", id="x")
        moved = gone.get(timeout=30).result(30)
        assert then.take(moved).result(30).result(30) == {"said": "a"}


# -- by a head ----------------------------------------------------------------------------------------


def test_a_head_has_texts_prefilled_and_decoded_and_images_made_in_places_of_their_own():
    from local_machines import LocalMachines

    from neustream.backends.diffusers import PipelineMount
    from neustream.backends.ray.driver import Driver
    from neustream.backends.ray.kinds import Each
    from neustream.backends.transformers import TextMount
    from neustream.cluster.book import Settings
    from neustream.cluster.head import Head
    from neustream.cluster.rules.slack import Slack

    roles = {
        "front": ("chat.prefill", "sd/encode"),
        "core": ("sd/denoise",),
        "back": ("chat.decode", "sd/decode"),
    }

    def make(number, kind):
        text = TextMount(copy.deepcopy(model_of("llama")), profile=LearntSteps(), slots=2)
        image = PipelineMount(build("stable_diffusion"), samples=[], measure_s=0.0)
        return serve({"chat": text, "sd": image}, stages=roles.get(kind))

    asked = {"max_tokens": MAX, "ignore_eos": True, "temperature": 1.1, "seed": 5}
    picture = requests("stable_diffusion")[0]
    with make(0, "whole") as whole:
        wanted = [whole.submit(prompt, model="chat", **asked).result(60).token_ids for prompt in prompts(3)]
    machines = LocalMachines(make)
    settings = Settings(suspect_s=60.0, dead_s=90.0)
    driver = Driver(Head([], {}, Slack(), None, Each(dict.fromkeys(roles, 1)), settings=settings), machines, 3)
    try:
        driver.up.result(60)
        image = driver.submit((), picture.arguments(), "sd", None, "image")
        texts = [driver.submit((prompt,), asked, "chat", None, f"t{at}") for at, prompt in enumerate(prompts(3))]
        assert [answer.result(60).token_ids for answer in texts] == wanted
        assert [[one.index for one in answer.outputs] for answer in texts] == [list(range(MAX))] * 3
        assert {one.member for one in texts[0].outputs[1:]} == {"back-3"}
        assert torch.equal(tensor_of(image.result(60)), stock(build("stable_diffusion"), picture))
        counted = driver.ask(lambda head, now: driver.counts.moved)  # an answer comes before its last move counts
        assert counted.result(60) == 5 and driver.counts.failed == 0
    finally:
        driver.close()
        machines.close()
