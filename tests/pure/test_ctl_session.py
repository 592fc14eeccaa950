"""What is said to who is not let."""

from __future__ import annotations

from qkilld.ctl.session import Bus, NeedsRoot, explain
from qkilld.judgement.target import check_answer
from qkilld.model.access import Answer
from qkilld.model.errors import AccessDenied


def test_advice_is_given_once_and_only_where_it_helps() -> None:
    try:
        check_answer(Answer.CHALLENGE, "Process 7 is")
    except AccessDenied as error:
        text = explain(error, Bus())
    assert text.count("administrator") == 1
    assert "as root" in text and "polkit" in text
    assert explain(NeedsRoot("run this as root"), Bus()) == "run this as root"
