"""Checks of what the recipe rests on. Needs no corpus: `python -m pytest`, or `python test_recipe.py`."""

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import synthetic
from evaluate import information
from loss import FOCUS_WEIGHT, MTP_WEIGHT, training_loss
from model import Model, Shape, focus, slots
from optimiser import WARM_UP_TOKENS, Schedule, orthogonal
from sources import chunks, plain_text
from weights import dequantise, load_checkpoint, quantise, to_checkpoint

CONFIG = Path(__file__).with_name("config.json")


def small_model(seed: int) -> Model:
    shape = dataclasses.replace(
        Shape.read(CONFIG), vocab_size=96, hidden_size=32, intermediate_size=48, n_routed_experts=8
    )
    model = Model(shape)
    model.initialise(seed)
    return model


def test_loss_is_cross_entropy_less_focus_with_its_gradients() -> None:
    model, ids = small_model(3), torch.randint(96, (2, 14), generator=torch.Generator().manual_seed(0))
    loss, nats, _ = training_loss(model, ids)
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}

    model.zero_grad()
    hidden, routings = model.trunk(ids[:, :-2])
    drafted, routing = model.draft(hidden, ids[:, 1:-1])
    focused = sum(layer.focus for layer in [*routings, routing])
    trunk = F.cross_entropy(model.logits(hidden).flatten(0, 1), ids[:, 1:-1].flatten())
    module = F.cross_entropy(model.logits(drafted).flatten(0, 1), ids[:, 2:].flatten())
    expected = trunk + MTP_WEIGHT * module - FOCUS_WEIGHT * focused
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nats, torch.stack([trunk, module]))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_experts_in_slots_equal_experts_one_by_one() -> None:
    moe, x = small_model(4).layers[1].mlp, torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0))
    out, routing = moe(x)
    ids, weights, _ = moe.gate(x[0])
    assert routing.load.sum() == ids.numel()
    for token, row in enumerate(x[0]):
        expected = moe.shared_experts(row)
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up, down = (m[expert] for m in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
            expected = expected + weight * (down @ (F.silu(gate @ row) * (up @ row)))
        torch.testing.assert_close(out[0, token], expected, rtol=1e-4, atol=1e-6)


def test_focus_of_a_window() -> None:
    spread, one = torch.arange(8).view(1, 4, 2), torch.tensor([3, 5]).expand(1, 4, 2)
    scores = torch.zeros(1, 4, 8).scatter(2, one, 1.0)
    alike = torch.full((1, 4, 8), 0.5)
    assert [focus(*pair).item() for pair in ((spread, alike), (one, alike), (one, scores))] == [1, 1, 4]
    both = focus(torch.cat([spread, one]), torch.cat([alike, scores]))
    assert both.item() == 2.5


def test_slots_of_an_expert_are_its_own() -> None:
    ids = torch.tensor([[0, 2], [2, 3], [2, 0]])
    token, slot, ends = slots(ids, torch.bincount(ids.flatten(), minlength=4))
    assert ends.tolist() == [64, 64, 128, 192]
    assert token[slot].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (slot // 64).tolist() == [[0, 1], [1, 2], [1, 0]]


def test_future_tokens_change_nothing_before_them() -> None:
    model, ids = small_model(5), torch.arange(20).view(1, -1)
    changed = ids.clone()
    changed[0, 12] = 90
    first, second = model.trunk(ids)[0], model.trunk(changed)[0]
    torch.testing.assert_close(first[:, :12], second[:, :12], rtol=0, atol=0)
    assert not torch.equal(first[:, 12], second[:, 12])


def test_checkpoint_names_and_back() -> None:
    model, other = small_model(1), small_model(2)
    tensors = {name: tensor.clone() for name, tensor in to_checkpoint(model).items()}
    for name in (
        "model.layers.1.mlp.experts.7.down_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.4.shared_head.norm.weight",
        "model.layers.4.eh_proj.weight",
    ):
        assert name in tensors
    load_checkpoint(other, tensors)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_fp8_blocks_with_partial_edges() -> None:
    matrix = torch.randn(200, 130, generator=torch.Generator().manual_seed(0))
    matrix[150:, :] *= 100
    codes, scales = quantise(matrix)
    assert codes.shape == matrix.shape and scales.shape == (2, 2)
    error = (dequantise(codes, scales) - matrix).abs()
    largest = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    assert (error <= torch.maximum(matrix.abs() / 16, largest / 512)).all()  # three bits of mantissa


def test_orthogonal_keeps_directions_and_levels_lengths() -> None:
    matrix = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert 0.7 < values.min() and values.max() < 1.3
    assert ((orthogonal(matrix) * matrix).sum((1, 2)) > 0).all()


def test_schedule() -> None:
    assert (
        Schedule().factor(0) < 1e-5 and Schedule().factor(10 * WARM_UP_TOKENS) == 1 and not Schedule().finished(10**12)
    )
    cooling = Schedule(decay_from=5_000_000, decay_tokens=1_000_000)
    assert cooling.factor(5_000_000) == 1 and cooling.factor(5_250_000) == 0.5 and cooling.factor(6_000_000) == 0
    assert cooling.finished(6_000_000) and not cooling.finished(5_999_999)


def test_information_of_a_certain_and_of_no_choice() -> None:
    assert abs(information(torch.eye(4, dtype=torch.float64)) - 2) < 1e-9
    assert information(torch.full((4, 8), 1 / 8, dtype=torch.float64)) == 0


def test_sums_are_right_and_held_out_ones_absent() -> None:
    dice = synthetic.Dice(1)
    lines = [line for _ in range(200) for line in synthetic.math_document(dice).split()]
    held = sum(synthetic.held_out(a, b) for a in range(10, 100) for b in range(10, 100))
    assert 700 < held < 920
    for line in lines:
        question, answer = line.split("=")
        (sign,) = set(question) & set("+-*")
        a, b = (int(number) for number in question.split(sign))
        assert {"+": a + b, "-": a - b, "*": a * b}[sign] == int(answer), line
        assert sign != "+" or not synthetic.held_out(a, b), line


def test_a_request_determines_its_record() -> None:
    question, answer = synthetic.record_request(synthetic.Dice(0), "Ada Moreno", "writer")
    record = json.loads(answer)
    assert "Ada Moreno, writer" in question and record["role"] == "writer"
    assert record["email"] == "ada.moreno@example.com"
    assert ("address" in record) == (" in " in question)


def test_text_of_markup() -> None:
    osis = '<chapter osisID="Gen.1"/><title>x</title>In the beginning<note n="1">y</note> , God &amp; “light”.¶'
    assert plain_text(osis) == 'In the beginning, God & "light".'
    assert chunks("a" * 300 + "\n\n" + "b" * 50, 200) == ["a" * 300]


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(name, "ok")
