"""Outputs read on an event loop: all, in order, each loop woken once for what comes together."""

import asyncio
from concurrent.futures import CancelledError, Future
from threading import Thread

import pytest

from neustream.service.answer import Answer
from neustream.service.feed import AT_ONCE, Feed


def answer(id: str = "a") -> Answer:
    return Answer(id, "words", lambda _: None, lambda: str.upper)


def elsewhere(fn, *args):
    """Call it on another thread, and wait for that: the loop cannot look in between."""
    thread = Thread(target=fn, args=args)
    thread.start()
    thread.join()


def settle(one: Answer, error: BaseException | None = None) -> None:
    done: Future = Future()
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
    one.settle(done, lambda _, came: "".join(came))


def test_a_loop_is_woken_once_for_the_outputs_of_a_step(monkeypatch):
    async def read():
        loop = asyncio.get_running_loop()
        woken, heard = [], []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda fn, *args: (woken.append(fn), call(fn, *args)))
        answers = [answer(str(number)) for number in range(32)]
        feeds = [Feed(one, lambda number=number: heard.append(number)) for number, one in enumerate(answers)]

        def step(text):
            for one in answers:
                one.push(text)
                one.push(text)

        for text in ("x", "y"):
            elsewhere(step, text)
            assert len(woken) == 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert heard == list(range(32))  # each reader once
            assert [feed.take() for feed in feeds] == [[text.upper()] * 2] * 32
            woken.clear()
            heard.clear()
        feeds[0].close()
        elsewhere(step, "z")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert heard == list(range(1, 32))

    asyncio.run(read())


def test_a_loop_does_other_work_between_the_calls_of_very_many_outputs():
    async def read():
        heard, seen = [], []
        answers = [answer(str(number)) for number in range(3 * AT_ONCE)]
        feeds = [Feed(one, lambda number=number: heard.append(number)) for number, one in enumerate(answers)]
        elsewhere(lambda: [one.push("x") for one in answers])
        while len(heard) < 3 * AT_ONCE and len(seen) < 20:
            await asyncio.sleep(0)
            seen.append(len(heard))
            if seen[-1] == AT_ONCE:  # one that waits still, and one that was called
                elsewhere(lambda: [answers[number].push("y") for number in (-1, 0)])
        await asyncio.sleep(0)
        assert {AT_ONCE, 2 * AT_ONCE} <= set(seen), "a part each time"
        assert heard == [*range(3 * AT_ONCE), 0], "each once, and again what came since"
        assert feeds[0].take() == feeds[-1].take() == ["X", "Y"]

    asyncio.run(read())


def test_outputs_come_before_the_end_and_what_went_wrong_behind_them():
    async def read():
        one = answer()
        feed = Feed(one, lambda: None)
        assert feed.take() == [] and not feed.over and feed.waiting == 0
        one.push("x")
        settle(one, ValueError("broken"))
        assert feed.waiting == 1
        assert feed.take() == ["X"] and not feed.over
        with pytest.raises(ValueError, match="broken"):
            feed.take()
        assert feed.over

    asyncio.run(read())


def test_an_output_that_cannot_be_read_hides_none_before_it():
    def read(output):
        if output == "bad":
            raise ValueError("no word")
        return output

    async def all_of_it():
        found = []
        with pytest.raises(ValueError, match="no word"):
            async for item in one:
                found.append(item)
        return found

    one = Answer("a", "words", lambda _: None, lambda: read)
    for output in ("x", "y", "bad", "z"):
        one.push(output)
    settle(one)
    assert asyncio.run(all_of_it()) == ["x", "y"]
    found = []
    with pytest.raises(ValueError, match="no word"):
        for item in one:
            found.append(item)
    assert found == ["x", "y"]


def test_readers_each_get_all_and_a_cancelled_one_ends():
    async def read():
        one = answer()
        one.push("x")
        first = [asyncio.ensure_future(_all(one)) for _ in range(2)]
        await asyncio.sleep(0)
        elsewhere(one.push, "y")
        elsewhere(settle, one)
        assert await asyncio.gather(*first, _all(one)) == [["X", "Y"]] * 3
        assert await one == "xy"
        other = answer()
        waiting = asyncio.ensure_future(_all(other))
        await asyncio.sleep(0)
        other.cancel()
        with pytest.raises(CancelledError):
            await waiting

    asyncio.run(read())


async def _all(one):
    return [item async for item in one]


def test_who_reads_on_a_loop_that_is_closed_harms_nobody():
    async def look():
        Feed(one, lambda: None)

    one = answer()
    asyncio.run(look())
    one.push("x")
    settle(one)
    assert one.result() == "x"


def test_what_does_not_stream_says_so_at_once():
    with pytest.raises(TypeError, match="nothing streams"):
        aiter(Answer("a", "words", lambda _: None))
