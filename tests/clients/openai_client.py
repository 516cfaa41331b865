"""What the official `openai` client sees of a server: one function for each part, run in order.

Called by tests/clients.rs as `openai_client.py URL KEY MODEL`, where the model knows tools, reasoning and infilling. It
prints a line for each part and ends at the first thing that is not as the client's types and OpenAI's and DeepSeek's
descriptions say.
"""

import asyncio
import json
import math
import sys
import time

import openai
from pydantic import BaseModel

URL, KEY, MODEL = sys.argv[1:4]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
beta = client.with_options(base_url=f"{URL}/beta")
ASK = [{"role": "user", "content": "Tell me of the king and his ship."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "enum": ["Berlin", "Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}


def chat(messages=None, **options):
    """A greedy answer of a few tokens, unless told otherwise."""
    options = {"model": MODEL, "max_tokens": 12, "temperature": 0, **options}
    extra = {"thinking": {"type": "disabled"}, **options.pop("extra_body", {})}
    return client.chat.completions.create(messages=messages or ASK, extra_body=extra, **options)


def check_usage(usage):
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    hit, miss = usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens
    assert hit + miss == usage.prompt_tokens and hit >= 0 and miss > 0, usage
    assert usage.prompt_tokens_details.cached_tokens == hit, usage
    # What the server was started with: 0.5, 0.1 and 2 a million tokens.
    cost = (miss * 0.5 + hit * 0.1 + usage.completion_tokens * 2) / 1e6
    assert math.isclose(usage.cost, cost, rel_tol=1e-9), (usage.cost, cost)


def models():
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL], listed
    assert client.models.retrieve(MODEL).id == MODEL


def plain_answer():
    answer = chat()
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.index == 0 and choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 12, answer
    check_usage(answer.usage)
    again = chat()
    assert again.choices[0].message.content == choice.message.content
    assert again.usage.prompt_cache_hit_tokens > 0, again.usage
    check_usage(again.usage)


def streams():
    whole = chat().choices[0].message.content
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length" and not any(reasons[:-1]), reasons
    assert not chunks[-1].choices and all(chunk.usage is None for chunk in chunks[:-1])
    check_usage(chunks[-1].usage)
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 1, "it comes in pieces"
    with client.chat.completions.stream(model=MODEL, messages=ASK, max_tokens=12, temperature=0,
                                        extra_body={"thinking": {"type": "disabled"}}) as stream:
        for _ in stream:
            pass
        assert stream.current_completion_snapshot.choices[0].message.content == whole


def reasoning():
    answer = chat(extra_body={"thinking": {"type": "enabled"}})
    message = answer.choices[0].message
    assert message.reasoning_content and not message.content, message
    assert answer.usage.completion_tokens_details.reasoning_tokens == 12, answer.usage
    chunks = list(chat(stream=True, extra_body={"thinking": {"type": "enabled"}}))
    pieces = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks]
    assert "".join(pieces) == message.reasoning_content, pieces


def sampling():
    hot = {"temperature": 1.5, "top_p": 0.95, "max_tokens": 16}
    one, same, other = (chat(seed=seed, **hot).choices[0].message.content for seed in (7, 7, 8))
    assert one == same and one != other
    several = chat(n=3, seed=7, **hot)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2] and len(set(texts)) == 3 and texts[0] == one
    assert several.usage.completion_tokens <= 48
    check_usage(several.usage)
    penalised = chat(frequency_penalty=2, presence_penalty=2, max_tokens=40).choices[0].message.content
    assert penalised != chat(max_tokens=40).choices[0].message.content


