"""The in-process API over a small random checkpoint."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import BOS, EOS, VOCAB_SIZE, create_checkpoint
from transformers import AutoModelForCausalLM

from cluster import LLM, RequestOutput, SamplingParams
from cluster.core.request import FinishReason
from cluster.core.step import StepInput, StepOutput
from cluster.errors import CheckpointError, ConfigError, EngineFault, InvalidRequest

PROMPTS = ["def read_lines(path):", "a", "日本語 text", "x = [1, 2, 3]\n" * 4]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint(tmp_path_factory.mktemp("llama"), tokenizer=True)


@pytest.fixture(scope="module")
def shared_llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, device="cpu", dtype="float32", max_num_seqs=3, num_threads=1, kv_cache_bytes=2**20) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """Whatever a test does, the engine is empty and sound after it."""
    yield shared_llm
    engine = shared_llm._live_engine()
    engine.check_integrity()
    load = engine.load()
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.num_blocks)


def expected_greedy(checkpoint: Path, prompt: list[int], num_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        return model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)[
            0, len(prompt) :
        ].tolist()


def completions(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[candidate.token_ids for candidate in output.outputs] for output in outputs]


def test_results_come_in_prompt_order_with_text_and_tokens(llm: LLM, checkpoint: Path) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt)
        assert output.token_ids == expected_greedy(checkpoint, output.prompt_token_ids, 24)
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert output.finish_reason is FinishReason.LENGTH
        assert output.logprobs is None


def test_one_prompt_may_come_without_a_list(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    from_text = llm.generate("hello", GREEDY)
    from_ids = llm.generate(ids, GREEDY)
    assert completions(from_text) == completions(from_ids) == completions(llm.generate(["hello"], GREEDY))
    assert (from_text[0].prompt, from_ids[0].prompt) == ("hello", None)
    assert from_ids[0].prompt_token_ids == ids


def test_texts_and_token_ids_mix(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[1])
    mixed = llm.generate([PROMPTS[0], ids], GREEDY)
    assert completions(mixed) == completions(llm.generate(PROMPTS[:2], GREEDY))


def test_no_prompts_no_results(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    lengths = [3, 17, 1, 9]
    outputs = llm.generate(PROMPTS, [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in lengths])
    whole = llm.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == [w.token_ids[:n] for w, n in zip(whole, lengths, strict=True)]


def test_logprobs_of_the_chosen_and_the_likeliest(llm: LLM, checkpoint: Path) -> None:
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3))
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        logits_1TV = model(torch.tensor([output.prompt_token_ids + output.token_ids])).logits
    expected_TV = logits_1TV[0, len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
    assert output.logprobs is not None
    assert [token.token_id for token in output.logprobs] == output.token_ids
    for token, row_V in zip(output.logprobs, expected_TV, strict=True):
        assert token.logprob == pytest.approx(float(row_V[token.token_id]), abs=1e-4)
        values, ids = row_V.topk(3)
        assert [token_id for token_id, _ in token.top_logprobs] == ids.tolist()
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_seed_repeats_whatever_else_runs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, seed=5, ignore_eos=True)
    together = llm.generate(PROMPTS, params)
    alone = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
    assert completions(together) == completions(alone)
    other = llm.generate(PROMPTS, SamplingParams(max_tokens=16, seed=6, ignore_eos=True))
    assert all(a != b for a, b in zip(completions(together), completions(other), strict=True))


def test_without_a_seed_each_call_differs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    assert completions(llm.generate("a", params)) != completions(llm.generate("a", params))


def test_candidates_differ_and_the_first_is_the_single_one(llm: LLM) -> None:
    params = {"max_tokens": 12, "seed": 8, "ignore_eos": True}
    outputs = llm.generate(PROMPTS, SamplingParams(n=3, **params))
    single = llm.generate(PROMPTS, SamplingParams(**params))
    for output, first in zip(outputs, single, strict=True):
        assert [candidate.index for candidate in output.outputs] == [0, 1, 2]
        assert len({tuple(candidate.token_ids) for candidate in output.outputs}) == 3
        assert output.token_ids == first.token_ids
        assert (output.text, output.logprobs) == (output.outputs[0].text, None)


def test_a_stop_string_cuts_the_text_and_ends_the_candidate(llm: LLM) -> None:
    bias = dict.fromkeys(range(128, VOCAB_SIZE), -100.0)  # readable text: one character a token
    params = {"max_tokens": 40, "temperature": 0.0, "logit_bias": bias, "ignore_eos": True, "logprobs": 0}
    (whole,) = llm.generate("a", SamplingParams(**params))
    stop = whole.text[10:13]
    at = whole.text.index(stop)
    (output,) = llm.generate("a", SamplingParams(stop=("never this", stop), **params))
    assert output.text == whole.text[:at]
    assert output.finish_reason is FinishReason.STOP
    assert output.token_ids == whole.token_ids[: at + 3]
    assert output.logprobs is not None
    assert len(output.logprobs) == at + 3


def test_one_candidate_stops_and_the_others_go_on(llm: LLM) -> None:
    params = {"n": 3, "max_tokens": 30, "seed": 4, "ignore_eos": True}
    bias = dict.fromkeys(range(128, VOCAB_SIZE), -100.0)
    (whole,) = llm.generate("a", SamplingParams(logit_bias=bias, **params))
    stop = whole.outputs[1].text[5:8]
    (output,) = llm.generate("a", SamplingParams(logit_bias=bias, stop=(stop,), **params))
    assert [candidate.finish_reason for candidate in output.outputs] == [
        FinishReason.STOP if stop in candidate.text else FinishReason.LENGTH for candidate in whole.outputs
    ]
    assert output.outputs[1].finish_reason is FinishReason.STOP
    assert [c.text for c in output.outputs] == [c.text.split(stop)[0] for c in whole.outputs]


def test_the_end_of_text_ends_it_unless_ignored(llm: LLM) -> None:
    end = {EOS: 100.0}
    (output,) = llm.generate("a", SamplingParams(max_tokens=9, temperature=0.0, logit_bias=end))
    assert (output.token_ids, output.text, output.finish_reason) == ([EOS], "", FinishReason.STOP)
    (output,) = llm.generate("a", SamplingParams(max_tokens=9, temperature=0.0, logit_bias=end, min_tokens=4))
    assert output.token_ids[4:] == [EOS]
    assert EOS not in output.token_ids[:4]
    (output,) = llm.generate("a", SamplingParams(max_tokens=9, temperature=0.0, logit_bias=end, ignore_eos=True))
    assert (output.token_ids, output.finish_reason) == ([EOS] * 9, FinishReason.LENGTH)


def test_a_stop_token_ends_it(llm: LLM) -> None:
    (whole,) = llm.generate("a", GREEDY)
    stop = whole.token_ids[6]
    at = whole.token_ids.index(stop)
    (output,) = llm.generate(
        "a", SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    )
    assert (output.token_ids, output.finish_reason) == (whole.token_ids[: at + 1], FinishReason.STOP)
    assert output.text == llm.tokenizer.decode(whole.token_ids[:at])


def test_the_context_is_the_last_limit(checkpoint: Path) -> None:
    with LLM(checkpoint, device="cpu", max_model_len=20, num_threads=1, kv_cache_bytes=2**20) as llm:
        (output,) = llm.generate([[65] * 13], SamplingParams(temperature=0.0, ignore_eos=True))
        assert (len(output.token_ids), output.finish_reason) == (7, FinishReason.LENGTH)
        with pytest.raises(InvalidRequest, match=r"prompts\[1\].*20 tokens.*holds 20"):
            llm.generate([[65], [65] * 20], GREEDY)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["fine", ""], r"prompts\[1\].*empty"),
        (["fine", []], r"prompts\[1\].*no tokens"),
        (["fine", [1, VOCAB_SIZE]], r"prompts\[1\].*vocabulary"),
        (["fine", [1, -1]], r"prompts\[1\].*vocabulary"),
        (["fine", [1, "x"]], r"prompts\[1\]: a prompt is a string or"),
        (["fine", "x" * 600], r"prompts\[1\].*600 tokens"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm: LLM, prompts: list[object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    assert not llm._live_engine().has_work


def test_parameters_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 prompts and 3 sampling parameters"):
        llm.generate(["a", "b"], [GREEDY] * 3)
    with pytest.raises(InvalidRequest, match=f"names token {VOCAB_SIZE}"):
        llm.generate("a", SamplingParams(stop_token_ids=(VOCAB_SIZE,)))


def test_chat_renders_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, GREEDY)
    assert output.prompt_token_ids == llm.tokenizer.encode("<|user|>hi\n<|assistant|>")
    other = [{"role": "system", "content": "be brief"}, *conversation]
    both = llm.chat([conversation, other], GREEDY)
    assert both[0] == output
    assert both[1].prompt_token_ids == llm.tokenizer.encode("<|system|>be brief\n<|user|>hi\n<|assistant|>")


def test_chat_needs_a_template(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).symlink_to(file)
    with (
        LLM(tmp_path, device="cpu", num_threads=1, kv_cache_bytes=2**20) as llm,
        pytest.raises(InvalidRequest, match="no chat template"),
    ):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY)


def test_the_progress_bar_changes_no_result(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = llm.generate(PROMPTS, GREEDY)
    assert capsys.readouterr() == ("", "")
    assert llm.generate(PROMPTS, GREEDY, progress=True) == quiet
    shown = capsys.readouterr()
    assert (shown.out, "4/4" in shown.err, f"{4 * 24} tokens" in shown.err) == ("", True, True)


def test_ctrl_c_in_the_middle_of_a_step_ends_the_call_after_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = llm._live_engine()._executor
    collect, steps = executor.collect, []

    def interrupted_collect() -> object:
        steps.append(None)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return collect()

    expected = llm.generate("a", GREEDY)
    monkeypatch.setattr(executor, "collect", interrupted_collect)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert len(steps) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate("a", GREEDY) == expected


def test_a_fault_of_the_model_is_raised(checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cpu", num_threads=1, kv_cache_bytes=2**20)
    executor = llm._live_engine()._executor
    with torch.inference_mode():
        executor._runner._model.model.norm.weight.fill_(math.nan)
    for _ in range(2):  # and again: the engine lives on
        with pytest.raises(EngineFault, match="not finite"):
            llm.generate(["a", "b"], GREEDY)
    llm.shutdown()


def test_a_prompt_that_fails_is_named_and_the_next_call_works(llm: LLM) -> None:
    engine = llm._live_engine()
    expected = llm.generate("a", GREEDY)
    bad = [65] * 9
    execute = engine._executor._runner.execute

    def fail_one(step: StepInput) -> StepOutput:
        output = execute(step)
        failed = {new.sequence_id: "not finite" for new in step.new if list(new.token_ids) == bad}
        return replace(output, failed=failed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._executor._runner, "execute", fail_one)
        with pytest.raises(EngineFault, match=r"^prompts\[1\]: not finite"):
            llm.generate(["a", bad, "b"], GREEDY)
    assert not engine.has_work
    assert llm.generate("a", GREEDY) == expected


def test_a_fault_of_the_whole_engine_names_no_prompt(checkpoint: Path) -> None:
    with LLM(checkpoint, device="cpu", num_threads=1, kv_cache_bytes=2**20) as llm:
        engine = llm._live_engine()
        engine._executor._runner._kv_caches.clear()
        for _ in range(2):
            with pytest.raises(EngineFault, match=r"^the forward pass failed"):
                llm.generate(["a", "b"], GREEDY)


def test_refusals_of_chats_name_the_conversation(llm: LLM) -> None:
    fine = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match=r"^messages\[1\]: the prompt has \d+ tokens"):
        llm.chat([fine, [{"role": "user", "content": "x" * 600}]], GREEDY)
    with pytest.raises(InvalidRequest, match=r"^messages\[1\]: the text holds a NUL") as caught:
        llm.chat([fine, [{"role": "user", "content": "\0"}]], GREEDY)
    assert caught.value.field == "chat"


def test_min_tokens_beyond_the_context_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompts\[0\]: min_tokens is 510") as caught:
        llm.generate([[65] * 9], SamplingParams(min_tokens=510))
    assert caught.value.field == "sampling.min_tokens"


def test_after_shutdown_it_says_so(checkpoint: Path) -> None:
    with LLM(checkpoint, device="cpu", num_threads=1, kv_cache_bytes=2**20) as llm:
        assert llm.model.architecture == "LlamaForCausalLM"
    llm.shutdown()
    with pytest.raises(InvalidRequest, match="shut down"):
        llm.generate("a", GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device is 'gpu'; it must be one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"model_impl": "own"}, "model_impl is 'own'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 31}, "max_num_batched_tokens is 31.*at least max_num_seqs, 32"),
        ({"max_model_len": 513}, "513; it must be from 2 to 512"),
    ],
)
def test_wrong_arguments_are_refused(checkpoint: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(checkpoint, **{"device": "cpu", "num_threads": 1, **arguments})


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        LLM(tmp_path)


def test_other_architectures_run_through_transformers(tmp_path: Path) -> None:
    checkpoint = create_checkpoint(
        tmp_path, "Phi3ForCausalLM", tokenizer=True, sliding_window=9, pad_token_id=EOS, bos_token_id=BOS
    )
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 16}
    with LLM(checkpoint, device="cpu", num_threads=1, kv_cache_bytes=2**20, **limits) as llm:
        assert llm.model.backend.startswith("transformers")
        for output in llm.generate(PROMPTS, GREEDY):
            assert output.token_ids == expected_greedy(checkpoint, output.prompt_token_ids, 24)


def test_generation_loads_no_server(checkpoint: Path) -> None:
    program = (
        "import sys\nfrom cluster import LLM, SamplingParams\n"
        f"llm = LLM({str(checkpoint)!r}, device='cpu', num_threads=1, kv_cache_bytes=2**20)\n"
        "print(llm.generate('a', SamplingParams(max_tokens=2))[0].finish_reason.value)\n"
        "print([m for m in ('ray', 'grpc', 'cluster.serve', 'cluster.gateway', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[1] == "[]"


def test_a_group_of_shards_gives_the_same_tokens(checkpoint: Path, shared_llm: LLM):
    expected = completions(shared_llm.generate(PROMPTS, GREEDY))
    with LLM(checkpoint, device="cpu", dtype="float32", max_num_seqs=3, kv_cache_bytes=2**20, tp=2) as llm:
        assert (llm.model.tp_size, llm.model.pp_size) == (2, 1)
        assert completions(llm.generate(PROMPTS, GREEDY)) == expected


def test_auto_is_one_shard_where_one_holds_the_model(checkpoint: Path):
    with LLM(checkpoint, device="cpu", kv_cache_bytes=2**20, tp="auto", pp="auto") as llm:
        assert (llm.model.tp_size, llm.model.pp_size) == (1, 1)


@pytest.mark.parametrize("size", [0, "two", 1.5])
def test_a_size_that_is_none_is_told(checkpoint: Path, size: object):
    with pytest.raises(ConfigError, match="pp must be at least 1, or auto"):
        LLM(checkpoint, pp=size)
