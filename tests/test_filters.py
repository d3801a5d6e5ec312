"""Logit filters: the public code's stored results, and what must hold for any logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddfast.errors import UserError
from ddfast.flow import LogitFilter, filter_logits


@pytest.mark.golden("logits_filter*")
@pytest.mark.parametrize("rule", ["var", "llamagen"])
def test_matches_public_code(golden: Any, rule: str) -> None:
    compared = 0
    for params in golden.config["params"]:
        f = LogitFilter(params["temperature"], params["top_k"], params["top_p"], rule)
        before = golden["in.logits"].clone()
        got = filter_logits(golden["in.logits"], f)
        assert torch.equal(golden["in.logits"], before), "the input was modified"
        name = f"out.{rule}.{params['index']}"
        keep, clear = golden[f"{name}.keep"].bool(), golden[f"{name}.ambiguous"] == 0
        assert torch.equal((got > -torch.inf)[clear], keep[clear]), params
        counts = (got > -torch.inf).sum(1), keep.sum(1)
        assert bool(((counts[0] - counts[1])[_tied(golden)].abs() <= 1).all()), params
        torch.testing.assert_close(
            got.softmax(-1)[clear],
            golden[f"{name}.probs"][clear],
            rtol=golden.config["rtol"],
            atol=golden.config["atol"],
        )
        compared += int(clear.sum())
    assert compared > 0


def _tied(golden: Any) -> torch.Tensor:
    """Rows whose cut can only fall inside a tie: the public float32 sums may land one entry to either side."""
    return torch.tensor([kind in ("all_equal", "two_equal_dominant_tokens") for kind in golden.config["row_kinds"]])


def test_ties_at_the_top_p_cut_keep_the_lower_index() -> None:
    logits = torch.zeros(1, 8)
    assert filter_logits(logits, LogitFilter(top_p=0.5, rule="var"))[0].isfinite().tolist() == [True] * 4 + [False] * 4
    kept = filter_logits(logits, LogitFilter(top_p=0.49, rule="llamagen"))[0].isfinite().tolist()
    assert kept == [True] * 4 + [False] * 4


def test_ties_with_the_kth_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    for rule in ("var", "llamagen"):
        kept = filter_logits(logits, LogitFilter(top_k=2, rule=rule)).isfinite()
        assert kept.tolist() == [[True, False, True, True, True, False]]


def test_edge_values_of_each_rule() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    everything = [[True, True, True]]
    assert filter_logits(logits, LogitFilter(top_p=0.0, rule="var")).isfinite().tolist() == everything
    assert filter_logits(logits, LogitFilter(top_p=1.0, rule="llamagen")).isfinite().tolist() == everything
    assert filter_logits(logits, LogitFilter(top_p=0.0, rule="llamagen")).isfinite().tolist() == [[False, True, False]]
    assert filter_logits(logits, LogitFilter(top_k=99, rule="llamagen")).isfinite().tolist() == everything
    with pytest.raises(UserError, match="top_k=4 .*vocabulary of 3"):
        filter_logits(logits, LogitFilter(top_k=4, rule="var"))
    cold = filter_logits(logits, LogitFilter(temperature=1e-9, rule="llamagen"))
    torch.testing.assert_close(cold, logits / 1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0, not 0.0"),
        ({"temperature": math.inf}, "temperature .* not inf"),
        ({"temperature": math.nan}, "temperature .* not nan"),
        ({"top_k": -1}, "top_k must be a whole number >= 0, not -1"),
        ({"top_k": 2.5}, "top_k .* not 2.5"),
        ({"top_k": True}, "top_k .* not True"),
        ({"top_p": 1.01}, r"top_p must lie in \[0, 1\], not 1.01"),
        ({"top_p": math.nan}, "top_p .* not nan"),
        ({"top_p": "0.9"}, "top_p .* not '0.9'"),
        ({"rule": "gpt"}, "rule 'gpt' does not exist: use one of var, llamagen"),
    ],
)
def test_bad_settings_name_value_and_fix(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LogitFilter(**values)


def test_half_precision_is_refused_and_float64_kept() -> None:
    with pytest.raises(UserError, match="bfloat16"):
        filter_logits(torch.zeros(1, 4, dtype=torch.bfloat16), LogitFilter())
    assert filter_logits(torch.zeros(1, 4, dtype=torch.float64), LogitFilter(top_p=0.3)).dtype == torch.float64


def test_dict_round_trip() -> None:
    f = LogitFilter(0.7, 900, 0.95, "llamagen")
    assert LogitFilter(**f.to_dict()) == f  # type: ignore[arg-type]


# Logits on a grid of eighths: sums are exact, so equality below is not a matter of rounding.
_logits = st.lists(
    st.one_of(st.integers(-64, 64).map(lambda i: i / 8), st.just(-math.inf)), min_size=2, max_size=40
).filter(lambda row: max(row) > -math.inf)
_rules = st.sampled_from(["var", "llamagen"])


@settings(max_examples=150, deadline=None)
@given(_logits, _rules, st.integers(0, 40), st.floats(0.01, 0.99))
def test_kept_set(row: list[float], rule: str, k: int, top_p: float) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    k = min(k, len(row))
    f = LogitFilter(top_k=k, top_p=top_p, rule=rule)
    out = filter_logits(logits, f)
    kept = out[0] > -torch.inf
    after_k = filter_logits(logits, LogitFilter(top_k=k, rule=rule))
    p = after_k.softmax(-1)[0]
    assert bool(kept[logits[0].argmax()] | (logits[0] == logits.max())[kept].any())  # a largest one survives
    assert not bool(kept[logits[0] == -torch.inf].any())  # what was impossible stays so
    assert torch.equal(out[0][kept], logits[0][kept])  # the rest is not touched
    assert float(p[kept].sum()) >= top_p - 1e-9  # enough mass is kept,
    smallest = p[kept].min()
    assert float(p[kept].sum() - smallest) <= top_p + 1e-9  # and no more than needed
    assert bool((p[~kept] <= smallest).all())  # from the top down


@settings(max_examples=100, deadline=None)
@given(_logits, _rules, st.integers(1, 40), st.floats(0.01, 0.98), st.floats(0.0, 0.01), st.integers(-8, 8))
def test_nesting_shift_and_idempotence(row: list[float], rule: str, k: int, p: float, more: float, shift: int) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    k = min(k, len(row))

    def kept(x: torch.Tensor, **values: Any) -> torch.Tensor:
        return filter_logits(x, LogitFilter(rule=rule, **values)) > -torch.inf

    narrow, wide = kept(logits, top_p=p), kept(logits, top_p=p + more)
    assert bool((wide | ~narrow).all())
    assert bool((kept(logits, top_k=min(k + 1, len(row))) | ~kept(logits, top_k=k)).all())
    assert torch.equal(kept(logits + shift, top_k=k), kept(logits, top_k=k))
    once = filter_logits(logits, LogitFilter(top_k=k, rule=rule))
    assert torch.equal(filter_logits(once, LogitFilter(top_k=k, rule=rule)), once)
