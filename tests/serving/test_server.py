"""The HTTP server, with OpenAI's own client."""

import asyncio
import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import tokenizers
import uvicorn
from absl import flags
from absl.testing import flagsaver
from test_prompt import ROOT, save_run
from tiny_models import random_variables

from effjax import serving
from effjax.data.tokenizers import ByteTokenizer
from effjax.depth import MixtureOfRecursions
from effjax.ffn import Gated
from effjax.heads import Embedding
from effjax.interop import load_hf
from effjax.mixers import Attention
from effjax.models import DecoderLM, TextEncoder
from effjax.serving.api import create_app
from effjax.serving.chat import ChatTemplate
from effjax.serving.server import Loaded, find_draft, load_folder, main, serve

KEY = "a secret"
TOKENIZER = ByteTokenizer()
SIZE = {"d_model": 16, "num_layers": 1, "ffn": Gated(hidden_dim=16)}
# Decoded depth-wise, as it suits the model.
DECODER = DecoderLM(
    d_model=16,
    num_layers=2,
    ffn=None,
    max_seq_len=96,
    mixers=(Attention(2, 1),),
    depth=MixtureOfRecursions(2, "cycle"),
)
ENCODER = TextEncoder(
    **SIZE, max_seq_len=32, head=Embedding(), mixers=(Attention(2, 1, causal=False),)
)
GREEDY_SAMPLING = serving.Sampling(temperature=0)
GREEDY = {"model": "tiny", "temperature": 0}


@contextlib.contextmanager
def running(service):
    """The address of a server on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(60)


@pytest.fixture(scope="module")
def variables():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return {model: random_variables(model, rng) for model in (DECODER, ENCODER)}


def loaded_of(variables, model):
    ends = frozenset([TOKENIZER.eos_id])
    return Loaded(model, variables[model], TOKENIZER, ChatTemplate(), ends)


@pytest.fixture(scope="module")
def service(variables):
    loaded = loaded_of(variables, DECODER)
    limits = {"num_slots": 2, "max_waiting": 2, "max_body_bytes": 10_000, "timeout": 60.0}
    return serve(loaded, "tiny", api_key=KEY, **limits)


@pytest.fixture(scope="module")
def url(service):
    with running(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def greedy_text(variables, prompt, count):
    ids = np.concatenate([[TOKENIZER.bos_id], TOKENIZER.encode(prompt)])
    found = serving.generate(
        DECODER,
        variables[DECODER],
        [ids],
        count,
        sampling=GREEDY_SAMPLING,
        stop_tokens=[TOKENIZER.eos_id],
    )
    (tokens,) = found.completions()
    return TOKENIZER.decode(tokens), len(tokens), found.logprobs[0]


def test_completions_are_what_the_model_generates(client, variables):
    prompts = ["def f(", "import "]
    found = client.completions.create(prompt=prompts, max_tokens=10, logprobs=0, **GREEDY)
    for choice, prompt in zip(found.choices, prompts, strict=True):
        text, count, logprobs = greedy_text(variables, prompt, 10)
        assert choice.text == text
        assert choice.finish_reason == ("length" if count == 10 else "stop")
        np.testing.assert_allclose(
            choice.logprobs.token_logprobs, logprobs[:count], rtol=1e-4, atol=1e-4
        )
    assert found.usage.prompt_tokens == sum(map(len, prompts)) + 2
    assert client.models.list().data[0].id == found.model == "tiny"


def test_a_stream_is_the_whole_in_pieces(client):
    options = {
        "prompt": "for",
        "max_tokens": 12,
        "seed": 7,
        "n": 2,
        "model": "tiny",
        "temperature": 2,
    }
    whole = client.completions.create(**options)
    assert whole.choices[0].text != whole.choices[1].text
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    texts, ends = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage == whole.usage


def test_a_chat_is_rendered_by_the_template(client, variables):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    want, *_ = greedy_text(variables, "user: Hello\nassistant:", 8)
    found = client.chat.completions.create(messages=messages, max_completion_tokens=8, **GREEDY)
    assert found.choices[0].message.content == want
    stream = client.chat.completions.create(messages=messages, max_tokens=8, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == want


def test_a_stop_string_ends_a_text_before_it(client):
    options = {"prompt": "x", "max_tokens": 60, "seed": 3, "temperature": 2, "model": "tiny"}
    text = client.completions.create(**options).choices[0].text
    stop = text[4:6]
    found = client.completions.create(**options, stop=[stop, "never to be seen"]).choices[0]
    assert found.text == text[: text.index(stop)] and found.finish_reason == "stop"
    chunks = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.text


def metrics_of(url):
    """Numbers of the page that Prometheus reads, those without labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = [line.split() for line in lines if line.startswith("effjax_") and "{" not in line]
    return {name.removeprefix("effjax_"): float(value) for name, value in pairs}


