"""Token by token, with the parameters of the model itself, at a constant size of state."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
import torch
from torch import nn

import tautomer
from tautomer.passes.attention.transfer import Transfer
from tautomer.rewrite.errors import UsageError


@pytest.fixture
def fast(byte_lm: Any, held_out: Any) -> Any:
    byte_lm.config.use_cache = False
    data = [held_out[i * 64 : (i + 1) * 64].long()[None] for i in range(9)]
    recipe = tautomer.LongContext("hybrid", window=16, transfer=Transfer(steps=3))
    return tautomer.optimize(byte_lm, (data[0],), recipe=recipe, data=data, check=False)


@torch.no_grad()
def test_the_byte_model_generates_what_its_whole_form_does(fast: Any, held_out: Any) -> None:
    decoder = tautomer.decoder(fast)
    assert decoder.constant and len(decoder.checked) == 3
    prompt = torch.stack([held_out[:40], held_out[500:540]]).long()
    logits, state = decoder.prefill(prompt)
    torch.testing.assert_close(logits, fast(prompt).logits, rtol=1e-4, atol=1e-4)
    tokens, sizes = prompt, set[int]()
    for _ in range(30):
        wanted = fast(tokens).logits[:, -1]
        torch.testing.assert_close(logits if logits.ndim == 2 else logits[:, -1], wanted, rtol=1e-4, atol=2e-4)
        tokens = torch.cat((tokens, wanted.argmax(-1, keepdim=True)), 1)
        logits, state = decoder.step(tokens[:, -1], state)
        sizes.add(state.bytes)
    assert len(sizes) == 1 and state.position == 70
    assert torch.equal(decoder.generate(prompt, 30), tokens)
    one = decoder.step(tokens[1:, -1:], state.rows(torch.tensor([1])))[0]
    torch.testing.assert_close(one, decoder.step(tokens[:, -1], state)[0][1:], rtol=1e-4, atol=1e-4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.head(y.transpose(1, 2).flatten(2))
        return out


IDS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))


def small(recipe: Any = None) -> Any:
    return tautomer.optimize(Model().eval(), (IDS,), recipe=recipe or tautomer.LongContext("window", window=3), check=False)


def test_it_follows_the_training_of_the_model() -> None:
    fast = small()
    decoder = tautomer.decoder(fast)
    before = decoder.prefill(IDS)[0]
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.5)
    after = decoder.prefill(IDS)[0]
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, fast(IDS))
    torch.testing.assert_close(decoder.step(IDS[:, 8], decoder.prefill(IDS[:, :8])[1])[0], after[:, 8])


def test_softmax_that_was_left_keeps_all_keys_and_says_so() -> None:
    fast = small("inference")
    decoder = tautomer.decoder(fast)
    assert not decoder.constant
    _, state = decoder.prefill(IDS[:, :5])
    logits, longer = decoder.step(IDS[:, 5], state)
    torch.testing.assert_close(logits, fast(IDS)[:, 5])
    assert longer.bytes > state.bytes


def test_tokens_are_drawn_as_the_user_says() -> None:
    decoder = tautomer.decoder(small())
    found = decoder.generate(IDS, 3, lambda logits: logits.argmin(-1))
    assert found.shape == (2, 12) and torch.equal(found[:, 9], decoder.prefill(IDS)[0][:, -1].argmin(-1))
    assert torch.equal(decoder.generate(IDS, 0), IDS)


def test_what_does_not_fit_is_one_sentence() -> None:
    decoder = tautomer.decoder(small())
    assert decoder.checked == ("1 + 2", "5 + 2", "6 + 2")
    _, state = decoder.prefill(torch.cat((IDS, IDS[:, :3]), 1))
    with pytest.raises(UsageError, match="has no position 12"):
        decoder.step(IDS[:, 0], state)
    for wrong in (IDS[:1, 0], IDS[:, :2], IDS):
        with pytest.raises(UsageError, match="a step takes one of each"):
            decoder.step(wrong, state)
    with pytest.raises(UsageError, match=r"holds torch\.float32"):
        decoder.prefill(IDS.float())
    with pytest.raises(UsageError, match="no tokens"):
        decoder.prefill(IDS[:, :0])
    with pytest.raises(UsageError, match="made from what optimize returned"):
        tautomer.decoder(Model())


def test_the_state_of_another_decoder_is_refused() -> None:
    narrow, wide = (tautomer.decoder(small(tautomer.LongContext("window", window=w)), check=False) for w in (3, 4))
    state = narrow.prefill(IDS)[1]
    for other in (wide, tautomer.decoder(small(), check=False)):
        with pytest.raises(UsageError, match="the state is of another decoder than this one of Model"):
            other.step(IDS[:, 0], state)
    assert narrow.step(IDS[:1, 0], state.rows(torch.tensor([1])))[1].position == 10


def test_a_step_is_one_graph_for_every_position() -> None:
    decoder = tautomer.decoder(small(), check=False)
    step, (_, state) = torch.compile(decoder.step, fullgraph=True, backend="eager"), decoder.prefill(IDS[:, :4])
    for at in range(4, 9):
        wanted, after = decoder.step(IDS[:, at], state)
        with torch._dynamo.config.patch(error_on_recompile=at > 6):
            logits, state = step(IDS[:, at], state)
        torch.testing.assert_close(logits, wanted)
        assert state.position == after.position and all(map(torch.equal, state.tensors, after.tensors))


class Sliced(Model):
    """Its positions are the first rows of a table."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.places.weight[: ids.shape[1]]
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.head(y.transpose(1, 2).flatten(2))
        return out


def test_the_rows_of_a_table_end() -> None:
    recipe = tautomer.LongContext("window", window=8)
    fast = tautomer.optimize(Sliced().eval(), (IDS,), recipe=recipe, check=False)
    decoder = tautomer.decoder(fast)
    assert decoder.checked == ("1 + 2", "5 + 2") and decoder.stepping.positions == 12
    assert decoder.generate(IDS, 4).shape == (2, 13)
    for beyond in (lambda: decoder.generate(IDS, 5), lambda: decoder.prefill(torch.cat((IDS, IDS[:, :4]), 1))):
        with pytest.raises(UsageError, match="has no position 12: it has 12"):
            beyond()


def test_wrong_choices_are_one_sentence() -> None:
    decoder = tautomer.decoder(small())
    with pytest.raises(UsageError, match=r"choose returns tokens of shape \[2, 1\].*one of each sample, \[2\]"):
        decoder.generate(IDS, 2, lambda logits: torch.multinomial(logits.softmax(-1), 1))
    with pytest.raises(UsageError, match="new is -1"):
        decoder.generate(IDS, -1)
    wrong: Any = [1, 2]
    with pytest.raises(UsageError, match="not list and State"):
        decoder.step(wrong, decoder.prefill(IDS)[1])


def test_the_example_of_its_docstring() -> None:
    names = {"nn": nn, "torch": torch, **{name: getattr(tautomer, name) for name in tautomer.__all__}}
    found = doctest.testmod(sys.modules["tautomer.backends.to_decoder"], extraglobs=names)
    assert found.attempted >= 3 and found.failed == 0
