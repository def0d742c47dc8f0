"""A request hands to its model whether its answer is cut; the rule itself and its credit: `test_calibration.py`."""

import pytest
from test_runtime import QUESTION, controller, directory, picture, vlm  # noqa: F401

from budgetvlm.runtime import AdaptiveVLM


@pytest.mark.parametrize(("may_be_late", "cut"), [(True, False), (False, True)])
def test_a_request_hands_what_the_credit_says_to_its_model(vlm, picture, monkeypatch, may_be_late, cut):  # noqa: F811
    model, seen = AdaptiveVLM(vlm, controller()), []
    monkeypatch.setattr(type(model.guard), "may_be_late", property(lambda self: may_be_late))
    monkeypatch.setattr("budgetvlm.answer.deadline_of", lambda *args, cut: seen.append(cut))
    model.generate(picture, QUESTION, budget_ms=1e6, max_new_tokens=2, cut="needed")
    model.generate(picture, QUESTION, budget_ms=1e6, max_new_tokens=2, cut="always")
    assert set(seen[:-1]) >= {cut} and seen[-1] is True
