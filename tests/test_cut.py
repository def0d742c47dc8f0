"""Which answers are cut: `cut="needed"` finishes late ones while the promise pays for them, and no others."""

import pytest
from test_adaptive import STAGES, asked, bounded, guard
from test_guard_constants import K
from test_runtime import QUESTION, controller, directory, picture, vlm  # noqa: F401

from budgetvlm.answer import cuts
from budgetvlm.guard.bounds import Outcome
from budgetvlm.runtime import AdaptiveVLM


@pytest.mark.parametrize(
    ("cut", "promised", "may_be_late", "expected"),
    [
        ("always", True, True, True),
        ("always", False, False, True),
        ("needed", True, True, False),  # the credit pays for one more late answer
        ("needed", True, False, True),
        ("needed", False, True, True),  # nothing was promised, so nothing pays for it
        ("needed", False, False, True),
    ],
)
def test_an_answer_is_finished_late_only_where_it_was_promised_and_the_credit_pays(
    cut, promised, may_be_late, expected
):
    assert cuts(cut, promised, may_be_late) is expected


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_where_every_answer_would_be_late_1_plus_alpha_t_are_and_the_others_are_cut(alpha):
    """After each of T promised requests at most 1 + alpha T answers were late, and no more than one fewer."""
    made, request, late = guard(alpha=alpha, hurries=False), asked(0), 0
    stages = {name: float(times[0, K]) for name, times in STAGES.items()}
    for count in range(1, 301):
        chosen = bounded(made, request, 130.0)
        cut = cuts("needed", True, made.may_be_late)
        late += not cut
        made.update(K, [chosen], Outcome(stages, 4, sum(stages.values()), not cut, cut, True))
        assert alpha * count - 1e-9 < late <= 1 + alpha * count + 1e-9


@pytest.mark.parametrize(("may_be_late", "cut"), [(True, False), (False, True)])
def test_a_request_hands_what_the_credit_says_to_its_model(vlm, picture, monkeypatch, may_be_late, cut):  # noqa: F811
    model, seen = AdaptiveVLM(vlm, controller()), []
    monkeypatch.setattr(type(model.guard), "may_be_late", property(lambda self: may_be_late))
    monkeypatch.setattr(AdaptiveVLM, "deadline", lambda self, *args, cut: seen.append(cut))
    model.generate(picture, QUESTION, budget_ms=1e6, max_new_tokens=2, cut="needed")
    model.generate(picture, QUESTION, budget_ms=1e6, max_new_tokens=2, cut="always")
    assert set(seen[:-1]) >= {cut} and seen[-1] is True
