"""A decoder exported with its cache generates from the file what PyTorch generates, with one file for prompt and steps."""

from __future__ import annotations

import numpy
import onnxruntime
import pytest
import torch
from transformers import (
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutput
from zoo.models import ZOO, randomize

import tautomer
from tautomer.rewrite.errors import ExportError

NEW = 50
TOKENS = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=32, n_layer=3, n_head=4, **TOKENS))


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=128, **TOKENS))


def generate(session, tokens, masked):
    """Greedy tokens from an empty cache, and the smallest distance between the best two logits of a step."""
    empty = {x.name: numpy.zeros([1, x.shape[1], 0, x.shape[3]], "float32") for x in session.get_inputs() if "past" in x.name}
    names = [x.name for x in session.get_outputs()]
    feed, seen, margins = {"input_ids": tokens, **empty}, tokens, []
    for _ in range(NEW):
        if masked:
            feed["attention_mask"] = numpy.ones_like(seen)
        found = dict(zip(names, session.run(None, feed), strict=True))
        last = found["logits"][0, -1]
        second, best = numpy.sort(last)[-2:]
        margins.append(best - second)
        token = last.argmax().reshape(1, 1)
        seen = numpy.concatenate([seen, token], 1)
        feed = {"input_ids": token, **{name: found[name.replace("past_key_values", "present")] for name in empty}}
    return seen, min(margins)


@pytest.mark.parametrize(
    ("make", "masked"), [(gpt2, False), *(pytest.param(llama, masked, marks=pytest.mark.zoo) for masked in (False, True))]
)
def test_the_file_generates_what_pytorch_generates(make, masked, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        cache = model(torch.randint(1, 101, (2, 5)), use_cache=True).past_key_values
    call = {"input_ids": torch.randint(1, 101, (2, 3)), "past_key_values": cache, "use_cache": True}
    if masked:
        call["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    fast = tautomer.optimize(model, (), call, target="onnxruntime")
    report = tautomer.export_onnx(fast, tmp_path / "m.onnx", (), call)
    assert report.error is not None and report.error <= 1e-5 and report.nodes["Attention"] == 3
    assert "Transpose" not in report.nodes and ("Reshape" in report.nodes) == (make is llama)  # a rotary reads heads apart
    assert masked == ("LessOrEqual" in report.nodes)  # a mask of sizes alone is gone
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    cached = [f"{{}}.{layer}.{part}" for layer in (0, 1, 2) for part in ("key", "value")]
    assert {x.name for x in session.get_inputs()} - {"input_ids", "attention_mask"} == {
        x.format("past_key_values") for x in cached
    }
    assert [x.name for x in session.get_outputs()] == ["logits", *(x.format("present") for x in cached)]

    prompt = torch.randint(1, 101, (1, 4))
    found, margin = generate(session, prompt.numpy(), masked)
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert margin > 1e-5  # no tie decides
    assert found.tolist() == expected.tolist()


def test_a_cache_that_counts_in_python_is_refused(tmp_path):
    # A sliding window's positions would be constants of the file: right for one step, wrong when fed what it returned.
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=6, **TOKENS)).eval()
    with torch.no_grad():
        cache = model(torch.randint(1, 101, (2, 9)), use_cache=True).past_key_values
    call = {"input_ids": torch.randint(1, 101, (2, 1)), "past_key_values": cache, "use_cache": True}
    with pytest.raises(ExportError, match=r"counts its steps in Python \(cumulative_length 9 → 10\).*\n.*sliding_window=None"):
        tautomer.export_onnx(model, tmp_path / "m.onnx", (), call)


def generate_padded(session, ids, mask, new):
    """Greedy tokens of a batch of prompts padded on the left, from an empty cache, and the smallest margin."""
    empty = {
        x.name: numpy.zeros([len(ids), x.shape[1], 0, x.shape[3]], "float32") for x in session.get_inputs() if "past" in x.name
    }
    names = [x.name for x in session.get_outputs()]
    given, past, seen, margins = ids, empty, ids, []
    for _ in range(new):
        positions = numpy.clip(mask.cumsum(1) - 1, 0, None)[:, -given.shape[1] :]
        feed = {"input_ids": given, "attention_mask": mask, "position_ids": positions, **past}
        found = dict(zip(names, session.run(None, feed), strict=True))
        last = found["logits"][:, -1]
        assert numpy.isfinite(last).all()
        second, best = numpy.sort(last)[:, -2:].T
        margins.append((best - second).min())
        given = last.argmax(1)[:, None]
        seen, mask = numpy.concatenate([seen, given], 1), numpy.concatenate([mask, numpy.ones_like(given)], 1)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return seen, min(margins)


