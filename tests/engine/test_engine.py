"""The engine over a real (random) micro network: its answers are the model's, whatever else it is doing."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from dsv4.config import Config
from dsv4.engine import Engine, SamplingParams
from dsv4.model import Transformer
from dsv4.text import train_tokenizer

PROMPT = [0, 17, 300, 42, 42, 5, 99, 260, 11, 480, 33]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Config.preset("micro")).init_weights(seed=3)
    for parameter in model.parameters():  # larger than the initialisation: answers that vary
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def engine(model: Transformer) -> Engine:
    return Engine(model, train_tokenizer(["a few words"], 512))


def test_greedy_is_the_argmax_of_a_full_forward(engine: Engine, model: Transformer) -> None:
    answer = list(engine.generate(PROMPT, GREEDY))
    assert len(answer) == 24 and len(set(answer)) > 3
    with torch.inference_mode():
        full = model(torch.tensor([PROMPT + answer]))[0].argmax(-1).tolist()
    assert answer == full[len(PROMPT) - 1 : -1]


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_the_size_of_prompt_chunks_changes_nothing(engine: Engine, model: Transformer, chunk: int) -> None:
    chunked = Engine(model, engine.tokenizer, chunk=chunk)
    assert list(chunked.generate(PROMPT, GREEDY)) == list(engine.generate(PROMPT, GREEDY))


def test_a_seed_reproduces_alone_and_in_company(engine: Engine) -> None:
    def answer(seed: int | None) -> list[int]:
        return list(engine.generate(PROMPT, SamplingParams(temperature=1.0, top_p=0.9, max_tokens=20, seed=seed)))

    alone, crowd = answer(5), {}
    threads = [
        threading.Thread(target=lambda i=i: crowd.update({i: answer(5 if i == 2 else i + 10)})) for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowd[2] == alone == answer(5)
    assert len({tuple(ids) for ids in crowd.values()}) == 5
    assert answer(None) != answer(None)


def test_cancellation_stops_the_model(engine: Engine) -> None:
    told: list[int] = []
    generation = engine.generate(PROMPT, SamplingParams(temperature=0), cancelled=lambda: len(told) == 3)
    for id in generation:
        told.append(id)
    assert len(told) == 3 and generation.finish_reason == "cancelled" and generation.completion_tokens == 3


def test_it_ends_at_stop_tokens_and_at_limits(engine: Engine, model: Transformer) -> None:
    greedy = list(engine.generate(PROMPT, GREEDY))
    third = greedy[2]
    stopped = engine.generate(PROMPT, SamplingParams(temperature=0, stop_ids=(third,)))
    assert list(stopped) == greedy[: greedy.index(third)] and stopped.finish_reason == "stop"
    user = Engine(model, engine.tokenizer)
    assert user.stop_ids == {1, engine.tokenizer.special["<｜User｜>"]}
    short = engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4))
    assert list(short) == greedy[:4] and short.finish_reason == "length"
    assert (short.prompt_tokens, short.completion_tokens) == (len(PROMPT), 4)


def test_the_context_ends_the_answer_and_refuses_longer_prompts(engine: Engine) -> None:
    context = engine.context
    nearly_full = engine.generate([7] * (context - 2), SamplingParams(temperature=0))
    assert len(list(nearly_full)) == 2 and nearly_full.finish_reason == "length"
    for ids, told in (([7] * context, str(context)), ([], "0 tokens"), ([600], "512")):
        with pytest.raises(ValueError, match=told):
            engine.generate(ids)


def test_callers_take_turns(model: Transformer, engine: Engine) -> None:
    """A long prompt (60 chunks) does not hold up a short one."""
    small = Engine(model, engine.tokenizer, chunk=8)
    long, short = small.generate([9] * 480, GREEDY), small.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))

    async def both() -> list[str]:
        done: list[str] = []

        async def drive(name: str, generation: object) -> None:
            assert [id async for id in generation]  # type: ignore[attr-defined]
            done.append(name)

        await asyncio.gather(drive("long", long), drive("short", short))
        return done

    assert asyncio.run(both()) == ["short", "long"]