def post(url, path="/v1/completions", key=KEY, **body):
    return httpx.post(
        f"{url}{path}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
    )


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "prompt", "Field required"),
        ({"prompt": "x", "temperature": 3}, 400, "temperature", "less than or equal to 2, not '3'"),
        ({"prompt": "x", "best_of": 2}, 400, "best_of", "not a field that is honoured here"),
        ({"prompt": "x", "model": "gpt"}, 404, "model", "'gpt' is not here; valid: 'tiny'"),
        ({"prompt": "x" * 200}, 400, None, "the prompt has 201 tokens; valid: fewer than 96"),
        ({"prompt": [300]}, 400, None, "prompt has the id 300; valid: 0 to 259"),
        ({"prompt": "x" * 20_000}, 413, None, "the body is larger than 10000 bytes"),
    ],
)
def test_bad_requests_get_errors_of_openais_form(url, body, status, param, message):
    answer = post(url, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_what_is_not_json_not_there_or_not_allowed(url):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=b"{", headers=headers)
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]["message"]
    assert post(url, "/v1/other").json()["error"]["message"] == "Not Found"
    assert post(url, "/v1/embeddings", input="x").status_code == 404
    for key in ("another", KEY[:-1]):
        answer = post(url, key=key, prompt="x")
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_too_many_requests_are_turned_away_and_who_leaves_frees_the_slot(
    url, client, service, monkeypatch
):
    """Long streams fill the slots and the queue; closing them lets others in."""
    goes_on = threading.Event()
    step = service.engine._decoder._step

    def slow_step():
        goes_on.wait(60)
        return step()

    monkeypatch.setattr(service.engine._decoder, "_step", slow_step)
    long = {"prompt": "x", "max_tokens": 90, "stream": True, "temperature": 2, "model": "tiny"}

    async def fill():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as many:
            tasks = [asyncio.create_task(many.completions.create(**long)) for _ in range(6)]
            async with asyncio.timeout(60):
                done, held = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            refused = [error for task in done if (error := task.exception())]
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            return refused

    refused = asyncio.run(fill())
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert error.response.headers["retry-after"] == "1"
    until = time.monotonic() + 60  # those who left are noticed although nothing is decoded
    while service.engine.num_active + service.engine.num_waiting:
        assert time.monotonic() < until
        time.sleep(0.01)
    goes_on.set()
    assert client.completions.create(prompt="x", max_tokens=2, **GREEDY).usage.total_tokens <= 4


def test_health_and_metrics_need_no_key(url, client):
    client.completions.create(prompt="x", max_tokens=4, **GREEDY)
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    metrics = metrics_of(url)
    mean_depth = metrics["recursions_total"] / metrics["recursion_tokens_total"]
    assert 1 <= mean_depth <= 2  # the first recursion is for every token
    page = httpx.get(f"{url}/metrics").text
    assert 'effjax_requests_total{path="/v1/completions",status="200"}' in page
    for name in ("generated_tokens_total", "prompt_tokens_total", "active", "request_seconds_sum"):
        assert f"effjax_{name}" in page


def test_a_request_that_takes_too_long(variables):
    loaded = loaded_of(variables, DECODER)
    with running(serve(loaded, "tiny", num_slots=2, timeout=0.001)) as url:
        answer = post(url, prompt="x", max_tokens=90, temperature=2)
        assert answer.status_code == 504
        assert answer.json()["error"]["message"] == "the request took longer than 0.001 seconds"