@pytest.mark.zoo
@pytest.mark.parametrize("make", [gpt2, llama])
def test_prompts_of_two_lengths_generate_what_pytorch_generates(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    prompts, mask = torch.randint(1, 101, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3], prompts[0, :3] = 0, 0
    with torch.no_grad():
        cache = model(prompts[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    call = {"input_ids": prompts[:, 4:], "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, 4:]}
    call |= {"past_key_values": cache, "use_cache": True}
    fast = tautomer.optimize(model, (), call, target="onnxruntime")
    report = tautomer.export_onnx(fast, tmp_path / "m.onnx", (), call)
    assert report.error is not None and report.error <= 1e-5 and report.nodes["Attention"] == 3, report
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found, margin = generate_padded(session, prompts.numpy(), mask.numpy(), 12)
    wanted = model.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert margin > 1e-5 and found.tolist() == wanted.tolist()


def bart():
    """The model of the zoo, with its head."""
    model, call = ZOO["bart"]()
    return BartForConditionalGeneration(model.config), call


ENCODERS = {
    "bart": ("input_ids", "encoder_layers", "decoder_layers"),
    "t5": ("input_ids", "num_layers", "num_decoder_layers"),
    "whisper": ("input_features", "encoder_layers", "decoder_layers"),
}


@pytest.mark.parametrize("name", ["t5", *(pytest.param(name, marks=pytest.mark.zoo) for name in ("bart", "whisper"))])
def test_an_encoder_decoder_is_two_files(name, tmp_path):
    """The first reads the source and a start, the second goes on from its caches, of which the encoder's stays what it is."""
    given, *layers = ENCODERS[name]
    model, call = bart() if name == "bart" else ZOO[name]()
    for count in layers:
        setattr(model.config, count, 1)
    model.config.use_cache, model.config.max_target_positions = True, 40
    model = randomize(type(model)(model.config))
    source, start = call[given], call["decoder_input_ids"]
    with torch.no_grad():
        known = model(**{given: source, "decoder_input_ids": start}, use_cache=True)
    states = BaseModelOutput(last_hidden_state=known.encoder_last_hidden_state)
    first = {given: source, "decoder_input_ids": start[:, :3], "use_cache": True}
    later = {"decoder_input_ids": start[:, :2], "encoder_outputs": states, "past_key_values": known.past_key_values}
    sessions = []
    for file, kwargs in (("first.onnx", first), ("later.onnx", {**later, "use_cache": True})):
        report = tautomer.export_onnx(model, tmp_path / file, (), kwargs)
        assert report.error is not None and report.error <= 1e-5
        sessions.append(onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"]))

    shorter = source[:1, :-2] if given == "input_ids" else source[:1]  # another length than the example's
    tokens, margins, held = numpy.zeros((1, 1), "int64"), [], {}
    feed = {given: shorter.numpy(), "decoder_input_ids": tokens}
    for step in range(20):
        session = sessions[bool(step)]
        found = session.run(None, {x.name: feed[x.name] for x in session.get_inputs()})
        held |= {x.name.replace("present", "past_key_values"): y for x, y in zip(session.get_outputs(), found, strict=True)}
        second, best = numpy.sort(held["logits"][0, -1])[-2:]
        margins.append(best - second)
        token = held["logits"][:, -1:].argmax(-1)
        tokens = numpy.concatenate([tokens, token], 1)
        feed = {**held, "decoder_input_ids": token, "encoder_outputs_last_hidden_state": held["encoder_last_hidden_state"]}
    options = {"max_new_tokens": 20, "do_sample": False, "decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
    wanted = model.generate(**{given: shorter}, **options, eos_token_id=None, forced_eos_token_id=None)  # BART ends by force
    assert min(margins) > 1e-5 and tokens[:, 1:].tolist() == wanted[:, -20:].tolist()  # Whisper leaves the first one out