def stops_and_bias():
    text = chat(max_tokens=30).choices[0].message.content
    stop = text[7:10]
    answer = chat(max_tokens=30, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == text[: text.index(stop)], (answer, text)
    ids = client.post("/../tokenize", body={"prompt": " ship", "add_special_tokens": False}, cast_to=object)["tokens"]
    forced = chat(logit_bias={str(ids[0]): 100}, max_tokens=3, logprobs=True, top_logprobs=0).choices[0]
    assert len({entry.token for entry in forced.logprobs.content}) == 1, forced
    assert client.post("/../detokenize", body={"tokens": ids}, cast_to=object)["prompt"] == " ship"


def logprobs():
    choice = chat(logprobs=True, top_logprobs=5).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 5 and entry.token == entry.top_logprobs[0].token, entry
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob, abs_tol=1e-5) and entry.logprob <= 0
        assert 0 < sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-5
    assert bytes(sum((entry.bytes for entry in entries), [])).decode(errors="replace").startswith(choice.message.content)
    streamed = [entry for chunk in chat(logprobs=True, top_logprobs=5, stream=True) if chunk.choices
                and chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def tools():
    # Left to itself, a model that knows nothing of tools would call them for ever.
    answer = chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=200, temperature=1, seed=1)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls", choice
    call = choice.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.type == "function" and call.id and call.function.name == "get_weather"
    assert arguments["place"] in ("Berlin", "Paris", "Rome") and 1 <= arguments["days"] <= 7, arguments
    # What the tool said goes back.
    told = ASK + [choice.message.model_dump(exclude_none=True),
                  *({"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in choice.message.tool_calls)]
    assert chat(told, tools=[WEATHER]).choices[0].message.content is not None
    named = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(model=MODEL, messages=ASK, tools=[WEATHER], tool_choice=named, seed=1,
                                        parallel_tool_calls=False, max_tokens=200, extra_body={"thinking": {"type": "disabled"}}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds, kinds
    assert final.finish_reason == "tool_calls" and json.loads(final.message.tool_calls[0].function.arguments)


class Ship(BaseModel):
    name: str
    masts: int
    sails: list[bool]


def structured():
    for seed in range(3):
        schema = Ship.model_json_schema()
        schema["properties"]["name"]["maxLength"] = 12
        schema["properties"]["masts"]["maximum"] = 99
        schema["properties"]["masts"]["minimum"] = 0
        schema["properties"]["sails"]["maxItems"] = 4
        wanted = {"type": "json_schema", "json_schema": {"name": "ship", "schema": schema, "strict": True}}
        choice = chat(response_format=wanted, max_tokens=200, temperature=1, seed=seed).choices[0]
        assert choice.finish_reason == "stop", choice
        Ship.model_validate_json(choice.message.content)
    free = chat(response_format={"type": "json_object"}, max_tokens=300, temperature=1, seed=3).choices[0]
    if free.finish_reason == "stop":
        assert isinstance(json.loads(free.message.content), dict), free
    digits = chat(extra_body={"guided_regex": "[0-9]{3}-[a-f]{2}"}, max_tokens=40).choices[0].message.content
    assert len(digits) == 6 and digits[3] == "-" and digits[:3].isdigit(), digits


def completions():
    options = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    answer = client.completions.create(prompt="The king said to", **options)
    assert answer.object == "text_completion" and answer.choices[0].text and answer.usage.completion_tokens == 8
    check_usage(answer.usage)
    echoed = client.completions.create(prompt="The king said to", echo=True, **options)
    assert echoed.choices[0].text == "The king said to" + answer.choices[0].text
    streamed = client.completions.create(prompt="The king said to", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
    several = client.completions.create(prompt=["The king", "The queen"], n=2, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text
    told = client.completions.create(prompt="The king said to", logprobs=3, **options).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 8
    infilled = beta.completions.create(prompt="def add(a, b):\n", suffix="\n    return total", **options)
    assert infilled.choices[0].text and infilled.usage.prompt_tokens > 10


def prefix():
    messages = ASK + [{"role": "assistant", "content": "The king had a", "prefix": True}]
    answer = beta.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content and answer.usage.completion_tokens == 8


def experts():
    answer = chat(extra_body={"routed_experts": True}).choices[0]
    chosen = answer.routed_experts
    # The bundled model: three layers with experts, of which 4 are chosen.
    assert len(chosen) == 12 and all(len(token) == 3 and all(len(set(layer)) == 4 for layer in token) for token in chosen)
    assert all(0 <= expert < 32 for token in chosen for layer in token for expert in layer)


def errors():
    def fails(kind, call, code=None, param=None):
        try:
            call()
        except kind as error:
            assert code is None or error.code == code, (error.code, code)
            assert param is None or error.param == param, (error.param, param)
            assert error.body["message"] and error.body["type"], error.body
        else:
            raise AssertionError(f"no {kind.__name__}")

    stranger = client.with_options(api_key="sk-this-is-no-key-of-theirs")
    fails(openai.AuthenticationError, stranger.models.list, code="invalid_api_key")
    fails(openai.NotFoundError, lambda: chat(model="gpt-17"), code="model_not_found")
    fails(openai.BadRequestError, lambda: chat(temperature=7), param="temperature")
    fails(openai.BadRequestError, lambda: chat(messages="hello"))
    fails(openai.BadRequestError, lambda: chat([{"role": "pirate", "content": "hello"}]))
    fails(openai.BadRequestError, lambda: chat([{"role": "user", "content": "a ship " * 3000}]),
          code="context_length_exceeded")
    fails(openai.BadRequestError, lambda: chat(response_format={
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}))
    fails(openai.NotFoundError, lambda: client.post("/nothing", body={}, cast_to=object))


def cancelled():
    stream = chat(stream=True, max_tokens=1500, temperature=1, seed=5, logit_bias={"1": -100})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while True:
        text = client.get("/../metrics", cast_to=str)
        running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        if float(running[0].split()[-1]) == 0:
            break
        assert time.monotonic() < deadline, running
        time.sleep(0.1)


def at_once():
    async def all_of_them():
        many = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
        ask = [many.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"Count to {i}."}],
                                            max_tokens=8, temperature=0) for i in range(16)]
        return [answer.choices[0].message for answer in await asyncio.gather(*ask)]

    alone = [chat([{"role": "user", "content": f"Count to {i}."}], max_tokens=8, extra_body={"thinking": None})
             for i in range(3)]
    together = asyncio.run(all_of_them())
    for one, other in zip(alone, together):
        assert one.choices[0].message.content == other.content, (one, other)


for part in (models, plain_answer, streams, reasoning, sampling, stops_and_bias, logprobs, tools, structured, completions,
             prefix, experts, errors, cancelled, at_once):
    part()
    print("ok", part.__name__, flush=True)