def test_embeddings_are_truncated_to_the_dimensions_asked_for(variables):
    loaded = loaded_of(variables, ENCODER)
    texts = ["one", "a longer text", "x"]
    with (
        running(serve(loaded, "encoder")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        whole, short = (
            np.array(
                [
                    d.embedding
                    for d in client.embeddings.create(model="encoder", input=texts, **o).data
                ]
            )
            for o in ({"encoding_format": "float"}, {"dimensions": 4})
        )
        with pytest.raises(openai.BadRequestError, match="dimensions=17; valid: 1 to 16"):
            client.embeddings.create(model="encoder", input=texts, dimensions=17)
        with pytest.raises(openai.BadRequestError, match="has 33 tokens; valid: 1 to 32"):
            client.embeddings.create(model="encoder", input="x" * 33)
        coded = post(url, "/v1/embeddings", input="one", encoding_format="base64").json()
    ids = TOKENIZER.encode(texts[1])
    want = ENCODER.apply(variables[ENCODER], ids[None]).embeddings[0]
    want /= np.linalg.norm(want)
    np.testing.assert_allclose(whole[1], want, rtol=1e-4, atol=1e-5)
    cut = whole[:, :4] / np.linalg.norm(whole[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(short, cut, rtol=1e-4, atol=1e-5)
    decoded = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, whole[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drafts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_serves_a_run_until_it_is_told_to_end(tmp_path, drafts):
    model, variables = save_run(tmp_path / "run", "transformer")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "effjax.serving.server", f"--workdir={tmp_path / 'run'}"]
    if drafts:  # for itself, so that all of a draft stays
        command += [f"--draft_workdir={tmp_path / 'run'}", "--draft_tokens=2"]
    process = subprocess.Popen(
        [*command, f"--port={port}", "--name=mine"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        lines = [next(process.stderr)]
        while "running on" not in lines[-1]:
            lines.append(next(process.stderr))  # StopIteration if it has ended
        answer = httpx.post(
            f"{url}/v1/completions", json={"prompt": "x", "temperature": 0}, timeout=60
        ).json()
        metrics = metrics_of(url)
    finally:
        process.terminate()
        rest = process.communicate(timeout=60)[1]
    prompt = np.array([TOKENIZER.bos_id, ord("x")])
    found = serving.generate(
        model, variables, [prompt], 16, sampling=GREEDY_SAMPLING, stop_tokens=[TOKENIZER.eos_id]
    )
    assert answer["choices"][0]["text"] == TOKENIZER.decode(found.completions()[0])
    assert answer["model"] == "mine"
    if drafts:
        assert metrics["accepted_draft_tokens_total"] == metrics["draft_tokens_total"] > 0
    assert "Traceback" not in "".join(lines) + rest


@pytest.mark.parametrize("given", [{}, {"workdir": "runs/mor", "hf": "llama"}])
def test_one_model_has_to_be_named(given):
    flags.FLAGS.mark_as_parsed()
    with (
        flagsaver.flagsaver(**{"workdir": None, "hf": None} | given),
        pytest.raises(ValueError, match="give one of --workdir and --hf"),
    ):
        main()


def test_what_drafts_is_found(variables):
    loaded = loaded_of(variables, DECODER)
    assert find_draft(loaded) is None
    draft = find_draft(loaded, early_exit=1, num_tokens=2)
    assert (draft.model.depth.num_recursions, draft.num_tokens) == (1, 2)
    folder = ROOT / "tests/fixtures/hf/llama"
    llama, llama_variables = load_hf(folder)
    assert find_draft(loaded, hf=folder).model == llama
    plain = Loaded(llama, llama_variables, *loaded[2:])
    assert find_draft(plain, early_exit=1).model == llama.clone(num_layers=1)
    with pytest.raises(ValueError, match="draft_workdir and early_exit are given; valid: one"):
        find_draft(loaded, workdir="runs/small", early_exit=1)
    with pytest.raises(ValueError, match="a draft for a model that embeds"):
        serve(loaded_of(variables, ENCODER), "encoder", draft=draft)


@pytest.mark.slow
def test_a_hugging_face_folder_is_served_with_its_own_ends(tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(ROOT / "tests/fixtures/hf/llama", folder)
    words = {word: i for i, word in enumerate(["<unk>", "one", "two", "<eos>", "<turn>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<eos>", "<turn>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    loaded = load_folder(folder)
    assert loaded.stop_tokens == {3, 4}
    with running(serve(loaded, "llama")) as url:
        body = {"prompt": "one two", "temperature": 0, "max_tokens": 5}
        usage = post(url, **body).json()["usage"]
    found = serving.generate(
        loaded.model,
        loaded.variables,
        [np.array([1, 2])],
        5,
        sampling=GREEDY_SAMPLING,
        stop_tokens=[3, 4],
    )
    assert usage == {
        "prompt_tokens": 2,
        "completion_tokens": found.lengths[0],
        "total_tokens": 2 + found.lengths[0],
    }


def test_templates_of_folders(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    assert ChatTemplate.of_folder(tmp_path).render(messages) == "user: Hi\nassistant:"
    config = {
        "bos_token": {"content": "<s>"},
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of_folder(tmp_path)
    assert template.render(messages) == "<s>[user]Hi[assistant]"
    with pytest.raises(ValueError, match="no system here"):
        template.render([{"role": "system", "content": "x"}])
    with pytest.raises(ValueError, match="chat_template, line 1"):
        ChatTemplate("{% if %}")
